"""Prices along a pipeline whose ranks lie on groups of different devices: every stage on its own, messages over the links that they take."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from autopar.core.cluster import Cluster
from autopar.core.mesh import Mesh
from autopar.core.mixed import Machines, MixedCluster
from autopar.cost_models.collectives import Span, algorithm_seconds
from autopar.errors import PlanMismatchError
from autopar.planner.states import Pricing

TWO_NODES = Span(2, 2, 1, 1)
"""Two ranks that talk over the link between nodes."""


@dataclass
class MixedPricing(Pricing):
    """`ranks[r]`: the prices of rank r of the pipeline, those of one group the same object. What concerns ranks of several groups at once, sums of shared
    weights, is priced as on the `cluster` whose devices are all as slow as the slowest. `across`: the same with the link between groups as that
    between nodes. `memory_share`: of a device's memory that a plan may use."""

    ranks: tuple[Pricing, ...] = ()
    across: Cluster | None = field(default=None)
    memory_share: float = 1.0

    @cached_property
    def kinds(self) -> tuple[Pricing, ...]:  # type: ignore[override]
        return tuple({id(pricing): pricing for pricing in self.ranks}.values())

    @property
    def places(self) -> tuple[str, ...]:
        return tuple(pricing.cluster.name for pricing in self.ranks)

    def on(self, rank: int) -> Pricing:
        return self.ranks[rank]

    def spare_bytes(self, rank: int) -> float:
        return self.memory_share * (self.ranks[rank].cluster.device.memory_bytes - self.cluster.device.memory_bytes)

    def message(self, num_bytes: float, source: int = 0, target: int = 1) -> float:
        if source == target or not num_bytes:
            return 0.0
        if self.ranks[source] is self.ranks[target]:
            return self.ranks[source].message(num_bytes)
        assert self.across is not None, "made by `along`"
        return float(algorithm_seconds(self.across, TWO_NODES, "send", num_bytes)["direct"])


def along(mixed: MixedCluster, groups: Sequence[int], mesh: Mesh, memory_share: float = 1.0) -> MixedPricing:
    """`groups[r]`: the number of the group on whose devices rank r of the pipeline lies, a mesh like `mesh`."""
    found = {n: group_pricing(mixed.groups[n], mesh, list(groups).count(n)) for n in sorted(set(groups))}
    slowest = mixed.slowest
    across = replace(slowest, inter_node=mixed.between)
    return MixedPricing(slowest, mesh, (len(groups), 0), ranks=tuple(found[n] for n in groups), across=across, memory_share=memory_share)


def group_pricing(group: Cluster, mesh: Mesh, num_ranks: int) -> Pricing:
    """Prices on one group that holds so many ranks of a pipeline."""
    return Pricing(group, mesh, (num_ranks, 0))


def groups_of(mixed: Machines, places: Sequence[str]) -> tuple[int, ...]:
    """The numbers of the groups that a plan names, rank by rank; raises PlanMismatchError."""
    names = [group.name for group in mixed.groups]
    missing = next((name for name in places if name not in names), None)
    if missing is not None:
        raise PlanMismatchError(f"the plan has stages on {missing}, which is no group of {mixed.name}; give the cluster that it was made for, or plan again")
    return tuple(names.index(name) for name in places)
