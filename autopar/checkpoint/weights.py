"""Weights from and to a folder in Hugging Face's own format: `model.safetensors`, or several files and `model.safetensors.index.json`.

Every rank reads its slices only. To write, the ranks first store their parts, as for a checkpoint, then share the files out and
put each together from the parts; so no rank holds more than one file's tensors, and nothing is gathered over the network.
"""

import json
import math
import secrets
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from autopar.checkpoint.folder import MANIFEST, PARTIAL, flush, seal, write_rank, write_tensors
from autopar.checkpoint.held import hold
from autopar.checkpoint.manifest import Manifest, TensorEntry
from autopar.checkpoint.part import whole
from autopar.checkpoint.peers import Peers
from autopar.checkpoint.reader import DTYPES, Reader
from autopar.checkpoint.state import not_written, ranks_of
from autopar.core.json_file import read_json
from autopar.errors import CheckpointError, FileFormatError

ONE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_INDEX_BYTES = 64 << 20
MAX_FILE_BYTES = 5_000_000_000
"""Hugging Face's own limit until 2025; every reader accepts it."""


def load_weights(folder: str | Path, module: nn.Module) -> None:
    """Overwrite the parameters and saved buffers of a module with those in a folder, converted to the module's dtypes.

    Every rank calls this. A tied weight may be there under any of its names, and all names may have or lack the one word in front
    by which a model with a head differs from the model without (`transformer.h.0...`, `h.0...`). Raises CheckpointError, on all ranks alike.
    """
    peers, folder = Peers.here(), Path(folder)
    tensors: Mapping[str, TensorEntry] = {}
    keys: dict[torch.Tensor, str] = {}
    with peers.together():
        tensors = _entries(folder)
        keys = _match(_saved(module), tensors, folder)
    unread = [set(json.loads(text)) for text in peers.gather(json.dumps(sorted(set(tensors) - set(keys.values()))))]
    left = sorted(set.intersection(*unread))
    if left and peers.rank == 0:
        warnings.warn(f"{folder}: {len(left)} tensors are not of this model and were left out, {left[0]} the first", stacklevel=2)
    with peers.together(), Reader(folder, tensors) as reader:
        for x, key in keys.items():
            reader.read_held(key, hold(x, ranks_of(module, peers)))


def save_weights(folder: str | Path, module: nn.Module, *, max_file_bytes: int = MAX_FILE_BYTES) -> None:
    """Write the parameters and saved buffers of a module into a folder that all ranks share and that holds no weights yet.

    Every rank calls this. Tied weights are written once, under their first name. Files hold whole tensors, `max_file_bytes`
    at most unless one tensor is larger. What makes the folder readable is written last. Raises CheckpointError, on all ranks alike.
    """
    peers, folder = Peers.here(), Path(folder)
    stage = Path(peers.on_first(lambda: str(_begin(folder))))
    with peers.together():
        place, elsewhere = ranks_of(module, peers), not_written(module)
        write_rank(stage, peers.rank, {}, {names[0]: replace(hold(x, place), elsewhere=names[0] in elsewhere) for x, names in _saved(module).items()})
    peers.on_first(lambda: seal(stage, peers.num_ranks))
    files: Mapping[str, Sequence[str]] = {}
    with peers.together():
        tensors = Manifest.load(stage / MANIFEST).tensors
        files = _files(tensors, max_file_bytes)
        with Reader(stage, tensors) as reader:
            for name in sorted(files)[peers.rank :: peers.num_ranks]:
                write_tensors(stage / name, {key: reader.read(key) for key in files[name]})
    peers.on_first(lambda: _finish(stage, folder, files, tensors))


def _saved(module: nn.Module) -> dict[torch.Tensor, list[str]]:
    """Parameters and persistent buffers with all their names, as `state_dict` has them."""
    found: dict[torch.Tensor, list[str]] = {}
    for name, x in module.state_dict(keep_vars=True).items():
        if isinstance(x, torch.Tensor):
            found.setdefault(x, []).append(name)
    return found


# --- reading ---------------------------------------------------------------------------------------------------------


def _entries(folder: Path) -> dict[str, TensorEntry]:
    """Shape and file of every tensor of the folder, from the headers of its files."""
    if (folder / INDEX).is_file():
        listed = read_json(folder / INDEX, MAX_INDEX_BYTES).get("weight_map")
        if not isinstance(listed, dict) or not all(isinstance(name, str) and Path(name).name == name for name in listed.values()):
            raise FileFormatError(f"{folder / INDEX}: weight_map must name a file of the same folder for each tensor")
        names = sorted(set(listed.values()))
    elif (folder / ONE_FILE).is_file():
        listed, names = None, [ONE_FILE]
    else:
        raise CheckpointError(f"{folder}: neither {ONE_FILE} nor {INDEX} is here; give a folder with a Hugging Face model in safetensors files")
    found = {}
    for name in names:
        try:
            with safe_open(folder / name, "pt") as file:
                for key in file.keys():  # noqa: SIM118 - not a dict
                    view = file.get_slice(key)
                    shape = tuple(view.get_shape())
                    found[key] = TensorEntry(shape, view.get_dtype(), ((name, whole(shape)),))
        except (OSError, SafetensorError) as error:
            raise FileFormatError(f"{folder / name}: {str(error)[:200]}") from error
    if listed is not None:
        for key, name in listed.items():
            if key not in found or found[key].parts[0][0] != name:
                raise FileFormatError(f"{folder / INDEX}: {key[:200]} is not in {name[:200]}")
    return found


def _match(wanted: Mapping[torch.Tensor, Sequence[str]], tensors: Mapping[str, TensorEntry], folder: Path) -> dict[torch.Tensor, str]:
    """The tensor of the folder for each of the module; a buffer may be without one."""
    headless: dict[str, str | None] = {}
    for key in tensors:
        rest = key.partition(".")[2]
        headless[rest] = None if rest in headless else key  # None: ambiguous
    found: dict[torch.Tensor, str] = {}
    for x, names in wanted.items():
        candidates = [*names, *(name.partition(".")[2] for name in names), *(headless.get(name) for name in names)]
        match = next((name for name in candidates if name and name in tensors), None)
        if match is None:
            if isinstance(x, nn.Parameter):
                raise CheckpointError(f"{folder}: there is no tensor for {names[0]}; give the folder of the same model")
            continue
        if tensors[match].shape != tuple(x.shape):
            raise CheckpointError(f"{folder}: {match} has shape {list(tensors[match].shape)}, {names[0]} of the model {list(x.shape)}; give the folder of the same model")
        found[x] = match
    if len(set(found.values())) < len(found):
        twice = next(key for key in found.values() if list(found.values()).count(key) > 1)
        raise CheckpointError(f"{folder}: {twice} stands for two tensors of the model that are not tied; give the folder of the same model")
    return found


# --- writing ---------------------------------------------------------------------------------------------------------


def _begin(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.glob("model*.safetensors*")):
        raise CheckpointError(f"{folder}: there are weights already; give another folder")
    for stale in folder.glob(f".weights.*{PARTIAL}"):
        shutil.rmtree(stale, ignore_errors=True)
    stage = folder / f".weights.{secrets.token_hex(8)}{PARTIAL}"
    stage.mkdir()
    return stage


def _num_bytes(entry: TensorEntry) -> int:
    return math.prod(entry.shape) * DTYPES[entry.dtype].itemsize


def _files(tensors: Mapping[str, TensorEntry], max_file_bytes: int) -> dict[str, list[str]]:
    """Which tensors go into which file, in their order."""
    groups: list[list[str]] = [[]]
    size = 0
    for key, entry in tensors.items():
        if groups[-1] and size + _num_bytes(entry) > max_file_bytes:
            groups.append([])
            size = 0
        groups[-1].append(key)
        size += _num_bytes(entry)
    if len(groups) == 1:
        return {ONE_FILE: groups[0]}
    return {f"model-{n:05d}-of-{len(groups):05d}.safetensors": keys for n, keys in enumerate(groups, start=1)}


def _finish(stage: Path, folder: Path, files: Mapping[str, Sequence[str]], tensors: Mapping[str, TensorEntry]) -> None:
    """Move the files to their place; the index, without which several files are not a model, comes last."""
    for name in files:
        (stage / name).rename(folder / name)
    if len(files) > 1:
        index = {"metadata": {"total_size": sum(map(_num_bytes, tensors.values()))}, "weight_map": {key: name for name, keys in files.items() for key in keys}}
        (stage / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        flush(stage / INDEX)
        flush(folder)
        (stage / INDEX).rename(folder / INDEX)
    flush(folder)
    shutil.rmtree(stage)
