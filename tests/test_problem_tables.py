"""The tables of a search problem, entry by entry against their definition: one pair of layouts at a time."""

import math

import numpy as np
import pytest

from autopar.core.buckets import bucket_limit
from autopar.core.cluster import Cluster
from autopar.core.graph import DTYPE_BYTES, OpGraph
from autopar.core.layout import I, R, local_shape
from autopar.core.mesh import Mesh
from autopar.core.moves import step_input_bytes
from autopar.models.load import load_model
from autopar.planner.decode import decode
from autopar.planner.keeping import Keeping
from autopar.planner.problem import ProblemBuilder
from autopar.planner.roles import Constraints, Pins, batch_factors
from autopar.planner.rulebook import rules_of
from autopar.planner.states import Pricing
from autopar.program import Route, route_steps, without_r
from autopar.trace.capture import trace


@pytest.fixture(scope="module")
def tables():
    loaded = load_model("transformer-tiny", batch=8, seq=16)
    graph = trace(loaded.module, (), loaded.kwargs).graph
    mesh = Mesh.of(a=2, b=4)
    rules, pricing = rules_of(graph), Pricing(Cluster.local(8), mesh)
    builder = ProblemBuilder(graph, rules, batch_factors(graph, rules), pricing, Constraints(mesh, Pins(), False))
    problem, ports = builder.build(None)
    return graph, mesh, rules, pricing, problem, ports


def summed(graph: OpGraph, pricing: Pricing, v: int, axes: tuple[int, ...], local_bytes: float) -> float:
    """A gradient travels in a bucket and takes its share of the time that a full one takes."""
    limit = bucket_limit(sum(graph.values[p].meta.num_bytes for p in graph.params))
    share = min(1.0, graph.values[v].meta.num_bytes / limit)
    return share * pricing.gradient_reduction(axes, local_bytes / share)


def test_a_parameter_pays_its_way_and_its_one_gradient_reduction(tables) -> None:
    graph, mesh, _, pricing, problem, ports = tables
    reduced = 0
    for v, node in ports.param_node.items():
        meta = graph.values[v].meta
        (edge,) = (e for e in problem.edges if e.u == node)
        stored, used = ports.states[node].result_layouts[0], ports.states[edge.v].operand_layouts[_operand(graph, ports, v, edge.v)]
        for s, d in np.ndindex(edge.cost_s.shape):
            axes = tuple(a for a in range(2) if stored[s][a] == I and used[d][a] == R)
            start = tuple(R if a in axes else p for a, p in enumerate(stored[s]))
            red = pricing.redistribution(meta, (*stored, *used), grad=True)
            local = math.prod(local_shape(meta.shape, stored[s], mesh)) * DTYPE_BYTES[meta.dtype]
            expected = red.seconds[red.index[start], red.index[used[d]]] + summed(graph, pricing, v, axes, local)
            assert edge.cost_s[s, d] == pytest.approx(expected, rel=1e-12, abs=1e-18), (graph.values[v].source, stored[s], used[d])
            reduced += bool(axes)
    assert reduced > 100


def test_a_saved_operand_is_held_where_it_was_moved(tables) -> None:
    graph, mesh, rules, _, problem, ports = tables
    op_of = {node: i for i, node in ports.op_node.items()}
    relays = {node: v for v, node in ports.relay_node.items()}
    held = gathered = 0
    for edge in problem.edges:
        if edge.memory_bytes is None:
            continue
        if edge.v in relays:  # a copy that lies at a relay takes the place of what was produced
            v = relays[edge.v]
            assert v in graph.differentiated and any(k in rules[i].saved_operands for i, k in graph.consumers[v])
            made, there = (ports.states[n].result_layouts[j] for n, j in ((edge.u, graph.producer[v][1]), (edge.v, 0)))
            for s, d in np.ndindex(edge.cost_s.shape):
                before, after = (math.prod(local_shape(graph.values[v].meta.shape, x, mesh)) * DTYPE_BYTES[graph.values[v].meta.dtype] for x in (made[s], there[d]))
                assert edge.memory_bytes[s, d] == max(0, after - before)
                gathered += after > before
            continue
        i = op_of[edge.v]
        for s, d in np.ndindex(edge.cost_s.shape):
            sizes = {0.0}
            for k in rules[i].saved_operands:
                meta, used = graph.values[graph.ops[i].operands[k]].meta, ports.states[edge.v].operand_layouts[k][d]
                moved = all(without_r(used) != without_r(here[s]) for here in ports.states[edge.u].result_layouts)
                sizes.add(math.prod(local_shape(meta.shape, used, mesh)) * DTYPE_BYTES[meta.dtype] if moved else 0.0)
            assert edge.memory_bytes[s, d] in sizes
            held += edge.memory_bytes[s, d] > 0
    assert held > 100 and gathered > 100


def test_what_the_search_priced_is_what_the_decoded_routes_cost(tables) -> None:
    graph, mesh, rules, pricing, problem, ports = tables
    rng = np.random.default_rng(0)

    def price(v: int, route: Route) -> float:
        meta, total = graph.values[v].meta, 0.0
        for here, step in zip(route, route_steps(route), strict=False):
            local = math.prod(local_shape(meta.shape, here, mesh)) * DTYPE_BYTES[meta.dtype]
            total += pricing.step(step.forward, step.axis, local)
            if meta.requires_grad:
                total += pricing.step(step.backward, step.axis, step_input_bytes(step.backward, step, mesh, local, backward=True))
        return total

    for _ in range(20):
        choices = [int(rng.integers(node.num_states)) for node in problem.nodes]
        program = decode(graph, rules, pricing, ports, choices, Keeping())
        moves = [price(v, route) for v, route in program.relay.items()]
        moves += [price(graph.ops[i].operands[k], route) for (i, k), route in program.routes.items() if graph.ops[i].operands[k] in graph.searched]
        moves += [price(v, route) for v, route in zip(graph.outputs, program.output_routes, strict=True) if v in graph.searched]
        moves += [summed(graph, pricing, v, axes, program.local_bytes(v, program.storage[v])) for v, axes in program.deferred.items()]
        priced = math.fsum(float(edge.cost_s[choices[edge.u], choices[edge.v]]) for edge in problem.edges)
        assert math.fsum(moves) == pytest.approx(priced, rel=1e-9)


def _operand(graph, ports, v: int, node: int) -> int:
    """Which operand of the node a value is; relays and outputs have one."""
    op_of = {n: i for i, n in ports.op_node.items()}
    return graph.ops[op_of[node]].operands.index(v) if node in op_of else 0
