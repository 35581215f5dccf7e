"""Reading TOML that may come from anywhere: every fault is one `FileFormatError` line with file, key and remedy.

Limits come before parsing, so that no file takes longer than about a second: file size, number of entries, dots per
line (a dotted key of n parts costs the parser n squared). Depth and finiteness are checked on the result.
"""

import math
import re
import tomllib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from autopar.core.units import Dimension, parse_quantity, shown
from autopar.errors import FileFormatError, UsageError

MAX_BYTES = 1 << 20
MAX_DEPTH = 64
MAX_ENTRIES = 20_000
MAX_TEXT = 1000
BARE_KEY = re.compile(r"[A-Za-z0-9_-]{1,40}")


@dataclass(frozen=True)
class Table:
    """One table of a file, with the name of the file and the path of keys that leads to it."""

    file: str
    path: tuple[str, ...]
    values: Mapping[str, Any]

    def fail(self, key: str, problem: str) -> NoReturn:
        """Raises the one-line error for `key` of this table."""
        where = ".".join(k if BARE_KEY.fullmatch(k) else shown(k) for k in (*self.path, key) if k)
        raise FileFormatError(f"{self.file}: {where}: {problem}")

    def check_keys(self, required: Mapping[str, str], optional: Collection[str] = ()) -> None:
        """Every required key is there and every key that is there is known; `required`: what to write, by key."""
        known = [*required, *optional]
        for key in self.values:
            if key not in known:
                close = get_close_matches(key[:40], known, n=1, cutoff=0.5)
                self.fail(key, f"unknown key; did you mean {close[0]!r}?" if close else f"unknown key; this table holds {', '.join(known)}")
        for key, line in required.items():
            if key not in self.values:
                self.fail(key, f"missing; write {line}")

    def table(self, key: str) -> "Table":
        value = self.values[key]
        if not isinstance(value, dict):
            self.fail(key, f"{shown(value)} is not a table; write [{'.'.join((*self.path, key))}] and its keys below it")
        return Table(self.file, (*self.path, key), value)

    def text(self, key: str) -> str:
        """A text that is not blank and fits on one line."""
        value = self.values[key]
        if not isinstance(value, str):
            self.fail(key, f"{shown(value)} is not text; write it in quotes")
        if not value.strip() or not value.isprintable() or len(value) > MAX_TEXT:
            self.fail(key, f"{shown(value)} is blank, has control characters or is longer than {MAX_TEXT}; write one line of text")
        return value

    def quantity(self, key: str, dimension: Dimension, *, zero: bool = False) -> float:
        """A number with a unit, in the base unit; positive unless `zero` is allowed."""
        try:
            value = parse_quantity(self.values[key], dimension)
        except UsageError as error:
            self.fail(key, str(error))
        if value == 0 and not zero:
            self.fail(key, f"{shown(self.values[key])} is zero; write {dimension.name} such as '{dimension.example}'")
        return value

    def count(self, key: str, largest: int) -> int:
        value = self.values[key]
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= largest:
            self.fail(key, f"{shown(value)} is not a count; write a whole number from 1 to {largest}")
        return value

    def flag(self, key: str) -> bool:
        """`true` or `false`."""
        value = self.values[key]
        if not isinstance(value, bool):
            self.fail(key, f"{shown(value)} is neither true nor false")
        return value

    def number(self, key: str) -> float:
        """A plain number above 0."""
        value = self.values[key]
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1e18:
            self.fail(key, f"{shown(value)} is not a number above 0; write one such as 2.0")
        return float(value)

    def share(self, key: str) -> float:
        """A plain number above 0 and up to 1."""
        value = self.values[key]
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= 1:
            self.fail(key, f"{shown(value)} is not a share; write a number above 0 and up to 1, such as 0.8")
        return float(value)


def read_toml(path: str | Path) -> Table:
    """The top table of a file. A file that cannot be opened is a `UsageError`, one that breaks a rule a `FileFormatError`."""
    name = _file_name(path)
    try:
        if not Path(path).is_file():
            raise UsageError(f"{name}: no such file; give the path of a TOML file")
        with open(path, "rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL byte
        reason = error.strerror if isinstance(error, OSError) else "not a path"
        raise UsageError(f"{name}: cannot be read ({reason}); give the path of a TOML file") from None
    return parse_toml(data, name)


def parse_toml(data: bytes, name: str) -> Table:
    """The top table of TOML text; `name` stands for the file in messages."""
    if len(data) > MAX_BYTES:
        raise FileFormatError(f"{name}: larger than {MAX_BYTES} bytes; a cluster file has a few thousand")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FileFormatError(f"{name}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
    _check_size(text, name)
    try:
        values = tomllib.loads(text)
    except RecursionError:
        raise FileFormatError(f"{name}: nested deeper than {MAX_DEPTH}; write plain tables") from None
    except tomllib.TOMLDecodeError as error:
        reason = str(error) if str(error).isprintable() else shown(str(error))
        raise FileFormatError(f'{name}: not valid TOML: {reason}; write each key once, as key = "value"') from None
    except ValueError:  # Python's own limit of 4300 digits
        raise FileFormatError(f"{name}: not valid TOML: a whole number of thousands of digits; write a short one") from None
    top = Table(name, (), values)
    _check_values(top)
    return top


def _check_size(text: str, name: str) -> None:
    if max(text.count(c) for c in "=[{.,") > MAX_ENTRIES:
        raise FileFormatError(f"{name}: more than {MAX_ENTRIES} entries; a cluster file has a few dozen")
    for number, line in enumerate(text.split("\n"), start=1):
        if line.count(".") > MAX_DEPTH and not line.lstrip().startswith("#"):
            raise FileFormatError(
                f"{name}: line {number} has more than {MAX_DEPTH} dots; keys nest at most {MAX_DEPTH} deep, write plain tables"
            )


def _check_values(top: Table) -> None:
    """No value is nested too deep and no number is infinite or NaN. A loop, not recursion: the depth is the attacker's."""
    open_values: list[tuple[tuple[str, ...], Any]] = [((), top.values)]
    while open_values:
        path, value = open_values.pop()
        if len(path) > MAX_DEPTH:
            raise FileFormatError(f"{top.file}: nested deeper than {MAX_DEPTH}; write plain tables")
        if isinstance(value, float) and not math.isfinite(value):
            Table(top.file, path[:-1], {}).fail(
                path[-1], f"{value} is not a finite number; write a number such as 0.8 or a text with a unit"
            )
        open_values.extend(((*path, key), child) for key, child in _children(value))


def _children(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        yield from value.items()
    elif isinstance(value, list):
        yield from ((str(i), child) for i, child in enumerate(value))


def _file_name(path: str | Path) -> str:
    text = str(path)
    return text if text.isprintable() and len(text) <= 200 else shown(text)
