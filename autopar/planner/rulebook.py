"""The rules of a graph, each distinct operator looked at once."""

from autopar.core.graph import OpGraph
from autopar.core.rule import OpRule
from autopar.rules import families as _families  # noqa: F401 - every family registers its rules on import
from autopar.rules.registry import rule_of


def rules_of(graph: OpGraph) -> tuple[OpRule, ...]:
    """The factor rule of every operator; equal calls share one rule object."""
    known: dict[tuple, OpRule] = {}
    found = []
    for op in graph.ops:
        key = (op.kind, op.args, tuple(graph.values[v].meta for v in (*op.operands, *op.results)))
        if key not in known:
            known[key] = rule_of(op, graph)
        found.append(known[key])
    return tuple(found)
