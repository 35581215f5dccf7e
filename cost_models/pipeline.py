"""What the stages and edges of a pipeline cost: the table that the simulator of a schedule reads (`timeline.py`)."""

from dataclasses import dataclass

from autopar.core.schedule import RECEIVES, Action, Kind, Schedule
from autopar.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCost:
    """One stage, and one microbatch where the schedule says so. Recomputation belongs to `input_gradient_s`.

    `weight_activation_bytes` is the part of `activation_bytes` (and gradients kept for it) that W still reads after I. From a GATHER on there are
    `gathered_bytes` until the FREE and, until the next computation takes in what has come, `arriving_bytes`.
    """

    forward_s: float
    input_gradient_s: float
    weight_gradient_s: float
    activation_bytes: int = 0
    weight_activation_bytes: int = 0
    state_bytes: int = 0
    arriving_bytes: int = 0
    gathered_bytes: int = 0
    gather_s: float = 0.0
    reduce_s: float = 0.0
    step_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class EdgeCost:
    """What crosses an edge per microbatch, and how long it takes; the gradients may be fewer bytes than the activations."""

    activation_s: float = 0.0
    gradient_s: float = 0.0
    activation_bytes: int = 0
    gradient_bytes: int = 0


@dataclass(frozen=True)
class PipelineCost:
    """Costs of the stages, of the schedule's edges and of its tied groups, each in the schedule's order. None: free edges, free sums."""

    stages: tuple[StageCost, ...]
    edges: tuple[EdgeCost, ...] | None = None
    tie_s: tuple[float, ...] | None = None

    @classmethod
    def uniform(cls, num_stages: int, *, forward_s: float = 1.0, input_gradient_s: float = 1.0, weight_gradient_s: float = 1.0) -> "PipelineCost":
        """Equal stages and free messages: what the textbook formulas assume."""
        return cls((StageCost(forward_s=forward_s, input_gradient_s=input_gradient_s, weight_gradient_s=weight_gradient_s),) * num_stages)


class Prices:
    """Seconds and bytes of a schedule's actions."""

    def __init__(self, schedule: Schedule, cost: PipelineCost) -> None:
        edges = cost.edges if cost.edges is not None else (EdgeCost(),) * len(schedule.edges)
        tie_s = cost.tie_s if cost.tie_s is not None else (0.0,) * len(schedule.tied)
        for what, given, wanted in (("stages", cost.stages, schedule.placement), ("edges", edges, schedule.edges), ("tied groups", tie_s, schedule.tied)):
            if len(given) != len(wanted):
                raise UsageError(f"costs of {len(given)} {what} for schedule {schedule.name} with {len(wanted)}")
        self.stages, self.edges = cost.stages, edges
        self._edges = {(e.source, e.target): c for e, c in zip(schedule.edges, edges, strict=True)}
        self._tie_s = {group[0]: seconds for group, seconds in zip(schedule.tied, tie_s, strict=True)}

    def message(self, transfer: Action) -> tuple[float, int]:
        """Of a send or of its receive."""
        kind, stage, peer = transfer.kind, transfer.stage, transfer.peer
        assert peer is not None, f"{transfer} is no message"
        edge = self._edges[(stage, peer) if kind is Kind.SEND_F or kind is Kind.RECV_B else (peer, stage)]
        return (edge.activation_s, edge.activation_bytes) if kind is Kind.SEND_F or kind is Kind.RECV_F else (edge.gradient_s, edge.gradient_bytes)

    def seconds(self, action: Action) -> float:
        """Of anything but a message."""
        stage = self.stages[action.stage]
        match action.kind:
            case Kind.F:
                return stage.forward_s
            case Kind.B:
                return stage.input_gradient_s + stage.weight_gradient_s
            case Kind.I:
                return stage.input_gradient_s
            case Kind.W:
                return stage.weight_gradient_s
            case Kind.GATHER:
                return stage.gather_s
            case Kind.REDUCE:
                return stage.reduce_s
            case Kind.STEP:
                return stage.step_s
            case Kind.TIE if action.peer is not None:
                return self._tie_s[action.peer]
        raise UsageError(f"{action} has no duration of its own; messages are priced by edge")


def received_bytes(schedule: Schedule, cost: PipelineCost) -> tuple[int, ...]:
    """Bytes that reach each rank in messages between stages, per step."""
    prices = Prices(schedule, cost)
    return tuple(sum(prices.message(action.partner)[1] for action in actions if action.kind in RECEIVES) for actions in schedule.ranks)
