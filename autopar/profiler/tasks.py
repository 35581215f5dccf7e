"""What is measured, what came out, and the file that remembers it by device, operation, shape and dtype."""

import json
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from autopar.core.device import MEASURED_COLLECTIVES
from autopar.core.json_file import read_json
from autopar.errors import FileFormatError, UsageError

SCHEMA_VERSION = 2
OUTDATED = (1,)
"""Versions under whose names other things were measured: they are measured anew."""

MAX_CACHE_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Task:
    """One thing to time: an operation on tensors of a shape. What the digits of `shape` mean is said where each operation is measured."""

    op: str
    shape: tuple[int, ...]
    dtype: str = "float32"

    @property
    def key(self) -> str:
        return f"{self.op} {'x'.join(map(str, self.shape))} {self.dtype}"


TOGETHER = (*MEASURED_COLLECTIVES, "microbatches")
"""Tasks whose seconds are by the clock, until all ranks are done; those of others are processor seconds of a rank."""

Measured = Mapping[Task, float]
"""Seconds of one call of a task, while all ranks do the same."""


def device_name() -> str:
    """What this machine computes with, as its system calls it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    except OSError:
        return platform.processor() or platform.machine()


@dataclass(frozen=True)
class Cache:
    """Measurements of one device under one name: the device, how many processes share it, the library's version."""

    path: Path
    name: str

    def read(self) -> dict[str, float]:
        """Seconds by key of a task. Raises FileFormatError where the file is something else."""
        return self._read_all().get(self.name, {})

    def forget(self) -> None:
        """Measure this device anew; what is known of others stays."""
        known = self._read_all()
        if known.pop(self.name, None) is not None:
            self._write(known)

    def add(self, found: Iterable[tuple[Task, float]]) -> None:
        """Keep these too."""
        known = self._read_all()
        known[self.name] = known.get(self.name, {}) | {task.key: seconds for task, seconds in found}
        self._write(known)

    def _write(self, known: dict[str, dict[str, float]]) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps({"schema_version": SCHEMA_VERSION, "seconds": known}, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise UsageError(f"{self.path}: cannot be written ({error.strerror}); give another --cache") from error

    def _read_all(self) -> dict[str, dict[str, float]]:
        if not self.path.exists():
            return {}
        data = read_json(self.path, MAX_CACHE_BYTES)
        if data.get("schema_version") in OUTDATED:
            return {}
        seconds = data.get("seconds")
        if data.get("schema_version") != SCHEMA_VERSION or not isinstance(seconds, dict) or not all(map(_is_row, seconds.values())):
            raise FileFormatError(f"{self.path}: holds no measurements of `autopar calibrate`; remove it, or give another --cache")
        return seconds


def _is_row(row: object) -> bool:
    return isinstance(row, dict) and all(isinstance(x, (int, float)) and not isinstance(x, bool) and x > 0 for x in row.values())
