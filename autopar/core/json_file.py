"""Reading JSON that may come from anywhere: every fault is one `FileFormatError` line that starts with the file."""

import json
import math
from pathlib import Path
from typing import Any

from autopar.errors import FileFormatError

MAX_DEPTH = 64


def read_json(path: Path, max_bytes: int) -> dict[str, Any]:
    """The object in a file of at most `max_bytes` bytes, nested at most MAX_DEPTH deep, all its numbers finite."""
    try:
        with path.open("rb") as stream:
            raw = stream.read(max_bytes + 1)
    except OSError as error:
        raise FileFormatError(f"{path}: cannot be read ({error.strerror})") from error
    if len(raw) > max_bytes:
        raise FileFormatError(f"{path}: larger than {max_bytes} bytes")
    try:
        data = json.loads(raw.decode("utf-8"), parse_constant=_refuse)
    except RecursionError as error:
        raise FileFormatError(f"{path}: nested deeper than {MAX_DEPTH}") from error
    except ValueError as error:  # not UTF-8, not JSON, a number of thousands of digits, NaN
        raise FileFormatError(f"{path}: not JSON ({str(error)[:120]})") from error
    if not isinstance(data, dict):
        raise FileFormatError(f"{path}: holds a {type(data).__name__}, not an object")
    _check(data, path)
    return data


def _refuse(word: str) -> None:
    raise ValueError(f"{word} is not a finite number")


def _check(data: dict[str, Any], path: Path) -> None:
    """Depth and finiteness (1e999 reads as infinity). A loop, not recursion: the depth is the file's."""
    level: list[Any] = [data]
    for _ in range(MAX_DEPTH + 1):
        if any(isinstance(value, float) and not math.isfinite(value) for value in level):
            raise FileFormatError(f"{path}: holds a number that is not finite")
        inside = (value.values() if isinstance(value, dict) else value for value in level if isinstance(value, (dict, list)))
        level = [child for children in inside for child in children]
        if not level:
            return
    raise FileFormatError(f"{path}: nested deeper than {MAX_DEPTH}")
