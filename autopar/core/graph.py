"""A torch-free graph of tensor operators: what a model computes, with shapes, dtypes and where it says so."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

DTYPE_BYTES: Mapping[str, int] = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1, "complex64": 8, "complex128": 16,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorMeta:
    """Global shape, dtype name (torch's, without the prefix) and whether a gradient flows into it."""

    shape: tuple[int, ...]
    dtype: str
    requires_grad: bool = False

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.numel * DTYPE_BYTES[self.dtype]

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


class Operand(int):
    """Stands for the k-th tensor operand inside `Op.args`."""

    def __repr__(self) -> str:
        return f"%{int(self)}"


@dataclass(frozen=True)
class Value:
    """A tensor of the graph. `source` is the parameter, buffer or input name(s) where it is not computed."""

    name: str
    meta: TensorMeta
    role: str = "op"  # op | param | buffer | input | constant | elsewhere (of another stage of a pipeline)
    source: tuple[str, ...] = ()


@dataclass(frozen=True)
class Op:
    """One operator call. `args` holds every argument of its schema by name, tensors as `Operand(k)`."""

    name: str
    kind: str
    operands: tuple[int, ...]
    results: tuple[int, ...]
    args: tuple[tuple[str, Any], ...] = ()
    module_path: str = ""
    source: str = ""


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive ops of one block; `block` is its module path, empty between blocks."""

    block: str
    ops: range


def block_of(path: str) -> str:
    """The repeated block an operator belongs to: its module path up to the first list index."""
    parts = path.split(".")
    for n, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: n + 1])
    return ""


@dataclass(frozen=True)
class OpGraph:
    """Values and the ops between them, ops in topological order.

    `outputs` are value ids returned to the user, `updates` maps a buffer's value id to the value that replaces it.
    `differentiate`: the seeds of the backward, where they are not what the outputs say (a stage of a pipeline).
    """

    values: tuple[Value, ...]
    ops: tuple[Op, ...]
    outputs: tuple[int, ...]
    updates: tuple[tuple[int, int], ...] = ()
    name: str = ""
    differentiate: tuple[int, ...] | None = None

    @cached_property
    def producer(self) -> dict[int, tuple[int, int]]:
        """value id -> (index of op, index of result)."""
        return {v: (i, k) for i, op in enumerate(self.ops) for k, v in enumerate(op.results)}

    @cached_property
    def consumers(self) -> dict[int, list[tuple[int, int]]]:
        """value id -> [(index of op, index of operand), ...] in program order."""
        found: dict[int, list[tuple[int, int]]] = {v: [] for v in range(len(self.values))}
        for i, op in enumerate(self.ops):
            for k, v in enumerate(op.operands):
                found[v].append((i, k))
        return found

    @cached_property
    def params(self) -> tuple[int, ...]:
        return tuple(v for v, value in enumerate(self.values) if value.role == "param")

    @cached_property
    def searched(self) -> frozenset[int]:
        """Ids of the values that depend on a parameter: the part of the graph whose layouts are searched."""
        found = set(self.params)
        for op in self.ops:
            if any(v in found for v in op.operands):
                found.update(op.results)
        return frozenset(found)

    @cached_property
    def seeds(self) -> tuple[int, ...]:
        """Outputs that a training step differentiates: the scalar loss where there is one, else every floating output."""
        if self.differentiate is not None:
            return self.differentiate
        floating = [v for v in self.outputs if self.values[v].meta.requires_grad]
        return tuple([v for v in floating if self.values[v].meta.shape == ()][:1] or floating)

    @cached_property
    def differentiated(self) -> frozenset[int]:
        """Ids of the values that receive a gradient when the seeds are differentiated."""
        wanted = set(self.seeds)
        for op in reversed(self.ops):
            if any(v in wanted for v in op.results):
                wanted.update(v for v in op.operands if self.values[v].meta.requires_grad)
        return frozenset(wanted)

    @property
    def num_params(self) -> int:
        return sum(self.values[v].meta.numel for v in self.params)

    @cached_property
    def digest(self) -> str:
        """Fingerprint of the computation: shapes, dtypes, operators and parameter names, not weights.

        float64 counts as float32, so that the double-precision copy that verification runs is the same computation.
        """
        lines = [f"{v.meta}{v.role}{v.source}" for v in self.values]
        lines += [f"{op.kind}{op.operands}{op.results}{op.args}" for op in self.ops]
        text = "\n".join([*lines, f"{self.outputs}{self.updates}"]).replace("float64", "float32")
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @cached_property
    def segments(self) -> tuple["Segment", ...]:
        """Maximal runs of ops that belong to the same repeated block: the units that are emitted, gathered and recomputed."""
        runs: list[list[Any]] = []
        for i, op in enumerate(self.ops):
            block = block_of(op.module_path)
            if not runs or runs[-1][0] != block:
                runs.append([block, i, i])
            runs[-1][2] = i + 1
        return tuple(Segment(block, range(first, last)) for block, first, last in runs)

    def text(self) -> str:
        """One line per op, for people."""
        lines = []
        for op in self.ops:
            outs = ", ".join(f"%{v}: {self.values[v].meta}" for v in op.results)
            ins = ", ".join(f"%{v}" for v in op.operands)
            lines.append(f"{outs} = {op.kind}({ins})  # {op.module_path}")
        return "\n".join(lines)
