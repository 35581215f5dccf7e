"""Reductions, scans and normalisations: along what they work, and what passes through."""

import math

from autopar.core.rule import OpRule
from autopar.rules.registry import Call, NoRule, rule


def _dims(call: Call, rank: int) -> set[int]:
    dim = call.args.get("dim")
    if dim is None or dim == ():
        return set(range(rank))
    return {int(d) % max(rank, 1) for d in (dim if isinstance(dim, tuple) else (dim,))}


def _reduced(call: Call, name: str = "self") -> tuple[list[str | None], list[str | None], list[str]]:
    """(operand dims, result dims, names of the reduced factors)."""
    shape = call.shape(name)
    along = _dims(call, len(shape))
    names = [f"d{i}" if n > 1 else None for i, n in enumerate(shape)]
    keep = bool(call.args.get("keepdim")) and len(call.outs[0].shape) == len(shape)
    result = [None if i in along else n for i, n in enumerate(names) if keep or i not in along]
    return names, result, [n for i, n in enumerate(names) if i in along and n]


@rule("aten.sum.dim_IntList", "aten.sum.default", "aten.mean.dim", "aten.mean.default")
def linear_reduction(call: Call) -> OpRule:
    """A cut reduced factor leaves a partial sum (the rewriter scales a mean's addends)."""
    names, result, _ = _reduced(call)
    return call.rule({"self": names}, [result], linear=[["self"]], kind="mean" if "mean" in call.op.kind else "reduction")


@rule("aten.amax.default", "aten.amin.default", "aten.max.dim", "aten.min.dim", "aten.max.default", "aten.min.default", "aten.argmax.default",
      "aten.argmin.default", "aten.any.default", "aten.any.dim", "aten.any.dims", "aten.all.default", "aten.all.dim",
      "aten.prod.dim_int", "aten.prod.default", "aten.var.dim", "aten.var.correction", "aten.std.dim", "aten.std.correction",
      "aten.logsumexp.default", "aten.linalg_vector_norm.default", "aten.norm.ScalarOpt_dim", "aten.var_mean.correction",
      "aten.std_mean.correction", "aten.median.dim", "aten.kthvalue.default", "aten.mode.default")  # fmt: skip
def whole_reduction(call: Call) -> OpRule:
    names, result, along = _reduced(call)
    return call.rule({"self": names}, [result] * len(call.outs), whole=along, saves=["self"], saves_results=[0], kind="reduction")


@rule("aten.softmax.int", "aten._softmax.default", "aten.log_softmax.int", "aten._log_softmax.default", "aten.cumsum.default", "aten.cumprod.default",
      "aten.sort.default", "aten.argsort.default", "aten.glu.default", "aten.logcumsumexp.default", "aten.cummax.default",
      "aten.cummin.default", "aten.diff.default")  # fmt: skip
def along_one_dim(call: Call) -> OpRule:
    shape = call.shape("self")
    d = call.dim("dim", len(shape))
    names = [f"d{i}" if n > 1 and i != d else None for i, n in enumerate(shape)]
    is_softmax = "softmax" in call.op.kind
    linear = [["self"]] if call.op.kind == "aten.cumsum.default" else ()
    beside = {name: names for name in ("prepend", "append") if call.has(name)}
    saved = {"saves_results": [0], "kind": "softmax"} if is_softmax else {"saves": ["self"]}
    return call.rule({"self": names, **beside}, [names] * len(call.outs), linear=linear, **saved)


@rule("aten.topk.default")
def topk(call: Call) -> OpRule:
    shape = call.shape("self")
    d = call.dim("dim", len(shape))
    names = [f"d{i}" if n > 1 and i != d else None for i, n in enumerate(shape)]
    return call.rule({"self": names}, [names] * len(call.outs), saves_results=[1])


@rule("aten.layer_norm.default", "aten.rms_norm.default")
def layer_norm(call: Call) -> OpRule:
    shape = call.shape("input")
    n = len(call.args["normalized_shape"])
    lead = [f"b{i}" if size > 1 else None for i, size in enumerate(shape[:-n])]
    tail = [f"n{i}" for i in range(n)]
    return call.rule({"input": [*lead, *tail], "weight": tail, "bias": tail}, [[*lead, *tail]], whole=tail, saves=["input"],
                     keeps=[(lead, "float32")] * (2 if "layer" in call.op.kind else 1), kind="normalisation")  # fmt: skip


@rule("aten.group_norm.default")
def group_norm(call: Call) -> OpRule:
    """Channels are (groups, rest), and whole groups may be cut."""
    shape = call.shape("input")
    groups = call.args["num_groups"]
    rest, channels = [f"x{i}" for i in range(len(shape) - 2)], ("g", "c")
    return call.rule(
        {"input": ["n", channels, *rest], "weight": [channels], "bias": [channels]},
        [["n", channels, *rest]],
        sizes={"g": groups, "c": shape[1] // groups},
        whole=["c", *rest],
        saves=["input"],
        kind="normalisation",
    )


@rule("aten._native_batch_norm_legit_no_training.default")
def fixed_batch_norm(call: Call) -> OpRule:
    """Running statistics: elementwise, with numbers per channel."""
    shape = call.shape("input")
    names = ["n", "c", *(f"x{i}" for i in range(len(shape) - 2))]
    per_channel = {name: ["c"] for name in ("weight", "bias", "running_mean", "running_var")}
    return call.rule({"input": names, **per_channel}, [names, *([None] for _ in call.outs[1:])], saves=["input"], kind="normalisation")


@rule("aten.instance_norm.default")
def instance_norm(call: Call) -> OpRule:
    if not call.args["use_input_stats"] or call.has("running_mean"):
        raise NoRule
    names = ["n", "c", *(f"x{i}" for i in range(len(call.shape("input")) - 2))]
    return call.rule({"input": names, "weight": ["c"], "bias": ["c"]}, [names], whole=names[2:], saves=["input"], kind="normalisation")


@rule("autopar.batch_norm.default")
def batch_norm(call: Call) -> OpRule:
    """Results: normalised input, batch mean, batch variance (biased). The batch cut: statistics are summed over ranks."""
    shape = call.shape("input")
    rest = [f"x{i}" for i in range(len(shape) - 2)]
    per_channel = {name: ["c"] for name in ("weight", "bias")}
    return call.rule(
        {"input": ["n", "c", *rest], **per_channel},
        [["n", "c", *rest], ["c"], ["c"]],
        whole=rest,
        saves=["input"],
        inner=[("n", "all_reduce", ["c"], 2, 2)],
        kind="normalisation",
    )


@rule("aten.max_pool2d.default", "aten.max_pool2d_with_indices.default", "aten.avg_pool2d.default", "aten.adaptive_avg_pool2d.default",
      "aten.max_pool1d.default", "aten.avg_pool1d.default", "aten.adaptive_avg_pool1d.default", "aten.adaptive_max_pool2d.default",
      "aten.max_pool3d.default")  # fmt: skip
def pooling(call: Call) -> OpRule:
    """flops: one for every element of every window."""
    name = "self" if call.has("self") else "input"
    shape = call.shape(name)
    if len(shape) < 3 or len(shape) != len(call.outs[0].shape):
        raise NoRule
    spatial = 1 if "1d" in call.op.kind else 3 if "3d" in call.op.kind else 2
    lead = [f"b{i}" if n > 1 else None for i, n in enumerate(shape[: len(shape) - spatial])]
    dims = [*lead, *[None] * spatial]
    average = "avg" in call.op.kind
    size = call.args.get("kernel_size")
    sides = size if isinstance(size, tuple) else (size,)
    window = call.meta(name).numel / call.outs[0].numel if size is None else math.prod(sides) ** (spatial // len(sides))
    return call.rule({name: dims}, [dims] * len(call.outs), linear=[[name]] if average else (), saves=[name], flops=window * call.outs[0].numel,
                     kind="average_pooling" if average else "max_pooling")  # fmt: skip
