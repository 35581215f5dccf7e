"""Operators that only rearrange: views, permutations, broadcasts, splits, slices, concatenation."""

import math
from collections.abc import Sequence

from autopar.core.rule import OpRule
from autopar.rules.registry import Call, NoRule, rule


def reshape_factors(src: Sequence[int], dst: Sequence[int]) -> tuple[list, list, dict[str, int], list[str]]:
    """Common factors of two shapes with the same number of elements: (source dims, result dims, sizes, whole factors).

    Walks both shapes from the left and splits off the greatest common part, so that (b, s, h) -> (b*s, heads, d) shares
    b, s, heads and d. Where the rest of two dimensions share no further part they become whole factors.
    """
    left: list[list[str]] = [[] for _ in src]
    right: list[list[str]] = [[] for _ in dst]
    sizes: dict[str, int] = {}
    whole: list[str] = []
    a = [(i, n) for i, n in enumerate(src) if n > 1]
    b = [(j, n) for j, n in enumerate(dst) if n > 1]

    def new(size: int) -> str:
        name = f"f{len(sizes)}"
        sizes[name] = size
        return name

    while a and b:
        (i, n), (j, m) = a.pop(0), b.pop(0)
        common = math.gcd(n, m)
        if n == m or common in (n, m):
            name = new(common)
            left[i].append(name)
            right[j].append(name)
            if n > common:
                a.insert(0, (i, n // common))
            if m > common:
                b.insert(0, (j, m // common))
            continue
        if common > 1:
            name = new(common)
            left[i].append(name)
            right[j].append(name)
            n, m = n // common, m // common
        tail_a, tail_b = [(i, n)], [(j, m)]
        while math.prod(x for _, x in tail_a) != math.prod(x for _, x in tail_b):
            shorter, rest = (tail_a, a) if math.prod(x for _, x in tail_a) < math.prod(x for _, x in tail_b) else (tail_b, b)
            shorter.append(rest.pop(0))
        for tail, side in ((tail_a, left), (tail_b, right)):
            for d, size in tail:
                name = new(size)
                whole.append(name)
                side[d].append(name)
    return [tuple(x) or None for x in left], [tuple(x) or None for x in right], sizes, whole


@rule("aten.view.default", "aten.reshape.default", "aten._unsafe_view.default", "aten.unsqueeze.default", "aten.squeeze.dim", "aten.squeeze.dims",
      "aten.squeeze.default", "aten.flatten.using_ints", "aten.unflatten.int", "aten.view_copy.default", "aten._reshape_copy.default")  # fmt: skip
def view(call: Call) -> OpRule:
    left, right, sizes, whole = reshape_factors(call.shape("self"), call.outs[0].shape)
    return call.rule({"self": left}, [right], sizes=sizes, whole=whole, linear=[["self"]], cost="view")


def _permuted(call: Call, order: Sequence[int]) -> OpRule:
    names = [f"d{i}" if n > 1 else None for i, n in enumerate(call.shape("self"))]
    return call.rule({"self": names}, [[names[i] for i in order]], linear=[["self"]], cost="view")


@rule("aten.transpose.int", "aten.t.default", "aten.permute.default", "aten.movedim.int", "aten.numpy_T.default", "aten.mT.default")
def permute(call: Call) -> OpRule:
    rank = len(call.shape("self"))
    order = list(range(rank))
    if call.op.kind == "aten.permute.default":
        order = [int(d) % rank for d in call.args["dims"]]
    elif call.op.kind == "aten.transpose.int":
        i, j = call.dim("dim0", rank), call.dim("dim1", rank)
        order[i], order[j] = order[j], order[i]
    elif call.op.kind == "aten.movedim.int":
        order.insert(call.dim("destination", rank), order.pop(call.dim("source", rank)))
    elif call.op.kind == "aten.mT.default":
        order[-1], order[-2] = order[-2], order[-1]
    else:
        order.reverse()
    return _permuted(call, order)


@rule("aten.expand.default", "aten.broadcast_to.default", "aten.expand_as.default")
def expand(call: Call) -> OpRule:
    """A broadcast dimension is a factor that the operand lacks: cut, its gradient is a partial sum."""
    src, out = call.shape("self"), call.outs[0].shape
    names = [f"d{i}" if n > 1 else None for i, n in enumerate(out)]
    tail = names[len(out) - len(src) :]
    return call.rule({"self": [name if n > 1 else None for name, n in zip(tail, src)]}, [names], linear=[["self"]], cost="view")


@rule("aten.broadcast_tensors.default")
def broadcast_tensors(call: Call) -> OpRule:
    names = [f"d{i}" if n > 1 else None for i, n in enumerate(call.outs[0].shape)]
    operands = [[name if n > 1 else None for name, n in zip(names[len(names) - len(m.shape) :], m.shape)] for m in call.metas]
    return call.rule({"tensors": operands}, [names] * len(call.outs), linear=[["tensors"]], cost="view")


@rule("aten.split.Tensor", "aten.chunk.default", "aten.split_with_sizes.default", "aten.split.sizes", "aten.unbind.int", "aten.tensor_split.sections")
def split(call: Call) -> OpRule:
    """Equal parts: the dimension is (parts, rest) and the rest may be cut; unequal parts leave it whole."""
    shape = call.shape("self")
    d = call.dim("dim", len(shape))
    names: list = [f"d{i}" if n > 1 else None for i, n in enumerate(shape)]
    unbind = call.op.kind == "aten.unbind.int"
    parts = [1 if unbind else meta.shape[d] for meta in call.outs]
    equal = len(set(parts)) == 1
    source, result = list(names), list(names)
    source[d] = ("parts", "rest") if equal and parts[0] > 1 else None
    result[d] = "rest" if equal and parts[0] > 1 else None
    if unbind:
        del result[d]
    return call.rule(
        {"self": source}, [result] * len(call.outs), sizes={"parts": len(parts), "rest": parts[0]} if source[d] else None,
        whole=["parts"], linear=[["self"]], cost="view",
    )  # fmt: skip


@rule("aten.select.int")
def select(call: Call) -> OpRule:
    shape = call.shape("self")
    d = call.dim("dim", len(shape))
    names = [f"d{i}" if n > 1 and i != d else None for i, n in enumerate(shape)]
    return call.rule({"self": names}, [names[:d] + names[d + 1 :]], linear=[["self"]], cost="view")


@rule("aten.slice.Tensor", "aten.narrow.default", "aten.constant_pad_nd.default", "aten.pad.default", "aten.roll.default", "aten.flip.default",
      "aten.triu.default", "aten.tril.default", "aten.upsample_nearest2d.vec", "aten.upsample_bicubic2d.vec",
      "aten.upsample_bilinear2d.vec", "aten.pixel_shuffle.default", "aten.pixel_unshuffle.default")  # fmt: skip
def keeps_other_dims(call: Call) -> OpRule:
    """Dimensions that the operator leaves alone pass through; those it works along stay whole."""
    name = "self" if call.has("self") else "input"
    src, out = call.shape(name), call.outs[0].shape
    if len(src) != len(out):
        raise NoRule
    names = [f"d{i}" if n == m and n > 1 and i not in _touched(call, src) else None for i, (n, m) in enumerate(zip(src, out))]
    is_slice = call.op.kind in ("aten.slice.Tensor", "aten.narrow.default")
    constant_pad = call.args.get("value") not in (None, 0) or call.args.get("mode", "constant") != "constant"
    return call.rule({name: names}, [names], linear=() if constant_pad else [["self"]], cost="view" if is_slice else "pointwise")


def _touched(call: Call, shape: tuple[int, ...]) -> set[int]:
    rank = len(shape)
    kind = call.op.kind
    if kind in ("aten.roll.default", "aten.flip.default"):
        dims = call.args["dims"] or range(rank)
        return {int(d) % rank for d in dims}
    if kind in ("aten.triu.default", "aten.tril.default"):
        return {rank - 1, rank - 2}
    if kind in ("aten.slice.Tensor", "aten.narrow.default"):
        return set()
    if "pixel" in kind:
        return {rank - 3, rank - 2, rank - 1}
    if kind in ("aten.pad.default", "aten.constant_pad_nd.default"):
        pad = call.args["pad"]
        return {rank - 1 - i for i in range(len(pad) // 2) if pad[2 * i] or pad[2 * i + 1]}
    return set(range(2, rank))


@rule("aten.repeat.default", "aten.tile.default")
def repeat(call: Call) -> OpRule:
    """A repeated dimension is (copies, the dimension), and the dimension may be cut."""
    shape, out = call.shape("self"), call.outs[0].shape
    padded = (1,) * (len(out) - len(shape)) + tuple(shape)
    names = [f"d{i}" if n > 1 else None for i, n in enumerate(padded)]
    return _copies(call, names, len(out) - len(shape), copies_first=True)


@rule("aten.repeat_interleave.self_int")
def repeat_interleave(call: Call) -> OpRule:
    """The dimension is (itself, copies): a cut of it keeps neighbours together."""
    shape = call.shape("self")
    if len(shape) != len(call.outs[0].shape) or call.args.get("output_size") is not None:
        raise NoRule
    names = [f"d{i}" if n > 1 else None for i, n in enumerate(shape)]
    return _copies(call, names, 0, copies_first=False)


def _copies(call: Call, names: Sequence[str | None], new: int, *, copies_first: bool) -> OpRule:
    result: list[str | tuple[str, str] | None] = list(names)
    sizes: dict[str, int] = {}
    out = call.outs[0].shape
    for i, (name, n) in enumerate(zip(names, out)):
        size = call.shape("self")[i - new] if i >= new else 1
        if name is not None and n != size:
            sizes |= {name: size, f"r{i}": n // size}
            result[i] = (f"r{i}", name) if copies_first else (name, f"r{i}")
    return call.rule({"self": names[new:]}, [result], sizes=sizes, whole=[f for f in sizes if f[0] == "r"], linear=[["self"]])


@rule("aten.unfold.default")
def unfold(call: Call) -> OpRule:
    """Windows along one dimension: it stays whole, and so does the window, the new last dimension."""
    shape = call.shape("self")
    d = call.dim("dimension", len(shape))
    names = [f"d{i}" if n > 1 and i != d else None for i, n in enumerate(shape)]
    return call.rule({"self": names}, [[*names, None]], linear=[["self"]], cost="view")


@rule("aten.im2col.default")
def im2col(call: Call) -> OpRule:
    """Windows of an image: [n, c, h, w] -> [n, (c, window), places]."""
    shape = call.shape("self")
    if len(shape) != 4:
        raise NoRule
    return call.rule(
        {"self": ["n", "c", None, None]},
        [["n", ("c", "w"), None]],
        sizes={"c": shape[1], "w": call.outs[0].shape[1] // shape[1]},
        whole=["w"],
        linear=[["self"]],
    )


@rule("aten.cat.default", "aten.concat.default")
def cat(call: Call) -> OpRule:
    """The joined dimension stays whole."""
    shapes = [meta.shape for meta in call.metas]
    if any(len(s) != len(shapes[0]) for s in shapes):
        raise NoRule
    d = call.dim("dim", len(shapes[0]))
    names = [f"d{i}" if n > 1 and i != d else None for i, n in enumerate(shapes[0])]
    return call.rule({"tensors": [names] * len(shapes)}, [names], linear=[["tensors"]], kind="copy")


@rule("aten.stack.default")
def stack(call: Call) -> OpRule:
    rank = len(call.outs[0].shape)
    d = call.dim("dim", rank)
    names = [f"d{i}" if n > 1 else None for i, n in enumerate(call.metas[0].shape)]
    return call.rule({"tensors": [names] * len(call.metas)}, [[*names[:d], None, *names[d:]]], linear=[["tensors"]], kind="copy")
