"""What an action reads and writes: the one definition of dependence, for making, checking and timing schedules.

Three values per stage and microbatch: its output, the gradient of its inputs, the gradient of its weights. A stage reads
the outputs of the stages that feed it and the input gradients of the stages it feeds. A transfer reads a value on one rank
and writes the same value on another.
"""

from collections.abc import Sequence
from typing import NamedTuple

from autopar.core.schedule import Action, Edge, Kind, microbatches_of


class Value(NamedTuple):
    """`what` is "output", "input gradient" or "weight gradient"."""

    what: str
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"the {self.what} of stage {self.stage} for microbatch {self.microbatch}"


class Flow:
    """Reads and writes of the actions of one schedule; every stage runs every microbatch, or its share of them."""

    def __init__(
        self, num_microbatches: int, placement: Sequence[int], edges: Sequence[Edge], tied: Sequence[Sequence[int]] = (), shares: Sequence[int] = ()
    ) -> None:
        stages = range(len(placement))
        self._microbatches = [microbatches_of(stage, num_microbatches, shares) for stage in stages]
        self._sources = [tuple(e.source for e in edges if e.target == stage) for stage in stages]
        self._readers = [tuple(e.target for e in edges if e.source == stage and e.has_gradient) for stage in stages]
        homes = {group[0]: {placement[stage]: [s for s in group if placement[s] == placement[stage]] for stage in group} for group in tied}
        self._tied: dict[tuple[int | None, int], list[int]] = {(first, stage): here for first, by_rank in homes.items() for here in by_rank.values() for stage in here}

    def reads(self, action: Action) -> tuple[Value, ...]:
        """Values that must be on the rank before the action runs."""
        kind, stage, m = action.kind, action.stage, action.microbatch
        if m is None:
            stages = [stage] if kind in (Kind.REDUCE, Kind.STEP) else self._tied.get((action.peer, stage), []) if kind is Kind.TIE else []
            return tuple(Value("weight gradient", s, i) for s in stages for i in self._microbatches[s])
        if kind is Kind.F:
            return tuple(Value("output", source, m) for source in self._sources[stage])
        if kind in (Kind.B, Kind.I):
            return (Value("output", stage, m), *(Value("input gradient", reader, m) for reader in self._readers[stage]))
        if kind is Kind.W:
            return (Value("input gradient", stage, m),)
        if kind is Kind.SEND_F:
            return (Value("output", stage, m),)
        if kind is Kind.SEND_B:
            return (Value("input gradient", stage, m),)
        return (Value("weight gradient", stage, m),) if kind is Kind.REDUCE else ()

    def writes(self, action: Action) -> tuple[Value, ...]:
        """Values that are on the rank once the action has run."""
        kind, stage, m = action.kind, action.stage, action.microbatch
        if m is None:
            return ()
        if kind is Kind.F:
            return (Value("output", stage, m),)
        if kind is Kind.B:
            return Value("input gradient", stage, m), Value("weight gradient", stage, m)
        if kind is Kind.I:
            return (Value("input gradient", stage, m),)
        if kind is Kind.W:
            return (Value("weight gradient", stage, m),)
        if action.peer is not None and kind is Kind.RECV_F:
            return (Value("output", action.peer, m),)
        if action.peer is not None and kind is Kind.RECV_B:
            return (Value("input gradient", action.peer, m),)
        return ()
