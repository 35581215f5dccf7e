"""Contractions: linear, matrix products, embedding lookups, convolutions. A cut contracted factor leaves a partial sum."""

import math

from autopar.core.rule import OpRule
from autopar.rules.registry import Call, NoRule, rule


@rule("aten.linear.default")
def linear(call: Call) -> OpRule:
    if len(call.shape("weight")) != 2:
        raise NoRule
    batch = [f"b{i}" for i in range(len(call.shape("input")) - 1)]
    return call.rule(
        {"input": [*batch, "i"], "weight": ["o", "i"], "bias": ["o"]},
        [[*batch, "o"]],
        additive=["bias"],
        linear=[["input", "bias"], ["weight", "bias"]],
        cost="contract",
        saves=["input", "weight"],
    )


@rule("aten.mm.default")
def mm(call: Call) -> OpRule:
    return call.rule({"self": ["m", "k"], "mat2": ["k", "n"]}, [["m", "n"]], linear=[["self"], ["mat2"]], cost="contract", saves=["self", "mat2"])


@rule("aten.addmm.default")
def addmm(call: Call) -> OpRule:
    bias = ["m", "n"][2 - len(call.shape("self")) :]
    bias = [name if size > 1 else None for name, size in zip(bias, call.shape("self"))]
    return call.rule(
        {"self": bias, "mat1": ["m", "k"], "mat2": ["k", "n"]},
        [["m", "n"]],
        additive=["self"],
        linear=[["self", "mat1"], ["self", "mat2"]],
        cost="contract",
        saves=["mat1", "mat2"],
    )


@rule("aten.mv.default")
def mv(call: Call) -> OpRule:
    return call.rule({"self": ["m", "k"], "vec": ["k"]}, [["m"]], linear=[["self"], ["vec"]], cost="contract", saves=["self", "vec"])


@rule("aten.dot.default")
def dot(call: Call) -> OpRule:
    return call.rule({"self": ["k"], "tensor": ["k"]}, [[]], linear=[["self"], ["tensor"]], cost="contract", saves=["self", "tensor"])


@rule("aten.outer.default")
def outer(call: Call) -> OpRule:
    return call.rule({"self": ["m"], "vec2": ["n"]}, [["m", "n"]], linear=[["self"], ["vec2"]], cost="contract", saves=["self", "vec2"])


@rule("aten.bilinear.default")
def bilinear(call: Call) -> OpRule:
    batch = [f"b{i}" for i in range(len(call.shape("input1")) - 1)]
    return call.rule(
        {"input1": [*batch, "i"], "input2": [*batch, "j"], "weight": ["o", "i", "j"], "bias": ["o"]},
        [[*batch, "o"]],
        additive=["bias"],
        linear=[["input1", "bias"], ["input2", "bias"], ["weight", "bias"]],
        cost="contract",
        saves=["input1", "input2", "weight"],
    )


@rule("aten.bmm.default")
def bmm(call: Call) -> OpRule:
    return call.rule(
        {"self": ["b", "m", "k"], "mat2": ["b", "k", "n"]}, [["b", "m", "n"]], linear=[["self"], ["mat2"]], cost="contract", saves=["self", "mat2"]
    )


@rule("aten.baddbmm.default")
def baddbmm(call: Call) -> OpRule:
    names = ["b", "m", "n"][3 - len(call.shape("self")) :]
    bias = [name if size > 1 else None for name, size in zip(names, call.shape("self"))]
    return call.rule(
        {"self": bias, "batch1": ["b", "m", "k"], "batch2": ["b", "k", "n"]},
        [["b", "m", "n"]],
        additive=["self"],
        linear=[["self", "batch1"], ["self", "batch2"]],
        cost="contract",
        saves=["batch1", "batch2"],
    )


@rule("aten.matmul.default")
def matmul(call: Call) -> OpRule:
    left, right, out = call.shape("self"), call.shape("other"), call.outs[0].shape
    num_batch = len(out) - (len(left) > 1) - (len(right) > 1)
    batch = [f"b{i}" for i in range(num_batch)]

    def dims(shape: tuple[int, ...], tail: list[str]) -> list[str | None]:
        lead = shape[: len(shape) - len(tail)]
        names = batch[num_batch - len(lead) :]
        return [*(name if size > 1 else None for name, size in zip(names, lead)), *tail]

    return call.rule(
        {"self": dims(left, ["m", "k"] if len(left) > 1 else ["k"]), "other": dims(right, ["k", "n"] if len(right) > 1 else ["k"])},
        [[*(b if out[i] > 1 else None for i, b in enumerate(batch)), *(["m"] if len(left) > 1 else []), *(["n"] if len(right) > 1 else [])]],
        linear=[["self"], ["other"]],
        cost="contract",
        saves=["self", "other"],
    )


@rule("aten.einsum.default")
def einsum(call: Call) -> OpRule:
    left, arrow, right = str(call.args["equation"]).replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow or "." in left or any(len(set(t)) != len(t) for t in (*terms, right)):
        raise NoRule
    operands = [list(term) for term in terms]
    shapes = [meta.shape for meta in call.metas]
    checked = [[f if size > 1 else None for f, size in zip(term, shape)] for term, shape in zip(operands, shapes)]
    present = {f for term in checked for f in term if f}
    result = [f if f in present else None for f in right]
    each = [[f"tensors.{k}"] for k in range(len(operands))]
    return call.rule({"tensors": checked}, [result], linear=each, cost="contract", saves=["tensors"])


@rule("aten.embedding.default")
def embedding(call: Call) -> OpRule:
    """Rows cut: looked up with a local mask, a partial sum. Columns cut: no communication.

    A gradient scaled by how often a row is looked up needs all indices and rows.
    """
    index = [f"b{i}" if size > 1 else None for i, size in enumerate(call.shape("indices"))]
    whole = ["v", *(f for f in index if f)] if call.args.get("scale_grad_by_freq") else []
    return call.rule({"weight": ["v", "h"], "indices": index}, [[*index, "h"]], linear=[["weight"]], saves=["indices"], whole=whole, kind="gather")


@rule("aten.convolution.default", "aten.conv1d.default", "aten.conv2d.default", "aten.conv3d.default", "aten.conv2d.padding", "aten.conv1d.padding",
      "aten.conv3d.padding", "aten.conv_transpose1d.default", "aten.conv_transpose2d.input", "aten.conv_transpose3d.input")  # fmt: skip
def convolution(call: Call) -> OpRule:
    """Batch, input and output channels may be cut; a transposed weight is [input, output, ...]. Groups keep channels whole."""
    weight, transposed = call.shape("weight"), bool(call.args.get("transposed")) or "transpose" in call.op.kind
    spatial = len(weight) - 2
    if len(call.shape("input")) not in (spatial + 1, spatial + 2):
        raise NoRule
    batch = ["n"] if len(call.shape("input")) == spatial + 2 else []
    inner = [f"k{i}" for i in range(spatial)]
    around, out = [f"x{i}" for i in range(spatial)], [f"y{i}" for i in range(spatial)]
    grouped = call.args["groups"] != 1
    source, made = (None if grouped else "i"), (None if grouped and transposed else "o")
    return call.rule(
        {"input": [*batch, source, *around], "weight": [*((source, made) if transposed else (made, source)), *inner], "bias": [made]},
        [[*batch, made, *out]],
        additive=["bias"],
        linear=[["input", "bias"], ["weight", "bias"]],
        cost="contract",
        saves=["input", "weight"],
        whole=[*inner, *around, *out, *(["o"] if grouped else [])],
        flops=2.0 * (call.meta("input") if transposed else call.outs[0]).numel * math.prod(weight[1:]),
        kind="convolution",
    )
