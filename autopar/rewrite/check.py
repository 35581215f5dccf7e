"""The static check of a program before it runs: a type check of layouts, first of the plan, then of the emitted graph.

All ranks run the same emitted graph, so every group issues the same collectives in the same order; what is left to prove
is that each value has the layout its user takes it for, that no output is partial, and that every step is one legal move.
"""

from collections.abc import Iterator

from torch.fx import Graph, Node

from autopar.core.layout import Layout, R, local_outer
from autopar.core.moves import PRIMITIVES, Step, legal_step
from autopar.errors import LayoutError, VerificationError
from autopar.program import Program, Route, Tensor, route_steps, without_r
from autopar.runtime.moves import PAIR_OF


def check_program(program: Program) -> None:
    """Every strategy is legal; every route starts where its value is made, ends where it is used, in legal steps that fit."""
    for op, rule, strategy in zip(program.graph.ops, program.rules, program.strategies):
        if not rule.legal(strategy, program.mesh):
            raise VerificationError(f"operator {op.name}: strategy {rule.describe(strategy, program.mesh)} is not legal on mesh {program.mesh}")
    for name, value, route, end in _routes(program):
        _check_route(program, name, value, route, end)


def _routes(program: Program) -> Iterator[tuple[str, int, Route, Layout | None]]:
    graph = program.graph
    for i, op in enumerate(graph.ops):
        for k, v in enumerate(op.operands):
            yield f"{op.name} operand {k}", v, program.full_route(v, program.routes[i, k]), program.needed(i, k)
    for n, (v, route) in enumerate(zip(graph.outputs, program.output_routes)):
        route = program.full_route(v, route)
        yield f"output {n}", v, route, route[-1] if n >= program.first_handed else None
    for (buffer, v), route in zip(graph.updates, program.update_routes):
        yield f"update of {graph.values[buffer].source[0]}", v, program.full_route(v, route), None


def _check_route(program: Program, name: str, v: int, route: Route, end: Layout | None) -> None:
    value = program.graph.values[v]
    if route[0] != program.produced[v]:
        raise VerificationError(f"{name}: {value.name} is made as {program.produced[v]}, the route starts at {route[0]}")
    if end is None and any(p.kind in "PR" for p in (route[-1] if value.meta.requires_grad else without_r(route[-1]))):
        raise VerificationError(f"{name}: {value.name} leaves the program as {route[-1]}; outputs must be whole or cut")
    if end is not None and route[-1] != end:
        raise VerificationError(f"{name}: {value.name} arrives as {route[-1]}, the operator takes it as {end}")
    for layout in route:
        try:
            program.local_shape(v, layout)
        except LayoutError as error:
            raise VerificationError(f"{name}: {value.name}: {error}") from error
    for here, step in zip(route, route_steps(route)):
        if not legal_step(here, step):
            raise VerificationError(f"{name}: {value.name}: {here} to {step.apply(here)} is not one move")
        if not value.meta.requires_grad and R in (step.src, step.dst):
            raise VerificationError(f"{name}: {value.name} carries no gradient but moves through R")


def check_emitted(program: Program, graph: Graph) -> None:
    """Re-derive, from the emitted moves alone, the layout in which every operator receives its operands."""
    expected = _expected_moves(program)
    found: dict[tuple, int] = {}
    for node in graph.nodes:
        if node.op == "call_function" and node.target in PAIR_OF and "route" in node.meta:
            key = (node.meta["route"], PAIR_OF[node.target], node.args[2], tuple(sorted(node.kwargs.items())))
            found[key] = found.get(key, 0) + 1
            _check_source(program, node)
    for key in expected - found.keys():
        raise VerificationError(f"the emitted program lacks the move {key[1][0]} over {key[2]} on the way {key[0]}")
    for key, count in found.items():
        if key not in expected or count != 1:
            raise VerificationError(f"the emitted program moves {key[0]} by {key[1][0]} over {key[2]} {count} times, the plan {int(key in expected)} times")


def _expected_moves(program: Program) -> set[tuple]:
    expected, there = set(), set[Tensor]()
    for _, v, route, _ in _routes(program):
        for n, step in enumerate(route_steps(route), start=1):
            same = program.once.get((v, route[: n + 1]))
            if same in there:
                continue
            there.update(() if same is None else (same,))
            pair = PRIMITIVES[step.src.kind, step.dst.kind]
            expected.add(((v, route[: n + 1]), pair, program.mesh.names[step.axis], tuple(sorted(move_arguments(program, step, route[n - 1]).items()))))
    return expected


def move_arguments(program: Program, step: Step, src: Layout) -> dict[str, int]:
    """Keyword arguments of a move's function: the digits it cuts or joins, as the local tensor sees them."""
    kwargs: dict[str, int] = {}
    if step.src.kind == "S":
        kwargs = {"dim": step.src.dim, "outer": local_outer(src, program.mesh, step.axis)}
    if step.dst.kind == "S":
        outer = local_outer(step.apply(src), program.mesh, step.axis)
        names = ("to_dim", "to_outer") if step.src.kind == "S" else ("dim", "outer")
        kwargs |= dict(zip(names, (step.dst.dim, outer)))
    return {k: n for k, n in kwargs.items() if not (k.endswith("outer") and n == 1)}


def _check_source(program: Program, node: Node) -> None:
    """A move takes the value as the step before it left it."""
    value, route = node.meta["route"]
    source = node.args[0]
    before = source.meta.get("route") if isinstance(source, Node) else None
    expected = value, route[:-1]
    if before is not None and program.once.get(before, before) != program.once.get(expected, expected):
        raise VerificationError(f"move {node.name} continues {before}, not {expected}")
    if before is None and len(route) != 2:
        raise VerificationError(f"move {node.name} skips the first steps of {route}")
