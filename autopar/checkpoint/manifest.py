"""The manifest of a checkpoint: which part of which tensor lies in which file, how large and sound the files are, and all that is no tensor.

A rank's record and the whole manifest are the same object: merging the records of all ranks gives the manifest.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autopar.checkpoint.part import Part, Run, fits, num_elements
from autopar.core.json_file import read_json
from autopar.errors import FileFormatError

SCHEMA_VERSION = 1
MAX_BYTES = 1 << 30
FILE_NAME = re.compile(r"rank-[0-9]{5,8}\.safetensors")


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file's size and the hex SHA-256 of its bytes."""

    num_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A whole tensor and its parts: (file name, what of the whole the file holds under the tensor's key)."""

    shape: tuple[int, ...]
    dtype: str
    parts: tuple[tuple[str, Part], ...]


@dataclass(frozen=True, slots=True)
class Manifest:
    """`values`: the tree of the state as JSON (see tree.py), with references to `tensors`."""

    files: Mapping[str, DataFile]
    tensors: Mapping[str, TensorEntry]
    values: Mapping[str, Any]

    @classmethod
    def merge(cls, records: Sequence["Manifest"]) -> "Manifest":
        """One manifest of what all ranks wrote; raises FileFormatError unless every tensor is complete."""
        files = {name: file for record in records for name, file in record.files.items()}
        tensors: dict[str, TensorEntry] = {}
        for record in records:
            for key, entry in record.tensors.items():
                known = tensors.get(key, entry)
                if (known.shape, known.dtype) != (entry.shape, entry.dtype):
                    raise FileFormatError(f"{key} is {known.dtype}{list(known.shape)} on one rank and {entry.dtype}{list(entry.shape)} on another")
                tensors[key] = TensorEntry(entry.shape, entry.dtype, entry.parts if known is entry else (*known.parts, *entry.parts))
        for key, entry in tensors.items():
            written, wanted = sum(num_elements(part) for _, part in entry.parts), math.prod(entry.shape)
            if written != wanted:
                raise FileFormatError(f"the ranks wrote {written} of the {wanted} elements of {key}; save on all ranks of the mesh")
        return cls(files, tensors, _merged([record.values for record in records]))

    def to_json(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "files": {name: [file.num_bytes, file.sha256] for name, file in self.files.items()},
            "tensors": {key: [list(entry.shape), entry.dtype, entry.parts] for key, entry in self.tensors.items()},
            "values": self.values,
        }

    @classmethod
    def load(cls, path: Path) -> "Manifest":
        """Read and check a manifest or record; raises FileFormatError."""
        data = read_json(path, MAX_BYTES)
        if data.get("schema_version") != SCHEMA_VERSION:
            raise FileFormatError(f"{path}: schema_version {str(data.get('schema_version'))[:40]}, this autopar reads {SCHEMA_VERSION}")
        try:
            files = {_matching(name): DataFile(_natural(size), _text(digest)) for name, (size, digest) in data["files"].items()}
            return cls(files, {key: _entry(item, files) for key, item in data["tensors"].items()}, _table(data["values"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FileFormatError(f"{path}: not a valid manifest ({type(error).__name__}: {str(error)[:160]})") from error


def _merged(values: Sequence[Any]) -> Any:
    """Dicts joined key by key; of everything else the first. All ranks have the same values, or those of different tensors."""
    if not all(isinstance(value, dict) for value in values):
        return values[0]
    keys = dict.fromkeys(key for value in values for key in value)
    return {key: _merged([value[key] for value in values if key in value]) for key in keys}


def _entry(item: Any, files: Mapping[str, DataFile]) -> TensorEntry:
    dims, dtype, parts = item
    shape = tuple(_natural(n) for n in dims)
    found = []
    for file, runs in parts:
        part = tuple(tuple(Run(_natural(start), _natural(length)) for start, length in dim) for dim in runs)
        if file not in files or not fits(part, shape):
            raise ValueError(f"a part in {str(file)[:60]!r} is outside of shape {shape} or its file is not listed")
        found.append((file, part))
    return TensorEntry(shape, _text(dtype), tuple(found))


def _checked(wanted: Callable[[Any], bool], what: str) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if not wanted(value):
            raise ValueError(f"expected {what}, found {str(value)[:60]!r}")
        return value

    return check


_table = _checked(lambda x: isinstance(x, dict), "an object")
_text = _checked(lambda x: isinstance(x, str) and len(x) <= 100, "a short text")
_natural = _checked(lambda x: isinstance(x, int) and not isinstance(x, bool) and 0 <= x < 1 << 62, "a number from 0")
_matching = _checked(lambda x: isinstance(x, str) and FILE_NAME.fullmatch(x) is not None, "a file name like rank-00000.safetensors")
