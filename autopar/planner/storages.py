"""A program as the steps that the emitted code makes, each with the memory it takes: what is new, what is shared, what is kept.

A *node* is a value in one layout (a result, or the value after some of its moves), its *owner* the node whose memory it lies in: views
own none. How long memory lives is not decided here (`liveness.py`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from autopar.core.graph import DTYPE_BYTES, Op
from autopar.core.layout import Layout
from autopar.core.moves import COLLECTIVES
from autopar.core.strides import Strides, dense_like, is_row_major, row_major, view_strides
from autopar.planner.keeping import kept_by_selective
from autopar.program import Program, Route, route_steps

JOINING = ("aten.cat", "aten.concat", "aten.stack")
SAME_GRADIENT = ("aten.clone", "aten.contiguous", "aten.alias", "aten.add.", "aten.sub.", "aten.sum", *JOINING)
"""Operators whose operands' gradients lie in the memory of the result's, where shapes agree."""

WHOLE_GRADIENT = ("aten.slice", "aten.narrow", "aten.select", "aten.split", "aten.chunk", "aten.tensor_split", "aten.unbind", "aten.expand",
                  "aten.broadcast", "aten.unfold")  # fmt: skip
"""Views whose operand's gradient is memory of its own: zeros around a part, parts joined, or a sum over copies."""

FORWARD_WORKSPACE = {"autopar.dropout": 1.0, "autopar.attention": 1.0, "autopar.token_cross_entropy": 1.0}
"""Copies of the largest tensor kept (or made) that an operator holds while it runs and drops at its end, where it is written out."""

WRITTEN_OUT = ("autopar.dropout", "autopar.attention")
"""Operators that always are; others where what they sum themselves is cut."""

BACKWARD_WORKSPACE = {"aten.pow": 2.0, "autopar.attention": 2.0, "autopar.token_cross_entropy": 1.0}
"""The same for its backward: `grad * (e * x ** (e - 1))` has two products at once."""

PERMUTING = ("aten.transpose", "aten.permute", "aten.movedim", "aten.t.", "aten.numpy_T", "aten.mT")
RESHAPING = ("aten.view", "aten.reshape", "aten._unsafe_view", "aten.unsqueeze", "aten.squeeze", "aten.flatten", "aten.unflatten")
ATTENTION = "aten.scaled_dot_product_attention"


@dataclass(frozen=True, slots=True)
class Node:
    """`owner`: number of the node whose memory this one lies in; None for what a rank holds anyway (parameters, buffers, inputs).
    `live`: a gradient comes back to it."""

    num_bytes: int
    shape: tuple[int, ...]
    strides: Strides
    owner: int | None
    live: bool


@dataclass(frozen=True, slots=True)
class Step:
    """One operator or move. Bytes beside those of its nodes; `saved`: nodes the backward reads, `kept_bytes`: what it keeps beside them;
    `gradients`: for every operand bytes of new memory for its gradient, None where it shares the result's; `op`: None for a move."""

    moment: str
    operands: tuple[int, ...]
    results: tuple[int, ...]
    recorded: bool
    live: bool
    saved: tuple[int, ...] = ()
    kept_bytes: int = 0
    workspace_bytes: int = 0
    gradients: tuple[int | None, ...] = ()
    backward_workspace_bytes: int = 0
    contraction: bool = False
    collective: bool = False


@dataclass(frozen=True)
class Steps:
    """`segments[s]`: the steps of segment s; one more at the end for what leads to the outputs (`ends`). `leaves`: node -> parameter."""

    nodes: tuple[Node, ...]
    segments: tuple[tuple[Step, ...], ...]
    ends: tuple[int, ...]
    seeds: tuple[int, ...]
    leaves: Mapping[int, int]


@dataclass
class _Builder:
    program: Program
    nodes: list[Node] = field(default_factory=list)
    found: dict[tuple[int, Route], int] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    place: str = "outputs"

    def build(self) -> Steps:
        program, graph = self.program, self.program.graph
        for v, value in enumerate(graph.values):
            if value.role not in ("op", "elsewhere"):
                self._given(v)
        segments = []
        for segment in graph.segments:
            self.steps = []
            for i in segment.ops:
                self.place = segment.block or graph.ops[i].module_path or graph.ops[i].name
                self._op(i)
            segments.append(tuple(self.steps))
        self.steps, self.place = [], "outputs"
        ends = [self._moved(v, route) for v, route in zip(graph.outputs, program.output_routes)]
        ends += [self._moved(v, route) for (_, v), route in zip(graph.updates, program.update_routes)]
        seeds = [n for v, n in zip(graph.outputs, ends) if v in graph.seeds]
        leaves = {self.found[v, (program.produced[v],)]: v for v in graph.params}
        return Steps(tuple(self.nodes), (*segments, tuple(self.steps)), tuple(ends), tuple(seeds), leaves)

    def _add(self, v: int, layout: Layout, route: Route, *, strides: Strides | None = None, source: int | None = None, held: bool = False) -> int:
        """A node; with `source` in its memory."""
        shape = self.program.local_shape(v, layout)
        n = len(self.nodes)
        owner = None if held else n if source is None else self.nodes[source].owner
        live = v in self.program.graph.differentiated
        size = math.prod(shape) * DTYPE_BYTES[self.program.graph.values[v].meta.dtype]
        self.nodes.append(Node(size, shape, strides or row_major(shape), owner, live))
        self.found[v, route] = n
        return n

    def _given(self, v: int) -> None:
        layout = self.program.produced[v]
        self._add(v, layout, (layout,), held=True)

    def _moved(self, v: int, tail: Route) -> int:
        route = self.program.full_route(v, tail)
        for n, step in enumerate(route_steps(route), start=1):
            key = (v, route[: n + 1])
            if key not in self.found:
                self._move(v, self.found[v, route[:n]], step.forward, step.backward, route[n], key[1])
        return self.found[v, route]

    def _move(self, v: int, source: int, forward: str, backward: str, layout: Layout, route: Route) -> None:
        before = self.nodes[source]
        shape = self.program.local_shape(v, layout)
        cut = next((d for d, (n, m) in enumerate(zip(before.shape, shape)) if n != m), None)
        shares = forward == "identity" or (forward == "slice" and cut is not None and math.prod(shape[:cut]) == 1)
        n = self._add(v, layout, route, source=source if shares else None)
        after = self.nodes[n]
        live = before.live and after.live
        same = backward == "identity"
        self.steps.append(
            Step(
                self.place, (source,), (n,), live, live,
                workspace_bytes=_in_flight(forward, before.num_bytes, after.num_bytes),
                gradients=(None if same else before.num_bytes,),
                backward_workspace_bytes=_in_flight(backward, after.num_bytes, before.num_bytes),
                collective=forward in COLLECTIVES,
            )  # fmt: skip
        )

    def _op(self, i: int) -> None:
        program, graph = self.program, self.program.graph
        op, rule, strategy = graph.ops[i], program.rules[i], program.strategies[i]
        operands = tuple(self._moved(v, program.routes[i, k]) for k, v in enumerate(op.operands))
        results = tuple(self._result(op, v, operands) for v in op.results)
        recorded = any(graph.values[v].meta.requires_grad for v in op.results)
        wanting = [k for k, v in enumerate(op.operands) if graph.values[v].meta.requires_grad]
        saved = [operands[k] for k in range(len(operands)) if rule.keeps_operand(k, wanting) or not rule.known] + [results[j] for j in rule.saved_results]
        kept = rule.kept_bytes(strategy, program.mesh) if recorded else 0
        made = max((self.nodes[n].num_bytes for n in results), default=0)
        written_out = op.kind.startswith(WRITTEN_OUT) or any(choice == ("cut", inner.factor) for choice in strategy for inner in rule.inner)
        self.steps.append(
            Step(
                self.place, operands, results, recorded, not graph.differentiated.isdisjoint(op.results),
                saved=tuple(dict.fromkeys(saved)) if recorded else (),
                kept_bytes=kept,
                workspace_bytes=round(_share(FORWARD_WORKSPACE, op.kind) * max(kept // max(len(rule.kept), 1), made)) if written_out else 0,
                gradients=tuple(self._gradient(op, n, results) for n in operands),
                backward_workspace_bytes=self._backward_workspace(i, operands, max(kept // max(len(rule.kept), 1), made), made),
                contraction=kept_by_selective(op, [graph.values[v].meta for v in op.operands]),
            )  # fmt: skip
        )

    def _result(self, op: Op, v: int, operands: Sequence[int]) -> int:
        layout = self.program.produced[v]
        shape = self.program.local_shape(v, layout)
        route = (layout,)
        if operands and self.program.rules[self.program.graph.producer[v][0]].cost == "view":
            source = self.nodes[operands[0]]
            strides = _seen(op, source, shape)
            if strides is not None:
                return self._add(v, layout, route, strides=strides, source=operands[0])
        elif op.kind.startswith(ATTENTION):  # flash attention writes rows of all heads together
            return self._add(v, layout, route, strides=dense_like(shape, (3, 1, 2, 0)))
        elif operands and not op.kind.startswith(("aten.clone", "aten.contiguous")):
            alike = (self.nodes[n] for n in operands if self.nodes[n].shape == shape)
            like = next((node for node in alike if not is_row_major(shape, node.strides)), None)
            if like is not None and self.program.rules[self.program.graph.producer[v][0]].cost == "pointwise" and all(like.strides):
                return self._add(v, layout, route, strides=dense_like(shape, like.strides))
        return self._add(v, layout, route)

    def _gradient(self, op: Op, n: int, results: Sequence[int]) -> int | None:
        node = self.nodes[n]
        if op.kind.startswith(WHOLE_GRADIENT):
            return node.num_bytes
        rearranged = op.kind.startswith((*PERMUTING, *RESHAPING))
        broadcast = math.prod(node.shape) < math.prod(self.nodes[results[0]].shape) and not op.kind.startswith(JOINING)
        return None if rearranged or (op.kind.startswith(SAME_GRADIENT) and not broadcast) else node.num_bytes

    def _backward_workspace(self, i: int, operands: Sequence[int], largest: int, made: int) -> int:
        kind = self.program.graph.ops[i].kind
        share = _share(BACKWARD_WORKSPACE, kind)
        if share:
            return round(share * largest)
        broadcast = any(self.nodes[n].live and self.nodes[n].num_bytes < made for n in operands)
        product = self.program.rules[i].cost == "pointwise" and not kind.startswith(SAME_GRADIENT)
        return made if product and broadcast else 0  # a gradient of the whole shape, before it is summed


def _seen(op: Op, source: Node, shape: tuple[int, ...]) -> Strides | None:
    """Strides of a view's result in the memory of its operand; None where a reshape must copy."""
    given = dict(op.args)
    rank = len(source.shape)
    if op.kind.startswith(RESHAPING):
        return view_strides(source.shape, source.strides, shape)
    if op.kind.startswith(PERMUTING):
        order = list(range(rank))
        if op.kind == "aten.permute.default":
            order = [int(d) % rank for d in given["dims"]]
        elif op.kind == "aten.transpose.int":
            a, b = int(given["dim0"]) % rank, int(given["dim1"]) % rank
            order[a], order[b] = b, a
        elif op.kind == "aten.movedim.int":
            order.insert(int(given["destination"]) % rank, order.pop(int(given["source"]) % rank))
        elif op.kind == "aten.mT.default":
            order[-1], order[-2] = order[-2], order[-1]
        else:
            order.reverse()
        return tuple(source.strides[d] for d in order)
    if op.kind.startswith(("aten.select", "aten.unbind")):
        d = int(given["dim"]) % rank
        return source.strides[:d] + source.strides[d + 1 :]
    if op.kind.startswith(("aten.expand", "aten.broadcast")):
        lead = len(shape) - rank
        return (0,) * lead + tuple(s if n == m else 0 for s, n, m in zip(source.strides, source.shape, shape[lead:]))
    return source.strides if len(shape) == rank else row_major(shape)


def _in_flight(primitive: str, given: int, made: int) -> int:
    """Bytes that a move holds beside its input and its result: pieces, pieces side by side, and what is received."""
    return {"all_gather": made, "reduce_scatter": 3 * given, "all_to_all": 2 * given, "embed": given}.get(primitive, 0)


def _share(table: dict[str, float], kind: str) -> float:
    return next((share for start, share in table.items() if kind.startswith(start)), 0.0)


def steps_of(program: Program) -> Steps:
    """The steps of one microbatch of a program."""
    return _Builder(program).build()
