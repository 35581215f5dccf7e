"""A folder of checkpoints: how one comes into being at once or not at all, and which ones there are.

    checkpoint-00000007/                     committed: manifest.json and the files it lists
    checkpoint-00000008.4f1c22a0.partial/    being written, or left by a process that was killed

Ranks write data and a record each into the `.partial` folder, and flush both to the disk. Then rank 0 merges the records into
the manifest and renames the folder: that is the commit. Numbers only grow, so a commit never replaces anything; a run that went
back to an older checkpoint continues behind the newest, not over it. Removal is a rename to `.partial` first, so
that a half-removed folder is never taken for a checkpoint.
"""

import hashlib
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from autopar.checkpoint.held import Held
from autopar.checkpoint.manifest import DataFile, Manifest, TensorEntry
from autopar.checkpoint.reader import DTYPES, dtype_name
from autopar.errors import FileFormatError, UsageError

COMMITTED = re.compile(r"checkpoint-([0-9]{8,12})")
PARTIAL = ".partial"
MANIFEST = "manifest.json"


def checkpoints(folder: Path) -> list[Path]:
    """The committed checkpoints, newest first; none where there is no such folder."""
    found = [path for path in folder.iterdir() if COMMITTED.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=_number, reverse=True)


def _number(path: Path) -> int:
    match = COMMITTED.fullmatch(path.name)
    return int(match[1]) if match else -1


def begin(folder: Path) -> Path:
    """An empty `.partial` folder for the next number; those of runs that ended are removed. Rank 0 calls this.

    Its name is like no other's, so a process of an earlier attempt that should still be alive cannot write into it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob(f"*{PARTIAL}"):
        shutil.rmtree(stale, ignore_errors=True)
    number = max(map(_number, checkpoints(folder)), default=0) + 1
    stage = folder / f"checkpoint-{number:08d}.{secrets.token_hex(8)}{PARTIAL}"
    stage.mkdir()
    return stage


def write_rank(stage: Path, rank: int, values: Mapping[str, Any], tensors: Mapping[str, Held]) -> None:
    """What one rank adds: its share of the tensors, each replicated one written by one replica, and a record of it. Flushed to the disk."""
    for key, held in tensors.items():
        if dtype_name(held.local.dtype) not in DTYPES:
            raise UsageError(f"{key} is {held.local.dtype}, which safetensors cannot store; leave it out of the state")
    writers = _writers(tensors)
    mine = {key: held for key, held in tensors.items() if writers.get(key) == held.replicas.number and held.local.numel()}
    name = f"rank-{rank:05d}.safetensors"
    entries = {key: TensorEntry(held.shape, dtype_name(held.local.dtype), ((name, held.part),) if key in mine else ()) for key, held in tensors.items()}
    file = write_tensors(stage / name, {key: held.local for key, held in mine.items()})
    _write_json(_record(stage, rank), Manifest({name: file}, entries, values))


def _writers(tensors: Mapping[str, Held]) -> dict[str, int]:
    """Which replica writes each tensor: the one with the least to write so far. By size of the whole, which is the same on all replicas."""
    found: dict[str, int] = {}
    loads: dict[int, list[int]] = {}
    for key, held in tensors.items():
        if held.elsewhere:
            continue
        load = loads.setdefault(held.replicas.count, [0] * held.replicas.count)
        found[key] = load.index(min(load))
        load[found[key]] += math.prod(held.shape) * held.local.itemsize
    return found


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> DataFile:
    """A safetensors file, flushed to the disk, and what it must be when it is read."""
    save_file({key: x.detach().cpu().contiguous() for key, x in tensors.items()}, path, metadata={"format": "pt"})
    flush(path)
    with path.open("rb") as stream:
        return DataFile(os.path.getsize(path), hashlib.file_digest(stream, "sha256").hexdigest())


def seal(stage: Path, num_ranks: int) -> None:
    """Turn the records of all ranks into the manifest. Rank 0 calls this when all are done."""
    records = [Manifest.load(_record(stage, rank)) for rank in range(num_ranks)]
    _write_json(stage / MANIFEST, Manifest.merge(records))
    for rank in range(num_ranks):
        _record(stage, rank).unlink()
    flush(stage)


def commit(stage: Path, num_ranks: int) -> Path:
    """Make a checkpoint of what all ranks wrote; returns its path. Rank 0 calls this when all are done."""
    seal(stage, num_ranks)
    target = stage.with_name(stage.name.partition(".")[0])
    stage.rename(target)
    flush(target.parent)
    return target


def prune(folder: Path, keep: int) -> None:
    """Remove checkpoints older than the `keep` newest whole ones."""
    whole = 0
    for path in checkpoints(folder):
        if whole >= keep:
            doomed = path.with_name(f"{path.name}.{secrets.token_hex(8)}{PARTIAL}")
            path.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)
        else:
            whole += _sizes_are_right(path)


def _sizes_are_right(path: Path) -> bool:
    try:
        files = Manifest.load(path / MANIFEST).files
        return all((path / name).stat().st_size == file.num_bytes for name, file in files.items())
    except (FileFormatError, OSError):
        return False


def check_files(path: Path, files: Mapping[str, DataFile]) -> None:
    """Raise FileFormatError unless the files are those that were written, byte for byte."""
    for name, file in files.items():
        try:
            with (path / name).open("rb") as stream:
                size = os.fstat(stream.fileno()).st_size
                sound = size == file.num_bytes and hashlib.file_digest(stream, "sha256").hexdigest() == file.sha256
        except OSError as error:
            raise FileFormatError(f"{path / name}: {error.strerror}") from error
        if not sound:
            raise FileFormatError(f"{path / name}: {size} bytes that are not the {file.num_bytes} that were written")


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _record(stage: Path, rank: int) -> Path:
    return stage / f"rank-{rank:05d}.json"


def _write_json(path: Path, manifest: Manifest) -> None:
    with path.open("w", encoding="utf-8") as stream:
        json.dump(manifest.to_json(), stream, allow_nan=False)
        stream.flush()
        os.fsync(stream.fileno())
