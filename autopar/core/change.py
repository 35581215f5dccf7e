"""Questions about another machine: a cluster with some of its numbers changed, `inter_node.bandwidth*=2` or `device.memory=40 GB`."""

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

from autopar.core.mixed import Machines
from autopar.core.units import QUANTITY, shown
from autopar.errors import FileFormatError, UsageError

NUMBERED = re.compile(r"^group\.[0-9]+\.")
CHANGE = re.compile(r"\s*([A-Za-z0-9_.]+)\s*(\*?=)\s*(.+?)\s*")


def changed(cluster: Machines, changes: Sequence[str]) -> Machines:
    """The cluster with every change made, in their order. Keys are those of a cluster file, those of a group behind its number: `group.0.num_nodes`;
    raises UsageError.

    `KEY=VALUE` sets a number as it is written in a file; `KEY*=FACTOR` multiplies it.
    """
    values = cluster.to_values()
    for text in changes:
        _change(values, text)
    name = f"{cluster.name} with {', '.join(text.strip() for text in changes)}" if changes else cluster.name
    try:
        return replace(type(cluster).from_values(values, "--set"), name=name)
    except FileFormatError as error:
        raise UsageError(str(error)) from None


def _change(values: dict[str, Any], text: str) -> None:
    match = CHANGE.fullmatch(text)
    if match is None:
        raise UsageError(f"--set {shown(text)}: write KEY=VALUE (device.memory=40 GB) or KEY*=FACTOR (inter_node.bandwidth*=2)")
    key, how, value = match.groups()
    table, name = _place(values, key)
    table[name] = _times(table[name], value, text) if how == "*=" else _as_written(table[name], value)


def _place(values: dict[str, Any], key: str) -> tuple[dict[str, Any], str]:
    """The table that a dotted key leads to, and the key in it."""
    known = _keys(values)
    if key not in known:
        close = get_close_matches(key[:40], known, n=1, cutoff=0.4)
        listed = ", ".join(dict.fromkeys(NUMBERED.sub("group.N.", name) for name in known))  # of groups the keys of all of them once
        raise UsageError(f"--set {shown(key)}: no number of a cluster; {f'did you mean {close[0]}?' if close else f'known are {listed}'}")
    *path, name = key.split(".")
    table: Any = values
    for part in path:
        table = table[int(part)] if isinstance(table, list) else table[part]
    return table, name


def _keys(values: dict[str, Any], prefix: str = "") -> list[str]:
    found: list[str] = []
    for key, value in values.items():
        if isinstance(value, dict):
            found += _keys(value, f"{prefix}{key}.") if key != "source" else []
        elif isinstance(value, list):
            found += [name for n, table in enumerate(value) for name in _keys(table, f"{prefix}{key}.{n}.")]
        elif key != "name":
            found.append(prefix + key)
    return found


def _as_written(before: Any, value: str) -> Any:
    """A bare number where one was; text with a unit where that was."""
    if isinstance(before, str):
        return value
    try:
        return int(value) if isinstance(before, int) else float(value)
    except ValueError:
        return value


def _times(before: Any, factor_text: str, text: str) -> Any:
    try:
        factor = float(factor_text)
    except ValueError:
        factor = math.nan
    if not math.isfinite(factor) or factor <= 0:
        raise UsageError(f"--set {shown(text)}: {shown(factor_text)} is not a factor; write a number above 0, such as 2 or 0.5")
    if isinstance(before, str):
        match = QUANTITY.fullmatch(before)
        assert match is not None, before
        return f"{float(match['number']) * factor!r} {match['unit']}"
    scaled = before * factor
    if isinstance(before, int) and not isinstance(before, bool):
        if scaled != round(scaled):
            raise UsageError(f"--set {shown(text)}: {before} times {factor_text} is no whole number")
        return round(scaled)
    return scaled
