"""The resume example under the real `torchrun`: a rank is killed, it restarts all, and the end is that of an undisturbed run."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from autopar.checkpoint.folder import MANIFEST, checkpoints
from autopar.checkpoint.manifest import Manifest
from autopar.checkpoint.reader import Reader
from autopar.runtime.launch import launch

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "resume.py"
STEPS = 400


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    path = checkpoints(folder)[0]
    manifest = Manifest.load(path / MANIFEST)
    with Reader(path, manifest.tensors) as reader:
        return {key: reader.read(key) for key in manifest.tensors}


def start(command: list[str], log: Path) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with log.open("w") as stream:
        return subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=environment)


def ranks_of(process: subprocess.Popen) -> list[int]:
    """The process numbers of torchrun's ranks."""
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


@pytest.mark.gloo
@pytest.mark.skipif(sys.platform != "linux", reason="finds the ranks through /proc")
def test_torchrun_restarts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import resume  # type: ignore[import-not-found]  # a script, not a module of the package

    killed, calm, log = tmp_path / "killed", tmp_path / "calm", tmp_path / "log"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    run = start([*torchrun, str(SCRIPT), str(killed), "--steps", str(STEPS), "--every", "2"], log)
    try:
        while len(checkpoints(killed)) < 2:
            assert run.poll() is None, log.read_text()[-3000:]
            time.sleep(0.01)
        os.kill(ranks_of(run)[1], signal.SIGKILL)
        assert run.wait(300) == 0, log.read_text()[-3000:]
    finally:
        run.terminate()
    starts = [int(step) for step in re.findall(r"step +(\d+)  starting here", log.read_text())]
    assert len(starts) == 2 and 0 == starts[0] < starts[1] < STEPS
    launch(resume.train, 2, resume.Settings(str(calm), STEPS, every=STEPS))
    found, want = tensors(killed), tensors(calm)
    assert found.keys() == want.keys() and all(torch.equal(x, want[key]) for key, x in found.items())
