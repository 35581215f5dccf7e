"""A plan that is given, as a program: the search with everything pinned that the plan says, over the same rules, moves and prices.

`tp` is Megatron's tensor parallelism (columns, then rows; heads; vocabulary), with `sp` what lies between is cut along the sequence; `cp` cuts the
sequence everywhere, queries within attention, whose keys and values are gathered; `dp` cuts the batch, and ZeRO the state along it and `cp`. Experts
are cut along `ep`, a part of the ranks of `dp`, and along `tp` too unless `tp_of_experts`: their slots go from where tokens are to where experts are.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from autopar.core.cluster import Cluster
from autopar.core.graph import OpGraph
from autopar.core.mesh import Mesh, MeshAxis
from autopar.core.residency import Precision
from autopar.cost_models.kernels import PLAIN, Kernels
from autopar.errors import UsageError
from autopar.forecast.transformer import Dims, Experts, transformer_graph
from autopar.planner.decode import decode
from autopar.planner.keeping import Keeping
from autopar.planner.pins import Pin, Pins
from autopar.planner.problem import ProblemBuilder
from autopar.planner.roles import Constraints, batch_factors
from autopar.planner.rulebook import rules_of
from autopar.planner.states import Pricing
from autopar.program import Program
from autopar.search.solve import solve

COLUMNS = ("q", "k", "v", "gate", "up", "shared_gate", "shared_up")
ROWS = ("o", "down", "shared_down")
NORMS = ("norm", "*.norm?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout3D:
    """How one stage of a transformer is laid out on its dp x cp x tp devices, `ep` of the dp for experts. `zero`: stage of ZeRO over dp;
    `recompute`: of every block; `whole_loss`: the loss is computed on whole logits by every rank of tp."""

    dp: int = 1
    tp: int = 1
    sp: bool = False
    zero: int = 0
    recompute: str = "none"
    micro_batch: int = 1
    cp: int = 1
    whole_loss: bool = False
    ep: int = 1
    tp_of_experts: bool = False

    @property
    def mesh(self) -> Mesh:
        axes = tuple(MeshAxis(name, n) for name, n in (("dp", self.dp // self.ep), ("ep", self.ep), ("cp", self.cp), ("tp", self.tp)) if n > 1)
        return Mesh(axes or (MeshAxis("dp", 1),))


@dataclass(frozen=True)
class Forced:
    """The program of a transformer under a layout, as one stage of `num_stages` that lie outermost in the cluster."""

    dims: Dims
    layout: Layout3D
    cluster: Cluster
    num_stages: int = 1
    precision: Precision = Precision(master="float32")
    micro_batches: int = 1
    dtype: str = "bfloat16"
    kernels: Kernels = PLAIN

    def __post_init__(self) -> None:
        if self.dims.kv_heads % self.layout.tp or self.dims.inner % self.layout.tp:
            raise UsageError(f"tp={self.layout.tp} does not divide {self.dims.kv_heads} key heads and an inner width of {self.dims.inner}")
        if self.dims.seq % (self.layout.cp * (self.layout.tp if self.layout.sp else 1)):
            raise UsageError(f"tp={self.layout.tp} and cp={self.layout.cp} do not divide a sequence of {self.dims.seq}")
        if self.layout.dp % self.layout.ep:
            raise UsageError(f"ep={self.layout.ep} does not divide dp={self.layout.dp}")
        if self.layout.micro_batch > 1 and _cuts_rows(self.dims, self.layout):
            raise UsageError("sequences in parts, several in a microbatch: the parts do not lie in one piece")

    @cached_property
    def graph(self) -> OpGraph:
        padding = -self.dims.vocab % (128 * self.layout.tp)  # as all who cut the vocabulary do
        return transformer_graph(_padded(self.dims, padding), self.layout.micro_batch * self.layout.dp, self.dtype, cut_rows=self.layout.cp > 1)

    @cached_property
    def pricing(self) -> Pricing:
        return Pricing(self.cluster, self.layout.mesh, (self.num_stages, 0), self.kernels)

    @cached_property
    def program(self) -> Program:
        """What the search decides does not depend on sizes where everything that matters is pinned: it is decided once for all of a structure."""
        decided, graph, layout = _decided(_structure(self.dims), _degrees(self.layout, _cuts_rows(self.dims, self.layout))), self.graph, self.layout
        blocks = [segment.block for segment in graph.segments if segment.block]
        recompute = {block: layout.recompute for block in blocks if layout.recompute != "none"}
        rules = rules_of(graph)
        if any(a.factors != b.factors for a, b in zip(rules, decided.rules, strict=True)):
            raise UsageError(f"a layout for sizes of its own: {layout} cannot be decided on a small model")
        residency = replace(decided.residency, recompute=recompute, micro_batches=self.micro_batches, precision=self.precision)
        return replace(decided, graph=graph, mesh=layout.mesh, rules=rules, residency=residency)


def _structure(dims: Dims) -> Dims:
    """The smallest transformer of this form."""
    grouped = dims.kv_heads != dims.heads
    small = replace(
        dims, hidden=512, heads=8, kv_heads=4 if grouped else 8, inner=1536, vocab=1024, seq=128, dropout=0.1 if dims.dropout else 0.0,
        head_width=64 if dims.head_width else 0,
    )  # fmt: skip
    if dims.experts is None:
        return small
    return replace(small, hidden=4096, inner=8192, seq=4096, experts=Experts(64, 8, 2048, 2048 if dims.experts.shared else 0))  # bytes decide the way of slots


def _degrees(layout: Layout3D, rows: bool) -> Layout3D:
    """Which axes there are, not how long they are. A batch of one is a dimension that no factor runs along."""
    alone = layout.dp == layout.micro_batch == 1
    dp, ep = min(layout.dp // layout.ep, 2), min(layout.ep, 2)
    return replace(layout, dp=dp * ep, ep=ep, cp=min(layout.cp, 2), tp=min(layout.tp, 2), micro_batch=1 if alone or rows else 2, recompute="none")


def _cuts_rows(dims: Dims, layout: Layout3D) -> bool:
    """Whether rows of tokens, sequence after sequence, are cut within a sequence."""
    return layout.cp > 1 or (layout.tp > 1 and dims.experts is not None)


@lru_cache(maxsize=1024)
def _decided(dims: Dims, layout: Layout3D) -> Program:
    cluster = Cluster.preset("a100-sxm", 2)
    graph, pricing = transformer_graph(dims, layout.micro_batch * layout.dp, cut_rows=layout.cp > 1), Pricing(cluster, layout.mesh)
    rules = rules_of(graph)
    keeping = Keeping(stages=(layout.zero,), precision=Precision(master="float32"))
    constraints = Constraints(layout.mesh, Pins(named=tuple(pins_of(layout))), strict=True)
    problem, ports = ProblemBuilder(graph, rules, batch_factors(graph, rules), pricing, constraints, keeping).build(None)
    program = decode(graph, rules, pricing, ports, solve(problem, use_ilp="never").choices, keeping)
    nested = [p for layout in program.produced for p in layout if p.kind == "S" and p.outer > 1]
    if nested:
        raise UsageError(f"a layout that depends on sizes: {nested[0]} under {layout}")
    return program


def _padded(dims: Dims, padding: int) -> Dims:
    return replace(dims, vocab=dims.vocab + padding)


def pins_of(layout: Layout3D) -> Iterator[Pin]:
    """On every axis the factor that operators are cut by, by patterns of their names."""
    if layout.ep > 1:
        patterns = [pattern.replace("*", "?") for pattern in _everywhere("b0")] + ["blocks.?.norm?", "blocks.?.router"]
        stored = {f"{pattern}.weight": "I" for pattern in patterns} | {"*.experts.*.weight": "S0"}
        yield from _along("ep", _everywhere("b0") | {"*.residual.*": "d0", "*.attention": "b"} | _rows("b", "b", "b") | stored)
    if layout.cp > 1:
        yield from _along("cp", _everywhere("b1") | {"*.residual.*": "d1", "*.attention": "q"} | _rows("m", "m", "m"))
    if layout.tp > 1:
        between = ("b1", "d1") if layout.sp else ("I", "I")
        words = {"token": "v", "head": "o", "*.attention": "g", "*.residual.*": between[1]} | dict.fromkeys(NORMS, between[0])
        words |= {f"blocks.*.{name}": "o" for name in COLUMNS} | {f"blocks.*.{name}": "i" for name in ROWS}
        words |= _rows("n", "n", "k") if layout.tp_of_experts else _rows("b", "b", "b") | {"*.dispatch.*": "e", "*.combine.*": "e"}
        yield from _along("tp", words | {"blocks.*.router": "b0", "*.token_cross_entropy.*": "I" if layout.whole_loss else "v"})


def _everywhere(factor: str) -> dict[str, str]:
    """Cut along the batch or the sequence."""
    return dict.fromkeys(("token", "head", *NORMS, *(f"blocks.*.{name}" for name in (*COLUMNS, *ROWS))), factor)


def _rows(gate: str, up: str, down: str) -> dict[str, str]:
    """Tokens as rows, their slots, and the products of experts."""
    experts = {"gate": gate, "up": up, "down": down}
    rows = {"blocks.*.router": "b0", "*.token_cross_entropy.*": "n", "*.dispatch.*": "c", "*.combine.*": "c"}
    return rows | {f"blocks.*.experts.{name}": word for name, word in experts.items()}


def _along(axis: str, words: Mapping[str, str]) -> Iterator[Pin]:
    for pattern, word in words.items():
        yield Pin(pattern, axis, word, f"{pattern}={axis}:{word}")
