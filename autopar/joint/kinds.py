"""What one sharding of a deep model costs by kind of stage: seconds and bytes of three blocks, from which those of any stage follow.

The program of the short graph is cut into three stages of one block each: with all that comes before the run, in the middle, with all that
comes after. A stage of n blocks costs what the stage of its kind does and n - 1 times the middle one; so it is with bytes. Blocks may be computed again
or not, each for itself: `Kinds` are made for every mode, and a `Mixture` has some blocks in one and some in another.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Any, NamedTuple, TypeVar

import numpy as np

from autopar.core.memory import MemoryUse
from autopar.core.pipeline import RECEIVES_AHEAD, SENDS_BEHIND
from autopar.cost_models.pipeline import StageCost
from autopar.joint.cut import ALL, MIDDLE, SHOWN_BY, STATE, Cut, PerKind
from autopar.joint.fold import shown
from autopar.planner.blocks import Order
from autopar.planner.held import Beside, fullest_bytes
from autopar.planner.liveness import Liveness, fullest
from autopar.program import Program
from autopar.schedules.held import held_counts

T = TypeVar("T")

Held = tuple[tuple[int, tuple[int, int]], ...]
"""The stages of a rank, those first whose blocks get the heavier of two modes first, and of each the kind and the number of blocks."""


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
    _of_ranks: dict[tuple, Any] = field(default_factory=dict)
    _lines: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)
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

    def _known(self, about: str, order: Order, *question: Hashable, find: Callable[[], T]) -> T:
        """What is asked of a rank, found once."""
        key = about, order.schedule, order.num_ranks, order.num_microbatches, *question
        if key not in self._of_ranks:
            self._of_ranks[key] = find()
        return self._of_ranks[key]  # type: ignore[no-any-return]

    def peak(self, order: Order, rank: int, held: tuple[tuple[int, Depth], ...]) -> MemoryUse:
        """Of a rank that holds stages of these kinds and depths: what shows of it computes; its other blocks, and the microbatches that are on their
        way, lie beside it."""
        return self._known("peak", order, rank, held, find=lambda: self._peak(order, rank, held))

    def _peak(self, order: Order, rank: int, held: tuple[tuple[int, Depth], ...]) -> MemoryUse:
        kept = int(self._most_kept(order, rank, np.array([[self._kept(*stage)] for stage in held]), [(kind, depth.blocks) for kind, depth in held])[0])
        whole = self.light.cut.state_bytes(tuple((kind, depth.blocks) for kind, depth in held))
        light = {k for k, depth in held if depth.heavy < depth.blocks}
        heavy = {k for k, depth in held if depth.heavy}
        queued = self._queued(order, len(held))
        computing = [(self.light, k) for k in sorted(light)] + [(self.heavy, k) for k in sorted(heavy)]
        peaks = [kinds.peak(k, replace(self._beside(k, whole, queued), activations=max(0, kept - kinds.kept_bytes[k]))) for kinds, k in computing]
        return max(peaks, key=lambda peak: peak.high_bytes)

    def _most_kept(self, order: Order, rank: int, kept: np.ndarray, held: Sequence[tuple[int, int | np.ndarray]]) -> np.ndarray:
        """What a rank keeps at most of all microbatches, where its stages keep so much of one. `kept`: [stage, way]; where a stage has no microbatch yet, there is
        what its parameters arrive in."""
        of_kind = self.light.cut.arriving_bytes
        arriving = [of_kind[kind] + (blocks - SHOWN_BY[kind]) * of_kind[MIDDLE] if order.num_ranks > 1 else 0 for kind, blocks in held]
        arriving = np.array(arriving).reshape(len(held), -1)
        counts = _counts(order)[rank][:, :, None]
        return np.where(counts, counts * kept, arriving).sum(axis=1).max(axis=0)

    def _queued(self, order: Order, num_stages: int) -> Beside:
        """Messages of a rank of so many stages."""
        message = max(self.light.cut.message.activation_bytes, self.light.cut.message.gradient_bytes) if order.num_ranks > 1 else 0
        return Beside(communication=RECEIVES_AHEAD * message, unsettled=SENDS_BEHIND * num_stages * message)

    def high_bytes(self, order: Order, rank: int, held: Held, *, heavy: bool) -> np.ndarray:
        """[number + 1]: the bytes of `peak` with so many blocks of the rank in the heavier mode, those of the first of its stages, while a block computes that is in
        the heavier mode, or one in the lighter; 0 where there is none."""
        return self._known("high_bytes", order, rank, held, heavy, find=lambda: self._high_bytes(order, rank, held, heavy))

    def _high_bytes(self, order: Order, rank: int, held: Held, heavy: bool) -> np.ndarray:
        stages = tuple([stage for _, stage in sorted(held)])
        most = self._most_kept(order, rank, self._by_number(held), stages)
        whole, queued, kinds = self.light.cut.state_bytes(stages), self._queued(order, len(held)), self.heavy if heavy else self.light
        computing, before = dict[int, int](), 0
        for _, (kind, blocks) in held:  # a block in the heavier mode from the first number of a kind on, one in the lighter to before the last
            computing[kind] = computing.get(kind, before + 1) if heavy else before + blocks
            before += blocks
        high = np.zeros(before + 1, dtype=int)
        for kind, number in computing.items():
            some = slice(number, None) if heavy else slice(number)
            high[some] = np.maximum(high[some], kinds.high_bytes(kind, self._beside(kind, whole, queued), np.maximum(0, most[some] - kinds.kept_bytes[kind])))
        return high

    def high_by_blocks(self, order: Order, rank: int, kind: int) -> np.ndarray:
        """[blocks - 1]: the bytes of `peak` of a rank that holds one stage, of this kind, of so many blocks, all in the lighter mode."""
        return self._known("high_by_blocks", order, rank, kind, find=lambda: self._high_by_blocks(order, rank, kind))

    def _high_by_blocks(self, order: Order, rank: int, kind: int) -> np.ndarray:
        cut, more = self.light.cut, np.arange(self.light.cut.run.depth)
        one, two = (cut.state_bytes(((kind, blocks),)) for blocks in (1, 2))
        kept = self._most_kept(order, rank, self._kept_by_blocks(kind)[None], [(kind, more + 1)])
        beside = Beside(**{part: more * (two[part] - one[part]) for part in STATE if not (part == "temporaries" and cut.engine.one_by_one)})
        queued = self._queued(order, 1)
        beside = replace(beside, communication=queued.communication, unsettled=queued.unsettled)
        return self.light.high_bytes(kind, beside, np.maximum(0, kept - self.light.kept_bytes[kind]))

    def least_by_blocks(self, order: Order, rank: int, kind: int) -> np.ndarray:
        """[blocks - 1]: of the same rank `least_bytes`."""
        return self._known("least_by_blocks", order, rank, kind, find=lambda: self._least_by_blocks(order, rank, kind))

    def _least_by_blocks(self, order: Order, rank: int, kind: int) -> np.ndarray:
        cut = self.light.cut
        one, two = (sum([cut.state_bytes(((kind, blocks),))[part] for part in ("parameters", "optimizer", "gradients")]) for blocks in (1, 2))
        state = one - cut.states[kind].gradients + np.arange(cut.run.depth) * (two - one)
        return state + (_counts(order)[rank] * self._kept_by_blocks(kind)).max(axis=0)

    def _kept_by_blocks(self, kind: int) -> np.ndarray:
        return self.light.kept_bytes[kind] + np.arange(self.light.cut.run.depth) * self.light.kept_inside

    def least_bytes(self, order: Order, rank: int, held: Held) -> np.ndarray:
        """[number + 1]: no `peak` is lower with so many blocks of the rank in the heavier mode, those of the first of its stages.
        No walk back is needed to know it: when the last of what is kept is made, parameters and optimizer state are there, and gradients of the stages that do
        not compute."""
        return self._known("least_bytes", order, rank, held, find=lambda: self._least_bytes(order, rank, held))

    def _least_bytes(self, order: Order, rank: int, held: Held) -> np.ndarray:
        stages, states = tuple([stage for _, stage in sorted(held)]), self.light.cut.states
        state = self.light.cut.state_bytes(stages)
        least = state["parameters"] + state["optimizer"] + state["gradients"] - max([states[k].gradients for k, _ in stages])
        return least + (_counts(order)[rank] @ self._by_number(held)).max(axis=0)

    def _by_number(self, held: Held) -> np.ndarray:
        """[stages, number + 1]: what each stage of a rank keeps of a microbatch with so many of its blocks in the heavier mode."""
        if len(held) == 1:
            return self._by_heavy(*held[0][1])[None]
        places = _heavier(tuple([blocks for _, (_, blocks) in held]))
        kept = {s: self._by_heavy(*stage)[heavier] for (s, stage), heavier in zip(held, places)}
        return np.array([kept[s] for s in sorted(kept)])

    def _by_heavy(self, kind: int, blocks: int) -> np.ndarray:
        """[number + 1]: `_kept` with so many blocks in the heavier mode."""
        if (found := self._lines.get((kind, blocks))) is None:
            found = self._kept(kind, Depth(blocks)) + np.arange(blocks + 1) * (self.heavy.kept_inside - self.light.kept_inside)
            found[blocks] = self._kept(kind, Depth(blocks, blocks))
            self._lines[kind, blocks] = found
        return found

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


@lru_cache(maxsize=1024)
def _heavier(blocks: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    """By stage [number + 1]: how many of its blocks are among the first so many of all."""
    numbers = np.arange(sum(blocks) + 1)
    return tuple([np.minimum(np.maximum(0, numbers - before), own) for own, before in zip(blocks, accumulate(blocks, initial=0))])
