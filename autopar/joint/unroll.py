"""From the program of a short graph to that of the whole one: the middle block's decisions for every block that it stands for."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from autopar.core.graph import OpGraph, Segment
from autopar.core.layout import I
from autopar.core.unroll import Run
from autopar.errors import UsageError
from autopar.joint.fold import shown
from autopar.joint.kinds import Depth
from autopar.planner.rulebook import rules_of
from autopar.program import Program


def unrolled(short: Program, graph: OpGraph, run: Run, modes: Sequence[str]) -> Program:
    """The program on `graph`, which is that of `short` with all blocks; `modes` of recomputation of these.

    Raises UsageError where the graphs are not so related.
    """
    op_of = dict(_same_ops(short.graph, graph, run))
    value_of = dict(_same_values(short.graph, graph, op_of))
    whole = tuple(I for _ in short.mesh.axes)
    zero = {v: short.residency.zero[w] for v, w in value_of.items() if w in short.residency.zero}
    return Program(
        graph, short.mesh, tuple(rules_of(graph)), tuple(short.strategies[op_of[i]] for i in range(len(graph.ops))),
        storage={v: short.storage[value_of[v]] for v in graph.params}, deferred={v: short.deferred[value_of[v]] for v in graph.params},
        produced=tuple(short.produced[value_of[v]] if v in value_of else whole for v in range(len(graph.values))),
        relay={v: short.relay[w] for v, w in sorted(value_of.items()) if w in short.relay},
        routes={(i, k): short.routes[op_of[i], k] for i, op in enumerate(graph.ops) for k in range(len(op.operands))},
        output_routes=short.output_routes, update_routes=short.update_routes, residency=replace(short.residency, zero=zero, recompute=recomputed(short, run, modes)),
    )  # fmt: skip


def recomputed(short: Program, run: Run, modes: Sequence[str]) -> dict[str, str]:
    """How every block of the whole graph is computed again that is."""
    others = {block: mode for block, mode in short.residency.recompute.items() if block not in shown(run)}
    return {**others, **{block: mode for block, mode in zip(run.blocks, modes, strict=True) if mode != "none"}}


def modes_of(depths: Sequence[Depth], light: str, heavy: str) -> tuple[str, ...]:
    """Per block: the first of every stage are computed again in the heavier mode."""
    return tuple(mode for depth in depths for mode in (heavy,) * depth.heavy + (light,) * (depth.blocks - depth.heavy))


def _same_ops(short: OpGraph, graph: OpGraph, run: Run) -> Iterator[tuple[int, int]]:
    """(operator, the operator of the short graph that stands for it)."""
    if missing := set(run.blocks) - {segment.block for segment in graph.segments}:
        raise UsageError(f"{graph.name} lacks {len(missing)} of the {run.depth} blocks of {run.path}")
    place = {block: 0 if n == 0 else 2 if n == run.depth - 1 else 1 for n, block in enumerate(run.blocks)}
    of_short: dict[str, list[Segment]] = {}
    for segment in short.segments:
        of_short.setdefault(segment.block, []).append(segment)
    seen: dict[str, int] = {}
    for segment in graph.segments:
        there = shown(run)[place[segment.block]] if segment.block in place else segment.block
        n = seen.setdefault(segment.block, 0)
        seen[segment.block] += 1
        if n >= len(of_short.get(there, ())) or len(of_short[there][n].ops) != len(segment.ops):
            raise UsageError(f"{segment.block or 'an operator outside of the blocks'} has no counterpart among the blocks that stand for all")
        yield from zip(segment.ops, of_short[there][n].ops, strict=True)


def _same_values(short: OpGraph, graph: OpGraph, op_of: Mapping[int, int]) -> Iterator[tuple[int, int]]:
    """(value, the value of the short graph that stands for it)."""
    for i, op in enumerate(graph.ops):
        other = short.ops[op_of[i]]
        if op.kind != other.kind:
            raise UsageError(f"operator {op.name} is {op.kind}, and {other.kind} stands for it")
        yield from zip(op.results, other.results, strict=True)
        yield from ((v, w) for v, w in zip(op.operands, other.operands, strict=True) if v not in graph.producer)
    named = {value.name: w for w, value in enumerate(short.values)}
    unused = (v for v, value in enumerate(graph.values) if v not in graph.producer and not graph.consumers[v])
    yield from ((v, named[graph.values[v].name]) for v in unused if graph.values[v].name in named)
