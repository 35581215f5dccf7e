"""A bound by cases, as all blocks of a plan are sharded alike.

Under a price of memory blocks may seem to be of several shardings at once, fast ones that hold much and lean ones, so that on the whole they just fit. No plan is:
so the shardings are told apart by that node of the folded problem of which those hold the most different bytes, and each part has a bound of its own. The least of
all parts is one on every plan; the part with the least is parted again (Land and Doig 1960).
"""

import heapq
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from autopar.errors import InfeasibleError
from autopar.joint.at_point import TOLERANCE, PointSearch
from autopar.joint.bounds import counted
from autopar.joint.envelope import Envelope
from autopar.joint.priced import Priced
from autopar.joint.relaxed import Allowed
from autopar.joint.solved import Solved

MOST = 24
"""Parts of a point that are looked at."""

ASIDE, CLOSE = 1.25, 1.01
"""Times and parts of a price that binds at which is looked for what blocks mix: what is the cheapest there, and costs so many times the least at most at the price itself. No bound rests
on them. Of Llama-3.1-405B on 2,048 nodes, 1.05 aside ends at a gap of 1.10 %, 1.25 at 0.93 % (`examples/benchmark_joint.py`)."""

LITTLE = 1 + 1e-4
"""Times the bound of what is parted: where no part has more, memory is not what blocks mix for."""


@dataclass(frozen=True, order=True)
class Case:
    """The shardings of a point whose nodes are in these of their states; `bound_s`: no plan of them takes less."""

    bound_s: float
    states: Allowed
    priced: dict[str, Priced] = field(default_factory=dict, compare=False)


def bound_by_cases(search: PointSearch, enough_s: float, goes_on: Callable[[], bool] = lambda: True) -> float:
    """No plan of the point takes less. No higher bound is looked for than `enough_s`, and none when it no longer `goes_on`."""
    cases, looked = [Case(search.fitting_s(), (), search.priced)], 0
    while cases[0].bound_s < enough_s and looked < MOST and goes_on():
        parts = [_looked_at(search, cases[0], states) for states in parted(search, cases[0])]
        if not parts or min(parts).bound_s < cases[0].bound_s * LITTLE:
            break
        heapq.heapreplace(cases, parts[0])
        for part in parts[1:]:
            heapq.heappush(cases, part)
        looked += len(parts)
    return cases[0].bound_s


def _looked_at(search: PointSearch, case: Case, states: Allowed) -> Case:
    """A part of a case: no less than that."""
    found: dict[str, Priced] = {}

    def priced(side: str) -> Priced:
        if side not in found:
            solved = search.tables.case(side, states)
            found[side] = Priced(solved, Envelope(solved.forms, TOLERANCE))
        return found[side]

    try:
        least = search.case_s(priced)
    except InfeasibleError:
        least = float("inf")
    return Case(max(case.bound_s, least), states, found)


def parted(search: PointSearch, case: Case) -> tuple[Allowed, ...]:
    """Two parts of a case; none where what blocks mix differs in the bytes of no node."""
    held: dict[int, set[float]] = {}
    most = 1.0
    for priced in case.priced.values():
        for (flight, _), price in priced.prices.items():
            most = max(most, counted(flight))
            for chosen in _close(priced.solved, price, counted(flight)) if price else ():
                for node, num_bytes in chosen.items():
                    held.setdefault(node, set()).add(num_bytes)
    params, nodes = search.tables.whole.params, search.tables.whole.folded.problem.nodes
    apart = {node: (max(found) - min(found)) * (1.0 if node in params else most) for node, found in held.items()}
    node = max(apart, key=lambda n: (apart[n], -n), default=None)
    if node is None or not apart[node]:
        return ()
    states = dict(case.states)
    left = np.array(states.get(node, range(nodes[node].num_states)))
    lean = nodes[node].memory_bytes[left] <= (max(held[node]) + min(held[node])) / 2
    return tuple(tuple(sorted((states | {node: tuple(left[part].tolist())}).items())) for part in (lean, ~lean))


def _close(solved: Solved, price: float, flight: float) -> Iterator[Mapping[int, float]]:
    """What the nodes of blocks hold that cost about as little as any at a price of a byte."""
    least = min(form.at(price, price * flight).bound_s for form in solved.forms)
    for near in (price / ASIDE, price, price * ASIDE):
        form = min(solved.forms, key=lambda form: form.at(near, near * flight).bound_s)
        found = form.at(near, near * flight)
        if found.seconds + price * (found.state_bytes + flight * found.kept_bytes) <= CLOSE * least:
            yield form.bytes_at(near, near * flight)
