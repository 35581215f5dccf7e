"""Make a plan fit its memory, or use the memory it leaves, by switching nodes.

`repair` and `spend` switch one node at a time. `relink` walks from one plan to another in pieces: where two plans
differ, the nodes that differ fall into connected parts, each of which can be switched on its own for a known number
of seconds and bytes. At the critical price of memory the plan that fits and the one that does not cost the same, and
the best plan within the limit is usually a mix of their parts ("recompute in 8 of 32 layers"). Where all that differs
is connected, `splice` takes one plan up to some node and the other from there on.
"""

import math
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from autopar.core.problem import SearchProblem, evaluate
from autopar.search.simplify import node_classes
from autopar.search.terms import Terms

RELATIVE_GAIN = 1e-12  # a smaller gain is rounding, and taking it could go round in circles


class Situation:
    """A node in its state, with its neighbours in theirs: seconds and bytes [k] that each other state would add.

    Copies of a node whose neighbours do the same in every copy are in one situation.
    """

    def __init__(self, cost_s: np.ndarray, memory_bytes: np.ndarray) -> None:
        self.cost_s, self.memory_bytes = cost_s, memory_bytes

    @cached_property
    def relief(self) -> tuple[float, int]:
        """(seconds per byte freed, state) of the switch that frees memory at the fewest seconds per byte; inf where none frees any."""
        with np.errstate(divide="ignore", invalid="ignore"):
            score = np.where(self.memory_bytes < 0, self.cost_s / -self.memory_bytes, np.inf)
        return _least(score)

    def finish(self, excess_bytes: float) -> tuple[float, int]:
        """(seconds, state) of the cheapest switch that frees at least so many bytes; inf where none does."""
        if self._most_freed < excess_bytes:
            return math.inf, 0
        return _least(np.where(-self.memory_bytes >= excess_bytes, self.cost_s, np.inf))

    @cached_property
    def _most_freed(self) -> float:
        return float(-self.memory_bytes.min())

    @cached_property
    def gains(self) -> tuple[tuple[float, float, int], ...]:
        """(score, bytes, state) of the switches that save seconds, best first.

        One that also frees memory is ranked by seconds alone, before any that needs memory: those by seconds per byte.
        """
        states = np.flatnonzero(self.cost_s < 0)
        seconds, held = self.cost_s[states], self.memory_bytes[states]
        scores = np.where(held > 0, seconds / np.maximum(held, 1.0), seconds)
        return tuple(sorted(zip(scores.tolist(), held.tolist(), states.tolist(), strict=True)))

    def gain(self, room_bytes: float, least_s: float) -> tuple[float, int]:
        """(score, state) of the best switch that saves more than `least_s` and adds at most `room_bytes`; inf where none does."""
        return next(((score, state) for score, held, state in self.gains if held <= room_bytes and self.cost_s[state] < -least_s), (math.inf, 0))


def _least(score: np.ndarray) -> tuple[float, int]:
    state = int(score.argmin())
    return float(score[state]), state


class Neighbourhood:
    """Where a plan stands: the situation of every node, kept up to date as nodes switch."""

    def __init__(self, problem: SearchProblem, choices: Sequence[int]) -> None:
        self.problem = problem
        self.choices = list(choices)
        self.cost_s, self.memory_bytes = evaluate(problem, choices)
        self.classes = node_classes(problem)
        self.ends: list[list[tuple[int, np.ndarray, np.ndarray | None]]] = [[] for _ in problem.nodes]
        for edge in problem.edges:
            memory = edge.memory_bytes
            self.ends[edge.u].append((edge.v, edge.cost_s, memory))
            self.ends[edge.v].append((edge.u, edge.cost_s.T, None if memory is None else memory.T))
        self.known: dict[tuple[int, ...], Situation] = {}
        self.members: dict[Situation, set[int]] = {}
        self.at: list[Situation] = [self._enter(node) for node in range(len(problem.nodes))]

    def _enter(self, node: int) -> Situation:
        key = (self.classes[node], self.choices[node], *[self.choices[other] for other, _, _ in self.ends[node]])
        if key not in self.known:
            self.known[key] = self._find(node)
        self.members.setdefault(self.known[key], set()).add(node)
        return self.known[key]

    def _find(self, node: int) -> Situation:
        item = self.problem.nodes[node]
        seconds, held = item.cost_s, item.memory_bytes
        for other, cost_s, memory_bytes in self.ends[node]:
            seconds = seconds + cost_s[:, self.choices[other]]
            if memory_bytes is not None:
                held = held + memory_bytes[:, self.choices[other]]
        here = self.choices[node]
        return Situation(seconds - seconds[here], held - held[here])

    def switch(self, node: int, state: int) -> None:
        """Give one node another state."""
        self.cost_s += float(self.at[node].cost_s[state])
        self.memory_bytes += float(self.at[node].memory_bytes[state])
        self.choices[node] = state
        for touched in {node, *[other for other, _, _ in self.ends[node]]}:
            left = self.members[self.at[touched]]
            left.discard(touched)
            if not left:
                del self.members[self.at[touched]]
            self.at[touched] = self._enter(touched)

    def best(self, scores: dict[Situation, float]) -> Situation | None:
        """The situation of least finite score; of equals the one with the lowest node."""
        least = min(scores.values(), default=math.inf)
        if not math.isfinite(least):
            return None
        return min((s for s, score in scores.items() if score == least), key=lambda s: min(self.members[s]))


def repair(problem: SearchProblem, choices: Sequence[int]) -> tuple[int, ...] | None:
    """A plan within the limit reached by switches that free memory at the fewest seconds per byte, or None.

    On the way every switch that would fit at once is a candidate; the cheapest candidate is returned.
    """
    here = Neighbourhood(problem, choices)
    best_cost, best = math.inf, None
    while not problem.fits(here.memory_bytes):
        excess = here.memory_bytes - problem.limit_bytes
        last = here.best({s: s.finish(excess)[0] for s in here.members})
        if last and here.cost_s + last.finish(excess)[0] < best_cost:
            best_cost = here.cost_s + last.finish(excess)[0]
            best = list(here.choices)
            best[min(here.members[last])] = last.finish(excess)[1]
        relief = here.best({s: s.relief[0] for s in here.members})
        if relief is None:
            break
        here.switch(min(here.members[relief]), relief.relief[1])
    else:
        if here.cost_s < best_cost:
            best = here.choices
    return tuple(best) if best and problem.fits(evaluate(problem, best)[1]) else None


def spend(problem: SearchProblem, choices: Sequence[int]) -> tuple[int, ...]:
    """A plan that no single switch within the limit improves; starts from one within the limit."""
    here = Neighbourhood(problem, choices)
    while True:
        room, least = problem.limit_bytes - here.memory_bytes, RELATIVE_GAIN * here.cost_s
        step = here.best({s: s.gain(room, least)[0] for s in here.members})
        if step is None:
            return tuple(here.choices)
        here.switch(min(here.members[step]), step.gain(room, least)[1])


def relink(problem: SearchProblem, over: Sequence[int], within: Sequence[int]) -> tuple[int, ...]:
    """A plan within the limit made of parts of `over` (cheaper, too large) and `within` (which fits).

    Starts from `within` and gives back the parts of `over` that save most seconds per byte while they fit.
    """
    terms, left, right = Terms(problem), np.asarray(over, dtype=int), np.asarray(within, dtype=int)
    part = _parts(terms, left != right)
    nodes = terms.of_nodes(left) - terms.of_nodes(right)
    edges = terms.of_edges(left[terms.u], left[terms.v]) - terms.of_edges(right[terms.u], right[terms.v])
    of_edge = np.maximum(part[terms.u], part[terms.v])  # where both ends differ they are in one part
    numbers = np.concatenate([part, of_edge]) + 1
    seconds, held = (np.bincount(numbers, weights=np.concatenate([nodes[row], edges[row]]))[1:] for row in (0, 1))
    offers = sorted((seconds[p] / max(held[p], 1.0), p) for p in range(len(seconds)))
    memory_bytes = terms.of_plan(within)[1]
    taken = []
    for _, p in offers:
        if seconds[p] < 0 and problem.fits(memory_bytes + held[p]):
            memory_bytes += held[p]
            taken.append(p)
    mixed = tuple(np.where(np.isin(part, taken), left, right).tolist())
    return mixed if problem.fits(terms.of_plan(mixed)[1]) else tuple(within)


def splice(problem: SearchProblem, head: Sequence[int], tail: Sequence[int]) -> tuple[int, ...] | None:
    """The cheapest plan within the limit that takes `head` for the first i nodes and `tail` for the rest, over all i.

    Nodes come in program order, so this turns "every layer one way or every layer the other" into "the first i layers".
    """
    terms, left, right = Terms(problem), np.asarray(head, dtype=int), np.asarray(tail, dtype=int)
    n = len(problem.nodes)
    forward = terms.u < terms.v
    between = np.where(forward, left[terms.u], right[terms.u]), np.where(forward, right[terms.v], left[terms.v])
    ends = [_finite(terms.of_edges(*states)) for states in ((right[terms.u], right[terms.v]), between, (left[terms.u], left[terms.v]))]
    steps = np.zeros((3, n + 1))  # change from cut i - 1 to cut i of: seconds, bytes, number of forbidden pairs
    steps[:2, 1:] = terms.of_nodes(left) - terms.of_nodes(right)
    for row in range(3):
        np.add.at(steps[row], np.minimum(terms.u, terms.v) + 1, ends[1][row] - ends[0][row])
        np.add.at(steps[row], np.maximum(terms.u, terms.v) + 1, ends[2][row] - ends[1][row])
    cost_s, memory_bytes = terms.of_plan(tail)
    seconds_at, bytes_at, forbidden_at = steps.cumsum(axis=1)
    allowed = (bytes_at + memory_bytes <= problem.limit_bytes) & (forbidden_at < 0.5)
    if not allowed.any():
        return None
    cut = int(np.where(allowed, seconds_at + cost_s, np.inf).argmin())
    plan = (*head[:cut], *tail[cut:])
    return plan if problem.fits(terms.of_plan(plan)[1]) else None


def _finite(terms: np.ndarray) -> np.ndarray:
    """[3, edges]: seconds (0 where forbidden), bytes, 1 where forbidden."""
    forbidden = np.isinf(terms[0])
    return np.stack([np.where(forbidden, 0.0, terms[0]), terms[1], forbidden])


def _parts(terms: Terms, differs: np.ndarray) -> np.ndarray:
    """Per node the number of its connected part of the nodes that differ, by their lowest node; -1 where none does."""
    root = list(range(len(differs)))

    def find(node: int) -> int:
        while root[node] != node:
            root[node] = root[root[node]]
            node = root[node]
        return node

    inside = np.flatnonzero(differs[terms.u] & differs[terms.v])
    for u, v in zip(terms.u[inside].tolist(), terms.v[inside].tolist(), strict=True):
        a, b = sorted((find(u), find(v)))
        root[b] = a
    numbers: dict[int, int] = {}
    return np.array([numbers.setdefault(find(node), len(numbers)) if d else -1 for node, d in enumerate(differs.tolist())], dtype=int)
