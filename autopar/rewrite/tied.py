"""Look-ups in a table that is used whole elsewhere, such as a head's: their gradient is rows to add to that of the other use, not a table of zeros and rows."""

import torch

from autopar.program import Program
from autopar.rewrite.emit import Emitted

EMBEDDING = torch.ops.aten.embedding.default
DTYPES = ("float32", "float64")
"""In which the rows are added exactly as autograd adds a whole table; narrower ones were not tried."""

PLAIN = 3
"""Arguments of a look-up that asks for nothing but rows (weight, indices, padding_idx); one scaled by frequency has no sparse gradient."""


def add_rows_where_tied(emitted: Emitted, program: Program, device: torch.device) -> None:
    """Ask for sparse gradients of look-ups in parameters that another operator differentiates too; autograd adds them in place to its gradient."""
    graph, live = program.graph, program.graph.differentiated
    placeholders = [n for n in emitted.graph.nodes if n.op == "placeholder"][1:]
    if device.type != "cpu":
        return
    for node, v in zip(placeholders, emitted.inputs):
        if v not in program.storage or v not in live or program.residency.stage(v) == 3 or graph.values[v].meta.dtype not in DTYPES:
            continue
        others = [i for i, _ in graph.consumers[v] if graph.ops[i].kind != str(EMBEDDING) and not live.isdisjoint(graph.ops[i].results)]
        lookups = [n for n in node.users if n.target is EMBEDDING and len(n.args) <= PLAIN and not n.kwargs] if others else []
        for n in lookups:
            weight, indices, *padding = n.args
            n.args = (weight, indices, padding[0] if padding else -1, False, True)
