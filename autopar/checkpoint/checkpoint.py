"""Save and load a training run. A checkpoint is complete or it is not there, and it does not depend on the plan."""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autopar.checkpoint.folder import MANIFEST, begin, check_files, checkpoints, commit, prune, write_rank
from autopar.checkpoint.manifest import Manifest
from autopar.checkpoint.peers import Peers
from autopar.checkpoint.reader import Reader
from autopar.checkpoint.state import TrainingState
from autopar.errors import CheckpointError

KEEP = 2


def save_checkpoint(folder: str | Path, module: nn.Module, optimizer: torch.optim.Optimizer | None = None, state: Any = None, *, keep: int = KEEP) -> Path:
    """Add a checkpoint to a folder that all ranks share, and remove all but the `keep` newest; returns its path.

    Every rank calls this; each writes its parts of parameters, buffers, gradients that are there and optimizer state. `state` is
    whatever else the run must remember (step, data position, loss scale, scheduler), the same on all ranks: numbers, text, lists,
    dicts and tensors. When this returns, the checkpoint is on the disk. A process killed before leaves what was there before.
    Raises CheckpointError, on all ranks alike.
    """
    peers, folder = Peers.here(), Path(folder)
    if keep < 1:
        raise CheckpointError(f"keep={keep} would remove the checkpoint that is being saved; keep 1 or more")
    stage = Path(peers.on_first(lambda: str(begin(folder))))
    with peers.together():
        values, tensors = TrainingState(module, optimizer, peers).encode(state)
        write_rank(stage, peers.rank, values, tensors)
    path = Path(peers.on_first(lambda: str(commit(stage, peers.num_ranks))))
    if peers.rank == 0:
        prune(folder, keep)
    return path


def load_checkpoint(folder: str | Path, module: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Any:
    """Continue from the newest whole checkpoint of a folder; returns the `state` it was saved with, None if there is no checkpoint.

    Every rank calls this and reads its parts only. Module and optimizer are overwritten; they must be those that were
    saved, under any plan, on any number of ranks. Without an optimizer the module alone is loaded. A checkpoint whose
    files are not what was written is passed over with a warning. Raises CheckpointError, on all ranks alike.
    """
    peers, folder = Peers.here(), Path(folder)
    names = json.loads(peers.on_first(lambda: json.dumps([path.name for path in checkpoints(folder)])))
    for name in names:
        try:
            with peers.together():
                manifest = Manifest.load(folder / name / MANIFEST)
                turn = sorted(manifest.files)[peers.rank :: peers.num_ranks]  # together the ranks check every file, once
                check_files(folder / name, {file: manifest.files[file] for file in turn})
        except CheckpointError as error:
            warnings.warn(f"checkpoint passed over: {error}", stacklevel=2)
            continue
        return _restore(folder / name, manifest, TrainingState(module, optimizer, peers), peers)
    if names:
        raise CheckpointError(f"{folder}: none of the {len(names)} checkpoints is whole; remove them to start anew")
    return None


def _restore(path: Path, manifest: Manifest, target: TrainingState, peers: Peers) -> Any:
    with Reader(path, manifest.tensors) as reader:
        with peers.together():
            target.check(manifest.values, reader)
        unused = [set(json.loads(text)) for text in peers.gather(json.dumps(sorted(target.unused(manifest.values))))]
        left = sorted(set.intersection(*unused))
        if left:
            raise CheckpointError(f"{path}: no rank has the saved parameter {left[0]} ({len(left)} in all); load it into the model it was saved from")
        state = None
        with peers.together():
            state = target.restore(manifest.values, reader)
        return state
