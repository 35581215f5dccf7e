"""Contractions with weights in the form that a zero-bubble schedule needs: the gradient of the weight apart from that of the input."""

import torch
from torch.fx import Node

from autopar.program import Program
from autopar.rewrite.emit import Emitted
from autopar.runtime import split

aten = torch.ops.aten
FORMS = {aten.linear.default: split.linear, aten.addmm.default: split.addmm, aten.mm.default: split.mm}
WEIGHT = {aten.linear.default: 1, aten.addmm.default: 2, aten.mm.default: 1}


def put_off_weight_gradients(emitted: Emitted, program: Program) -> None:
    """Replace contractions whose second operand is made of parameters alone, and whose first is not."""
    graph, values = emitted.graph, program.graph.values
    mesh, *given = (n for n in graph.nodes if n.op == "placeholder")
    fixed: set[Node] = {mesh, *(n for n, v in zip(given, emitted.inputs) if values[v].role in ("param", "buffer", "constant"))}
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.all_input_nodes and all(n in fixed for n in node.all_input_nodes):
            fixed.add(node)
        form = FORMS.get(node.target)
        if form is None or node.kwargs or node.args[WEIGHT[node.target]] not in fixed or node.args[WEIGHT[node.target] - 1] in fixed:
            continue
        with graph.inserting_before(node):
            new = graph.call_function(form, (mesh, *node.args))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
