"""The three stages of one block each that stand for those of a deep model, before any block is computed again: what a sharding has whatever the mode."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from autopar.core.pipeline import Pipeline
from autopar.core.unroll import Run
from autopar.cost_models.pipeline import EdgeCost
from autopar.joint.fold import SHOWN, shown
from autopar.planner.held import Beside, state_of
from autopar.planner.liveness import Engine, Liveness
from autopar.planner.staging import Staged, Walked
from autopar.planner.states import Pricing
from autopar.planner.work import Pieces, put_off_bytes
from autopar.program import Program, Tensor
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

    def state_bytes(self, held: tuple[tuple[int, int], ...]) -> Mapping[str, int]:
        """What a rank holds between passes of stages of these kinds and numbers of blocks."""
        if held not in self._state:
            found = {part: sum([getattr(self.states[k], part) + (blocks - SHOWN_BY[k]) * getattr(self.states[MIDDLE], part) for k, blocks in held]) for part in STATE}
            found["parameters"] += self.lasting_bytes(held)
            self._state[held] = found
        return self._state[held]

    @cached_property
    def _state(self) -> dict[tuple[tuple[int, int], ...], dict[str, int]]:
        return {}

    @cached_property
    def arriving_bytes(self) -> Sequence[int]:
        return PerKind(lambda kind: self.walks[kind].holdings.arriving_bytes)

    @cached_property
    def message(self) -> EdgeCost:
        there, back = self.stages.message_bytes(FIRST, MIDDLE), self.stages.message_bytes(FIRST, MIDDLE, back=True)
        price = self.pricing.message
        return EdgeCost(activation_s=price(there), gradient_s=price(back), activation_bytes=there, gradient_bytes=back)
