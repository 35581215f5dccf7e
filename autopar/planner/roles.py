"""Which factors are the batch, and which strategies the pins allow."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from autopar.core.graph import Op, OpGraph, Wiring
from autopar.core.layout import Layout
from autopar.core.mesh import Mesh
from autopar.core.rule import Choice, OpRule, Strategy
from autopar.errors import PinConflictError, UsageError
from autopar.planner.pins import Pin, Pins

Allowed = Callable[[Strategy], bool]


def batch_factors(graph: OpGraph, rules: Sequence[OpRule]) -> tuple[frozenset[int], ...]:
    """For every op the factors that run along the batch: those connected to the first dimension of an input.

    Factors of different ops are the same when a value's dimension is made of both.
    """
    batch_dims: dict[int, Extents] = {}
    for v, value in enumerate(graph.values):
        if value.role == "input" and value.meta.shape:
            batch_dims[v] = {0: value.meta.shape[0]}
    known: dict[tuple, tuple[list[frozenset[int]], list[Extents]]] = {}
    factors: list[frozenset[int]] = []
    for segment, wiring in zip(graph.segments, graph.wirings, strict=True):
        entering = [batch_dims.get(v, {}) for v in wiring.entries]
        key = (wiring.form, *(tuple(dims.items()) for dims in entering))
        if key not in known:
            known[key] = _batch_of_segment([graph.ops[i] for i in segment.ops], rules[segment.ops.start : segment.ops.stop], wiring, entering)
        factors += known[key][0]
        batch_dims.update(zip(wiring.results, known[key][1]))
    return tuple(factors)


Extents = dict[int, int]
"""Dimension (or factor) -> how much of it is the batch."""


def _batch_of_segment(ops: Sequence[Op], rules: Sequence[OpRule], wiring: Wiring, entering: Sequence[Extents]) -> tuple[list[frozenset[int]], list[Extents]]:
    """(batch factors of each op, batch dimensions of each result) of a segment, given those of what enters."""
    batch_dims: list[Extents] = [*entering, *({} for _ in wiring.results)]
    found = []
    place, made = 0, len(entering)
    for op, rule in zip(ops, rules, strict=True):
        extents: Extents = {}
        for k, v in enumerate(wiring.operands[place : place + len(op.operands)]):
            for dim, extent in batch_dims[v].items():
                extents.update(_leading(rule, rule.operands[k][dim], extent))
        for j in range(len(op.results)):
            for dim, parts in enumerate(rule.results[j]):
                lead = [extents[f] for f in parts if f in extents]
                if lead and parts[0] in extents:
                    batch_dims[made + j][dim] = math.prod(lead)
        place, made = place + len(op.operands), made + len(op.results)
        found.append(frozenset(extents))
    return found, batch_dims[len(entering) :]


def _leading(rule: OpRule, parts: tuple[int, ...], extent: int) -> dict[int, int]:
    """Factors that make up the first `extent` of a dimension; a factor that merges more behind it counts with its share."""
    taken: dict[int, int] = {}
    for f in parts:
        if extent <= 1:
            break
        taken[f] = min(rule.sizes[f], extent)
        extent //= rule.sizes[f]
    return taken


@dataclass(frozen=True)
class Constraints:
    """What pins allow on one mesh; an axis called dp may only cut the batch, one called tp only other factors."""

    mesh: Mesh
    pins: Pins
    strict: bool

    def choice_allowed(self, axis: int, choice: Choice, batch: frozenset[int]) -> bool:
        if not self.strict or choice.kind != "cut":
            return True
        name = self.mesh.names[axis]
        return (choice.index in batch) if name == "dp" else (choice.index not in batch) if name == "tp" else True

    def for_op(self, op: Op, rule: OpRule, batch: frozenset[int], *, named: bool = True) -> Mapping[int, tuple[set[str], list[Pin]]]:
        """axis -> (words allowed there, the pins that say so)."""
        found: dict[int, tuple[set[str], list[Pin]]] = {}
        for pin in self.pins.named if named else ():
            if not (fnmatchcase(op.name, pin.pattern) or (op.module_path and fnmatchcase(op.module_path, pin.pattern))):
                continue
            axis = self._axis(pin)
            if pin.word not in (*rule.factors, "I", "R"):
                continue
            words, pins = found.get(axis, ({pin.word}, []))
            if words != {pin.word}:
                raise PinConflictError(f"pins {pins[0].text!r} and {pin.text!r} ask two things of operator {op.name} on axis {pin.axis}; keep one")
            found[axis] = ({pin.word}, [*pins, pin])
        return found

    def for_param(self, names: Sequence[str], layouts: Sequence[Layout]) -> list[Layout]:
        """Storage layouts of a parameter that the pins allow."""
        kept = list(layouts)
        last: Pin | None = None
        for pin in self.pins.named:
            if not any(fnmatchcase(name, pin.pattern) for name in names):
                continue
            axis = self._axis(pin)
            left = [layout for layout in kept if str(layout[axis]) == pin.word]
            if not left and last is not None:
                raise PinConflictError(f"pins {last.text!r} and {pin.text!r} contradict each other for parameter {names[0]}; keep one")
            if not left:
                raise UsageError(f"--pin {pin.text!r}: parameter {names[0]} cannot lie as {pin.word} on {pin.axis}={self.mesh.sizes[axis]}; it can be {_options(layouts, axis)}")
            kept, last = left, pin
        return kept

    def _axis(self, pin: Pin) -> int:
        if pin.axis not in self.mesh.names:
            raise UsageError(f"--pin {pin.text!r}: the mesh has no axis {pin.axis!r}, only {', '.join(self.mesh.names)}; pin its size too, e.g. {pin.axis}=2")
        return self.mesh.names.index(pin.axis)

    def allowed(self, op: Op, rule: OpRule, batch: frozenset[int]) -> tuple[Allowed, Allowed, tuple]:
        """(what pins allow, what a forced plan prefers where it is possible, a key that names both)."""
        words = self.for_op(op, rule, batch)

        def check(strategy: Strategy) -> bool:
            for axis, choice in enumerate(strategy):
                pinned = axis in words and self.mesh.sizes[axis] > 1
                if not pinned and not self.choice_allowed(axis, choice, batch):
                    return False
                if pinned:
                    word = rule.factors[choice.index] if choice.kind == "cut" else choice.kind
                    if word not in words[axis][0]:
                        return False
            return True

        forced = self.forced_axes(rule, batch)

        def prefer(strategy: Strategy) -> bool:
            return all(strategy[axis].kind == "cut" for axis in forced)

        return check, prefer, (forced, tuple(sorted((axis, tuple(w)) for axis, (w, _) in words.items())))

    def forced_axes(self, rule: OpRule, batch: frozenset[int]) -> tuple[int, ...]:
        """Axes of a forced mesh on which an operator can be cut in the axis's own way, and then must be.

        Along dp that is every operator of the batch: data parallelism computes nothing twice. Along the others it is
        the contractions; what is cheap lies between them as the search finds best.
        """
        if not self.strict:
            return ()
        found = []
        for axis, size in enumerate(self.mesh.sizes):
            if rule.cost != "contract" and self.mesh.names[axis] != "dp":
                continue
            cuts = [Choice("cut", f) for f, n in enumerate(rule.sizes) if f not in rule.whole and n % size == 0]
            if size > 1 and any(self.choice_allowed(axis, c, batch) for c in cuts):
                found.append(axis)
        return tuple(found)


def _options(layouts: Sequence[Layout], axis: int) -> str:
    return ", ".join(sorted({str(layout[axis]) for layout in layouts}))
