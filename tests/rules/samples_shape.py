"""Sample calls of operators that rearrange: merged and split dimensions, fused projections, equal and unequal parts."""

import torch

from tests.rules.draws import BOOL, INT, X, call

VIEWS = [
    call("view", X(12, 4, 6), [12, 24]),
    call("view", X(4, 6, 24), [24, 12, 2], note="heads"),
    call("view", X(12, 12), [2, 6, 12], note="split front"),
    call("view", X(4, 36), [4, 3, 12], note="fused projection"),
    call("view", X(6, 4), [4, 6], note="no common part"),
    call("view", X(12, 6), [8, 9], note="common part"),
    call("view", X(12, 1, 6), [1, 12, 6, 1], note="ones"),
    call("view", X(2, 12, 4), [-1, 4], note="inferred"),
    call("view", BOOL(12, 6), [72], note="bool"),
    call("view", X(), [1, 1], note="zero rank"),
    call("reshape", X(4, 6, 12), [4, 72]),
    call("_unsafe_view", X(24, 12), [4, 6, 12]),
    call("view_copy", X(24, 12), [4, 6, 12]),
    call("_reshape_copy", X(24, 12), [4, 72]),
    call("flatten.using_ints", X(4, 6, 12), 0, 1),
    call("flatten.using_ints", X(4, 6, 12), 1, -1, note="tail"),
    call("unflatten.int", X(4, 36), -1, [3, 12]),
    call("unsqueeze", X(12, 6), 1),
    call("squeeze", X(12, 1, 6, 1)),
    call("squeeze.dim", X(12, 1, 6), 1),
    call("squeeze.dim", X(12, 6), 1, note="nothing"),
    call("squeeze.dims", X(12, 1, 6, 1), [1, 3]),
]

PERMUTATIONS = [
    call("transpose.int", X(4, 12, 6), 1, -1),
    call("transpose.int", INT(9, 4, 12), 0, 1, note="integers"),
    call("t", X(12, 6)),
    call("t", X(12), note="vector"),
    call("permute", X(4, 12, 6, 1), [2, 0, 3, 1]),
    call("permute", X(4, 12, 6), [-1, 0, -2], note="negative"),
    call("movedim.int", X(4, 12, 6), 0, 2),
    call("movedim.int", X(4, 12, 6), -1, 0, note="to front"),
    call("numpy_T", X(4, 12, 6)),
    call("mT", X(4, 12, 6)),
]

BROADCASTS = [
    call("expand", X(4, 1, 12), [4, 6, 12]),
    call("expand", X(12), [4, 6, -1], note="new dimensions"),
    call("expand", X(1), [12], note="one"),
    call("expand", BOOL(12, 1), [12, 6], note="bool"),
    call("broadcast_to", X(12, 1), [4, 12, 6]),
    call("broadcast_tensors", [X(4, 12, 6), X(12, 1)]),
    call("broadcast_tensors", [X(12, 1), X(4, 1, 12).frozen(), X(1)], note="one frozen"),
    call("expand_as", X(12, 1), X(4, 12, 6).frozen()),
    call("expand_as", X(12, 1).frozen(), X(4, 12, 6), note="frozen"),
]

SPLITS = [
    call("split.Tensor", X(4, 36), 12, -1),
    call("split.Tensor", X(4, 12, 6), 5, 1, note="unequal"),
    call("split.Tensor", X(12, 6), 1, 0, note="single"),
    call("split.Tensor", X(12, 6), 12, 0, note="one part"),
    call("split_with_sizes", X(4, 36), [12, 12, 12], 1),
    call("split_with_sizes", X(4, 36), [12, 24], -1, note="unequal"),
    call("split.sizes", X(24, 6), [12, 12]),
    call("chunk", X(4, 24), 2, -1),
    call("chunk", X(13, 12), 3, 0, note="unequal"),
    call("unbind.int", X(3, 12, 4), 0),
    call("unbind.int", X(12, 3), -1, note="last"),
    call("tensor_split.sections", X(4, 24), 2, 1),
    call("tensor_split.sections", X(12, 7), 2, 1, note="unequal"),
    call("select.int", X(4, 12, 6), 1, -2),
    call("select.int", X(4, 12), 0, 3, note="front"),
    call("slice.Tensor", X(12, 12), 1, 2, 8),
    call("slice.Tensor", X(12, 12), 0, 0, 12, note="all"),
    call("slice.Tensor", X(12, 12), 0, -12, 2**62, note="negative all"),
    call("slice.Tensor", X(12, 12), 1, 0, -1, 2, note="stepped"),
    call("slice.Tensor", BOOL(12, 12), 1, 3, 9, note="bool"),
    call("narrow", X(12, 12), 1, 2, 6),
    call("narrow", X(12, 12), -1, 0, 12, note="all"),
]

PADS = [
    call("constant_pad_nd", X(4, 12, 6), [1, 2]),
    call("constant_pad_nd", X(4, 12, 6), [0, 0, 1, 0], note="second"),
    call("constant_pad_nd", X(4, 12, 6), [-1, 0], 2.5, note="crop"),
    call("constant_pad_nd", X(4, 12, 6), [1, -1], note="shift"),
    call("pad", X(4, 12, 6), [1, 1], "reflect"),
    call("pad", X(4, 12, 6), [0, 2], "constant", 0.0, note="constant"),
    call("pad", X(4, 12, 6), [2, 0], "constant", 3.0, note="three"),
    call("roll", X(12, 4, 6), [2], [0]),
    call("roll", X(12, 4), [3], note="flat"),
    call("flip", X(12, 4, 6), [0, -1]),
    call("triu", X(4, 12, 12), 1),
    call("tril", X(4, 12, 12)),
    call("tril", BOOL(12, 12), note="bool"),
    call("repeat", X(12, 6), [1, 3]),
    call("repeat", X(12, 6), [1, 1], note="once"),
    call("repeat", X(12, 6), [2, 1, 3], note="new dimension"),
    call("repeat_interleave.self_int", X(12, 4, 6), 3, 1),
    call("repeat_interleave.self_int", X(12, 4), 2, -1, note="last"),
    call("repeat_interleave.self_int", X(12), 2, note="flat"),
    call("repeat_interleave.self_int", X(12, 4), 2, known=False, note="flattened"),
    call("tile", X(12, 6), [3]),
    call("pixel_shuffle", X(4, 12, 3, 2), 2),
    call("pixel_unshuffle", X(12, 3, 4, 4), 2),
    call("im2col", X(4, 12, 4, 4), [2, 2], [1, 1], [0, 0], [1, 1]),
    call("upsample_nearest2d.vec", X(12, 4, 3, 3), [6, 6], None),
    call("upsample_nearest2d.vec", X(12, 4, 3, 3), None, [2.0, 2.0], note="factor"),
    call("upsample_bilinear2d.vec", X(12, 4, 3, 3), [6, 5], False, None),
    call("upsample_bicubic2d.vec", X(12, 4, 4, 4), [4, 4], False, None),
    call("unfold", X(12, 4, 6), 2, 3, 1),
    call("unfold", X(12, 12), 0, 4, 4, note="front"),
]

JOINS = [
    call("cat", [X(12, 4), X(12, 6)], -1),
    call("cat", [X(4, 12), X(6, 12), X(2, 12)], 0, note="rows"),
    call("cat", [X(4, 12), X(4, 12)], 1, note="equal"),
    call("cat", [BOOL(4, 12), BOOL(2, 12)], 0, note="bool"),
    call("concat", [X(12, 4), X(12, 6)], 1),
    call("stack", [X(4, 12), X(4, 12)], 1),
    call("stack", [X(12), X(12), X(12)], -1, note="last"),
    call("stack", [X(), X()], 0, note="numbers"),
]

F64 = torch.float64

MADE = [
    call("full", [12, 6], 2.5, dtype=F64),
    call("zeros", [12, 6], dtype=F64),
    call("ones", [12, 1, 6], dtype=torch.bool),
    call("empty.memory_format", [12, 6], dtype=F64, exact=False),
    call("new_zeros", X(3).frozen(), [12, 6]),
    call("new_ones", X(12, 6), [12, 6]),
    call("new_full", X(12, 6), [24, 6], -1.5),
    call("new_empty", X(3).frozen(), [12, 6], exact=False),
    call("arange", 12),
    call("arange.start", 2, 14),
    call("arange.start_step", 0, 24, 2),
    call("scalar_tensor", 2.0, dtype=F64),
    call("eye", 12, dtype=F64),
    call("eye.m", 12, 6, dtype=F64),
    call("linspace", 0.0, 1.0, 12, dtype=F64),
    call("tril_indices", 4, 4),
    call("triu_indices", 4, 4),
]

SAMPLES = [*VIEWS, *PERMUTATIONS, *BROADCASTS, *SPLITS, *PADS, *JOINS, *MADE]
