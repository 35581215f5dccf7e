"""State as a tree of dicts, lists, scalars and tensors: JSON with a reference in the place of each tensor, and the tensors beside it.

What JSON has no word for is an object with one key that starts with `$`: `$tensor` (the key of a tensor), `$tuple`, `$float`
(inf, -inf, nan) and `$items` (a dict whose keys are not all plain text). Everything comes back as it was given.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from autopar.checkpoint.held import Held
from autopar.core.json_file import MAX_DEPTH
from autopar.errors import FileFormatError, UsageError

MAX_USER_DEPTH = MAX_DEPTH // 4
"""A level of the tree is at most two levels of JSON, and a few more lie above it."""


@dataclass(frozen=True, slots=True)
class Ref:
    """A tensor of a tree that was read: its key in the checkpoint."""

    key: str


class Encoder:
    """Turns trees into JSON and collects their tensors by key: the path to them. An object met twice is stored once."""

    def __init__(self, hold: Callable[[torch.Tensor], Held]) -> None:
        self._hold = hold
        self.tensors: dict[str, Held] = {}
        self._keys: dict[int, tuple[str, Any]] = {}

    def encode(self, value: Any, *path: str) -> Any:
        """JSON for a tree; raises UsageError for a leaf that is neither a scalar nor a tensor."""
        if isinstance(value, (Held, torch.Tensor)):
            return {"$tensor": self._key(value, path)}
        if value is None or isinstance(value, (bool, int, str)):
            return value
        if isinstance(value, float):
            return value if math.isfinite(value) else {"$float": str(value)}
        if len(path) > MAX_USER_DEPTH:
            raise UsageError(f"the state is nested deeper than {MAX_USER_DEPTH} at {_shown(path)}; flatten it")
        if isinstance(value, Mapping):
            return self._mapping(value, path)
        if isinstance(value, (list, tuple)):
            items = [self.encode(item, *path, str(n)) for n, item in enumerate(value)]
            return items if isinstance(value, list) else {"$tuple": items}
        raise UsageError(f"{_shown(path)} of the state is a {type(value).__name__}; save numbers, text, lists, dicts and tensors")

    def _mapping(self, value: Mapping[Any, Any], path: tuple[str, ...]) -> Any:
        plain = all(isinstance(key, str) and not key.startswith("$") for key in value)
        if plain:
            return {key: self.encode(item, *path, key) for key, item in value.items()}
        return {"$items": [[self.encode(key, *path, f"{n}.key"), self.encode(item, *path, str(n))] for n, (key, item) in enumerate(value.items())]}

    def _key(self, value: Held | torch.Tensor, path: Sequence[str]) -> str:
        if id(value) not in self._keys:
            key = "/".join(part.replace("~", "~0").replace("/", "~1") for part in path)  # as in a JSON pointer: one path, one key
            self.tensors[key] = value if isinstance(value, Held) else self._hold(value)
            self._keys[id(value)] = key, value  # the value too: as long as it lives, no other has its id
        return self._keys[id(value)][0]


def decode(data: Any, read: Callable[[Ref], Any] = lambda ref: ref) -> Any:
    """The inverse of `Encoder.encode`, tensors made by `read`; raises FileFormatError."""
    if isinstance(data, list):
        return [decode(item, read) for item in data]
    if not isinstance(data, dict):
        return data
    word = next(iter(data), "")
    if not word.startswith("$"):
        return {key: decode(item, read) for key, item in data.items()}
    value = data[word]
    if word == "$tensor" and isinstance(value, str):
        return read(Ref(value))
    if word == "$tuple" and isinstance(value, list):
        return tuple(decode(item, read) for item in value)
    if word == "$float" and value in ("inf", "-inf", "nan"):
        return float(value)
    if word == "$items" and isinstance(value, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        return {_hashable(decode(key, read)): decode(item, read) for key, item in value}
    raise FileFormatError(f"{word[:40]!r} with a {type(value).__name__} is no value that a checkpoint holds")


def _hashable(key: Any) -> Any:
    if isinstance(key, (list, dict, torch.Tensor)):
        raise FileFormatError(f"a {type(key).__name__} cannot be the key of a dict")
    return key


def _shown(path: Sequence[str]) -> str:
    return ".".join(path)[:200]
