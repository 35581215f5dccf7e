"""What one sharding of a deep model costs by kind of stage: seconds and bytes of three blocks, from which those of any stage follow.

The program of the short graph is cut into three stages of one block each: with all that comes before the run, in the middle, with all that
comes after. A stage of n blocks costs what the stage of its kind does and n - 1 times the middle one; so it is with bytes. Blocks may be computed again
or not, each for itself: `Kinds` are made for every mode, and a `Mixture` has some blocks in one and some in another.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import NamedTuple, TypeVar

import numpy as np

from autopar.core.memory import MemoryUse
from autopar.core.pipeline import RECEIVES_AHEAD, SENDS_BEHIND, Pipeline
from autopar.core.unroll import Run
from autopar.cost_models.pipeline import EdgeCost, StageCost
from autopar.joint.fold import SHOWN, shown
from autopar.planner.blocks import Order
from autopar.planner.held import Beside, fullest_bytes, state_of
from autopar.planner.liveness import Engine, Liveness, fullest
from autopar.planner.staging import Staged, Walked
from autopar.planner.states import Pricing
from autopar.planner.work import Pieces, put_off_bytes
from autopar.program import Program, Tensor
from autopar.schedules.held import held_counts
from autopar.stages import Stages, cut_into_stages

FIRST, MIDDLE, LAST, ALL = range(4)
"""Kinds of stages of one block, and that of all three, which stands for a model that is one stage."""

SHOWN_BY = (1, 1, 1, SHOWN)
"""Blocks of the run in a stage of each kind."""

STATE = ("parameters", "gradients", "optimizer", "temporaries", "delivered")
"""What a rank holds of blocks that do not compute; temporaries, and gradients as they are delivered, are those of the optimizer step."""

T = TypeVar("T")


class PerKind(Sequence[T]):
    """A figure of every kind, made when it is asked for."""

    def __init__(self, make: Callable[[int], T]) -> None:
        self._make, self._made = make, dict[int, T]()

    def __len__(self) -> int:
        return len(SHOWN_BY)

    def __getitem__(self, kind: int) -> T:
        if kind in self._made:
            return self._made[kind]
        if kind not in range(len(self)):
            raise IndexError(kind)
        return self._made.setdefault(kind, self._make(kind))


@dataclass(frozen=True, eq=False)
class Cut:
    """The three stages of one block each, and the one of all three, of a program of which no block is computed again: what other modes do not change."""

    program: Program
    pricing: Pricing
    run: Run
    engine: Engine

    @cached_property
    def stages(self) -> Stages:
        graph = self.program.graph
        first_op = {segment.block: graph.ops[segment.ops.start].name for segment in graph.segments}
        return cut_into_stages(self.program, Pipeline(3, tuple(first_op[block] for block in shown(self.run)[1:])))

    @cached_property
    def programs(self) -> Sequence[Program]:
        return PerKind(lambda kind: self.program if kind == ALL else self.stages.stages[kind].program)

    @cached_property
    def walks(self) -> Sequence[Liveness]:
        return PerKind(lambda kind: Liveness.of(self.programs[kind]))

    @cached_property
    def pieces(self) -> Sequence[Pieces]:
        return PerKind(lambda kind: Pieces(self.programs[kind], self.pricing))

    @cached_property
    def walked(self) -> dict[Hashable, Walked]:
        """Stages of plans on the whole graph, by their form."""
        return {}

    @cached_property
    def wholes(self) -> dict[Hashable, Staged]:
        """The plan on the whole graph that was asked for last, none of whose blocks is computed again, by what it is a plan of."""
        return {}

    @cached_property
    def put_off_bytes(self) -> Sequence[int]:
        return PerKind(lambda kind: put_off_bytes(self.programs[kind], range(len(self.programs[kind].graph.ops))))

    @cached_property
    def states(self) -> Sequence[Beside]:
        return PerKind(lambda kind: state_of(self.programs[kind]))

    @cached_property
    def _middle_alone(self) -> frozenset[Tensor]:
        """What the block in the middle takes of what is computed once a step, and no other operator does."""
        program, block = self.program, shown(self.run)[MIDDLE]
        inside, beside = [], []
        for segment in program.graph.segments:
            (inside if segment.block == block else beside).extend(program.standing(segment.ops))
        return frozenset(inside).difference(beside)

    def lasting_bytes(self, held: tuple[tuple[int, int], ...]) -> int:
        """What a rank that holds stages of these kinds and numbers of blocks computes once a step and keeps: what several of them read is there once."""
        if held not in self._lasting:
            of_stages = [self.walks[kind].steps.lasting for kind, _ in held]
            shared = of_stages if self.program.communicates_once else [{there: size for lasting in of_stages for there, size in lasting.items()}]
            sizes = self.walks[ALL if held[0][0] == ALL else MIDDLE].steps.lasting
            alone = sum(size for there, size in sizes.items() if there <= self._middle_alone)
            more = sum(blocks - SHOWN_BY[kind] for kind, blocks in held) + (0 if self.program.communicates_once else max(0, [k for k, _ in held].count(MIDDLE) - 1))
            self._lasting[held] = sum(sum(sizes.values()) for sizes in shared) + more * alone
        return self._lasting[held]

    @cached_property
    def _lasting(self) -> dict[tuple[tuple[int, int], ...], int]:
        return {}

    @cached_property
    def arriving_bytes(self) -> Sequence[int]:
        return PerKind(lambda kind: self.walks[kind].holdings.arriving_bytes)

    @cached_property
    def message(self) -> EdgeCost:
        there, back = self.stages.message_bytes(FIRST, MIDDLE), self.stages.message_bytes(FIRST, MIDDLE, back=True)
        price = self.pricing.message
        return EdgeCost(activation_s=price(there), gradient_s=price(back), activation_bytes=there, gradient_bytes=back)


@dataclass(frozen=True, eq=False)
class Kinds:
    """The stages of a cut with its blocks computed again in one mode."""

    cut: Cut
    mode: str

    @cached_property
    def _recompute(self) -> Mapping[str, str]:
        run, given = shown(self.cut.run), self.cut.program.residency.recompute
        again = dict.fromkeys(run, self.mode) if self.mode != "none" else {}
        return {**{block: mode for block, mode in given.items() if block not in run}, **again}

    @cached_property
    def programs(self) -> Sequence[Program]:
        return PerKind(lambda kind: self._in_mode(self.cut.programs[kind]))

    def _in_mode(self, program: Program) -> Program:
        return program.in_modes(self._recompute)

    @cached_property
    def walks(self) -> Sequence[Liveness]:
        return PerKind(lambda kind: replace(self.cut.walks[kind], program=self.programs[kind]))

    @property
    def program(self) -> Program:
        """With all three blocks."""
        return self.programs[ALL]

    @cached_property
    def seconds(self) -> Sequence[Sequence[float]]:
        return PerKind(lambda kind: self.cut.pieces[kind].in_modes(self.programs[kind]).total_seconds().tolist())

    @property
    def block_s(self) -> float:
        """Of a microbatch's passes through a block in the middle."""
        return sum(self.seconds[MIDDLE][:3])

    @cached_property
    def kept_bytes(self) -> Sequence[int]:
        """Of one microbatch, from forward to backward."""
        return PerKind(lambda kind: sum(self._kept if kind == ALL else self.walks[kind].kept_by_segment()))

    @cached_property
    def _kept(self) -> tuple[int, ...]:
        return self.walks[ALL].kept_by_segment()

    @cached_property
    def kept_inside(self) -> int:
        """The same of a block that takes from one and hands to one of its own stage."""
        return sum(kept for kept, segment in zip(self._kept, self.program.graph.segments) if segment.block == shown(self.cut.run)[MIDDLE])

    def peak(self, kind: int, beside: Beside) -> MemoryUse:
        """The fullest moment of a stage of this kind. What lies beside it is there at every moment, so the moment is the same for all."""
        return fullest(self._alone[kind], beside)

    def high_bytes(self, kind: int, beside: Beside, activations: np.ndarray) -> np.ndarray:
        """Of `peak`, with each of so many activations beside it."""
        return fullest_bytes(self._alone[kind], beside, activations)

    @cached_property
    def _alone(self) -> Sequence[tuple[MemoryUse, ...]]:
        return PerKind(lambda kind: self.walks[kind].moments(self.cut.engine))

    def with_heavy(self, heavy: "Kinds") -> "Mixture":
        """This mode for some blocks of a stage, `heavy` for others."""
        return self._mixtures.setdefault(heavy, Mixture(self, heavy))

    @cached_property
    def _mixtures(self) -> dict["Kinds", "Mixture"]:
        return {}


class Depth(NamedTuple):
    """Blocks of a stage, of which `heavy` are computed again in the second mode of a `Mixture`."""

    blocks: int
    heavy: int = 0


@dataclass(frozen=True, eq=False)
class Mixture:
    """Figures of stages whose blocks are computed again in one of two modes. A cache too: stages are priced once."""

    light: Kinds
    heavy: Kinds
    _costs: dict[tuple[int, Depth], StageCost] = field(default_factory=dict)
    _peaks: dict[tuple, MemoryUse] = field(default_factory=dict)
    _least: dict[tuple, np.ndarray] = field(default_factory=dict)
    _high: dict[tuple, np.ndarray] = field(default_factory=dict)
    _steps: dict[tuple[Order, tuple[Depth, ...]], tuple[float, float]] = field(default_factory=dict)
    _numbers: dict[Hashable, tuple[float, int | None]] = field(default_factory=dict)

    def number(self, about: Hashable, limit_bytes: float, find: Callable[[], int | None]) -> int | None:
        """Of blocks in the heavier mode: found once for what it is `about` and the limit that was asked for last."""
        limit, found = self._numbers.get(about, (math.nan, None))
        if limit != limit_bytes:
            found = find()
            self._numbers[about] = limit_bytes, found
        return found

    def step_s(self, order: Order, depths: tuple[Depth, ...], timed: Callable[[float], float], enough_s: float = math.inf) -> float:
        """Of stages of these depths, `timed` once; where a step takes no less than `enough_s`, it may be inf instead."""
        seconds, known_s = self._steps.get((order, depths), (math.inf, 0.0))
        if seconds == math.inf and enough_s > known_s:  # it takes no less than what is known
            seconds = timed(enough_s)
            self._steps[order, depths] = seconds, enough_s
        return seconds

    def cost(self, kind: int, depth: Depth) -> StageCost:
        if (found := self._costs.get((kind, depth))) is None:
            forward, inputs, weights, gather, reduce, update = self._seconds(kind, depth)
            put_off = self.light.cut.put_off_bytes
            found = self._costs[kind, depth] = StageCost(
                forward_s=forward, input_gradient_s=inputs, weight_gradient_s=weights, gather_s=gather, reduce_s=reduce, step_s=update,
                activation_bytes=self._kept(kind, depth), weight_activation_bytes=put_off[kind] + (depth.blocks - SHOWN_BY[kind]) * put_off[MIDDLE],
            )  # fmt: skip
        return found

    def _seconds(self, kind: int, depth: Depth) -> list[float]:
        """By phase, from those of the kinds under both modes."""
        own, blocks = self.heavy if depth.heavy == depth.blocks else self.light, depth.blocks - depth.heavy
        figures = zip(self.light.seconds[MIDDLE], self.heavy.seconds[MIDDLE], own.seconds[kind], own.seconds[MIDDLE], strict=True)
        return [max(0.0, blocks * light + depth.heavy * heavy + stage - SHOWN_BY[kind] * block) for light, heavy, stage, block in figures]

    def _kept(self, kind: int, depth: Depth) -> int:
        """Between forward and backward of a microbatch. What one block hands to another is kept by the one that makes it."""
        every, counted = depth.heavy == depth.blocks, SHOWN_BY[kind]
        own, light, heavy = self.heavy if every else self.light, self.light.kept_inside, self.heavy.kept_inside
        inside = (depth.blocks - counted) * heavy if every else depth.heavy * heavy + (depth.blocks - depth.heavy - counted) * light
        return own.kept_bytes[kind] + inside

    def peak(self, order: Order, rank: int, held: tuple[tuple[int, Depth], ...]) -> MemoryUse:
        """Of a rank that holds stages of these kinds and depths: what shows of it computes; its other blocks, and the microbatches that are on their
        way, lie beside it."""
        key = order.schedule, order.num_ranks, order.num_microbatches, rank, held
        if key not in self._peaks:
            self._peaks[key] = self._peak(order, rank, held)
        return self._peaks[key]

    def _peak(self, order: Order, rank: int, held: tuple[tuple[int, Depth], ...]) -> MemoryUse:
        counts = _counts(order)[rank]
        kept = int(np.where(counts, counts * [self._kept(*stage) for stage in held], self._arriving(order, held)).sum(axis=1).max())
        whole = self._state(tuple((kind, depth.blocks) for kind, depth in held))
        light = {k for k, depth in held if depth.heavy < depth.blocks}
        heavy = {k for k, depth in held if depth.heavy}
        queued = self._queued(order, len(held))
        computing = [(self.light, k) for k in sorted(light)] + [(self.heavy, k) for k in sorted(heavy)]
        peaks = [kinds.peak(k, replace(self._beside(k, whole, queued), activations=max(0, kept - kinds.kept_bytes[k]))) for kinds, k in computing]
        return max(peaks, key=lambda peak: peak.high_bytes)

    def _arriving(self, order: Order, held: tuple[tuple[int, Depth], ...]) -> list[int]:
        """What parameters of each stage arrive in while it has no microbatch yet."""
        of_kind = self.light.cut.arriving_bytes
        return [of_kind[kind] + (depth.blocks - SHOWN_BY[kind]) * of_kind[MIDDLE] if order.num_ranks > 1 else 0 for kind, depth in held]

    def _queued(self, order: Order, num_stages: int) -> Beside:
        """Messages of a rank of so many stages."""
        message = max(self.light.cut.message.activation_bytes, self.light.cut.message.gradient_bytes) if order.num_ranks > 1 else 0
        return Beside(communication=RECEIVES_AHEAD * message, unsettled=SENDS_BEHIND * num_stages * message)

    def high_bytes(self, order: Order, rank: int, held: Mapping[int, tuple[int, int]], *, heavy: bool) -> np.ndarray:
        """[number + 1]: the bytes of `peak` with so many blocks of the rank in the heavier mode, those of the first of its stages, while a block computes that is in
        the heavier mode, or one in the lighter; 0 where there is none. `held`: kind and blocks by stage."""
        key = order.schedule, order.num_ranks, order.num_microbatches, rank, tuple(held.items()), heavy
        if key not in self._high:
            self._high[key] = self._high_bytes(order, rank, held, heavy)
        return self._high[key]

    def _high_bytes(self, order: Order, rank: int, held: Mapping[int, tuple[int, int]], heavy: bool) -> np.ndarray:
        counts, kept = _counts(order)[rank], self._kept_by_number(held)
        stages = [held[s] for s in sorted(held)]
        arriving = self._arriving(order, tuple((kind, Depth(blocks)) for kind, blocks in stages))
        most = np.where(counts[:, :, None], counts[:, :, None] * kept, np.array(arriving)[:, None]).sum(axis=1).max(axis=0)
        whole, queued, kinds = self._state(tuple(stages)), self._queued(order, len(held)), self.heavy if heavy else self.light
        computing, before = dict[int, int](), 0
        for kind, blocks in held.values():  # a block in the heavy mode from the first number of a kind on, one in the light mode to before the last
            computing[kind] = min(before + 1, computing.get(kind, before + 1)) if heavy else before + blocks
            before += blocks
        high = np.zeros(before + 1, dtype=int)
        for kind, number in computing.items():
            some = slice(number, None) if heavy else slice(number)
            bytes_of_kind = kinds.high_bytes(kind, self._beside(kind, whole, queued), (most[some] - kinds.kept_bytes[kind]).clip(0))
            high[some] = np.maximum(high[some], bytes_of_kind)
        return high

    def _kept_by_number(self, held: Mapping[int, tuple[int, int]]) -> np.ndarray:
        """[stages, number + 1]: what stages of a rank keep of a microbatch with so many of its blocks in the heavier mode."""
        numbers, before, kept = np.arange(sum(blocks for _, blocks in held.values()) + 1), 0, {}
        for s, (kind, blocks) in held.items():
            by_heavy = self._kept(kind, Depth(blocks)) + np.arange(blocks + 1) * (self.heavy.kept_inside - self.light.kept_inside)
            by_heavy[blocks] = self._kept(kind, Depth(blocks, blocks))
            kept[s] = by_heavy[(numbers - before).clip(0, blocks)]
            before += blocks
        return np.array([kept[s] for s in sorted(kept)])

    def _state(self, held: tuple[tuple[int, int], ...]) -> dict[str, int]:
        """What a rank holds between passes of stages of these kinds and numbers of blocks."""
        states = self.light.cut.states
        found = {part: sum(getattr(states[k], part) + (blocks - SHOWN_BY[k]) * getattr(states[MIDDLE], part) for k, blocks in held) for part in STATE}
        found["parameters"] += self.light.cut.lasting_bytes(held)
        return found

    def least_bytes(self, order: Order, rank: int, held: Mapping[int, tuple[int, int]]) -> np.ndarray:
        """[number + 1]: no `peak` is lower with so many blocks of the rank in the heavier mode, those of the first of its stages; `held`: kind and blocks by stage.
        No walk back is needed to know it: when the last of what is kept is made, parameters and optimizer state are there, and gradients of the stages that do
        not compute."""
        key = order.schedule, order.num_ranks, order.num_microbatches, rank, tuple(held.items())
        if key not in self._least:
            self._least[key] = self._least_bytes(order, rank, held)
        return self._least[key]

    def _least_bytes(self, order: Order, rank: int, held: Mapping[int, tuple[int, int]]) -> np.ndarray:
        state, states = self._state(tuple(held.values())), self.light.cut.states
        least = state["parameters"] + state["optimizer"] + state["gradients"] - max(states[k].gradients for k, _ in held.values())
        return least + (_counts(order)[rank] @ self._kept_by_number(held)).max(axis=0)

    def _beside(self, kind: int, whole: Mapping[str, int], queued: Beside) -> Beside:
        """While a stage of this kind computes: what it has of the `whole` state is its own, the rest lies beside it."""
        cut = self.light.cut
        parts = {part: max(0, total - getattr(cut.states[kind], part)) for part, total in whole.items()}
        parts["parameters"] = max(0, parts["parameters"] - cut.lasting_bytes(((kind, SHOWN_BY[kind]),)))
        if cut.engine.one_by_one:
            parts["temporaries"] = 0
        return replace(queued, **parts)


@lru_cache(maxsize=64)
def _counts(order: Order) -> tuple[np.ndarray, ...]:
    """By rank [moments, stages]: microbatches that it holds of each of its stages."""
    return tuple(map(np.array, held_counts(order.schedule, order.num_ranks, order.num_microbatches, order.virtual)))
