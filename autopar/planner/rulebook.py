"""The rules of a graph, each distinct operator looked at once."""

from autopar.core.graph import OpGraph
from autopar.core.rule import OpRule
from autopar.rules import families as _families  # noqa: F401 - every family registers its rules on import
from autopar.rules.registry import rule_of


def rules_of(graph: OpGraph) -> tuple[OpRule, ...]:
    """The factor rule of every operator; equal calls share one rule object."""
    known: dict[int, OpRule] = {}
    for call, op in zip(graph.calls, graph.ops, strict=True):
        if call not in known:
            known[call] = rule_of(op, graph)
    return tuple([known[call] for call in graph.calls])
