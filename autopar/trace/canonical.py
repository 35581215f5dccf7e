"""Rewrites of a traced fx graph into forms that can be cut: losses as sums, random ops with a site, statistics explicit.

Every rewrite keeps the mathematics of the graph. `PASSES` is the list, in order.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from autopar.trace.fused import fuse_formulas
from autopar.trace.operators import OPS

aten = torch.ops.aten


def bound(node: Node) -> dict[str, Any]:
    """All arguments of a node by their schema names, defaults filled in."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    found = {a.name: a.default_value if a.has_default_value() else None for a in schema}
    found.update({a.name: value for a, value in zip(schema, node.args)})
    found.update(node.kwargs)
    return found


def _val(node: Node) -> torch.Tensor:
    return node.meta["val"]


def _call(graph: Graph, like: Node, function: Callable, /, *args: Any, val: Any, **kwargs: Any) -> Node:
    node = graph.call_function(function, args, kwargs)
    node.meta = {k: v for k, v in like.meta.items() if k in ("nn_module_stack", "stack_trace")}
    node.meta["val"] = val
    return node


def drop_asserts(gm: GraphModule) -> None:
    names = ("_assert_tensor_metadata", "_assert_scalar", "_assert_async", "sym_constrain")
    for node in list(gm.graph.nodes):
        if node.op == "call_function" and any(n in str(node.target) for n in names) and not node.users:
            gm.graph.erase_node(node)


def drop_plain_inputs(gm: GraphModule) -> None:
    """Flags and None among the inputs were baked in by the trace."""
    for node in gm.graph.find_nodes(op="placeholder"):
        if not isinstance(node.meta.get("val"), torch.Tensor) and not node.users:
            gm.graph.erase_node(node)


def views_to_reshapes(gm: GraphModule) -> None:
    """Whether a view is possible depends on strides, and those on kernels and cuts; a reshape always is, and is a view where it can."""
    for target in (aten.view.default, aten._unsafe_view.default):
        for node in gm.graph.find_nodes(op="call_function", target=target):
            node.target = aten.reshape.default


def drop_copies(gm: GraphModule) -> None:
    """A plain copy of an operator's result is that result: nothing in an exported graph is changed in place. Outputs stay copies."""
    results = set(gm.graph.output_node().all_input_nodes)
    for target in (aten.clone.default, aten.alias.default):
        for node in gm.graph.find_nodes(op="call_function", target=target):
            source = node.args[0]
            if (not node.kwargs or _is_dense(node, source)) and source.op == "call_function" and node not in results:
                node.replace_all_uses_with(source)
                gm.graph.erase_node(node)


def _is_dense(copy: Node, source: Node) -> bool:
    """Whether this copy, which `contiguous` left, is none in eager mode: fused attention writes the heads of a row side by side. Reshapes look again."""
    maker = source.args[0] if source.target is aten.transpose.int else None
    fused = isinstance(maker, Node) and maker.target is aten.scaled_dot_product_attention.default and bound(maker)["dropout_p"] == 0
    return fused and all(user.target is aten.reshape.default for user in copy.users)


def write_out_copies(gm: GraphModule) -> None:
    """`copy(a, b)` is b in the shape and dtype of a; torch has no derivative for it."""
    for node in gm.graph.find_nodes(op="call_function", target=aten.copy.default):
        like, new = _val(node), node.args[1]
        with gm.graph.inserting_before(node):
            if _val(new).dtype != like.dtype:
                new = _call(gm.graph, node, aten._to_copy.default, new, dtype=like.dtype, val=torch.empty_like(_val(new), dtype=like.dtype))
            if _val(new).shape != like.shape:
                new = _call(gm.graph, node, aten.expand.default, new, list(like.shape), val=like)
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)


def write_out_cross_entropy(gm: GraphModule) -> None:
    """Mean and sum of cross-entropy -> sum of the row losses (over the count of targets that are not ignored)."""
    for node in gm.graph.find_nodes(op="call_function", target=aten.cross_entropy_loss.default):
        args = bound(node)
        logits, target = args["self"], args["target"]
        if args["weight"] is not None or _val(target).is_floating_point() or _val(logits).dim() not in (1, 2):
            continue
        if _val(logits).dim() != 2:
            continue
        with gm.graph.inserting_before(node):
            rows = _call(gm.graph, node, OPS.token_cross_entropy.default, logits, target, args["ignore_index"], args["label_smoothing"],
                         val=_val(logits).new_empty(_val(target).shape))  # fmt: skip
            result = rows
            if args["reduction"] != 0:
                result = _call(gm.graph, node, aten.sum.default, rows, val=_val(node))
            if args["reduction"] == 1:
                kept = _call(gm.graph, node, aten.ne.Scalar, target, args["ignore_index"], val=torch.empty_like(_val(target), dtype=torch.bool))
                count = _call(gm.graph, node, aten.sum.default, kept, val=_val(target).new_empty(()))
                result = _call(gm.graph, node, aten.div.Tensor, result, count, val=_val(node))
        node.replace_all_uses_with(result)
        gm.graph.erase_node(node)


LOSSES = (aten.mse_loss.default, aten.l1_loss.default, aten.smooth_l1_loss.default, aten.huber_loss.default,
          aten.binary_cross_entropy_with_logits.default, aten.binary_cross_entropy.default)  # fmt: skip


def write_out_losses(gm: GraphModule) -> None:
    """A reduced elementwise loss -> the unreduced loss and a mean or sum."""
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or node.target not in LOSSES:
            continue
        args = bound(node)
        reduction = args["reduction"]
        if reduction == 0:
            continue
        shape = torch.broadcast_shapes(_val(args["self"]).shape, _val(args["target"]).shape)
        with gm.graph.inserting_before(node):
            full = _call(gm.graph, node, node.target, **{**args, "reduction": 0}, val=_val(node).new_empty(shape))
            result = _call(gm.graph, node, aten.mean.default if reduction == 1 else aten.sum.default, full, val=_val(node))
        node.replace_all_uses_with(result)
        gm.graph.erase_node(node)


def write_out_random_ops(gm: GraphModule) -> None:
    """Dropout -> autopar.dropout, and attention with it, whose bits depend on (seed, step, site, global index) alone."""
    for node in list(gm.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in (aten.native_dropout.default, aten.dropout.default):
            args = bound(node)
            p = args["p"] if args["train"] is not False else 0.0
            with gm.graph.inserting_before(node):
                new = args["input"] if p == 0 else _call(gm.graph, node, OPS.dropout.default, args["input"], p, 0, val=_val(args["input"]))
            _replace_first_result(gm, node, new)
        elif node.target is aten.scaled_dot_product_attention.default and bound(node)["dropout_p"] > 0:
            args = bound(node)
            with gm.graph.inserting_before(node):
                new = _call(gm.graph, node, OPS.attention.default, *args.values(), 0, val=_val(node))
            node.replace_all_uses_with(new)
            gm.graph.erase_node(node)


def _replace_first_result(gm: GraphModule, node: Node, new: Node) -> None:
    if isinstance(node.meta["val"], (tuple, list)):
        for user in list(node.users):
            if user.target is operator.getitem and user.args[1] == 0:
                user.replace_all_uses_with(new)
                gm.graph.erase_node(user)
            elif not user.users:
                gm.graph.erase_node(user)
    else:
        node.replace_all_uses_with(new)
    gm.graph.erase_node(node)


def write_out_batch_norm(gm: GraphModule) -> None:
    """Training batch norm -> normalisation with explicit batch statistics, and the running statistics as arithmetic."""
    functional = aten._native_batch_norm_legit_functional.default
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or node.target is not functional or not bound(node)["training"]:
            continue
        a = bound(node)
        x, mean, var = _val(a["input"]), _val(a["running_mean"]), _val(a["running_var"])
        n = x.numel() // x.shape[1]
        with gm.graph.inserting_before(node):
            new = _call(gm.graph, node, OPS.batch_norm.default, a["input"], a["weight"], a["bias"], a["eps"], val=(x, mean, var))
            parts = [_call(gm.graph, node, operator.getitem, new, k, val=v) for k, v in enumerate((x, mean, var))]
            updates = []
            for part, old, scale, val in ((parts[1], a["running_mean"], 1.0, mean), (parts[2], a["running_var"], n / max(n - 1, 1), var)):
                fresh = _call(gm.graph, node, aten.mul.Tensor, part, a["momentum"] * scale, val=val)
                kept = _call(gm.graph, node, aten.mul.Tensor, old, 1.0 - a["momentum"], val=val)
                updates.append(_call(gm.graph, node, aten.add.Tensor, kept, fresh, val=val))
        replacement = {0: parts[0], 3: updates[0], 4: updates[1]}
        for user in list(node.users):
            if user.args[1] in replacement:
                user.replace_all_uses_with(replacement[user.args[1]])
            gm.graph.erase_node(user)
        gm.graph.erase_node(node)


PASSES = (drop_asserts, drop_plain_inputs, views_to_reshapes, drop_copies, fuse_formulas, write_out_copies, write_out_cross_entropy, write_out_losses, write_out_batch_norm, write_out_random_ops)


def number_sites(gm: GraphModule) -> None:
    """Random operators are numbered in program order."""
    random = [n for n in gm.graph.nodes if n.op == "call_function" and n.target in (OPS.dropout.default, OPS.attention.default)]
    for site, node in enumerate(random):
        node.args = (*node.args[:-1], site)


def canonicalise(gm: GraphModule) -> None:
    """Run every pass in order, drop what no longer has a user, and number what is random."""
    for rewrite in PASSES:
        rewrite(gm)
    gm.graph.eliminate_dead_code()
    number_sites(gm)
    gm.graph.lint()
    gm.recompile()
