"""Gather, index and scatter: dimensions that no index walks pass through."""

from autopar.core.graph import Operand
from autopar.core.rule import OpRule
from autopar.rules.registry import Call, NoRule, rule


@rule("aten.gather.default")
def gather(call: Call) -> OpRule:
    shape, index = call.shape("self"), call.shape("index")
    if not shape:
        raise NoRule
    d = call.dim("dim", len(shape))
    shared = [f"d{i}" if n == m and n > 1 and i != d else None for i, (n, m) in enumerate(zip(shape, index))]
    index_dims = list(shared)
    index_dims[d] = "picked" if index[d] > 1 else None
    return call.rule({"self": shared, "index": index_dims}, [index_dims], linear=[["self"]], saves=["index"], kind="gather")


@rule("aten.index_select.default")
def index_select(call: Call) -> OpRule:
    shape = call.shape("self")
    d = call.dim("dim", len(shape))
    names = [f"d{i}" if n > 1 and i != d else None for i, n in enumerate(shape)]
    picked = "picked" if call.outs[0].shape[d] > 1 else None
    result = [*names[:d], picked, *names[d + 1 :]]
    return call.rule({"self": names, "index": [picked] * len(call.shape("index"))}, [result], linear=[["self"]], saves=["index"], kind="gather")


@rule("aten.index.Tensor")
def index(call: Call) -> OpRule:
    """The picked elements and the dimensions that no index walks may be cut."""
    names, indices, result = _indexed(call)
    return call.rule({"self": names, "indices": indices}, [result], linear=[["self"]], saves=["indices"], kind="gather")


@rule("aten.index_put.default")
def index_put(call: Call) -> OpRule:
    """Only the dimensions that no index walks may be cut: every rank writes all picked elements."""
    names, indices, result = _indexed(call)
    kept = {name for name in names if name}
    shape = call.shape("values")
    values = [name if name in kept and n > 1 else None for name, n in zip(result[len(result) - len(shape) :], shape)]
    whole = [[None] * len(dims) for dims in indices]
    return call.rule({"self": names, "indices": whole, "values": values}, [names], linear=[["self", "values"]], saves=["indices"])


def _indexed(call: Call) -> tuple[list[str | None], list[list[str | None]], list[str | None]]:
    """Adjacent integer indices, broadcast together: (dims of the indexed tensor, of every index, of what they pick)."""
    shape, entries = call.shape("self"), call.args["indices"]
    used = [i for i, e in enumerate(entries) if isinstance(e, Operand)]
    if not used or used != list(range(used[0], used[-1] + 1)) or any(call.metas[entries[i]].dtype == "bool" for i in used):
        raise NoRule
    names = [f"d{i}" if n > 1 and i not in used else None for i, n in enumerate(shape)]
    shapes = [call.metas[entries[i]].shape for i in used]
    rank = max(map(len, shapes))
    longest = [max((s[i - rank] for s in shapes if len(s) >= rank - i), key=lambda n: (n != 1, n)) for i in range(rank)]
    picked = [f"p{i}" if n > 1 else None for i, n in enumerate(longest)]
    indices = [[p if n > 1 else None for p, n in zip(picked[rank - len(s) :], s)] for s in shapes]
    return names, indices, [*names[: used[0]], *picked, *names[used[-1] + 1 :]]


@rule("aten.index_add.default", "aten.index_copy.default")
def index_add(call: Call) -> OpRule:
    shape = call.shape("self")
    d = call.dim("dim", len(shape))
    names = [f"d{i}" if n > 1 and i != d else None for i, n in enumerate(shape)]
    return call.rule({"self": names, "source": names}, [names], linear=[["self", "source"]], saves=["index"])


@rule("aten.slice_scatter.default", "aten.select_scatter.default")
def slice_scatter(call: Call) -> OpRule:
    """The dimension that is written in part stays whole."""
    shape = call.shape("self")
    d = call.dim("dim", len(shape))
    names = [f"d{i}" if n > 1 and i != d else None for i, n in enumerate(shape)]
    source = names if "slice" in call.op.kind else names[:d] + names[d + 1 :]
    return call.rule({"self": names, "src": source}, [names], linear=[["self", "src"]])


@rule("aten.scatter.src", "aten.scatter_add.default", "aten.scatter.value", "aten.scatter_reduce.two")
def scatter(call: Call) -> OpRule:
    shape, index_shape = call.shape("self"), call.shape("index")
    d = call.dim("dim", len(shape))
    source = call.shape("src") if call.has("src") else index_shape
    names = [f"d{i}" if n == m == k and n > 1 and i != d else None for i, (n, m, k) in enumerate(zip(shape, index_shape, source))]
    operands = {"self": names, "index": names, **({"src": names} if call.has("src") else {})}
    is_linear = call.has("src") and "reduce" not in call.op.kind
    return call.rule(operands, [names], linear=[["self", "src"]] if is_linear else (), saves=["index"])


@rule("aten.one_hot.default")
def one_hot(call: Call) -> OpRule:
    names = [f"d{i}" if n > 1 else None for i, n in enumerate(call.shape("self"))]
    return call.rule({"self": names}, [[*names, None]])
