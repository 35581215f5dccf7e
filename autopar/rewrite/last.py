"""A loss is summed over ranks as its last step, so that nobody has to wait for the sum (`runtime/pending.py`)."""

import torch
from torch.fx import Graph, Node

from autopar.program import Program
from autopar.rewrite.emit import Emitted
from autopar.runtime.moves import MOVES

SUM = MOVES["all_reduce", "identity"]
QUOTIENT = torch.ops.aten.div.Tensor


def sum_numbers_last(emitted: Emitted, program: Program) -> None:
    """Divide a rank's addend of a number, and sum that, where the sum would be divided: by a number that all ranks have and nothing is trained through."""
    divided = {op.operands[0] for op in program.graph.ops if op.kind == str(QUOTIENT) and _by_a_number(program, op.operands)}
    for node in reversed(emitted.graph.nodes):
        value, _ = node.meta.get("route", (None, ()))  # sums inside an operator have none
        if node.target is SUM and value in divided:
            [quotient, *others] = node.users
            if not others and quotient.target is QUOTIENT:
                _swap(emitted.graph, node, quotient)


def _by_a_number(program: Program, operands: tuple[int, ...]) -> bool:
    values = program.graph.values
    return len(operands) == 2 and all(values[v].meta.shape == () for v in operands) and not values[operands[1]].meta.requires_grad


def _swap(graph: Graph, total: Node, quotient: Node) -> None:
    with graph.inserting_before(quotient):
        addend = graph.call_function(QUOTIENT, (total.args[0], *quotient.args[1:]))
        last = graph.call_function(SUM, (addend, *total.args[1:]), total.kwargs)
    addend.meta, last.meta = dict(quotient.meta), total.meta | {"segment": quotient.meta["segment"]}
    quotient.replace_all_uses_with(last)
    graph.erase_node(quotient)
    graph.erase_node(total)
