"""A model's graph as a function of the number of samples in a batch and of the depth of its runs of blocks, read off short traces.

Every whole number of a graph (shapes and arguments) is constant or `constant + per_sample * samples`; `fit` finds which from the graphs of
two batches, and what is not of that form has no family.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from autopar.core.graph import Op, OpGraph
from autopar.core.unroll import Run, Unrolled, unroll
from autopar.errors import NoFamilyError, UsageError


@dataclass(frozen=True, slots=True)
class Affine:
    """A number that grows with the number of samples."""

    constant: int
    per_sample: int

    def at(self, samples: int) -> int:
        return self.constant + self.per_sample * samples


def fit(one: Any, other: Any, samples: tuple[int, int], where: str) -> Any:
    """What two batches of `samples` have in common: a value with `Affine` numbers in the places where they differ."""
    if isinstance(one, tuple) and isinstance(other, tuple) and len(one) == len(other):
        found = tuple([fit(a, b, samples, where) for a, b in zip(one, other)])
        return one if found == one else found
    if type(one) is type(other) and one == other:
        return one
    if type(one) is int and type(other) is int:
        per_sample, rest = divmod(other - one, samples[1] - samples[0])
        if not rest:
            return Affine(one - per_sample * samples[0], per_sample)
    raise NoFamilyError(f"{where} has {one} with {samples[0]} samples and {other} with {samples[1]}")


def evaluate(fitted: Any, samples: int) -> Any:
    """The value for a number of samples."""
    if isinstance(fitted, tuple):
        return tuple([evaluate(x, samples) for x in fitted])
    return fitted.at(samples) if isinstance(fitted, Affine) else fitted


@dataclass(frozen=True)
class Form:
    """The graph of one batch with three blocks of every run. `shapes` of values and `arguments` of ops (by name) that depend on the number of
    samples."""

    graph: OpGraph
    runs: tuple[Run, ...]
    shapes: Mapping[int, tuple[Any, ...]] = field(default_factory=dict)
    arguments: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)

    def unrolled(self, depth: int | None) -> Unrolled:
        """With runs of `depth` blocks, or as deep as the model's."""
        found = Unrolled(self.graph, tuple(range(len(self.graph.values))), tuple(range(len(self.graph.ops))))
        for run in self.runs:
            step = unroll(found.graph, run, range(depth or run.depth))
            found = Unrolled(step.graph, tuple([found.values[v] for v in step.values]), tuple([found.ops[i] for i in step.ops]))
        return found

    def at(self, unrolled: Unrolled, samples: int) -> OpGraph:
        """`unrolled` for another number of samples."""
        graph = unrolled.graph
        metas = {v: replace(self.graph.values[v].meta, shape=evaluate(shape, samples)) for v, shape in self.shapes.items()}
        arguments = {i: {name: evaluate(x, samples) for name, x in args.items()} for i, args in self.arguments.items()}
        values = tuple([replace(value, meta=metas[v]) if v in metas else value for value, v in zip(graph.values, unrolled.values)])
        ops = tuple([_with(op, arguments[i]) if i in arguments else op for op, i in zip(graph.ops, unrolled.ops)])
        return replace(graph, values=values, ops=ops)

    def fitted(self, samples: int, other: OpGraph, other_samples: int) -> "Form":
        """With the numbers that differ in `other`, the graph of another batch with one block of every run, as functions of the samples."""
        mine = self.unrolled(1)
        _check_same_structure(mine.graph, other)
        both = samples, other_samples
        shapes, arguments = {}, {}
        for v, ours, theirs in zip(mine.values, mine.graph.values, other.values):
            shape = fit(ours.meta.shape, theirs.meta.shape, both, ours.name)
            if shape != ours.meta.shape:
                shapes[v] = shape
        for i, ours, theirs in zip(mine.ops, mine.graph.ops, other.ops):
            if ours.args != theirs.args:
                args = fit(ours.args, theirs.args, both, ours.name)
                arguments[i] = {name: x for (name, x), (_, before) in zip(args, ours.args) if x != before}
        return replace(self, shapes=shapes, arguments=arguments)


def _with(op: Op, changed: Mapping[str, Any]) -> Op:
    return replace(op, args=tuple([(name, changed.get(name, value)) for name, value in op.args]))


def _check_same_structure(one: OpGraph, other: OpGraph) -> None:
    """Raise NoFamilyError unless two graphs differ in numbers alone."""
    if len(one.values) != len(other.values) or len(one.ops) != len(other.ops):
        raise NoFamilyError(f"{len(one.ops)} operators with one number of samples, {len(other.ops)} with another")
    for x, y in zip(one.values, other.values):
        if (x.name, x.role, x.source, x.meta.dtype, x.meta.requires_grad) != (y.name, y.role, y.source, y.meta.dtype, y.meta.requires_grad):
            raise NoFamilyError(f"{x.name} depends on the number of samples")
    for a, b in zip(one.ops, other.ops):
        if (a.kind, a.operands, a.results, a.module_path, a.source) != (b.kind, b.operands, b.results, b.module_path, b.source):
            raise NoFamilyError(f"{a.name} depends on the number of samples")
    if (one.outputs, one.updates) != (other.outputs, other.updates):
        raise NoFamilyError("the outputs depend on the number of samples")


@dataclass
class Family:
    """The graphs of a model: `form` for two samples and more; `make_single` gives that for one, whose dimension broadcasts. `check` raises NoFamilyError where they
    are not those of the model, which is looked at when it is to be confirmed."""

    form: Form
    make_single: Callable[[], Form]
    check: Callable[[], None]
    is_confirmed: bool = False
    _graphs: dict[tuple[int, int | None], OpGraph] = field(default_factory=dict, repr=False, compare=False)
    _unrolled: dict[int | None, Unrolled] = field(default_factory=dict, repr=False, compare=False)

    @property
    def runs(self) -> tuple[Run, ...]:
        """The rows of blocks that repeat, in the order of the model's modules."""
        return self.form.runs

    @property
    def depth(self) -> int:
        """Blocks of the deepest run."""
        return max(run.depth for run in self.runs)

    def graph(self, samples: int, depth: int | None = None) -> OpGraph:
        """The graph of a batch of `samples`, which a full trace gives too; with runs of `depth` blocks each where that is said.

        Raises NoFamilyError where one sample, which is looked at only here, does not follow from short traces.
        """
        if samples < 1 or (depth is not None and depth < 1):
            raise UsageError(f"a graph of {samples} samples and {depth} blocks; give at least one of each")
        key = samples, depth
        if key not in self._graphs:
            self._graphs[key] = self._single.unrolled(depth).graph if samples == 1 else self._made(samples, depth)
        return self._graphs[key]

    def confirm(self) -> None:
        """Raises NoFamilyError where a trace is not what `graph` says; what was made of the family is to be thrown away then."""
        if not self.is_confirmed:
            self.check()
            self.is_confirmed = True

    @cached_property
    def _single(self) -> Form:
        return self.make_single()

    def _made(self, samples: int, depth: int | None) -> OpGraph:
        if depth not in self._unrolled:
            self._unrolled[depth] = self.form.unrolled(depth)
        return self.form.at(self._unrolled[depth], samples)
