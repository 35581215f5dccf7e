"""Sample calls of reductions, scans, normalisations and pooling."""

from tests.rules.draws import BOOL, INT, POS, X, call

SUMS = [
    call("sum", X(4, 12, 6)),
    call("sum", BOOL(12, 6), note="bools"),
    call("sum.dim_IntList", X(4, 12, 6), [1]),
    call("sum.dim_IntList", X(4, 12, 6), [0, -1], True, note="kept"),
    call("sum.dim_IntList", X(4, 12), None, note="all"),
    call("sum.dim_IntList", BOOL(4, 12), [-1], note="bools"),
    call("sum.dim_IntList", X(12, 1), [1], note="size one"),
    call("mean", X(4, 12, 6)),
    call("mean.dim", X(4, 12, 6), [1]),
    call("mean.dim", X(4, 12, 6), [0, -1], True, note="kept"),
    call("mean.dim", X(4, 12), None, note="all"),
]

WHOLE = [
    *(call(name, X(4, 12, 6), [1]) for name in ("amax", "amin")),
    call("amax", X(4, 12), note="all"),
    call("amax", X(4, 12, 6), [0, 2], True, note="kept"),
    *(call(f"{name}.dim", X(4, 12, 6), 1) for name in ("max", "min")),
    call("max.dim", X(4, 12, 6), -1, True, note="kept"),
    *(call(name, X(4, 12)) for name in ("max", "min", "argmax", "argmin")),
    call("argmax", X(4, 12, 6), 1, note="along"),
    call("argmin", X(4, 12, 6), -1, True, note="kept"),
    *(call(name, BOOL(4, 12)) for name in ("any", "all")),
    *(call(f"{name}.dim", BOOL(4, 12), 0) for name in ("any", "all")),
    call("any.dims", BOOL(4, 12, 6), [0, 2]),
    call("prod", POS(2, 12)),
    call("prod.dim_int", POS(12, 4), 1),
    *(call(f"{name}.dim", X(4, 12, 6), [1]) for name in ("var", "std")),
    *(call(f"{name}.correction", X(4, 12, 6), [1, 2], correction=0, keepdim=True) for name in ("var", "std")),
    call("var.correction", X(4, 12), None, note="all"),
    *(call(f"{name}.correction", X(4, 12, 6), [2], correction=1) for name in ("var_mean", "std_mean")),
    *(call(name, X(4, 12, 6), *args) for name, args in (("median.dim", (1,)), ("kthvalue", (2, 1)), ("mode", (1,)))),
    call("logsumexp", X(4, 12, 6), [1]),
    call("linalg_vector_norm", X(4, 12, 6), 2, [1]),
    call("linalg_vector_norm", X(4, 12), 3, note="all"),
    call("norm.ScalarOpt_dim", X(4, 12, 6), 2, [-1], True),
]

ALONG = [
    *(call(name, X(4, 12, 6), 1) for name in ("softmax.int", "log_softmax.int", "cumsum", "glu", "logcumsumexp", "cummax", "cummin")),
    call("argsort", X(4, 12, 6), 1),
    call("diff", X(4, 12, 6), 1, 1),
    call("softmax.int", X(4, 12), -1, note="last"),
    call("_softmax", X(4, 12, 6), -1, False),
    call("_log_softmax", X(4, 12, 6), 0, False),
    call("cumsum", INT(9, 4, 12), 1, note="integers"),
    call("cumsum", BOOL(4, 12), 0, note="bools"),
    call("cumprod", POS(4, 12), 1),
    call("sort", X(4, 12, 6), 1),
    call("sort", X(4, 12), note="last"),
    call("diff", X(4, 12), 1, -1, X(4, 1), None, note="prepended"),
    call("topk", X(4, 12, 6), 3, 1),
    call("topk", X(4, 12), 12, note="all"),
]
NORMS = [
    call("layer_norm", X(4, 12, 6), [6], X(6), X(6)),
    call("layer_norm", X(12, 4, 6), [4, 6], X(4, 6), X(4, 6), note="two"),
    call("layer_norm", X(4, 12, 6), [6], note="plain"),
    call("layer_norm", X(12), [12], X(12), note="vector"),
    call("rms_norm", X(4, 12, 6), [6], X(6), 1e-6),
    call("rms_norm", X(4, 12, 6), [6], note="plain"),
    call("group_norm", X(12, 12, 3, 2), 4, X(12), X(12)),
    call("group_norm", X(4, 12, 6), 12, note="plain"),
    call("group_norm", X(4, 12), 3, X(12), note="no rest"),
    call("_native_batch_norm_legit_no_training", X(4, 12, 3), X(12), X(12), X(12).frozen(), POS(12).frozen(), 0.1, 1e-5),
    call("instance_norm", X(4, 12, 3), X(12), X(12), None, None, True, 0.1, 1e-5, True),
    call("autopar.batch_norm", X(12, 6, 3), X(6), X(6), 1e-5),
    call("autopar.batch_norm", X(12, 12), None, None, 1e-5, note="plain"),
    call("autopar.batch_norm", X(12, 6, 2, 3), X(6), None, 1e-5, note="weight"),
    call("autopar.batch_norm", X(12, 6, 2).frozen(), X(6), X(6), 1e-5, note="frozen input"),
]

POOLS = [
    call("max_pool1d", X(4, 12, 8), [2]),
    call("max_pool2d", X(4, 12, 6, 6), [2, 2]),
    call("max_pool2d", X(12, 6, 6), [2, 2], note="one image"),
    call("max_pool2d_with_indices", X(4, 12, 6, 6), [3, 3], [2, 2], [1, 1]),
    call("max_pool3d", X(4, 12, 4, 4, 4), [2, 2, 2]),
    call("avg_pool1d", X(4, 12, 8), [2]),
    call("avg_pool2d", X(4, 12, 6, 6), [3, 3], [1, 1], [1, 1]),
    call("adaptive_avg_pool1d", X(4, 12, 8), [1]),
    call("adaptive_avg_pool2d", X(4, 12, 6, 6), [2, 3]),
    call("adaptive_avg_pool2d", X(12, 6, 4, 4), [4, 4], note="same size"),
    call("adaptive_max_pool2d", X(4, 12, 6, 6), [2, 3]),
]

SAMPLES = [*SUMS, *WHOLE, *ALONG, *NORMS, *POOLS]
