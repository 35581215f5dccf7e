"""A loss is summed over ranks as the last thing of a program, so that its backward need not wait for the sum."""

import torch
from torch.fx import Graph, Node

from autopar.program import Program
from autopar.rewrite.emit import Emitted
from autopar.runtime.moves import MOVES, late_all_reduce__identity

SUM = MOVES["all_reduce", "identity"]
QUOTIENT = torch.ops.aten.div.Tensor


def sum_at_last(emitted: Emitted, program: Program) -> None:
    """Divide a rank's addend of a number, and sum that, where the sum would be divided; mark the sums that are outputs and nothing else."""
    divided = {op.operands[0] for op in program.graph.ops if op.kind == str(QUOTIENT) and _by_a_number(program, op.operands, op.results[0])}
    for node in reversed(emitted.graph.nodes):
        value, _ = node.meta.get("route", (None, ()))  # sums inside an operator have none
        if node.target is SUM and value in divided and value not in program.graph.once:
            [quotient, *others] = node.users
            if not others and quotient.target is QUOTIENT:
                _swap(emitted.graph, node, quotient)
    outputs, updates = emitted.graph.output_node().args[0]
    for node in set(outputs) - set(updates):  # the new values of buffers are read at once
        if node.target is SUM and len(node.users) == 1:
            node.target = late_all_reduce__identity


def _by_a_number(program: Program, operands: tuple[int, ...], quotient: int) -> bool:
    """Numbers of one dtype, as a sum of integers and its mean are not, divided by one that all ranks have and nothing is trained through."""
    metas = [program.graph.values[v].meta for v in (*operands, quotient)]
    return len(operands) == 2 and all(m.shape == () for m in metas) and not metas[1].requires_grad and metas[0].dtype == metas[2].dtype


def _swap(graph: Graph, total: Node, quotient: Node) -> None:
    with graph.inserting_before(quotient):
        addend = graph.call_function(QUOTIENT, (total.args[0], *quotient.args[1:]))
        last = graph.call_function(SUM, (addend, *total.args[1:]), total.kwargs)
    addend.meta, last.meta = dict(quotient.meta), total.meta | {"segment": quotient.meta["segment"]}
    quotient.replace_all_uses_with(last)
    graph.erase_node(quotient)
    graph.erase_node(total)
