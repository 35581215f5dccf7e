"""What is behind the blocks holds when it begins to be differentiated: the loss with its float32 copies of the logits, beside all that is kept for the backward."""

from collections.abc import Sequence

import numpy as np

from autopar.core.graph import OpGraph
from autopar.core.mesh import Mesh
from autopar.core.problem import SearchProblem
from autopar.core.rule import OpRule
from autopar.core.unroll import Run
from autopar.joint.fold import sides
from autopar.planner.problem import Ports
from autopar.planner.saved import counted_bytes, wanting
from autopar.planner.states import States
from autopar.planner.storages import backward_share


def fullest_bytes(graph: OpGraph, rules: Sequence[OpRule], problem: SearchProblem, ports: Ports, run: Run, mesh: Mesh) -> float:
    """No plan holds less while an operator behind the run is differentiated: of what it makes then, and of what it and those before it keep. What those behind it keep
    is gone by then, and copies that moves keep may be."""
    side, kept, most = sides(run, graph), 0.0, 0.0
    for i in sorted(i for i in ports.op_node if side[i] == 2):
        kept += float(problem.nodes[ports.op_node[i]].memory_bytes.min())
        if not graph.differentiated.isdisjoint(graph.ops[i].results):
            most = max(most, kept + float(_passing_bytes(graph, rules[i], i, ports.states[ports.op_node[i]], mesh).min()))
    return most


def _passing_bytes(graph: OpGraph, rule: OpRule, i: int, states: States, mesh: Mesh) -> np.ndarray:
    """By state: what the backward of an operator works in, and the gradients that it makes; nothing where it is not known to work in any."""
    op, share = graph.ops[i], backward_share(graph.ops[i].kind)
    if not share or states.kept_bytes is None or states.result_bytes is None:
        return np.zeros(1)
    largest = np.maximum(states.kept_bytes // max(len(rule.kept), 1), states.result_bytes.max(axis=0))
    made = [counted_bytes(graph.values[op.operands[k]].meta, states.operand_layouts[k], mesh) for k in wanting(graph, i)]
    return np.floor(share * largest) + sum(np.floor(num_bytes) for num_bytes in made)
