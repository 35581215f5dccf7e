"""What memory an operator or a move takes: what is new, what is shared, what passes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from autopar.core.again import RESHAPES
from autopar.core.graph import Op
from autopar.core.rule import OpRule
from autopar.core.strides import Strides, dense_like, is_row_major, row_major, view_strides

JOINING = ("aten.cat", "aten.concat", "aten.stack")
SAME_GRADIENT = ("aten.clone", "aten.contiguous", "aten.alias", "aten.add.", "aten.sub.", "aten.sum", *JOINING)
"""Operators whose operands' gradients lie in the memory of the result's, where shapes agree."""

WHOLE_GRADIENT = ("aten.slice", "aten.narrow", "aten.select", "aten.split", "aten.chunk", "aten.tensor_split", "aten.unbind", "aten.expand",
                  "aten.broadcast", "aten.unfold")  # fmt: skip
"""Views whose operand's gradient is memory of its own: zeros around a part, parts joined, or a sum over copies."""

FORWARD_WORKSPACE = {"autopar.dropout": 1.0, "autopar.attention": 1.0, "autopar.token_cross_entropy": 1.0}
"""Copies of the largest tensor kept (or made) that an operator holds while it runs and drops at its end, where it is written out."""

WRITTEN_OUT = ("autopar.dropout", "autopar.attention")
"""Operators that always are; others where what they sum themselves is cut."""

BACKWARD_WORKSPACE = {"aten.pow": 2.0, "autopar.attention": 2.0, "autopar.token_cross_entropy": 1.0}
"""The same for its backward: `grad * (e * x ** (e - 1))` has two products at once."""

PERMUTING = ("aten.transpose", "aten.permute", "aten.movedim", "aten.t.", "aten.numpy_T", "aten.mT")
ATTENTION = "aten.scaled_dot_product_attention"


@dataclass(frozen=True, slots=True)
class Node:
    """A value in one layout on one rank: a result, or the value after some of its moves. `live`: a gradient comes back to it."""

    num_bytes: int
    shape: tuple[int, ...]
    strides: Strides
    live: bool


def result_strides(op: Op, rule: OpRule, operands: Sequence[Node], shape: tuple[int, ...]) -> tuple[Strides, bool]:
    """Strides of a result, and whether it lies in the memory of the first operand."""
    if operands and rule.cost == "view":
        strides = _seen(op, operands[0], shape)
        if strides is not None:
            return strides, True
    elif op.kind.startswith(ATTENTION):  # flash attention writes rows of all heads together
        return dense_like(shape, (3, 1, 2, 0)), False
    elif operands and not op.kind.startswith(("aten.clone", "aten.contiguous")):
        alike = (node for node in operands if node.shape == shape)
        like = next((node for node in alike if not is_row_major(shape, node.strides)), None)
        if like is not None and rule.cost == "pointwise" and all(like.strides):
            return dense_like(shape, like.strides), False
    return row_major(shape), False


def new_gradient_bytes(op: Op, operand: Node, result: Node) -> int | None:
    """New memory for the gradient of an operand; None where it shares the result's."""
    if op.kind.startswith(WHOLE_GRADIENT):
        return operand.num_bytes
    rearranged = op.kind.startswith((*PERMUTING, *RESHAPES))
    broadcast = math.prod(operand.shape) < math.prod(result.shape) and not op.kind.startswith(JOINING)
    return None if rearranged or (op.kind.startswith(SAME_GRADIENT) and not broadcast) else operand.num_bytes


def forward_workspace(kind: str, largest: int) -> int:
    """Bytes that an operator holds while it runs; `largest`: of its results and of what it keeps for its backward."""
    return round(_share(FORWARD_WORKSPACE, kind) * largest)


def backward_workspace(kind: str, rule: OpRule, operands: Sequence[Node], largest: int, made: int) -> int:
    """The same for its backward; `made`: bytes of its largest result."""
    share = backward_share(kind)
    if share:
        return round(share * largest)
    broadcast = any(node.live and node.num_bytes < made for node in operands)
    product = rule.cost == "pointwise" and not kind.startswith(SAME_GRADIENT)
    return made if product and broadcast else 0  # a gradient of the whole shape, before it is summed


def backward_share(kind: str) -> float:
    """Of the largest tensor kept (or made), what an operator that is known to work in memory of its own works in when it is differentiated; it makes its gradients anew."""
    return _share(BACKWARD_WORKSPACE, kind)


def move_shares(primitive: str, before: tuple[int, ...], after: tuple[int, ...]) -> bool:
    """Whether a value lies in the same memory after a move."""
    cut = next((d for d, (n, m) in enumerate(zip(before, after)) if n != m), None)
    return primitive == "identity" or (primitive == "slice" and cut is not None and math.prod(after[:cut]) == 1)


def in_flight(primitive: str, given: int, made: int) -> int:
    """Bytes that a move holds beside its input and its result: pieces, pieces side by side, and what is received."""
    return {"all_gather": made, "reduce_scatter": 3 * given, "all_to_all": 2 * given, "embed": given}.get(primitive, 0)


def _seen(op: Op, source: Node, shape: tuple[int, ...]) -> Strides | None:
    """Strides of a view's result in the memory of its operand; None where a reshape must copy."""
    given = dict(op.args)
    rank = len(source.shape)
    if op.kind.startswith(RESHAPES):
        return view_strides(source.shape, source.strides, shape)
    if op.kind.startswith(PERMUTING):
        order = list(range(rank))
        if op.kind == "aten.permute.default":
            order = [int(d) % rank for d in given["dims"]]
        elif op.kind == "aten.transpose.int":
            a, b = int(given["dim0"]) % rank, int(given["dim1"]) % rank
            order[a], order[b] = b, a
        elif op.kind == "aten.movedim.int":
            order.insert(int(given["destination"]) % rank, order.pop(int(given["source"]) % rank))
        elif op.kind == "aten.mT.default":
            order[-1], order[-2] = order[-2], order[-1]
        else:
            order.reverse()
        return tuple(source.strides[d] for d in order)
    if op.kind.startswith(("aten.select", "aten.unbind")):
        d = int(given["dim"]) % rank
        return source.strides[:d] + source.strides[d + 1 :]
    if op.kind.startswith(("aten.expand", "aten.broadcast")):
        lead = len(shape) - rank
        return (0,) * lead + tuple(s if n == m else 0 for s, n, m in zip(source.strides, source.shape, shape[lead:]))
    return source.strides if len(shape) == rank else row_major(shape)


def _share(table: dict[str, float], kind: str) -> float:
    return next((share for start, share in table.items() if kind.startswith(start)), 0.0)
