"""What each operator may do on a mesh and what that costs: strategies, their layouts, seconds and bytes."""

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence, Set
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from itertools import chain
from typing import Any, TypeVar

import numpy as np

from autopar.core.cluster import Cluster
from autopar.core.graph import DTYPE_BYTES, TensorMeta
from autopar.core.layout import Layout, P, Placement
from autopar.core.mesh import Mesh
from autopar.core.moves import COLLECTIVES
from autopar.core.pipeline import with_pipeline
from autopar.core.redistribute import Redistribution, layout_space
from autopar.core.rule import Choice, OpRule, Strategy, nest, strategies
from autopar.core.zero import Zero
from autopar.cost_models.collectives import Span, algorithm_seconds, collective_seconds
from autopar.cost_models.compute import op_seconds
from autopar.cost_models.kernels import PLAIN, Kernels, Work, backward_halves, forward_seconds
from autopar.planner.roles import Allowed
from autopar.program import without_r

PRICED_DTYPES = ("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
"""Dtypes with a peak of their own; everything else (integers, float64 checks) is priced like float32."""

LOCAL_COPIES = {"slice": 1.0, "embed": 1.0, "mask": 1.0, "identity": 0.0}
"""Passes over the input bytes that a step without communication makes."""

TIE_BREAK_S = 1e-9
"""Every step costs at least this, so that of equal routes the shortest is taken."""

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class States:
    """The states of one search node. Compared by identity: equal operators share one object.

    `operand_layouts[k][s]`, `result_layouts[j][s]`: layout under state s. `strategies` is empty for nodes that are no op;
    `forward_s` is their share of `seconds` that a second forward would cost; `kept_bytes`: what the backward keeps beside operands
    and results; `result_bytes[j, s]`: of a rank; `zeros`: ZeRO of a parameter; `modes`: of a block.
    """

    strategies: tuple[Strategy, ...]
    operand_layouts: tuple[tuple[Layout, ...], ...]
    result_layouts: tuple[tuple[Layout, ...], ...]
    seconds: np.ndarray
    memory_bytes: np.ndarray
    forward_s: np.ndarray | None = None
    kept_bytes: np.ndarray | None = None
    result_bytes: np.ndarray | None = None
    zeros: tuple[Zero | None, ...] = ()
    modes: tuple[str, ...] = ()


@dataclass
class Pricing:
    """Seconds of operators and steps on one mesh of one cluster, memoised. A cache, not a value: one per search.

    The mesh may be that of one stage of a pipeline, `pp`: how many ranks that has and where its axis stands among those of the mesh.
    """

    cluster: Cluster
    mesh: Mesh
    pp: tuple[int, int] = (1, 0)
    kernels: Kernels = PLAIN
    _steps: dict[tuple[str, tuple[int, ...], float], float] = field(default_factory=dict)
    _reductions: dict[tuple[tuple[int, ...], float], float] = field(default_factory=dict)
    _spaces: dict[tuple, Redistribution] = field(default_factory=dict)
    _computed: dict[Work, tuple[float, float, float]] = field(default_factory=dict)
    _kept: dict[Hashable, Any] = field(default_factory=dict)

    def kept(self, key: Hashable, make: Callable[[], T]) -> T:
        """Whatever else depends on nothing but the mesh, its cluster and the `key`."""
        found = self._kept.get(key)
        if found is None:
            found = self._kept[key] = make()
        return found  # type: ignore[no-any-return]

    @cached_property
    def whole(self) -> Mesh:
        """The mesh of all devices, whose strides say which links a group spans."""
        return self.mesh if self.pp[0] == 1 else with_pipeline(self.mesh, *self.pp)

    def _in_whole(self, axes: tuple[int, ...]) -> tuple[int, ...]:
        return axes if self.pp[0] == 1 else tuple(a + (a >= self.pp[1]) for a in axes)

    def compute(self, work: Work) -> tuple[float, float, float]:
        """Seconds of the forward of one operator, and of its backward: for its input, and (of a product) for its second operand."""
        if work not in self._computed:
            priced = work if work.dtype in PRICED_DTYPES else work._replace(dtype="float32")
            device = self.cluster.device
            self._computed[work] = (forward_seconds(device, priced, self.kernels), *backward_halves(device, priced, self.kernels))
        return self._computed[work]

    @property
    def kinds(self) -> "tuple[Pricing, ...]":
        """The different ones among the prices of the ranks of the pipeline."""
        return (self,)

    def on(self, rank: int) -> "Pricing":
        """What things cost on the devices of one rank of the pipeline."""
        return self

    @property
    def places(self) -> tuple[str, ...]:
        """The groups on which the ranks of the pipeline lie, where there are several."""
        return ()

    def spare_bytes(self, rank: int) -> float:
        """What a plan may hold on devices of this rank beyond what it may on all."""
        return 0.0

    def message(self, num_bytes: float, source: int = 0, target: int = 1) -> float:
        """Seconds of a message of this many bytes from a rank of the pipeline to another, which is next to it."""
        return float(collective_seconds(self.cluster, self.whole, "send", (self.pp[1],), num_bytes)) if num_bytes else 0.0

    def tie(self, ranks: tuple[int, ...], num_bytes: float) -> float:
        """Seconds of an all-reduce of this many bytes over these ranks of the pipeline."""
        stride, per_node = self.whole.strides[self.pp[1]], self.cluster.devices_per_node
        nodes = Counter(rank * stride // per_node for rank in ranks)
        span = Span(len(ranks), len(nodes), max(nodes.values()), min(nodes.values()))
        return float(min(algorithm_seconds(self.cluster, span, "all_reduce", num_bytes).values()))

    def step(self, primitive: str, axis: int, local_bytes: float) -> float:
        """Seconds of one primitive along one axis with this many local input bytes."""
        return self.collective(primitive, (axis,), local_bytes)

    def _step(self, primitive: str, axes: tuple[int, ...], local_bytes: float) -> float:
        if primitive in COLLECTIVES:
            local_bytes *= self.kernels.exchange_share if primitive == "all_to_all" else 1.0
            return float(collective_seconds(self.cluster, self.whole, primitive, self._in_whole(axes), local_bytes))
        passes = LOCAL_COPIES[primitive]
        return passes * float(op_seconds(self.cluster.device, 0.0, 2 * local_bytes, "float32", "pointwise")) if passes else 0.0

    def gradient_reduction(self, axes: tuple[int, ...], local_bytes: float) -> float:
        """Seconds of the once-per-step all-reduce of a gradient over several axes at once."""
        key = axes, local_bytes
        if key not in self._reductions:
            self._reductions[key] = self._step("all_reduce", axes, local_bytes) if axes else 0.0
        return self._reductions[key]

    def collective(self, primitive: str, axes: tuple[int, ...], local_bytes: float) -> float:
        """Seconds of one collective over several axes at once."""
        key = (primitive, axes, local_bytes)
        if key not in self._steps:
            self._steps[key] = TIE_BREAK_S + self._step(primitive, axes, local_bytes)
        return self._steps[key]

    def redistribution(self, meta: TensorMeta, layouts: Sequence[Layout], *, grad: bool) -> Redistribution:
        """All-pairs routes of a tensor between (at least) the given layouts."""
        return self.routes(meta, frozenset(chain.from_iterable(layouts)), grad=grad)

    def routes(self, meta: TensorMeta, placements: Set[Placement], *, grad: bool) -> Redistribution:
        """The same between layouts of these placements."""
        cuts = tuple(sorted([(p.dim, p.outer) for p in placements if p.kind == "S"]))
        key = (meta.shape, DTYPE_BYTES[meta.dtype], grad, cuts, P in placements)
        if key not in self._spaces:
            space = layout_space(meta.shape, self.mesh, cuts, grad=grad, partial=P in placements)
            self._spaces[key] = Redistribution(meta.shape, DTYPE_BYTES[meta.dtype], self.mesh, space, grad, self.step)
        return self._spaces[key]


@dataclass(frozen=True, eq=False)
class Ways:
    """The legal strategies of operators of one form on a mesh, one for each set of layouts: `operand_layouts[k][s]` and `result_layouts[j][s]`; `degree[s]`, and
    [k, s] and [j, s]: in how many parts the work, the operands and the results are cut."""

    strategies: tuple[Strategy, ...]
    operand_layouts: tuple[tuple[Layout, ...], ...]
    result_layouts: tuple[tuple[Layout, ...], ...]
    degree: np.ndarray
    operand_parts: np.ndarray
    result_parts: np.ndarray

    @classmethod
    def of(
        cls, rule: OpRule, operands: Sequence[TensorMeta], results: Sequence[TensorMeta], mesh: Mesh, allowed: Allowed, prefer: Allowed, *, differentiable: bool
    ) -> "Ways":
        """Those that `allowed` admits (of these those that `prefer` does, if any)."""
        layouts = [_layouts_of(partial(rule.operand_placement, k), m, mesh) for k, m in enumerate(operands)]
        layouts += [_layouts_of(partial(rule.result_placement, j), m, mesh) for j, m in enumerate(results)]
        chosen: dict[tuple, tuple[Strategy, list[Layout], int]] = {}
        for strategy in strategies(rule, mesh, differentiable=differentiable):
            if not allowed(strategy) or (rule.cost == "contract" and any(c.kind == "carry" for c in strategy)):
                continue  # a partial sum through a contraction would only delay its reduction past more work
            around, degree = [layout(strategy) for layout in layouts], rule.degree(strategy, mesh)
            chosen.setdefault((*around, degree), (strategy, around, degree))
        picked = [c for c in chosen.values() if prefer(c[0])] or list(chosen.values())
        by_tensor = tuple([tuple([around[n] for _, around, _ in picked]) for n in range(len(layouts))])
        parts = [[math.prod([size for size, p in zip(mesh.sizes, layout) if p.kind == "S"]) for layout in found] for found in by_tensor]
        shaped = np.array(parts, dtype=np.int64).reshape(len(layouts), len(picked))
        ins = len(operands)
        degrees = np.array([degree for *_, degree in picked], dtype=np.int64)
        return cls(tuple([s for s, *_ in picked]), by_tensor[:ins], by_tensor[ins:], degrees, shaped[:ins], shaped[ins:])


def op_states(
    rule: OpRule, operands: Sequence[TensorMeta], results: Sequence[TensorMeta], pricing: Pricing, allowed: Allowed, prefer: Allowed, *, named: Hashable,
    saved: frozenset[int], keeps: bool = True, times: int = 1,
) -> States:  # fmt: skip
    """States of one operator: the `Ways` that `allowed` admits (those that `prefer` does, if any), both of them `named`.

    Seconds: forward plus backward of `times` microbatches. Memory: results in `saved` that the backward keeps, and, where the
    operator `keeps` it, what it makes for its backward alone.
    """
    mesh = pricing.mesh
    trained = tuple([m.requires_grad for m in operands]), tuple([m.requires_grad for m in results])
    differentiable = any(trained[0]) and any(trained[1])
    ways = pricing.kept(
        ("ways", rule.form(mesh.sizes), trained, named), lambda: Ways.of(rule, operands, results, mesh, allowed, prefer, differentiable=differentiable)
    )
    flops = rule.flops / ways.degree
    beside = np.array([rule.kept_bytes(s, mesh) for s in ways.strategies] if rule.kept else np.zeros(len(ways.strategies)), dtype=float)
    result_bytes = np.array([m.num_bytes for m in results], dtype=np.int64)[:, None] // ways.result_parts
    moved = (np.array([m.num_bytes for m in operands], dtype=np.int64)[:, None] // ways.operand_parts).sum(axis=0) + result_bytes.sum(axis=0)
    moved = moved + (beside if rule.cost == "pointwise" else 0.0)  # kernels of attention keep theirs on the chip
    dtype = results[0].dtype if results else "float32"
    calls = list(zip(flops.tolist(), moved.tolist(), ways.strategies if rule.product is not None else ways.degree.tolist(), strict=True))
    works = {call: pricing.compute(work_of(rule, s, mesh, *call[:2], dtype)) for call, s in dict(zip(calls, ways.strategies)).items()}
    priced = [works[call] for call in calls]
    forward_s = np.array([there for there, *_ in priced])
    seconds = forward_s + (np.array([inputs + weights for _, inputs, weights in priced]) if differentiable else 0.0) + _inner_seconds(rule, ways.strategies, pricing, dtype, differentiable=differentiable)
    kept_bytes = beside if differentiable else np.zeros(len(beside))
    return States(
        strategies=ways.strategies,
        operand_layouts=ways.operand_layouts,
        result_layouts=ways.result_layouts,
        seconds=times * seconds,
        memory_bytes=result_bytes[sorted(saved)].sum(axis=0).astype(float) + (kept_bytes if keeps else 0.0),
        forward_s=forward_s,
        kept_bytes=kept_bytes,
        result_bytes=result_bytes,
    )


def work_of(rule: OpRule, strategy: Strategy, mesh: Mesh, flops: float, num_bytes: float, dtype: str, *, rows: float = 1.0, is_weight: bool = False) -> Work:
    """What one rank does of an operator; `rows`: the share of its rows, of a smaller microbatch."""
    kernel = rule.kernel or {"contract": "product"}.get(rule.cost, rule.cost)
    kind = rule.kind or kernel
    shape = rule.product_shape(strategy, mesh)
    if shape is not None and rows != 1.0:
        batch, m, n, k = shape
        shape = (max(1, round(batch * rows)), m, n, k) if rule.kernel or batch > 1 else (batch, max(1, round(m * rows)), n, k)
    functions = rule.functions / rule.degree(strategy, mesh) * rows if rule.functions else 0.0
    again = rule.kernel == "attention" or not (rule.kernel or rule.saved_results)  # the others differentiate by what they have evaluated
    return Work(kernel, flops, num_bytes, dtype, shape, rule.masked, is_weight, bool(rule.saved_operands or rule.saved_results), functions, again, kind)


def written_beside(rule: OpRule, strategy: Strategy, mesh: Mesh) -> int:
    """Bytes that a pointwise operator writes for its backward beside its results; kernels of attention keep theirs on the chip."""
    return rule.kept_bytes(strategy, mesh) if rule.cost == "pointwise" else 0


def _inner_seconds(rule: OpRule, chosen: Sequence[Strategy], pricing: Pricing, dtype: str, *, differentiable: bool) -> np.ndarray:
    total = np.zeros(len(chosen))
    for inner in rule.inner:
        count = inner.forward + (inner.backward if differentiable else 0)
        for s, strategy in enumerate(chosen):
            size = rule.local_numel(inner.dims, strategy, pricing.mesh) * DTYPE_BYTES[dtype]
            total[s] += sum(count * pricing.step(inner.primitive, a, size) for a, c in enumerate(strategy) if c == ("cut", inner.factor))
    return total


def layout_states(layouts: Sequence[Layout]) -> States:
    """States of a node that only holds a value: a relay or an output."""
    zeros = np.zeros(len(layouts))
    return States((), (tuple(layouts),), (tuple(layouts),), zeros, zeros)


def _layouts_of(placement: Callable[[Choice], Placement], meta: TensorMeta, mesh: Mesh) -> Callable[[Strategy], Layout]:
    """The layout of one operand or result by strategy; a placement is found once for each choice."""
    placements = cache(placement)

    def layout(strategy: Strategy) -> Layout:
        found = nest(tuple([placements(choice) for choice in strategy]), mesh)
        return found if meta.requires_grad else without_r(found)

    return layout
