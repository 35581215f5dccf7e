"""What a block does a second time where not everything is kept for its backward, and what it keeps so that it can."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from autopar.core.graph import Op, OpGraph, TensorMeta
from autopar.core.residency import computes_again, gathers_again, keeps_contractions
from autopar.core.rule import OpRule

WEIGHT_CONTRACTIONS = ("aten.linear.default", "aten.mm.default", "aten.addmm.default", "aten.convolution.default")
"""Operators whose results selective recomputation keeps."""

RESHAPES = ("aten.view", "aten.reshape", "aten._unsafe_view", "aten.unsqueeze", "aten.squeeze", "aten.flatten", "aten.unflatten")

KEPT, AGAIN, UNREAD = "kept", "again", "unread"
"""What becomes of a result: it is kept from the forward; it is made a second time; nothing that is made a second time reads it."""


def kept_by_selective(op: Op, operands: Sequence[TensorMeta]) -> bool:
    """Whether selective recomputation may keep an operator's result: a contraction with a weight."""
    return op.kind in WEIGHT_CONTRACTIONS or (op.kind == "aten.matmul.default" and len(operands[1].shape) <= 2)


def computed_again(graph: OpGraph, rules: Sequence[OpRule]) -> dict[int, float]:
    """Operator of a block -> the part of its forward that recomputation does again.

    torch's checkpoint stops when the last of what the block keeps for its backward is there: what follows, such as the product with the last weight, is left out.
    """
    live, found = graph.differentiated, dict[int, float]()
    for segment in (segment for segment in graph.segments if segment.block):
        for i in reversed(segment.ops):
            rule = rules[i]
            if not live.isdisjoint(graph.ops[i].results) and (rule.saved_operands or rule.saved_results or rule.kept or not rule.known):
                found |= dict.fromkeys(range(segment.ops.start, i), 1.0) | {i: rule.share_until_kept}
                break
    return found


def read_again(graph: OpGraph, rules: Sequence[OpRule]) -> frozenset[int]:
    """Values that the backward of the block that makes them reads, or what it does a second time takes."""
    live, found = graph.differentiated, set[int]()
    for segment in (segment for segment in graph.segments if segment.block):
        for i in reversed(segment.ops):
            op, rule = graph.ops[i], rules[i]
            if live.isdisjoint(op.results):
                continue
            found.update(op.results[j] for j in rule.saved_results)
            if rule.saved_operands or rule.kept or not rule.known or not found.isdisjoint(op.results):
                found.update(op.operands)
    return frozenset(found)


@dataclass(frozen=True, slots=True)
class Part:
    """One operator or move of a block. Tensors have names of any kind: those that it `reads` and `makes`, and those that its backward reads (`saved`).

    `prepares`: it makes more for its backward than its results; `view`: what it makes lies in the memory of what it reads, if
    that lies in order; `contraction`: with a weight; `addends`: its result is still to be summed over ranks; `collective`, and if so, whether
    a `gather`.
    """

    reads: tuple[Hashable, ...]
    makes: tuple[Hashable, ...]
    saved: tuple[Hashable, ...] = ()
    prepares: bool = False
    view: bool = False
    contraction: bool = False
    addends: bool = False
    collective: bool = False
    gather: bool = False

    def may_repeat(self, mode: str) -> bool:
        """Whether it may be done a second time under a mode of recomputation."""
        if self.collective:
            return self.gather and gathers_again(mode)
        return self.view or (computes_again(mode) and not (self.contraction and keeps_contractions(mode)))


def replayed(parts: Sequence[Part], mode: str) -> tuple[str, ...]:
    """What becomes of the results of every part of a block, in program order, under a mode of recomputation.

    Backwards from what the backward of the block reads: that is kept or made again, and where it is made again, what that takes is read too. So of a sum over
    ranks either the sum is kept or its addends are, and of what only the next block reads nothing (as Korthikanti et al. 2022, section 5, keep of a layer).
    A contraction that may be repeated is spared only where its result is addends: a search over operators has to know what it costs without its users.
    """
    read: set[Hashable] = set()
    found = []
    for part in reversed(parts):
        read.update(part.saved)
        wanted = not read.isdisjoint(part.makes)
        again = part.may_repeat(mode)
        if again and (wanted or part.prepares):
            read.update(part.reads)
        spared = not wanted and not (again and part.contraction and not part.addends)
        found.append(UNREAD if spared else AGAIN if again else KEPT)
    return tuple(reversed(found))
