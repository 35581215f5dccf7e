"""How a model is cut into stages that run one after another on different devices."""

from dataclasses import dataclass

from autopar.core.mesh import Mesh, MeshAxis
from autopar.errors import UsageError

PP = "pp"
"""The name of a pipeline's axis."""

SHARED = "shared"
"""The schedule of a model that is not cut: every rank has a copy of it, and a share of the microbatches."""

RECEIVES_AHEAD = 2
"""Receives are posted so many computations before they are needed."""

SENDS_BEHIND = 2
"""Messages of each stage that may be on their way, or have arrived and nobody has looked since."""


def with_pipeline(mesh: Mesh, num_ranks: int, position: int) -> Mesh:
    """The mesh of all devices, from that of one stage."""
    axes = list(mesh.axes)
    axes.insert(position, MeshAxis(PP, num_ranks))
    return Mesh(tuple(axes))


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePrediction:
    """What the cost model expects of one stage on one device: from block `first` to block `last`; seconds per microbatch; `in_flight`
    microbatches at most; memory of its rank while this stage runs; bytes sent to other ranks per step."""

    rank: int
    first: str
    last: str
    num_params: int
    forward_s: float
    backward_s: float
    in_flight: int
    peak_memory_bytes: int
    sent_bytes: int


@dataclass(frozen=True)
class Pipeline:
    """`num_ranks` groups of devices, each a mesh of the plan's shape, run the stages in turn: stage s on group s mod num_ranks.

    `starts`: the first operator of every stage but the first, by name. `schedule`: the order of computation, as
    `schedules.orders` knows it. `position`: where the pipeline's axis stands among those of the plan's mesh (0: outermost). `places`: of a cluster of
    groups, the group on whose devices each rank of the pipeline lies; none elsewhere. `shares`: with schedule `shared`, how many of the microbatches of a
    step each rank runs, all of the model, the first rank the first ones; gradients are summed over the ranks once a step.
    """

    num_ranks: int
    starts: tuple[str, ...]
    schedule: str = "1f1b"
    position: int = 0
    places: tuple[str, ...] = ()
    shares: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if (self.schedule == SHARED) != bool(self.shares) or (self.shares and (len(self.shares) != self.num_ranks or min(self.shares) < 1 or self.starts)):
            raise UsageError(f"shares {list(self.shares)} of a step over {self.num_ranks} ranks, schedule {self.schedule}; give every rank of schedule {SHARED} at least 1 microbatch")
        if len(self.places) not in (0, self.num_ranks) or (self.places and self.position):
            raise UsageError(f"places {', '.join(self.places)} of a pipeline of {self.num_ranks}; name a group for every rank, and leave the pipeline's axis outermost")
        if self.num_ranks < 1 or self.num_stages % self.num_ranks:
            raise UsageError(f"{self.num_stages} stages on a pipeline of {self.num_ranks}; every rank of a pipeline has as many stages")

    @property
    def num_stages(self) -> int:
        return self.num_ranks if self.shares else len(self.starts) + 1

    @property
    def virtual_stages(self) -> int:
        return self.num_stages // self.num_ranks

    def whole_mesh(self, mesh: Mesh) -> Mesh:
        return with_pipeline(mesh, self.num_ranks, self.position)
