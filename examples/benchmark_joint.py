"""What the joint search takes for the models and clusters that planners are measured on: seconds from the command line's start to the plan, memory, and gap.

    python examples/benchmark_joint.py [--only 8b]

Every case runs in a process of its own, as `autopar plan` does: imports, building the model without weights, tracing, search, plan.
Beside it what others need to plan, not measured by this script: Galvatron 118 CPU s for 70B on 64 GPUs at one number of microbatches, and Calculon 29 ms a
candidate, about 9 CPU h for its default space (both measured elsewhere on two cores); Aceso's 200 s without a bound (its search budget, EuroSys 2024);
Meta AutoParallel 198 s for 8B on one given mesh (trace 30, build 88, solve 80: its own report).
"""

import glob
import json
import os
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

CASES = {
    "405b": ("llama-3.1-405b", "h100-sxm:2048", 2048, 8192),
    "175b": ("gpt3-175b", "a100-sxm:128", 1536, 2048),
    "70b": ("llama-3.1-70b", "h100-sxm:32", 1024, 8192),
    "8b": ("llama-3.1-8b", "h100-sxm:1", 64, 8192),
    "bert": ("bert-large", "a100-sxm:1x4", 256, 512),
}
LIMITS = {"405b": (30.0, 4.0)}
LIMIT = (15.0, 4.0)
LOOK_S = 0.2


def planned(model: str, cluster: str, batch: int, seq: int) -> dict:
    """One case in a process of its own, with wall and CPU seconds and the peak memory in GiB, of it and the helpers that its search forks."""
    command = [sys.executable, "-m", "autopar", "plan", model, "--cluster", cluster, "--batch", str(batch), "--seq", str(seq), "--joint", "--json"]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    most, ended = [0.0], threading.Event()
    watch = threading.Thread(target=lambda: _watch(process.pid, most, ended))
    watch.start()
    text = process.stdout.read() if process.stdout else ""
    _, status, used = os.wait4(process.pid, 0)
    ended.set()
    watch.join()
    if os.waitstatus_to_exitcode(status) not in (0, 4):
        raise SystemExit(f"{' '.join(command[1:])} failed")
    return json.loads(text) | {"wall_s": time.perf_counter() - start, "cpu_s": used.ru_utime + used.ru_stime, "gib": max(most[0], used.ru_maxrss / 2**20)}


def _watch(session: int, most: list[float], ended: threading.Event) -> None:
    """The most GiB that the processes of a session held at once, what they share counted once. Only where there is /proc."""
    while not ended.wait(LOOK_S):
        most[0] = max(most[0], sum(_gib(Path(entry)) for entry in glob.glob("/proc/[0-9]*") if _session(Path(entry)) == session))


def _session(process: Path) -> int:
    with suppress(OSError):
        return int((process / "stat").read_text().rpartition(")")[2].split()[3])
    return -1


def _gib(process: Path) -> float:
    with suppress(OSError):
        for line in (process / "smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) / 2**20
    return 0.0


def main(only: Annotated[str | None, typer.Option(help=f"One of {', '.join(CASES)}.")] = None) -> None:
    """Print the table."""
    table = Table("model", "cluster", "wall", "cpu", "of it search", "memory", "gap", "step", "MFU", "plan", "within", box=None)
    for name, (model, cluster, batch, seq) in CASES.items():
        if only not in (None, name):
            continue
        found = planned(model, cluster, batch, seq)
        print(f"{name}: {found['wall_s']:.1f} s", file=sys.stderr)
        seconds, gib = LIMITS.get(name, LIMIT)
        within = found["wall_s"] <= seconds and found["gib"] <= gib and found["seconds"]["search"] <= 10.0
        table.add_row(
            model, cluster, f"{found['wall_s']:.1f} s", f"{found['cpu_s']:.1f} s", f"{found['seconds']['search']:.1f} s", f"{found['gib']:.2f} GiB",
            f"{found['proof']['gap']:.2%}", f"{found['predicted']['step_time_s']:.2f} s", f"{found['predicted']['mfu']:.1%}", found["layout"], "yes" if within else "no",
        )  # fmt: skip
    Console(width=None if sys.stdout.isatty() else 220).print(table)


if __name__ == "__main__":
    typer.run(main)
