"""Real processes: they compute together, and they go together."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from autopar.errors import AutoparError, UsageError
from autopar.runtime.launch import RankFailure, launch
from tests.cli import ranks

pytestmark = pytest.mark.gloo

ROOT = Path(__file__).parents[2]
IMPORTS = "from autopar.runtime.launch import launch; from tests.cli import ranks"
LAUNCHER = f"{IMPORTS}; launch(ranks.wait_for_ever, 3, on_message=lambda pid: print(pid, flush=True))"
HEARING = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
"""What a shell starts in its background ignores interrupts, and so do its children."""
TORN_DOWN_S = 10.0


def test_messages_come_from_every_rank() -> None:
    found: list[tuple[int, float, int]] = []
    launch(ranks.count, 3, 5, on_message=found.append)
    assert sorted(found) == [(rank, 15.0, 1) for rank in range(3)]


@pytest.mark.parametrize(
    "function,error,words",
    [
        (ranks.fail_on_one, RankFailure, "rank 2 of 3 failed: ValueError: two lines"),
        (ranks.killed, RankFailure, "rank 1 of 3 was killed by signal 9"),
        (ranks.leave, RankFailure, "rank 1 of 3 ended with exit code 3"),
        (ranks.refuse_on_all, UsageError, "use it otherwise"),
    ],
)
def test_one_error_names_the_rank(function: Callable[..., None], error: type[AutoparError], words: str) -> None:
    start = time.monotonic()
    with pytest.raises(error) as caught:
        launch(function, 3)
    assert str(caught.value).startswith(words) and "\n" not in str(caught.value)
    assert time.monotonic() - start < TORN_DOWN_S


def test_rank_that_hangs_is_named() -> None:
    with pytest.raises(RankFailure, match="^rank 1 of 3 did not come to where the others waited"):
        launch(ranks.stop, 3, timeout_s=2.0)


def test_too_many_processes() -> None:
    with pytest.raises(RankFailure, match="1 to 256"):
        launch(ranks.count, 0, 1)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc")
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_no_process_outlives_the_parent(end: signal.Signals) -> None:
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True, "cwd": ROOT}
    parent = subprocess.Popen([sys.executable, "-c", f"{HEARING}; {LAUNCHER}"], env=os.environ | {"PYTHONPATH": str(ROOT)}, **options)
    assert parent.stdout is not None
    pids = [int(parent.stdout.readline()) for _ in range(3)]
    parent.send_signal(end)
    parent.wait(TORN_DOWN_S)
    deadline = time.monotonic() + TORN_DOWN_S
    while any(_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    left = [pid for pid in pids if _alive(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


def test_under_torchrun_the_function_runs_here() -> None:
    code = f"{IMPORTS}; launch(ranks.count, 9, 7, on_message=print)"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=60)
    assert done.stdout == "(0, 7.0, 1)\n", done.stderr


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc")
def test_under_torchrun_no_thread_of_gloo_stays(tmp_path: Path) -> None:
    """One that still lets go of a tensor while the interpreter ends would abort the process."""
    script = tmp_path / "ranks.py"
    script.write_text(
        f"import os, sys; from autopar.runtime.launch import launch; sys.path.insert(0, {str(ROOT / 'examples')!r}); import resume\n"
        f"launch(resume.train, 2, resume.Settings({str(tmp_path / 'checkpoints')!r}, steps=2, every=2))\n"
        "names = sorted(open(f'/proc/self/task/{task}/comm').read().strip() for task in os.listdir('/proc/self/task'))\n"
        f"open(os.path.join({str(tmp_path)!r}, os.environ['RANK']), 'w').write(str([name for name in names if 'gloo' in name]))\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["[]", "[]"]
