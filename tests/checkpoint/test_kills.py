"""SIGKILL at random moments: no completed checkpoint is lost, no torn one accepted, and the end is bit for bit the undisturbed one."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from autopar.checkpoint.folder import MANIFEST, PARTIAL, checkpoints
from autopar.checkpoint.manifest import Manifest
from autopar.checkpoint.reader import Reader
from autopar.runtime.launch import launch

ROOT = Path(__file__).parents[2]
PATIENCE_S = 120.0
MAX_SAVES = 8
"""A rank is killed after at most so many steps, so that the run does not end before the kills do."""


def content(folder: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """All that the newest checkpoint holds."""
    path = checkpoints(folder)[0]
    manifest = Manifest.load(path / MANIFEST)
    with Reader(path, manifest.tensors) as reader:
        return manifest.values, {key: reader.read(key) for key in manifest.tensors}


def same(a: Path, b: Path) -> bool:
    (values, tensors), (others, other_tensors) = content(a), content(b)
    return values == others and tensors.keys() == other_tensors.keys() and all(torch.equal(x, other_tensors[key]) for key, x in tensors.items())


def newest(folder: Path) -> int:
    """The number of the newest checkpoint; 0 if there is none."""
    return max((int(path.name.rpartition("-")[2]) for path in checkpoints(folder)), default=0)


def saving(folder: Path) -> bool:
    return any(name.endswith(PARTIAL) for name in os.listdir(folder))


class Killer:
    """Kills ranks of a run that is going on in a folder."""

    def __init__(self, folder: Path, run: subprocess.Popen, rng: random.Random) -> None:
        self.folder, self.run, self.rng = folder, run, rng
        self.completed: list[int] = []  # the newest checkpoint at each kill
        self.during_a_save = 0

    def wait(self, event: Callable[[], bool], patience_s: float = PATIENCE_S) -> bool:
        """Whether the event came in time; fails if the run ends."""
        deadline = time.monotonic() + patience_s
        while not event():
            assert self.run.poll() is None, f"the run ended with {self.run.returncode} after {len(self.completed)} kills"
            if time.monotonic() > deadline:
                return False
            time.sleep(0.002)
        return True

    def kill(self, life: int) -> None:
        """One rank of this life, at a random moment: of all its life, or of a save."""
        marks = [self.folder / "ranks" / str(life) / str(rank) for rank in range(2)]
        assert self.wait(lambda: all(mark.exists() for mark in marks)), f"the ranks did not start for the {life}th time"
        first, saves = newest(self.folder), self.rng.randrange(MAX_SAVES)
        if self.rng.random() < 0.5:
            self.wait(lambda: newest(self.folder) - first >= saves, self.rng.uniform(0, 2))
        else:
            assert self.wait(lambda: newest(self.folder) - first >= saves and saving(self.folder)), "nothing was saved"
            time.sleep(self.rng.uniform(0, 0.01))
        self.completed.append(newest(self.folder))
        os.kill(int(self.rng.choice(marks).read_text()), signal.SIGKILL)
        self.during_a_save += saving(self.folder)


@pytest.mark.gloo
@pytest.mark.timeout(3600)
def test_kills_at_random_moments(tmp_path: Path, kills: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples")
    import resume  # type: ignore[import-not-found]  # a script, not a module of the package

    steps = (MAX_SAVES + 2) * kills
    command = [sys.executable, str(ROOT / "tests" / "checkpoint" / "elastic.py"), str(tmp_path / "killed"), str(steps), str(kills + 1)]
    (tmp_path / "killed").mkdir()
    with (tmp_path / "log").open("w") as log:
        path = os.pathsep.join(map(str, (ROOT, ROOT / "examples", ROOT / "tests" / "checkpoint")))
        run = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path})
    try:
        killer = Killer(tmp_path / "killed", run, random.Random(kills))
        for life in range(kills):
            killer.kill(life)
        assert run.wait(600) == 0, (tmp_path / "log").read_text()[-4000:]
    finally:
        run.terminate()
    starts = [int(step) for step in re.findall(r"step +(\d+)  starting here", (tmp_path / "log").read_text())]
    assert starts and starts == sorted(starts)
    assert newest(tmp_path / "killed") == steps  # one a step, none skipped, none twice
    assert killer.during_a_save >= kills // 10
    assert not saving(tmp_path / "killed")
    launch(resume.train, 2, resume.Settings(str(tmp_path / "calm"), steps, every=steps))
    assert same(tmp_path / "killed", tmp_path / "calm")
