"""What a program costs, piece by piece: the prices that the search put on its tables, read off the program that came out of it.

A *piece* is one thing that is computed or sent: an operator, a move, the collectives of a parameter. It belongs to the operators that want
it, and a stage of a pipeline does each of its pieces once, however many of its operators want it. So the cost of any run of operators is
the sum over the pieces that they want, and stages are priced without being built.
"""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping
from copy import copy
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from autopar.core.again import computed_again, kept_by_selective
from autopar.core.graph import DTYPE_BYTES, OpGraph
from autopar.core.moves import COLLECTIVES, step_input_bytes
from autopar.core.residency import computes_again, keeps_contractions
from autopar.planner.keeping import Keeping, Sharding, Use, uses
from autopar.planner.states import Pricing, work_of, written_beside
from autopar.program import Program, Route, route_steps

PHASES = ("forward_s", "input_gradient_s", "weight_gradient_s", "gather_s", "reduce_s", "update_s")
"""Seconds of one microbatch (its forward, the two halves of its backward), before and after all microbatches of a step, and of the optimizer."""

SPLIT = ("aten.linear.default", "aten.addmm.default", "aten.mm.default")
"""Contractions whose weight gradient can wait (`runtime/split.py`); other operators make it with the gradient of their input."""

WITH_WEIGHTS = (*SPLIT, "aten.bmm.default")
"""Contractions that software may compute in a narrower dtype where one operand is a weight."""

NOTHING = (0.0,) * len(PHASES)


class Piece(NamedTuple):
    """`op`: number of an operator that wants it; pieces of equal `key` are one. `seconds`: by phase; `state_bytes`: of a parameter."""

    op: int
    key: Hashable
    seconds: tuple[float, ...] = NOTHING
    state_bytes: float = 0.0


def pieces(program: Program, pricing: Pricing, parts: int = 1) -> Iterator[Piece]:
    """The pieces of a program in its order; those of each operator it has. `parts`: of a microbatch so many times smaller, as an estimate."""
    return Pieces(program, pricing, parts).all()


def total_seconds(program: Program, pricing: Pricing) -> np.ndarray:
    """Seconds of a whole program by phase."""
    return Pieces(program, pricing).total_seconds()


def pass_seconds(program: Program, pricing: Pricing) -> tuple[float, float, float]:
    """Seconds of one microbatch: forward and the halves of the backward, operators and moves; parameters are there already."""
    found = {piece.key: piece.seconds for piece in pieces(program, pricing) if isinstance(piece.key, tuple) and piece.key[0] in ("op", "move")}
    forward, inputs, weights, *_ = np.array([NOTHING, *found.values()]).sum(axis=0).tolist()
    return forward, inputs, weights


def gathering_again_s(program: Program, pricing: Pricing) -> dict[int, float]:
    """Mesh axis -> seconds of a step that recomputation spends on all-gathers it repeats: part of the pieces, and of no table of a search."""
    found: dict[int, float] = {}
    for move in program.moves:
        if move.again:
            seconds = pricing.step("all_gather", move.step.axis, program.local_bytes(move.value, move.src))
            found[move.step.axis] = found.get(move.step.axis, 0.0) + program.residency.micro_batches * seconds
    return found


def compute_seconds(program: Program, pricing: Pricing) -> float:
    """Of these, what operators take in the forward and backward of a microbatch."""
    return Pieces(program, pricing).compute_seconds()


def step_seconds(program: Program, pricing: Pricing) -> float:
    """Seconds of a training step of a program that is no part of a pipeline."""
    forward, inputs, weights, *once = total_seconds(program, pricing).tolist()
    return program.residency.micro_batches * (forward + inputs + weights + 2 * pricing.cluster.host.action_s) + sum(once)


class _Done(NamedTuple):
    """What a piece takes before anything is computed again. Of an operator (`value` None) forward, the halves of its backward, and collectives inside it in both
    directions; of a move of a `value` along a `route`, in both directions."""

    op: int
    wanted_by: int
    number: int
    seconds: tuple[float, ...]
    value: int | None = None
    route: Route = ()
    collective: bool = False


class Pieces:
    """Those of a program. What modes of recomputation do not change is found once for all of them (`in_modes`)."""

    def __init__(self, program: Program, pricing: Pricing, parts: int = 1) -> None:
        self.program, self.graph, self.pricing, self.parts = program, program.graph, pricing, parts
        graph = self.graph
        self.weights = _made_of_weights(graph)
        self.computed = _searched(graph)
        self.block = {i: segment.block for segment in graph.segments for i in segment.ops if segment.block}
        self.live_moves = _live_moves(program)
        self.fused = fused_values(program) if pricing.kernels.fused else frozenset()
        self.uses = uses(graph)
        residency = program.residency
        self.sharding = Sharding(pricing, Keeping(micro_batches=residency.micro_batches, precision=residency.precision, offload=residency.offload))

    def in_modes(self, program: Program) -> "Pieces":
        """Of the same program under other modes of recomputation."""
        known = {"done": self.done, "states": self.states, "_together": self._together, "_sums": self._sums}
        made = copy(self)
        vars(made).update(known, program=program)
        vars(made).pop("shares", None)
        return made

    @cached_property
    def shares(self) -> Mapping[int, float]:
        return computed_again(self.graph, self.program.rules) if self.program.residency.recompute and self.pricing.kernels.repeats_collectives else {}

    def all(self) -> Iterator[Piece]:
        yield from (Piece(done.op, self.keys[done.number], self._seconds(done)) for done in self.done)
        yield from self.states

    def total_seconds(self) -> np.ndarray:
        """By phase."""
        asked = [(n, tuple(map(self.program.mode, segments))) for n, (segments, _) in enumerate(self._together)]
        self._sums.update({key: np.sum([self._seconds(done) for done in self._together[key[0]][1]], axis=0) for key in asked if key not in self._sums})
        return np.array([NOTHING, *[self._sums[key] for key in asked], *{piece.key: piece.seconds for piece in self.states}.values()]).sum(axis=0)

    @cached_property
    def _together(self) -> list[tuple[tuple[int, ...], list[_Done]]]:
        """What is done, each once, by the segments on whose modes depends how long it takes."""
        segment_of = {i: s for s, segment in enumerate(self.graph.segments) for i in segment.ops}
        near, found = defaultdict[int, set[int]](set), defaultdict[tuple[int, ...], list[_Done]](list)
        for done in self.done:
            near[done.number].update((segment_of[done.op], segment_of[done.wanted_by]))
        for done in {done.number: done for done in self.done}.values():
            found[tuple(sorted(near[done.number]))].append(done)
        return list(found.items())

    @cached_property
    def _sums(self) -> dict[tuple[int, tuple[str, ...]], np.ndarray]:
        """Of those, by number and these modes."""
        return {}

    def compute_seconds(self) -> float:
        """Of operators, forward and backward."""
        return sum(sum(self._seconds(done)) for done in self.done if done.value is None)

    @cached_property
    def done(self) -> list[_Done]:
        """Operators, each before its moves, and the moves to the ends."""
        graph, last, found = self.graph, len(self.graph.ops) - 1, list[_Done]()
        for i, op in enumerate(graph.ops):
            if self.computed.isdisjoint(op.operands):
                continue  # made of inputs alone: the search takes it for free, and so does this
            found.append(_Done(i, i, self._number(("op", op.name)), self._op(i)))
            for k, v in enumerate(op.operands):
                found += self._moves(i, v, self.program.full_route(v, self.program.routes[i, k]))
        ends = [*zip(graph.outputs, self.program.output_routes), *zip((v for _, v in graph.updates), self.program.update_routes)]
        for v, route in ends:
            found += self._moves(graph.producer.get(v, (last, 0))[0], v, self.program.full_route(v, route))
        return found

    @cached_property
    def states(self) -> list[Piece]:
        return list(self._states(len(self.graph.ops) - 1))

    @cached_property
    def keys(self) -> list[Hashable]:
        """By number."""
        return []

    @cached_property
    def _numbers(self) -> dict[Hashable, int]:
        return {}

    def _number(self, key: Hashable) -> int:
        if (number := self._numbers.get(key)) is None:
            number = self._numbers[key] = len(self.keys)
            self.keys.append(key)
        return number

    def _seconds(self, done: _Done) -> tuple[float, ...]:
        if done.value is None:
            forward, inputs, weights, inside, inside_back = done.seconds
            again, watched = forward * self._computed_again(done.op), self._watched_s(done.op)
            return (forward + inside + watched, inputs + again + inside_back + watched, weights, 0.0, 0.0, 0.0)
        there, back = done.seconds
        if self.program.move_of[done.value, done.route].again or (self.pricing.kernels.repeats_collectives and done.collective and self._computed_again(done.wanted_by)):
            back += there
        return (there, 0.0, back, 0.0, 0.0, 0.0) if done.value in self.weights else (there, back, 0.0, 0.0, 0.0, 0.0)

    def _share(self, v: int) -> float:
        """What is left of a value in a smaller microbatch."""
        return 1.0 if v in self.weights else 1.0 / self.parts

    def _op(self, i: int) -> tuple[float, ...]:
        op, rule = self.graph.ops[i], self.program.rules[i]
        of_weights, fused = (tuple([v in some for v in (*op.operands, *op.results)]) for some in (self.weights, self.fused))
        produced = tuple([self.program.produced[v] for v in op.results])
        key = ("operator", id(rule), self.program.strategies[i], produced, of_weights, fused, i in self.block, self.parts)
        _, (forward, inputs, weights), (inside, inside_back) = self.pricing.kept(key, lambda: (rule, *self._alone(i)))  # the rule beside it: an id is only a name while its object lives
        return forward, inputs, weights, inside, inside_back

    def _alone(self, i: int) -> tuple[tuple[float, float, float], tuple[float, float]]:
        """Seconds of an operator that is not computed again: its forward and the halves of its backward, and of the collectives inside it. Operators of one rule
        object are of one kind and size."""
        program, graph = self.program, self.graph
        op, rule, strategy = graph.ops[i], program.rules[i], program.strategies[i]
        moved = sum(program.local_bytes(v, program.needed(i, k)) * self._share(v) for k, v in enumerate(op.operands) if v not in self.fused)
        moved += sum(program.local_bytes(v, program.produced[v]) * self._share(v) for v in op.results if v not in self.fused)
        moved += written_beside(rule, strategy, program.mesh) / self.parts
        dtype = graph.values[op.results[0]].meta.dtype if op.results else "float32"
        share = max((self._share(v) for v in op.results), default=1.0)
        is_weight = i in self.block and op.kind in WITH_WEIGHTS and op.operands[-1] in self.weights
        work = work_of(rule, strategy, program.mesh, rule.flops / rule.degree(strategy, program.mesh) * share, moved, dtype, rows=share, is_weight=is_weight)
        forward, *halves = self.pricing.compute(work)
        differentiable = [v for v in op.operands if graph.values[v].meta.requires_grad]
        backward = sum(halves) if differentiable and any(graph.values[v].meta.requires_grad for v in op.results) else 0.0
        inputs, weights = _halves(backward, differentiable, self.weights) if op.kind in SPLIT else (backward, 0.0)
        if not self.fused.isdisjoint(op.results):  # its launch is that of the operator it is fused with
            forward, inputs = (max(0.0, s - self.pricing.cluster.device.kernel_launch_s) for s in (forward, inputs))
        return (forward, inputs, weights), self._inner(i, bool(backward), share)

    def _watched_s(self, i: int) -> float:
        """What keeping its result adds to an operator, in each direction."""
        watch_s = self.pricing.cluster.host.watch_s
        return watch_s if watch_s and self._kept_alone(i) and not self.graph.differentiated.isdisjoint(self.graph.ops[i].results) else 0.0

    def _mode(self, i: int) -> str:
        return self.program.residency.recompute.get(self.block.get(i, ""), "none")

    def _kept_alone(self, i: int) -> bool:
        op = self.graph.ops[i]
        return keeps_contractions(self._mode(i)) and kept_by_selective(op, [self.graph.values[v].meta for v in op.operands])

    def _computed_again(self, i: int) -> float:
        """The part of an operator's forward that recomputation does again."""
        kernels = self.pricing.kernels
        if kernels.stops_early and not kernels.repeats_collectives:
            return self.program.repeated.get(i, 0.0)
        if not computes_again(self._mode(i)) or self._kept_alone(i):
            return 0.0
        return self.shares.get(i, 0.0) if kernels.stops_early else float(not self.graph.differentiated.isdisjoint(self.graph.ops[i].results))

    def _inner(self, i: int, differentiable: bool, share: float) -> tuple[float, float]:
        """Collectives inside an operator, forward and backward."""
        program = self.program
        op, rule, strategy = self.graph.ops[i], program.rules[i], program.strategies[i]
        there = back = 0.0
        for inner in rule.inner:
            size = rule.local_numel(inner.dims, strategy, program.mesh) * DTYPE_BYTES[self.graph.values[op.results[0]].meta.dtype] * share
            seconds = sum(self.pricing.step(inner.primitive, a, size) for a, choice in enumerate(strategy) if choice == ("cut", inner.factor))
            there += inner.forward * seconds
            back += inner.backward * seconds if differentiable else 0.0
        return there, back

    def _moves(self, i: int, v: int, route: Route) -> Iterator[_Done]:
        """The moves of a value for an operator; those to where it is handed to its users are made with it."""
        if v not in self.computed:
            return
        handed, maker = len(self.program.relay.get(v, ())), self.graph.producer.get(v, (i, 0))[0]
        for n, step in enumerate(route_steps(route), start=1):
            size = self.program.local_bytes(v, route[n - 1]) * self._share(v)
            there = self.pricing.step(step.forward, step.axis, size)
            back = 0.0
            if (v, route[: n + 1]) in self.live_moves:
                back = self.pricing.step(step.backward, step.axis, step_input_bytes(step.backward, step, self.program.mesh, size, backward=True))
            number = self._number(("move", v, route[: n + 1]))
            yield _Done(maker if n < handed else i, i, number, (there, back), v, route[: n + 1], step.forward in COLLECTIVES)

    def _states(self, last: int) -> Iterator[Piece]:
        """Parameters: their memory, and the collectives that keep their parts and their copies together."""
        program, graph = self.program, self.graph
        for s, (segment, taken, back) in enumerate(zip(graph.segments, program.gathered, program.backward_segments)):
            for v in taken:
                yield Piece(segment.ops.start, ("unit", v, s), self._exchange(v, replace(self.uses[v], forward=1, backward=int(back))))
        ends = {*graph.outputs, *(v for _, v in graph.updates)}
        for v in graph.params:
            zero = program.residency.zero.get(v)
            meta, live = graph.values[v].meta, v in graph.differentiated
            seconds = NOTHING if zero is not None and zero.stage == 3 else self._exchange(v, replace(self.uses[v], forward=1, backward=1))
            seconds = (*seconds[:-1], self.sharding.update_s(meta, program.storage[v], zero, live))
            size = self.sharding.memory_bytes(meta, program.storage[v], zero, live)
            users = [i for i, _ in graph.consumers[v]] + ([last] if v in ends else [])
            for i in users:
                yield Piece(i, ("state", v), seconds, size)

    def _exchange(self, v: int, use: Use) -> tuple[float, ...]:
        program = self.program
        found = self.sharding.exchange(self.graph.values[v].meta, program.storage[v], program.residency.zero.get(v), program.deferred[v], use)
        return (found.forward_s, 0.0, found.backward_s, found.gather_s, found.reduce_s, 0.0)


def launches(program: Program, pricing: Pricing) -> tuple[int, int]:
    """Operators and collectives that a host launches for one microbatch, forward and backward."""
    pieces_of = Pieces(program, pricing)
    there = back = 0
    for i, (op, rule) in enumerate(zip(program.graph.ops, program.rules)):
        if rule.cost != "view" and not pieces_of.computed.isdisjoint(op.operands):
            live = not program.graph.differentiated.isdisjoint(op.results)
            shape = rule.product_shape(program.strategies[i], program.mesh)
            forward, backward = pricing.kernels.launches(rule.kernel, rule.kind, shape[0] if shape else 1)
            there += forward
            back += live * (2 if op.kind in SPLIT else backward) + forward * (pieces_of._computed_again(i) > 0)
    for move in program.moves:
        there += move.step.forward in COLLECTIVES
        back += move.again + (move.live and move.step.backward in COLLECTIVES)
    return there, back


def fused_values(program: Program) -> frozenset[int]:
    """Values that a pointwise operator makes for another one of the same block alone, where it lies."""
    graph, found = program.graph, set()
    block = {i: segment.block for segment in graph.segments for i in segment.ops}
    for i, (op, rule) in enumerate(zip(graph.ops, program.rules)):
        for v in op.results if rule.cost == "pointwise" else ():
            users = graph.consumers[v]
            if len(users) == 1 and v not in graph.finals:
                j, k = users[0]
                if program.rules[j].cost == "pointwise" and block[i] == block[j] and len(program.full_route(v, program.routes[j, k])) == 1:
                    found.add(v)
    return frozenset(found)


def _live_moves(program: Program) -> frozenset[tuple[int, Route]]:
    """(value, route up to and with a move) of the moves that a gradient comes back through."""
    return frozenset((v, route[:n]) for v, route, live in program.moving() if live for n in range(2, len(route) + 1))


def _searched(graph: OpGraph) -> frozenset[int]:
    """What depends on a parameter, of this stage or of those that it receives from."""
    found = {*graph.params, *(v for v, value in enumerate(graph.values) if value.role == "input" and not value.source)}
    for op in graph.ops:
        if not found.isdisjoint(op.operands):
            found.update(op.results)
    return frozenset(found)


def _made_of_weights(graph: OpGraph) -> frozenset[int]:
    """Parameters, and what is computed from them and from no input: the same for every sample."""
    found = {v for v, value in enumerate(graph.values) if value.role in ("param", "buffer", "constant")}
    for op in graph.ops:
        if op.operands and all(v in found for v in op.operands):
            found.update(op.results)
    return frozenset(found)


def _halves(backward_s: float, differentiable: list[int], weights: frozenset[int]) -> tuple[float, float]:
    """The backward of a contraction in gradients of inputs and gradients of weights: a product for each."""
    of_weights = [v in weights for v in differentiable]
    share = 0.0 if not any(of_weights) else 1.0 if all(of_weights) else 0.5
    return (1 - share) * backward_s, share * backward_s


def put_off_bytes(program: Program, ops: Iterable[int]) -> int:
    """Bytes that the second half of a split backward needs of these operators: inputs of contractions with weights, gradients of their results."""
    graph, kept = program.graph, {}
    for i in ops:
        op = graph.ops[i]
        if op.kind in SPLIT and not graph.differentiated.isdisjoint(op.results):
            for k, v in enumerate(op.operands):
                if graph.values[v].meta.requires_grad and graph.values[v].role != "param":
                    kept[v, program.needed(i, k)] = program.local_bytes(v, program.needed(i, k))
            kept[op.results[0], "gradient"] = program.local_bytes(op.results[0], program.produced[op.results[0]])
    return sum(kept.values())
