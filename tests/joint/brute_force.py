"""All plans of a small instance of the joint problem, one after the other: no bound, no price of memory, nothing left out.

Every pipeline and mesh, every size and number of microbatches and every order; all combinations of what operators, parameters and values may do; every cut of a
pipeline with one stage a rank, the even one of others; every pair of modes of recomputation, with every number of blocks in the heavier one on every
rank. Only the price of a complete plan is that of the search.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations, pairwise, product
from random import Random

from autopar.core.cluster import Cluster
from autopar.core.problem import SearchProblem
from autopar.core.residency import RECOMPUTE, Precision
from autopar.core.unroll import Run
from autopar.joint.at_point import PointSearch
from autopar.joint.deep import Deep, Sharding, even_depths
from autopar.joint.kinds import Depth
from autopar.joint.search import JointSearch
from autopar.joint.space import points
from autopar.planner.decode import decode
from autopar.planner.liveness import Engine
from autopar.planner.pins import parse_pins
from autopar.planner.search import Options
from tests.joint.rows import PATH, Row

MOST = 150
"""Shardings of all points of an instance, which is drawn again where there are more."""

STEPS = (1, 2, 4)


@dataclass(frozen=True)
class Instance:
    row: Row
    depth: int
    batch: int
    cluster: Cluster
    pins: tuple[str, ...]

    def search(self, memory_bytes: int | None = None) -> JointSearch:
        """With all of so much memory."""
        device = self.cluster.device if memory_bytes is None else replace(self.cluster.device, memory_bytes=memory_bytes)
        options = Options(precision=Precision(master="float32"), memory_share=1.0, free_micro_batches=True, time_limit_s=600.0)  # however busy the machine is
        run, cluster = Run(PATH, 0, self.depth), replace(self.cluster, device=device)
        return JointSearch(self.row.graphs(3), run, self.batch, cluster, options, parse_pins(self.pins), gap=0.0)


@dataclass(frozen=True)
class Priced:
    """A complete plan: seconds of a step, bytes of the fullest rank."""

    step_s: float
    memory_bytes: int


def drawn(seed: int) -> Instance:
    """A random instance of few enough plans."""
    for attempt in range(1000):
        found = _drawn(Random(f"{seed}/{attempt}"))
        if 0 < sum(1 for _ in _few(found)) <= MOST:
            return found
    raise AssertionError(f"no instance {seed} is small enough")


def _few(instance: Instance) -> Iterator[None]:
    for number, _ in enumerate(shardings(instance)):
        if number > MOST + 1:
            return
        yield


def _drawn(random: Random) -> Instance:
    row = Row(
        width=random.choice((64, 256, 1024, 4096)), inner=random.choice((64, 192, 1024, 8192)), seq=random.choice((1, 16, 128, 2048)),
        linears=random.choice((1, 1, 2)), residual=random.random() < 0.3, head=random.random() < 0.4, dtype=random.choice(("bfloat16", "float32")),
    )  # fmt: skip
    preset = Cluster.preset(random.choice(("a100-sxm", "h100-sxm")), nodes=random.choice((1, 2)), devices_per_node=random.choice((1, 2, 2, 3, 4)))
    links = [replace(link, bandwidth_bytes_per_s=link.bandwidth_bytes_per_s * 10 ** random.uniform(-1.5, 1), latency_s=link.latency_s * 10 ** random.uniform(-1, 1))
             for link in (preset.intra_node, preset.inter_node)]  # fmt: skip
    cluster, batch = replace(preset, intra_node=links[0], inter_node=links[1]), random.choice((1, 2, 3, 4, 6, 8, 16))
    offered = {
        "zero": random.choice((None, 0, 1, 2, 3)), "recompute": random.choice((None, *RECOMPUTE)), "micro_batch": random.choice((None, None, *STEPS)),
        "pp": random.choice((None, None, *STEPS)), "schedule": random.choice((None, None, None, "1f1b")),
    }  # fmt: skip
    if offered["pp"] == 1:
        offered["schedule"] = None
    return Instance(row, random.randint(3, 6), batch, cluster, tuple(f"{name}={value}" for name, value in offered.items() if value is not None))


def shardings(instance: Instance) -> Iterator[tuple[PointSearch, tuple[int, ...]]]:
    """Of every point all choices that can be joined, with no block computed again: that is decided later."""
    joint = instance.search()
    for point in points(joint.cluster, joint.batch, joint.run.depth, joint.pins):
        search = PointSearch(joint, point)
        folded, ports = search.tables.whole.folded, search.tables.built[1]
        blocks = {folded.node[n] for n in ports.block_node.values()}
        yield from ((search, choices) for choices in _joined(folded.problem, blocks) if search.orders)


def _joined(problem: SearchProblem, fixed: set[int]) -> Iterator[tuple[int, ...]]:
    """All choices without a forbidden pair, the nodes `fixed` at their first."""
    before: list[list] = [[] for _ in problem.nodes]
    for edge in problem.edges:
        before[max(edge.u, edge.v)].append(edge)

    def grown(chosen: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        n = len(chosen)
        if n == len(problem.nodes):
            yield chosen
            return
        for state in range(1 if n in fixed else problem.nodes[n].num_states):
            more = (*chosen, state)
            if all(edge.cost_s[more[edge.u], more[edge.v]] < float("inf") for edge in before[n]):
                yield from grown(more)

    return grown(())


@dataclass(frozen=True)
class BruteForce:
    instance: Instance

    @cached_property
    def plans(self) -> tuple[Priced, ...]:
        return tuple(plan for search, choices in shardings(self.instance) for plan in self._of(search, choices))

    def best_s(self, limit_bytes: float) -> float:
        """Of the fastest plan that fits; inf where none does."""
        return min((p.step_s for p in self.plans if p.memory_bytes <= limit_bytes), default=float("inf"))

    def _of(self, search: PointSearch, choices: Sequence[int]) -> Iterator[Priced]:
        tables, joint = search.tables, search.joint
        task = tables.task
        program = decode(task.graph, task.rules, search.pricing, tables.built[1], tables.whole.folded.unfolded(choices), search.keeping)
        sharding = Sharding.of(program, search.pricing, joint.run, Engine.of(joint.cluster), search.keeping.programs)
        for order in search.orders:
            even = tuple(d.blocks for d in even_depths(sharding.light, order.num_stages))
            for depths in {even, *(_cuts(joint.run.depth, order.num_stages) if order.virtual == 1 else ())}:
                for modes in combinations(sharding.modes, 2) if len(sharding.modes) > 1 else ((sharding.modes[0],) * 2,):
                    deeps = [Deep(*modes, order, tuple(map(Depth, depths)), late) for late in ((False, True) if order.virtual > 1 else (False,))]
                    yield from (Priced(d.step_s, d.memory.high_bytes) for deep in deeps for d in self._mixtures(deep))

    @staticmethod
    def _mixtures(deep: Deep) -> Iterator[Deep]:
        """With every number of blocks in the heavier mode on every rank."""
        ranks = range(deep.order.num_ranks)
        most = [0 if deep.heavy is deep.light else sum(deep.depths[s].blocks for s in deep.held(rank)) for rank in ranks]
        for numbers in product(*(range(number + 1) for number in most)):
            changed = {s: depth for rank in ranks for s, depth in deep.with_heavy(rank, numbers[rank]).items()}
            yield replace(deep, depths=tuple(changed[s] for s in range(len(deep.depths))))


def _cuts(depth: int, stages: int) -> Iterator[tuple[int, ...]]:
    for cut in combinations(range(1, depth), stages - 1):
        yield tuple(b - a for a, b in pairwise((0, *cut, depth)))
