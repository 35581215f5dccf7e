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
    return call.rule({"self": shared, "index": index_dims}, [index_dims], linear=[["self"]], saves=["index"])


@rule("aten.index_select.default")
def index_select(call: Call) -> OpRule:
    shape = call.shape("self")
    d = call.dim("dim", len(shape))
    names = [f"d{i}" if n > 1 and i != d else None for i, n in enumerate(shape)]
    picked = "picked" if call.outs[0].shape[d] > 1 else None
    return call.rule({"self": names, "index": [picked]}, [[*names[:d], picked, *names[d + 1 :]]], linear=[["self"]], saves=["index"])


@rule("aten.index.Tensor")
def index(call: Call) -> OpRule:
    """Adjacent integer indices, broadcast together; the other dimensions pass through."""
    shape, entries = call.shape("self"), call.args["indices"]
    used = [i for i, e in enumerate(entries) if isinstance(e, Operand)]
    if not used or used != list(range(used[0], used[-1] + 1)) or any(call.metas[entries[i]].dtype == "bool" for i in used):
        raise NoRule
    names = [f"d{i}" if n > 1 and i not in used else None for i, n in enumerate(shape)]
    rank = max(len(call.metas[entries[i]].shape) for i in used)
    out = call.outs[0].shape[used[0] : used[0] + rank]
    picked = [f"p{i}" if n > 1 else None for i, n in enumerate(out)]

    def dims(shape: tuple[int, ...]) -> list[str | None]:
        return [p if n > 1 else None for p, n in zip(picked[rank - len(shape) :], shape)]

    indices = [dims(call.metas[entries[i]].shape) for i in used]
    result = [*names[: used[0]], *picked, *names[used[-1] + 1 :]]
    return _with_indices(call, names, indices, result)


def _with_indices(call: Call, names: list, indices: list, result: list) -> OpRule:
    operands = {"self": names}
    filled = iter(indices)
    by_position = [next(filled) if isinstance(e, Operand) else [] for e in call.args["indices"]]
    operands["indices"] = [d for d, e in zip(by_position, call.args["indices"]) if isinstance(e, Operand)]
    return call.rule(operands, [result], linear=[["self"]], saves=["indices"])


@rule("aten.scatter.src", "aten.scatter_add.default", "aten.scatter.value")
def scatter(call: Call) -> OpRule:
    shape, index_shape = call.shape("self"), call.shape("index")
    d = call.dim("dim", len(shape))
    source = call.shape("src") if call.has("src") else index_shape
    names = [f"d{i}" if n == m == k and n > 1 and i != d else None for i, (n, m, k) in enumerate(zip(shape, index_shape, source))]
    operands = {"self": names, "index": names, **({"src": names} if call.has("src") else {})}
    return call.rule(operands, [names], linear=[["self", "src"]] if call.has("src") else (), saves=["index"])


@rule("aten.one_hot.default")
def one_hot(call: Call) -> OpRule:
    names = [f"d{i}" if n > 1 else None for i, n in enumerate(call.shape("self"))]
    return call.rule({"self": names}, [[*names, None]])
