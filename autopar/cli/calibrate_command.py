"""`autopar calibrate`: a cluster file of this machine, measured."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autopar.cli.console import output, print_json
from autopar.cli.options import Debug, Json
from autopar.errors import UsageError

if TYPE_CHECKING:
    from autopar.profiler.calibrate import Calibration, Progress

MOST_PROCESSES = 64

Processes = Annotated[int, typer.Option("--processes", "-n", min=1, max=MOST_PROCESSES, help="Processes of this machine that will train together.")]
OutFile = Annotated[Path, typer.Option("--out", "-o", help="Write the cluster to this TOML file.")]
CacheFile = Annotated[Path | None, typer.Option("--cache", help="Remember measurements here. [default: measurements.json in the user's cache folder]")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Measure everything anew.")]


def calibrate(processes: Processes = 4, out: OutFile = Path("machine.toml"), cache: CacheFile = None, fresh: Fresh = False, json: Json = False, debug: Debug = False) -> None:
    """Measure what processes of this machine do, all at once, and write it as a cluster file. Takes a minute or two on a quiet machine."""
    if out.suffix != ".toml" or out.is_dir() or not out.absolute().parent.is_dir():
        raise UsageError(f"--out {out}: give the path of a .toml file in a folder that exists, such as machine.toml")
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        raise UsageError("calibrate starts its processes itself; call it without torchrun")
    from autopar.profiler.calibrate import calibrate as measured
    from autopar.profiler.calibrate import write
    from autopar.profiler.tasks import Cache, device_name

    remembered = Cache(cache or _cache_folder() / "measurements.json", f"{device_name()}, {processes} processes")
    if fresh:
        remembered.forget()
    with _bar() as progress:
        found = measured(processes, cache=remembered, progress=progress)
    write(found, out)
    if json:
        print_json(_content(found, out))
    else:
        _print(found, out)


def _cache_folder() -> Path:
    """Where this user's programs keep what they can make again (XDG base directories)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "autopar"


@contextlib.contextmanager
def _bar() -> Iterator["Progress"]:
    """How far the measuring is, on stderr and only if that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda task, done, total: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        row = bar.add_task("measuring", total=None)
        yield lambda task, done, total: bar.update(row, description=task.key, completed=done, total=total)


def _print(found: "Calibration", out: Path) -> None:
    from rich.table import Table

    table = Table("FITTED", "POINTS", "R^2", box=None, pad_edge=False)
    for name, fit in found.fits:
        table.add_row(name, str(fit.num_points), f"{fit.r2:.3f}")
    page = output()
    page.print(table)
    page.print(f"{found.cluster}")
    page.print(f"written to {out}; next: autopar plan MODEL --cluster {out} --pipelines", style="dim")


def _content(found: "Calibration", out: Path) -> dict[str, object]:
    return {
        "out": str(out),
        "cluster": found.cluster.name,
        "fits": {name: {"points": fit.num_points, "r2": fit.r2, "prices": list(fit.prices)} for name, fit in found.fits},
        "seconds": {task.key: seconds for task, seconds in found.seconds.items()},
    }
