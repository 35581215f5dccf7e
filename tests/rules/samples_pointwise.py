"""Sample calls of elementwise operators: plain, broadcast, size-1 and zero-rank operands."""

import torch

from tests.rules.call import Draw, Sample
from tests.rules.draws import BOOL, INT, POS, UNIT, X, call

F64 = torch.float64


def _unary(draw: Draw, *names: str) -> list[Sample]:
    return [call(name, draw) for name in names]


UNARY = [
    *_unary(X(12, 8), "exp", "tanh", "sigmoid", "relu", "neg", "gelu", "silu", "sin", "cos", "abs", "erf", "softplus", "leaky_relu", "hardtanh",
            "hardswish", "hardsigmoid", "elu", "mish", "log_sigmoid", "relu6", "selu", "celu", "square", "expm1", "hardshrink", "softshrink",
            "exp2", "tan", "atan", "sinh", "cosh", "asinh", "erfc", "sinc", "frac", "trunc", "sgn", "sign", "floor", "ceil", "round", "isnan", "isinf", "isfinite", "ones_like", "zeros_like"),
    *_unary(POS(12, 8), "rsqrt", "sqrt", "reciprocal", "log", "log1p", "log2", "log10"),
    *_unary(UNIT(12, 8), "asin", "acos", "atanh", "erfinv", "logit"),
    call("acosh", POS(12, 8).plus(1)),
    call("gelu", X(4, 1, 12), approximate="tanh", note="tanh"),
    call("leaky_relu", X(12, 6), 0.3, note="slope"),
    call("logical_not", BOOL(12, 8)),
    call("bitwise_not", INT(9, 12, 8)),
    call("bitwise_not", BOOL(12, 8), note="bool"),
    call("full_like", X(12, 8), 2.5),
    call("empty_like", X(12, 8), exact=False),
    call("clamp", X(12, 8), -0.5, 0.7),
    call("clamp", X(12, 8), None, 0.4, note="above"),
    call("clamp_min", X(12, 8), 0.1),
    call("clamp_max", X(12, 8), 0.1),
    call("nan_to_num", X(12, 8), 1.0),
    call("pow.Tensor_Scalar", X(12, 8), 3),
    call("pow.Scalar", 2.0, X(12, 8)),
    call("threshold", X(12, 8), 0.1, -3.0),
    call("bucketize.Tensor", X(12, 8), X(5).frozen().sorted()),
    call("prelu", X(4, 12), X(12)),
    call("prelu", X(4, 12, 6), X(1), note="one slope"),
    call("prelu", X(12), X(1), note="vector"),
]  # fmt: skip

COPIES = [
    *_unary(X(12, 8), "clone", "alias", "contiguous", "detach", "lift_fresh_copy", "alias_copy"),
    call("detach_copy", X(12, 8).frozen()),
    call("clone", INT(50, 12, 8), note="integers"),
    call("clone", BOOL(12, 8), note="bool"),
    call("_to_copy", X(12, 8), dtype=F64),
    call("_to_copy", INT(50, 12, 8), dtype=F64, note="from integers"),
    call("_to_copy", BOOL(12, 8), dtype=F64, note="from bool"),
    call("_to_copy", X(12, 8), dtype=torch.int64, note="to integers"),
    call("to.dtype", X(12, 8), F64),
    call("to.dtype_layout", X(12, 8), dtype=F64),
    call("to.device", X(12, 8), "cpu", F64),
    call("type_as", X(12, 8), X(12, 8).frozen()),
    call("type_as", X(12, 8), X(5, 3, 2).frozen(), note="other shape"),
    call("type_as", X(12, 8).frozen(), X(12, 8), note="frozen"),
    call("type_as", INT(50, 12, 8), X(7).frozen(), note="from integers"),
]

BINARY = [
    *(call(f"{name}.Tensor", X(4, 12, 6), X(4, 12, 6)) for name in ("add", "sub", "rsub", "mul")),
    *(call(f"{name}.Tensor", X(4, 12, 6), X(12, 1), note="broadcast") for name in ("add", "sub", "mul")),
    *(call(f"{name}.Tensor", X(12, 1), X(4, 12, 6), note="left broadcast") for name in ("add", "sub", "mul")),
    *(call(f"{name}.Tensor", X(1, 12), X(12, 1), note="outer") for name in ("add", "mul")),
    *(call(f"{name}.Tensor", X(12, 6), X(), note="zero rank") for name in ("add", "mul", "div")),
    *(call(f"{name}.Tensor", X(12, 6), 3.0, note="number") for name in ("add", "sub", "mul", "div")),
    call("add.Tensor", X(12, 6), X(12, 6), alpha=-2.5, note="alpha"),
    call("add.Tensor", INT(20, 12, 6), INT(20, 6), note="integers"),
    call("mul.Tensor", X(12, 6), BOOL(12, 6), note="by bool"),
    call("mul.Tensor", BOOL(12, 6), BOOL(6), note="bools"),
    call("add.Scalar", X(12, 6), 2.0),
    call("sub.Scalar", X(12, 6), 2.0),
    call("rsub.Scalar", X(12, 6), 2.0),
    call("mul.Scalar", X(12, 6), -2.0),
    call("div.Scalar", X(12, 6), -3.0),
    call("div.Tensor", X(4, 12, 6), POS(4, 12, 6)),
    call("div.Tensor", X(4, 12, 6), POS(12, 1), note="broadcast"),
    call("div.Tensor", INT(40, 12, 6), POS(12, 1), note="integers"),
    call("pow.Tensor_Tensor", POS(4, 12), X(12)),
    *(call(name, X(4, 12), X(12)) for name in ("maximum", "fmax", "fmin", "logaddexp", "hypot")),
    *(call(f"{name}.other", X(4, 12), X(12)) for name in ("max", "min")),
    call("xlogy.Tensor", X(4, 12), POS(12)),
    call("copysign.Tensor", X(4, 12), X(12).frozen()),
    call("minimum", X(12, 1), X(12, 12)),
    call("atan2", X(4, 12), POS(12)),
    call("fmod.Tensor", X(4, 12), POS(12).frozen()),
    call("fmod.Scalar", X(4, 12), 0.7),
    call("remainder.Tensor", X(4, 12), POS(12).frozen()),
    call("remainder.Scalar", X(4, 12), 0.7),
    call("floor_divide", INT(50, 4, 12), INT(7, 12).plus(1)),
    call("div.Tensor_mode", X(4, 12), POS(12), rounding_mode="floor"),
    call("div.Scalar_mode", X(4, 12), 0.7, rounding_mode="trunc"),
    call("addcmul", X(12), X(4, 12), X(4, 1), value=0.5),
    call("addcdiv", X(4, 12), X(12), POS(4, 1), value=-2.0),
    call("lerp.Scalar", X(4, 12), X(12), 0.3),
    call("lerp.Tensor", X(4, 12), X(12), UNIT(4, 1)),
    call("clamp.Tensor", X(4, 12), UNIT(12).frozen().minus(1), UNIT(4, 1).frozen()),
]

LOGICAL = [
    *(call(f"{name}.Tensor", INT(3, 4, 12), INT(3, 12)) for name in ("eq", "ne", "lt", "le", "gt", "ge")),
    *(call(f"{name}.Scalar", X(4, 12), 0.1) for name in ("eq", "ne", "lt", "le", "gt", "ge")),
    *(
        call(f"{name}.Tensor", BOOL(4, 12), BOOL(12))
        for name in ("__and__", "__or__", "__xor__", "bitwise_and", "bitwise_or", "bitwise_xor")
    ),
    *(call(f"{name}.Scalar", INT(9, 4, 12), 5) for name in ("__and__", "__or__", "__xor__", "bitwise_and", "bitwise_or", "bitwise_xor")),
    *(call(f"{name}.Tensor", INT(9, 4, 12), INT(3, 12)) for name in ("__lshift__", "__rshift__")),
    *(call(f"{name}.Scalar", INT(9, 4, 12), 2) for name in ("__lshift__", "__rshift__")),
    *(call(name, BOOL(4, 12), BOOL(4, 1)) for name in ("logical_and", "logical_or", "logical_xor")),
]

CHOOSING = [
    call("where.self", BOOL(4, 12), X(4, 12), X(12)),
    call("where.self", BOOL(4, 1, 12), X(6, 12), X(), note="broadcast"),
    call("where.self", BOOL(4, 12), BOOL(4, 12), BOOL(12), note="bools"),
    call("where.ScalarSelf", BOOL(4, 12), 2.0, X(4, 12)),
    call("where.ScalarOther", BOOL(4, 12), X(4, 12), -1.0),
    call("where.Scalar", BOOL(4, 12), 2.0, -1.0),
    call("masked_fill.Scalar", X(4, 12, 6), BOOL(12, 1), 0),
    call("masked_fill.Scalar", X(4, 12, 6), BOOL(12, 1), -1e3, note="large"),
    call("masked_fill.Tensor", X(4, 12, 6), BOOL(12, 1), X()),
    call("autopar.dropout", X(4, 12, 6), 0.3, 5),
    call("autopar.dropout", X(12, 12), 1.0, 5, note="all"),
]

SAMPLES = [*UNARY, *COPIES, *BINARY, *LOGICAL, *CHOOSING]
