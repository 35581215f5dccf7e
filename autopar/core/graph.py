"""A torch-free graph of tensor operators: what a model computes, with shapes, dtypes and where it says so."""

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

DTYPE_BYTES: Mapping[str, int] = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1, "complex64": 8, "complex128": 16,
}  # fmt: skip

RANDOM_SITE = "site"
"""The argument, the last of a random operator, that numbers these in program order."""

DRAWING = ("bernoulli", "binomial", "cauchy", "exponential", "geometric", "log_normal", "multinomial", "normal", "poisson", "rand", "rrelu", "standard_gamma", "uniform")
"""What names of operators begin with that draw numbers of torch's own, without a site."""

MAY_DRAW = ("dropout", "attention", "gru", "lstm", "rnn")
"""What names contain of operators that draw some, depending on their arguments."""


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

    @property
    def draws(self) -> bool:
        """Whether its results may be random."""
        name = self.kind.partition(".")[2].lstrip("_")
        return name.startswith(DRAWING) or any(part in name for part in MAY_DRAW)


def named(values: Sequence[Value], ops: Sequence[Op]) -> tuple[tuple[Value, ...], tuple[Op, ...]]:
    """Operators under the names that their place gives them, and their results: the first `linear`, then `linear_1`; results of an
    operator with several are numbered behind a dot. Names follow from the graph alone, so that equal graphs have equal names."""
    found, calls = list(values), []
    taken, counts = {value.name for value in values if value.role != "op"}, Counter[str]()
    for op in ops:
        base = op.kind.split(".")[1]
        name = base if not counts[base] else f"{base}_{counts[base]}"
        while name in taken:
            counts[base] += 1
            name = f"{base}_{counts[base]}"
        counts[base] += 1
        taken.add(name)
        calls.append(replace(op, name=name))
        for k, v in enumerate(op.results):
            found[v] = replace(values[v], name=name if len(op.results) == 1 else f"{name}.{k}")
    return tuple(found), tuple(calls)


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive ops of one block; `block` is its module path, empty between blocks."""

    block: str
    ops: range


@dataclass(frozen=True, slots=True)
class Wiring:
    """A segment seen from inside: values are numbered locally, first the `entries` that it takes in, in order of use, then the
    `results` of its ops. Segments of one `form` are copies: the same calls, joined in the same way. What is derived from a segment
    alone, and from what enters and leaves it, is the same for all of them and is made once.

    `operands`: local numbers of the operands of all ops, one after the other; `crossing`: local numbers of the results that other
    segments use or that are outputs.
    """

    form: int
    entries: tuple[int, ...]
    results: tuple[int, ...]
    operands: tuple[int, ...]
    crossing: tuple[int, ...]

    @property
    def values(self) -> tuple[int, ...]:
        """Value id by local number."""
        return self.entries + self.results


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
    def places(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """For every segment the places where its ops take a value: (index of op, index of operand), in program order."""
        return tuple([tuple([(i, k) for i in segment.ops for k in range(len(self.ops[i].operands))]) for segment in self.segments])

    @cached_property
    def params(self) -> tuple[int, ...]:
        return tuple(v for v, value in enumerate(self.values) if value.role == "param")

    @cached_property
    def given(self) -> tuple[int, ...]:
        """Ids of the values that no operator makes."""
        return tuple([v for v, value in enumerate(self.values) if value.role != "op"])

    @cached_property
    def searched(self) -> frozenset[int]:
        """Ids of the values that depend on a parameter: the part of the graph whose layouts are searched."""
        found = set(self.params)
        for op in self.ops:
            if any(v in found for v in op.operands):
                found.update(op.results)
        return frozenset(found)

    @cached_property
    def once(self) -> frozenset[int]:
        """Ids of the values that are the same for every microbatch of a step: buffers that no microbatch changes, constants, and what is made of these or of
        nothing (masks, tables of positions), without chance."""
        changing = {buffer for buffer, _ in self.updates}
        found = {v for v in self.given if self.values[v].role in ("buffer", "constant") and v not in changing}
        for op in self.ops:
            if found.issuperset(op.operands) and not op.draws:
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
        lines += [f"{op.kind}{op.operands}{op.results}{arguments}" for op, arguments in zip(self.ops, self._arguments, strict=True)]
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

    @cached_property
    def metas(self) -> tuple[int, ...]:
        """A number per value, the same for equal metas: it hashes faster."""
        known: dict[TensorMeta, int] = {}
        return tuple([known.setdefault(value.meta, len(known)) for value in self.values])

    @cached_property
    def _arguments(self) -> tuple[str, ...]:
        """The arguments of every op as text, which tells 1 from 1.0 and True."""
        return tuple([str(op.args) for op in self.ops])

    @cached_property
    def calls(self) -> tuple[int, ...]:
        """A number per op, the same for ops of the same kind, arguments and metas of operands and results; random ones may differ in their site."""
        meta = self.metas
        known: dict[tuple[Any, ...], int] = {}
        found = []
        for op, arguments in zip(self.ops, self._arguments, strict=True):
            if op.args and op.args[-1][0] == RANDOM_SITE:
                arguments = str(op.args[:-1])
            key = (op.kind, arguments, tuple([meta[v] for v in op.operands]), tuple([meta[v] for v in op.results]))
            found.append(known.setdefault(key, len(known)))
        return tuple(found)

    @cached_property
    def finals(self) -> tuple[int, ...]:
        """Outputs, then what replaces buffers."""
        return (*self.outputs, *(v for _, v in self.updates))

    @cached_property
    def wirings(self) -> tuple[Wiring, ...]:
        """Every segment from inside."""
        entries, results, operands = [], [], []
        for segment in self.segments:
            ops = self.ops[segment.ops.start : segment.ops.stop]
            made = tuple([v for op in ops for v in op.results])
            inside = set(made)
            given = tuple(dict.fromkeys([v for op in ops for v in op.operands if v not in inside]))
            local = {v: n for n, v in enumerate(given + made)}
            entries.append(given)
            results.append(made)
            operands.append(tuple([local[v] for op in ops for v in op.operands]))
        used = {v for given in entries for v in given}.union(self.finals)
        forms: dict[tuple[Any, ...], int] = {}
        found = []
        for segment, given, made, inner in zip(self.segments, entries, results, operands, strict=True):
            key = (self.calls[segment.ops.start : segment.ops.stop], inner)
            crossing = tuple([n for n, v in enumerate(made, start=len(given)) if v in used])
            found.append(Wiring(forms.setdefault(key, len(forms)), given, made, inner, crossing))
        return tuple(found)

    def part(
        self, ops: Sequence[int], values: tuple[Value, ...], outputs: tuple[int, ...], updates: tuple[tuple[int, int], ...], differentiate: tuple[int, ...]
    ) -> "OpGraph":
        """Some of the operators, on the same values in other roles. What numbers metas and calls here numbers them there; what no microbatch changes stays so."""
        made = replace(self, values=values, ops=tuple([self.ops[i] for i in ops]), outputs=outputs, updates=updates, differentiate=differentiate)
        vars(made).update(metas=self.metas, calls=tuple([self.calls[i] for i in ops]), once=self.once)
        return made

    def text(self) -> str:
        """One line per op, for people."""
        lines = []
        for op in self.ops:
            outs = ", ".join(f"%{v}: {self.values[v].meta}" for v in op.results)
            ins = ", ".join(f"%{v}" for v in op.operands)
            lines.append(f"{outs} = {op.kind}({ins})  # {op.module_path}")
        return "\n".join(lines)
