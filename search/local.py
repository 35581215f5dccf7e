"""Make a plan fit its memory, or use the memory it leaves, by switching nodes.

`repair` and `spend` switch one node at a time. `relink` walks from one plan to another in pieces: where two plans
differ, the nodes that differ fall into connected parts, each of which can be switched on its own for a known number
of seconds and bytes. At the critical price of memory the plan that fits and the one that does not cost the same, and
the best plan within the limit is usually a mix of their parts ("recompute in 8 of 32 layers"). Where all that differs
is connected, `splice` takes one plan up to some node and the other from there on.
"""

import math
from collections.abc import Sequence

import numpy as np

from autopar.core.problem import SearchProblem, evaluate

RELATIVE_GAIN = 1e-12  # a smaller gain is rounding, and taking it could go round in circles


class Neighbourhood:
    """What switching one node costs from where the plan stands: arrays [n, K] of seconds and bytes, padded with inf and 0."""

    def __init__(self, problem: SearchProblem, choices: Sequence[int]) -> None:
        self.problem = problem
        self.choices = list(choices)
        self.cost_s, self.memory_bytes = evaluate(problem, choices)
        self.ends: list[list[tuple[int, np.ndarray, np.ndarray | None]]] = [[] for _ in problem.nodes]
        for edge in problem.edges:
            memory = edge.memory_bytes
            self.ends[edge.u].append((edge.v, edge.cost_s, memory))
            self.ends[edge.v].append((edge.u, edge.cost_s.T, None if memory is None else memory.T))
        width = max((node.num_states for node in problem.nodes), default=1)
        self.delta_cost_s = np.full((len(problem.nodes), width), np.inf)
        self.delta_memory_bytes = np.zeros((len(problem.nodes), width))
        for node in range(len(problem.nodes)):
            self._refresh(node)

    def _refresh(self, node: int) -> None:
        item = self.problem.nodes[node]
        seconds, held = item.cost_s, item.memory_bytes
        for other, cost_s, memory_bytes in self.ends[node]:
            seconds = seconds + cost_s[:, self.choices[other]]
            if memory_bytes is not None:
                held = held + memory_bytes[:, self.choices[other]]
        here = self.choices[node]
        self.delta_cost_s[node, : len(seconds)] = seconds - seconds[here]
        self.delta_memory_bytes[node, : len(held)] = held - held[here]

    def switch(self, node: int, state: int) -> None:
        """Give one node another state."""
        self.cost_s += float(self.delta_cost_s[node, state])
        self.memory_bytes += float(self.delta_memory_bytes[node, state])
        self.choices[node] = state
        self._refresh(node)
        for other, _, _ in self.ends[node]:
            self._refresh(other)

    def best(self, score: np.ndarray) -> tuple[int, int] | None:
        """(node, state) of the least finite score, the first of equals."""
        node, state = divmod(int(score.argmin()), score.shape[1])
        return (node, state) if math.isfinite(score[node, state]) else None


def repair(problem: SearchProblem, choices: Sequence[int]) -> tuple[int, ...] | None:
    """A plan within the limit reached by switches that free memory at the fewest seconds per byte, or None.

    On the way every switch that would fit at once is a candidate; the cheapest candidate is returned.
    """
    limit = problem.limit_bytes
    here = Neighbourhood(problem, choices)
    best_cost, best = math.inf, None
    while not problem.fits(here.memory_bytes):
        freed = -here.delta_memory_bytes
        finishing = np.where(freed >= here.memory_bytes - limit, here.delta_cost_s, np.inf)
        last = here.best(finishing)
        if last and here.cost_s + finishing[last] < best_cost:
            best_cost = here.cost_s + float(finishing[last])
            best = [*here.choices[: last[0]], last[1], *here.choices[last[0] + 1 :]]
        with np.errstate(divide="ignore", invalid="ignore"):
            step = here.best(np.where(freed > 0, here.delta_cost_s / freed, np.inf))
        if step is None:
            break
        here.switch(*step)
    else:
        if here.cost_s < best_cost:
            best = here.choices
    return tuple(best) if best and problem.fits(evaluate(problem, best)[1]) else None


def spend(problem: SearchProblem, choices: Sequence[int]) -> tuple[int, ...]:
    """A plan that no single switch within the limit improves; starts from one within the limit."""
    here = Neighbourhood(problem, choices)
    limit = problem.limit_bytes
    while True:
        grown = here.delta_memory_bytes
        gains = (here.delta_cost_s < -RELATIVE_GAIN * here.cost_s) & (grown <= limit - here.memory_bytes)
        # a switch that also frees memory is ranked by seconds alone, before any that needs memory
        step = here.best(np.where(gains, np.where(grown > 0, here.delta_cost_s / np.maximum(grown, 1.0), here.delta_cost_s * 1.0), np.inf))
        if step is None:
            return tuple(here.choices)
        here.switch(*step)


def relink(problem: SearchProblem, over: Sequence[int], within: Sequence[int]) -> tuple[int, ...]:
    """A plan within the limit made of parts of `over` (cheaper, too large) and `within` (which fits).

    Starts from `within` and gives back the parts of `over` that save most seconds per byte while they fit.
    """
    parts = _parts(problem, over, within)
    cost_s, memory_bytes = evaluate(problem, within)
    offers = []
    for part in parts:
        trial = list(within)
        for node in part:
            trial[node] = over[node]
        part_cost_s, part_memory_bytes = evaluate(problem, trial)
        offers.append((part_cost_s - cost_s, part_memory_bytes - memory_bytes, part))
    offers.sort(key=lambda offer: (offer[0] / max(offer[1], 1.0), offer[2]))
    mixed = list(within)
    for gain, grown, part in offers:
        if gain < 0 and problem.fits(memory_bytes + grown):
            memory_bytes += grown
            for node in part:
                mixed[node] = over[node]
    return tuple(mixed) if problem.fits(evaluate(problem, mixed)[1]) else tuple(within)


def splice(problem: SearchProblem, head: Sequence[int], tail: Sequence[int]) -> tuple[int, ...] | None:
    """The cheapest plan within the limit that takes `head` for the first i nodes and `tail` for the rest, over all i.

    Nodes come in program order, so this turns "every layer one way or every layer the other" into "the first i layers".
    """
    n = len(problem.nodes)
    steps = np.zeros((3, n + 1))  # change from cut i - 1 to cut i of: seconds, bytes, number of forbidden pairs
    for i, node in enumerate(problem.nodes):
        steps[0, i + 1] += node.cost_s[head[i]] - node.cost_s[tail[i]]
        steps[1, i + 1] += node.memory_bytes[head[i]] - node.memory_bytes[tail[i]]
    for edge in problem.edges:
        first, last = sorted((edge.u, edge.v))
        states = [(plan[edge.u], plan[edge.v]) for plan in (tail, _spliced(head, tail, edge.u, edge.v), head)]
        seconds = [float(edge.cost_s[pair]) for pair in states]
        finite = [value if math.isfinite(value) else 0.0 for value in seconds]
        held = [0.0 if edge.memory_bytes is None else float(edge.memory_bytes[pair]) for pair in states]
        forbidden = [float(not math.isfinite(value)) for value in seconds]
        for row, values in enumerate((finite, held, forbidden)):
            steps[row, first + 1] += values[1] - values[0]
            steps[row, last + 1] += values[2] - values[1]
    cost_s, memory_bytes = evaluate(problem, tail)
    seconds_at, bytes_at, forbidden_at = steps.cumsum(axis=1)
    limit = problem.limit_bytes
    allowed = (bytes_at + memory_bytes <= limit) & (forbidden_at < 0.5)
    if not allowed.any():
        return None
    cut = int(np.where(allowed, seconds_at + cost_s, np.inf).argmin())
    plan = (*head[:cut], *tail[cut:])
    return plan if problem.fits(evaluate(problem, plan)[1]) else None


def _spliced(head: Sequence[int], tail: Sequence[int], u: int, v: int) -> dict[int, int]:
    """The states of two nodes when the cut is between them."""
    return {u: head[u], v: tail[v]} if u < v else {u: tail[u], v: head[v]}


def _parts(problem: SearchProblem, left: Sequence[int], right: Sequence[int]) -> list[list[int]]:
    """Connected parts of the nodes in which two plans differ, by their lowest node."""
    root = list(range(len(problem.nodes)))

    def find(node: int) -> int:
        while root[node] != node:
            root[node] = root[root[node]]
            node = root[node]
        return node

    for edge in problem.edges:
        if left[edge.u] != right[edge.u] and left[edge.v] != right[edge.v]:
            a, b = sorted((find(edge.u), find(edge.v)))
            root[b] = a
    parts: dict[int, list[int]] = {}
    for node, (a, b) in enumerate(zip(left, right, strict=True)):
        if a != b:
            parts.setdefault(find(node), []).append(node)
    return list(parts.values())
