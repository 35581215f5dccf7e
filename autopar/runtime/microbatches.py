"""A global batch as microbatches, and what share each has in the loss of the whole."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree  # the public alias lacks tree_unflatten over dicts in torch 2.11
from torch.fx import Graph, GraphModule, Node

from autopar.errors import UsageError

Batch = dict[str, Any] | tuple


def split_batch(batch: Batch, pieces: int) -> list[Batch]:
    """Cut every tensor whose first dimension is the batch (that of the first tensor) into equal microbatches; others are shared.

    Raises UsageError where the batch does not divide.
    """
    if pieces == 1:
        return [batch]
    flat, spec = pytree.tree_flatten(batch)
    size = batch_size(batch)
    if size == 0 or size % pieces:
        raise UsageError(f"a batch of {size} does not divide into {pieces} microbatches; change the batch or micro_batches")
    cut = [x.chunk(pieces) if isinstance(x, torch.Tensor) and x.dim() and x.shape[0] == size else [x] * pieces for x in flat]
    return [pytree.tree_unflatten([column[n] for column in cut], spec) for n in range(pieces)]


def resized(batch: Batch, samples: int) -> Batch:
    """The shapes of a batch of another number of samples, on the meta device: what `split_batch` cuts is so long, others are shared."""
    size = batch_size(batch)

    def sized(x: torch.Tensor) -> torch.Tensor:
        return torch.empty((samples, *x.shape[1:]), dtype=x.dtype, device="meta") if x.dim() and x.shape[0] == size else x

    return pytree.tree_map_only(torch.Tensor, sized, batch)


def batch_size(batch: Batch) -> int:
    """The first dimension of the first tensor; 0 where there is none."""
    return next((x.shape[0] for x in pytree.tree_leaves(batch) if isinstance(x, torch.Tensor) and x.dim()), 0)


def loss_weights(traced: Any, pieces: Sequence[Batch]) -> list[float]:
    """The share of every microbatch in the loss of the batch; equal ones where the loss is not a mean over counted targets."""
    if len(pieces) == 1:
        return [1.0]
    count = _count_program(traced)
    if count is None:
        return [1.0 / len(pieces)] * len(pieces)
    counts = [float(count(*_flat(traced, piece))) for piece in pieces]
    return [c / sum(counts) for c in counts]


def _flat(traced: Any, batch: Batch) -> list[torch.Tensor]:
    return traced.flat_inputs((), batch) if isinstance(batch, dict) else traced.flat_inputs(batch, {})


def _count_program(traced: Any) -> GraphModule | None:
    """The part of the traced graph that counts the targets, where the loss is a sum divided by such a count."""
    graph = traced.graph
    if not graph.seeds or graph.values[graph.seeds[0]].meta.shape != ():
        return None
    i, _ = graph.producer[graph.seeds[0]]
    op = graph.ops[i]
    if op.kind != "aten.div.Tensor" or len(op.operands) != 2:
        return None
    numerator, denominator = op.operands
    if denominator in graph.producer and len(graph.ops[graph.producer[denominator][0]].results) > 1:
        return None
    if graph.values[denominator].meta.shape != () or graph.values[denominator].meta.requires_grad or not _is_sum(graph, numerator):
        return None
    nodes = {n.name: n for n in traced.gm.graph.nodes}
    return _extract(traced.gm, nodes[traced.node_of[denominator]], [nodes[traced.node_of[v]] for v, x in enumerate(graph.values) if x.role == "input"])


def _is_sum(graph: Any, value: int) -> bool:
    return value in graph.producer and graph.ops[graph.producer[value][0]].kind.startswith("aten.sum")


def _extract(gm: GraphModule, result: Node, inputs: Sequence[Node]) -> GraphModule | None:
    needed: set[Node] = set()
    stack = [result]
    while stack:
        node = stack.pop()
        if node in needed:
            continue
        needed.add(node)
        if node.op == "placeholder" and node not in inputs:
            return None  # depends on weights: not a count of targets
        stack += node.all_input_nodes
    graph = Graph()
    copies: dict[Node, Node] = {}
    for node in inputs:
        copies[node] = graph.placeholder(node.name)
    for node in gm.graph.nodes:
        if node in needed and node not in copies:
            copies[node] = graph.node_copy(node, lambda n: copies[n])
    graph.output(copies[result])
    return GraphModule(gm, graph)
