"""Fused attention and the losses."""

import math
from typing import Any

from autopar.core.rule import OpRule
from autopar.rules.pointwise import pointwise
from autopar.rules.registry import Call, NoRule, rule


@rule("aten.scaled_dot_product_attention.default", "autopar.attention.default", "autopar.context_attention.default")
def attention(call: Call) -> OpRule:
    """Batch, heads (groups of grouped-query heads) and, without a causal flag, query rows may be cut.

    `context_attention` knows where its rows begin, so they may be cut in spite of the flag, with all keys at hand: context parallelism. It is priced
    as if every rank had as many scores, which is so where rows are dealt from both ends.
    flops: 2 contractions over all (query, key) pairs, masked or not.
    """
    q, k, v = call.shape("query"), call.shape("key"), call.shape("value")
    if len(q) != 4 or len(k) != 4 or len(v) != 4 or q[0] != k[0] or v[:3] != k[:3]:
        raise NoRule
    heads, groups = q[1], k[1]
    if heads % groups:
        raise NoRule
    grouped = heads != groups
    query_heads: str | tuple[str, ...] = ("g", "r") if grouped else "g"
    mask: list[str | None] = []
    if call.has("attn_mask"):
        shape = call.shape("attn_mask")
        names = ["b", query_heads, "q", "t"][4 - len(shape) :]
        mask = [name if n > 1 else None for name, n in zip(names, shape)]
    causal = bool(call.args.get("is_causal"))
    knows_its_rows = "context" in call.op.kind
    fused = call.op.kind != "autopar.attention.default"
    saved = _kept_by_kernel(call, ["b", query_heads, "q"], mask) if fused else _kept_written_out(call, ["b", query_heads, "q", "t"])
    return call.rule(
        {"query": ["b", query_heads, "q", "d"], "key": ["b", "g", "t", "d"], "value": ["b", "g", "t", "e"], "attn_mask": mask},
        [["b", query_heads, "q", "e"]],
        sizes={"g": groups, "r": heads // groups} if grouped else None,
        whole=["d", "t", "r", *(["q"] if causal and not knows_its_rows else [])],
        linear=[["value"]],
        cost="contract",
        flops=2.0 * q[0] * heads * q[2] * k[2] * (q[3] + v[3]),
        kernel="attention" if fused else "scores",
        kind="causal_attention" if fused and causal else "",
        masked=0.5 if causal else 1.0,
        functions=float(q[0] * heads * q[2] * k[2]),
        **saved,
    )


def _kept_by_kernel(call: Call, rows: list, mask: list[str | None]) -> dict[str, Any]:
    """Flash attention keeps a number a row; it adds masks to the scores, so a mask of truth values becomes one of numbers."""
    keeps, saves = [(rows, "float32")], ["query", "key", "value", "attn_mask"]
    if call.has("attn_mask") and call.meta("attn_mask").dtype == "bool":
        keeps, saves = [*keeps, (mask, call.meta("query").dtype)], saves[:3]
    return {"saves": saves, "saves_results": [0], "keeps": keeps}


def _kept_written_out(call: Call, scores: list) -> dict[str, Any]:
    """The probabilities, the mask of the dropout and their product, all before the product with the values."""
    q, v = call.shape("query"), call.shape("value")
    return {"saves": ["query", "key", "value"], "keeps": [(scores, call.meta("query").dtype)] * 3, "tail_flops": 2.0 * math.prod(q[:3]) * v[2] * v[3]}


@rule("autopar.token_cross_entropy.default")
def token_cross_entropy(call: Call) -> OpRule:
    """Loss of every row; the class dimension may be cut: all-reduces of one number a row, never the logits.

    The largest logit, the sum of exponentials, the target's logit and, with label smoothing, the sum of logits. The backward keeps
    one number a logit: its log-probability, or where classes are cut its exponential.
    """
    target = ["n"] if len(call.shape("target")) == 1 else None
    if target is None or len(call.shape("input")) != 2:
        raise NoRule
    numbers = 4 if call.args["label_smoothing"] else 3
    inner = [("v", "all_reduce", ["n"], numbers, 0)]
    return call.rule({"input": ["n", "v"], "target": ["n"]}, [["n"]], saves=["target"], keeps=[(["n", "v"], call.meta("input").dtype)], inner=inner,
                     functions=float(call.meta("input").numel), kind="loss")  # fmt: skip


@rule("aten.mse_loss.default", "aten.l1_loss.default", "aten.smooth_l1_loss.default", "aten.huber_loss.default", "aten.kl_div.default",
      "aten.binary_cross_entropy_with_logits.default", "aten.binary_cross_entropy.default")  # fmt: skip
def elementwise_loss(call: Call) -> OpRule:
    """Only the unreduced form is elementwise; reductions are written out as sums when the model is traced."""
    if call.args.get("reduction") != 0:
        raise NoRule
    return pointwise(call, saves=["self", "target"])
