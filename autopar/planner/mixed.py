"""Pipelines over groups of different devices: every stage on the devices of one group, as deep as suits them.

All stages have meshes of one shape, so many devices as divide every group; a group of more devices has more stages. The groups are tried in every
order: the first stages hold most microbatches. All devices are used. The sharding is one for all stages, each time the one that is fastest on the devices of one of the groups;
cut, simulated and walked it is with every stage on its own.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import permutations

from autopar.core.mesh import Mesh
from autopar.core.mixed import MixedCluster
from autopar.planner.along import MixedPricing, along, group_pricing
from autopar.planner.blocks import Order
from autopar.planner.lengths import Pipelines, Row, Task, least_compute_s
from autopar.planner.pipelines import StageSearch
from autopar.planner.search import Candidate
from autopar.planner.states import Pricing

MAX_RANKS = 16
"""Ranks of a pipeline, and copies that share a batch, that are looked at where their number is not pinned."""


@dataclass(frozen=True)
class MixedStageSearch(StageSearch):
    """`groups[r]`: the number of the group that rank r of the pipeline lies on; `fastest_on`: that on whose devices the sharding is the fastest."""

    mixed: MixedCluster
    groups: tuple[int, ...]
    fastest_on: int

    @cached_property
    def pricing(self) -> Pricing:  # type: ignore[override]
        return group_pricing(self.mixed.groups[self.fastest_on], self.mesh, self.groups.count(self.fastest_on))

    @cached_property
    def along(self) -> MixedPricing:  # type: ignore[override]
        return along(self.mixed, self.groups, self.mesh, self.options.memory_share)


@dataclass
class MixedPipelines(Pipelines):
    """All pipelines over the groups of `mixed` that the pins allow; `cluster` is the groups as slow as the slowest."""

    mixed: MixedCluster = field(kw_only=True)

    def shapes(self) -> list[tuple[int, Mesh]]:
        found = [(ranks, mesh) for ranks, mesh in super().shapes() if self.pins.pp or ranks <= MAX_RANKS]
        return [(ranks, mesh) for ranks, mesh in found if all(group.num_devices % mesh.num_ranks == 0 for group in self.mixed.groups)]

    def _bases(self, task: Task, ranks: int, mesh: Mesh, position: int) -> Iterator[tuple[StageSearch, Candidate]]:
        numbers = range(len(self.mixed.groups))
        each = [group.num_devices // mesh.num_ranks for group in self.mixed.groups]
        lines = [tuple(n for n in order for _ in range(each[n])) for order in permutations(numbers)]
        strict = bool(self.pins.mesh_axes) and task.options.mesh is None
        found: dict[int, Candidate] = {}
        for n in numbers:
            first = MixedStageSearch(
                task.graph, task.rules, task.batch, self.cluster, mesh, self.pins, task.options, strict, Order("gpipe", ranks, 1), position, self.mixed, lines[0], n
            )  # fmt: skip
            base = first.sharded()
            known = any(other.assignment.choices == base.assignment.choices for other in found.values())
            found[n] = base
            if not known:
                yield from ((replace(first, groups=line), base) for line in lines)
        self.bound_s = min(self.bound_s, shared_s([least_compute_s(found[n]) for n in numbers], each))

    def _placed(self, rows: Sequence[Row]) -> list[Row]:
        """The pipeline's axis is the outermost: a stage lies within a group."""
        return self._near(rows)


def shared_s(operators_s: Sequence[Sequence[float]], number: Sequence[int]) -> float:
    """No division of operators over ranks of several kinds takes less; `operators_s[k]`: of each operator on a rank of kind k, of which there are `number[k]`.

    If all ranks r are done after T, then T >= sum over r of w_r * (the work on r) for any weights w_r whose sum is 1, which is at least the sum over operators
    of the least w_r * (its seconds on r). Weights here are such that all of an operator is as cheap on every kind, on average.
    """
    totals = [math.fsum(seconds) for seconds in operators_s]
    if not all(totals):
        return 0.0
    weights = [1.0 / total for total in totals]
    whole = math.fsum(weight * n for weight, n in zip(weights, number, strict=True))
    return math.fsum(min(weight * s for weight, s in zip(weights, column, strict=True)) for column in zip(*operators_s, strict=True)) / whole
