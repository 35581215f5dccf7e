"""Mixtures of experts: tokens to the slots of experts and back. Sending them is no operator but a redistribution, from slots cut to experts cut."""

from autopar.core.rule import OpRule
from autopar.rules.registry import Call, NoRule, rule


@rule("autopar.dispatch.default")
def dispatch(call: Call) -> OpRule:
    """[n, h] -> [e, c, h]: of every e / chosen neighbouring tokens each fills a slot of `chosen` experts. Cutting the tokens cuts the slots; cutting
    the experts, of tokens that are whole, makes the slots of some."""
    experts, chosen = int(call.args["experts"]), int(call.args["chosen"])
    return call.rule({"input": [("c", "r"), "h"]}, [["e", "c", "h"]], sizes=_sizes(call.shape("input")[0], experts, chosen), whole=["r"], linear=[["input"]])


@rule("autopar.combine.default")
def combine(call: Call) -> OpRule:
    """[e, c, h], weights [n, chosen] -> [n, h]: the weighted sum over the experts of a token, a partial one where experts are cut."""
    experts, (tokens, chosen) = call.shape("input")[0], call.shape("weights")
    operands = {"input": ["e", "c", "h"], "weights": [("c", "r"), None]}
    sizes = _sizes(tokens, experts, chosen)
    return call.rule(operands, [[("c", "r"), "h"]], sizes=sizes, whole=["r"], linear=[["input"], ["weights"]], saves=["input", "weights"])


def _sizes(tokens: int, experts: int, chosen: int) -> dict[str, int]:
    if experts % chosen or tokens % (experts // chosen):
        raise NoRule
    return {"c": tokens * chosen // experts, "r": experts // chosen}
