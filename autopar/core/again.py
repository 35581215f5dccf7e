"""What a block does a second time where not everything is kept for its backward."""

from collections.abc import Sequence

from autopar.core.graph import OpGraph
from autopar.core.rule import OpRule


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
