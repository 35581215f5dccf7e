"""Elementwise operators: every dimension of the result passes through; size-1 operand dimensions broadcast."""

from collections.abc import Sequence

from autopar.core.rule import OpRule
from autopar.rules.registry import Call, rule


def pointwise(call: Call, *, only: Sequence[str] = (), linear: Sequence[Sequence[str]] = (), saves: Sequence[str] = (),
              saves_results: Sequence[int] = (), keeps: bool = False, cost: str = "pointwise", kind: str = "") -> OpRule:  # fmt: skip
    """Broadcasting elementwise rule over all tensor operands, or those in `only`. `keeps`: the backward keeps a number an element."""
    out = call.outs[0].shape
    names = [f"d{i}" if size > 1 else None for i, size in enumerate(out)]

    def dims(shape: tuple[int, ...]) -> list[str | None]:
        tail = names[len(out) - len(shape) :]
        return [name if size > 1 else None for name, size in zip(tail, shape)]

    operands: dict[str, list] = {}
    for name, value in call.args.items():
        if only and name not in only:
            continue
        if isinstance(value, tuple):
            operands[name] = [dims(call.metas[v].shape) for v in value if type(v).__name__ == "Operand"]
        elif call.has(name):
            operands[name] = dims(call.shape(name))
    kept = [(dims(out), call.outs[0].dtype)] if keeps else ()
    return call.rule(operands, [dims(meta.shape) for meta in call.outs], linear=linear, saves=saves, saves_results=saves_results, keeps=kept, cost=cost,
                     kind=kind or ("scalar" if cost == "pointwise" and call.outs[0].numel == 1 else ""))  # fmt: skip


COPIES = ("clone", "alias", "contiguous", "detach", "lift_fresh_copy", "detach_copy", "alias_copy")


@rule(*(f"aten.{name}.default" for name in COPIES), "aten._to_copy.default", "aten.to.dtype", "aten.to.dtype_layout", "aten.to.device", "aten.type_as.default")
def copy(call: Call) -> OpRule:
    """The second operand of type_as lends its dtype alone."""
    is_view = call.op.kind in ("aten.alias.default", "aten.detach.default")
    floats = "float" in call.outs[0].dtype
    return pointwise(call, only=["self"], linear=[["self"]] if floats else (), cost="view" if is_view else "pointwise", kind="copy")


@rule("aten.neg.default")
def neg(call: Call) -> OpRule:
    return pointwise(call, linear=[["self"]])


@rule("aten.add.Tensor", "aten.sub.Tensor", "aten.add.Scalar", "aten.sub.Scalar", "aten.rsub.Scalar", "aten.rsub.Tensor")
def add(call: Call) -> OpRule:
    return pointwise(call, linear=[["self", "other"]] if call.has("other") else ())


@rule("aten.mul.Tensor", "aten.mul.Scalar")
def mul(call: Call) -> OpRule:
    if call.has("other"):
        return pointwise(call, linear=[["self"], ["other"]], saves=["self", "other"])
    return pointwise(call, linear=[["self"]])


@rule("aten.div.Tensor", "aten.div.Scalar")
def div(call: Call) -> OpRule:
    return pointwise(call, linear=[["self"]], saves=["self", "other"] if call.has("other") else ())


SAVES_RESULT = ("exp", "exp2", "tanh", "sigmoid", "relu", "rsqrt", "sqrt", "reciprocal")
SAVES_OPERAND = ("gelu", "silu", "log", "log1p", "log2", "sin", "cos", "abs", "erf", "softplus", "leaky_relu", "hardtanh", "hardswish",
                 "hardsigmoid", "elu", "mish", "log_sigmoid", "clamp", "clamp_min", "clamp_max", "relu6", "selu", "celu", "square",
                 "expm1", "hardshrink", "softshrink", "tan", "asin", "acos", "atan", "sinh", "cosh", "asinh", "acosh", "atanh", "erfc",
                 "erfinv", "log10", "logit", "sinc", "frac", "trunc", "sgn")  # fmt: skip
NO_GRADIENT = ("sign", "floor", "ceil", "round", "logical_not", "bitwise_not", "isnan", "isinf", "isfinite", "ones_like", "zeros_like",
               "full_like", "empty_like")
POWERS = ("aten.pow.Tensor_Scalar", "aten.pow.Tensor_Tensor", "aten.pow.Scalar", "aten.square.default")
COMPARISONS = tuple(f"aten.{n}.{o}" for n in ("eq", "ne", "lt", "le", "gt", "ge") for o in ("Tensor", "Scalar"))
LOGIC = tuple(f"aten.{n}.{o}" for n in ("__and__", "__or__", "__xor__", "bitwise_and", "bitwise_or", "bitwise_xor", "__lshift__", "__rshift__")
              for o in ("Tensor", "Scalar"))  # fmt: skip
BINARY = ("aten.max.other", "aten.min.other", "aten.maximum.default", "aten.minimum.default", "aten.logical_and.default",
          "aten.logical_or.default", "aten.logical_xor.default", "aten.fmod.Scalar", "aten.fmod.Tensor", "aten.remainder.Scalar",
          "aten.remainder.Tensor", "aten.floor_divide.default", "aten.div.Tensor_mode", "aten.div.Scalar_mode", "aten.atan2.default",
          "aten.addcmul.default", "aten.addcdiv.default", "aten.lerp.Scalar", "aten.lerp.Tensor", "aten.clamp.Tensor",
          "aten.nan_to_num.default", "aten.logaddexp.default", "aten.xlogy.Tensor", "aten.hypot.default", "aten.copysign.Tensor",
          "aten.fmax.default", "aten.fmin.default", "aten.threshold.default")  # fmt: skip


@rule(*(f"aten.{name}.default" for name in SAVES_RESULT))
def saves_result(call: Call) -> OpRule:
    return pointwise(call, saves_results=[0])


@rule(*(f"aten.{name}.default" for name in SAVES_OPERAND if name != "square"), *POWERS)
def saves_operand(call: Call) -> OpRule:
    return pointwise(call, saves=["self", "exponent"])


@rule(*(f"aten.{name}.default" for name in NO_GRADIENT), *COMPARISONS, *LOGIC)
def no_gradient(call: Call) -> OpRule:
    return pointwise(call)


@rule(*BINARY)
def binary(call: Call) -> OpRule:
    return pointwise(call, saves=[name for name in call.args if call.has(name)])


@rule("aten.prelu.default")
def prelu(call: Call) -> OpRule:
    """One slope, or one per channel (dimension 1)."""
    shape = call.shape("self")
    names = [f"d{i}" if size > 1 else None for i, size in enumerate(shape)]
    per_channel = call.meta("weight").numel > 1
    slopes = [names[1] if per_channel else None] * len(call.shape("weight"))
    return call.rule({"self": names, "weight": slopes}, [names], saves=["self", "weight"])


@rule("aten.bucketize.Tensor")
def bucketize(call: Call) -> OpRule:
    return pointwise(call, only=["self"])


@rule("aten.where.self", "aten.where.ScalarSelf", "aten.where.ScalarOther", "aten.where.Scalar")
def where(call: Call) -> OpRule:
    branches = [name for name in ("self", "other") if call.has(name)]
    return pointwise(call, linear=[branches] if len(branches) == 2 else (), saves=["condition"])


@rule("aten.masked_fill.Scalar", "aten.masked_fill.Tensor")
def masked_fill(call: Call) -> OpRule:
    zero = call.args.get("value") == 0
    return pointwise(call, linear=[["self"]] if zero else (), saves=["mask"])


@rule("autopar.dropout.default")
def dropout(call: Call) -> OpRule:
    """Linear for a given mask; the mask is a function of the global element index, so any cut draws the same bits."""
    return pointwise(call, linear=[["input"]], keeps=True)
