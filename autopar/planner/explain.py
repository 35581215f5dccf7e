"""Why this plan: every decision with its best alternative, and what that would cost.

The price of an alternative is exact: V(s) - V, how much more the best plan costs that has a given node in state s (`search/fixing.py`),
on the tables the plan was chosen from. Where memory binds, it is at the price of memory that the search ended with, so that a
plan that is faster and does not fit is not called better.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from autopar.core.layout import Layout, format_layout
from autopar.core.mesh import Mesh
from autopar.core.zero import Zero
from autopar.planner.plan import Planned
from autopar.planner.search import Candidate
from autopar.search.elimination import prepare
from autopar.search.fixing import Regrets, regrets_at
from autopar.search.simplify import BYTES, SECONDS


@dataclass(frozen=True)
class Decision:
    """What was chosen for a parameter or a block, the best other choice, and the seconds a step that this would cost."""

    what: str
    chosen: str
    alternative: str
    extra_s: float


def decisions_of(planned: Planned) -> tuple[Decision, ...]:
    """The layout of every parameter and the recomputation of every block, where there was a choice; empty where the tables are too large."""
    candidate, mesh = planned.candidates[0], planned.plan.mesh
    prepared = prepare(candidate.problem, (SECONDS, BYTES))
    regrets = regrets_at(prepared, candidate.assignment.multiplier_s_per_byte)
    if regrets is None:
        return ()
    kept = prepared.shrunk.kept
    return tuple([*_parameters(candidate, mesh, regrets, kept), *_blocks(candidate, regrets, kept)])


def _parameters(candidate: Candidate, mesh: Mesh, regrets: Regrets, kept: tuple[np.ndarray, ...]) -> Iterator[Decision]:
    ports, graph = candidate.ports, candidate.program.graph
    for v, node in ports.param_node.items():
        states = ports.states[node]
        words = [_state(mesh, layout, zero) for layout, zero in zip(states.result_layouts[0], states.zeros, strict=True)]
        yield from _decision(graph.values[v].source[0], words, candidate.assignment.choices[node], kept[node], regrets.at_nodes[node])


def _blocks(candidate: Candidate, regrets: Regrets, kept: tuple[np.ndarray, ...]) -> Iterator[Decision]:
    for block, node in candidate.ports.block_node.items():
        words = [f"recompute {mode}" for mode in candidate.ports.states[node].modes]
        yield from _decision(block, words, candidate.assignment.choices[node], kept[node], regrets.at_nodes[node])


def _decision(what: str, words: list[str], choice: int, kept: np.ndarray, regret: np.ndarray) -> Iterator[Decision]:
    """Against the choice that was made, which costs nothing more only where the plan is the optimum of these tables."""
    here = float(regret[np.flatnonzero(kept == choice)].min(initial=0.0))
    others = [(float(seconds) - here, words[state]) for state, seconds in zip(kept.tolist(), regret) if words[state] != words[choice] and np.isfinite(seconds)]
    if others:
        extra_s, alternative = min(others)
        yield Decision(what, words[choice], alternative, extra_s)


def _state(mesh: Mesh, layout: Layout, zero: Zero | None) -> str:
    """`tp=S0, ZeRO-1 over dp`."""
    cuts = " ".join(word for word in format_layout(layout, mesh).split(",") if not word.endswith("=I")) or "whole"
    return cuts if zero is None else f"{cuts}, ZeRO-{zero.stage} over {' and '.join(mesh.names[a] for a in zero.axes)}"
