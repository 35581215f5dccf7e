"""A bound by cases, as all blocks of a plan are sharded alike, and computed again in two modes at most.

Under a price of memory blocks may seem to be of several shardings and all modes at once, fast ones that hold much and lean ones, so that on the whole they just fit.
No plan is: so there is a case for every pair of modes, and in each the shardings are told apart by those nodes of the folded problem of which they hold the most
different bytes. Each part has a bound of its own. The least of all parts is one on every plan; the part with the least is parted again (Land and Doig 1960).
"""

import heapq
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations

import numpy as np

from autopar.errors import InfeasibleError
from autopar.joint.at_point import TOLERANCE, PointSearch
from autopar.joint.bounds import counted
from autopar.joint.envelope import Envelope
from autopar.joint.priced import Care, Priced
from autopar.joint.relaxed import Allowed
from autopar.joint.solved import Solved
from autopar.joint.tables import ROUGH

MOST = 24
"""Parts of a point that are looked at."""

ASIDE, CLOSE = 1.25, 1.01
"""Times and parts of a price that binds at which is looked for what blocks mix: what is the cheapest there, and costs so many times the least at most at the price itself. No bound rests
on them. Of Llama-3.1-405B on 2,048 nodes, 1.05 aside ends at a gap of 1.10 %, 1.25 at 0.93 % (`examples/benchmark_joint.py`)."""

CARES = Care.ROUGH, Care.NEAR, Care.CLOSE
"""A part is looked at with more and more of it."""

SHARE = 0.1
"""Of the bytes in which a node's states differ most: where it is less, nodes are not told apart."""

LITTLE = 1 + 1e-4
"""Times the bound of what is parted: where no part has more, memory is not what blocks mix for."""


@dataclass(frozen=True, order=True)
class Case:
    """The plans of a point whose nodes are in these of their states; `bound_s`: none of them takes less."""

    bound_s: float
    states: Allowed
    priced: dict[str, Priced] = field(default_factory=dict, compare=False)


Part = tuple[Allowed, float, float, tuple[Care, ...]]
"""Of a case: its states, and what else `looked_at` goes by."""

Look = Callable[[Sequence[Part]], Iterable[Case]]
"""At several parts, one after the other, as long as they are asked for."""


def bound_by_cases(search: PointSearch, enough_s: float, goes_on: Callable[[], bool] = lambda: True, look: Look | None = None) -> float:
    """No plan of the point takes less. No higher bound is looked for than `enough_s`, and none when it no longer `goes_on`. `look`: elsewhere than here."""
    cases, looked = [Case(search.fitting_s(), (), search.priced)], 0
    if cases[0].bound_s < enough_s and goes_on():
        cases = by_modes(search, cases[0], enough_s, look)
    while cases[0].bound_s < enough_s and looked < MOST and goes_on():
        parts: list[Case] = []
        for part in (look or partial(_in_turn, search))([(states, cases[0].bound_s, enough_s, CARES) for states in _parts(search, cases[0])]):
            parts.append(part)
            if part.bound_s < cases[0].bound_s * LITTLE:
                return cases[0].bound_s
        if not parts:
            break
        heapq.heapreplace(cases, parts[0])
        for part in parts[1:]:
            heapq.heappush(cases, part)
        looked += len(parts)
    return cases[0].bound_s


def by_modes(search: PointSearch, whole: Case, enough_s: float, look: Look | None = None) -> list[Case]:
    """The plans of each two modes of recomputation, the least bound first; or all together, where more than one of these would have to be parted."""
    parts = [((node, pair),) for node, modes in search.tables.whole.modes.items() for pair in combinations(range(len(modes)), 2)]
    bounds = [case.bound_s for case in (look or partial(_in_turn, search))([(states, whole.bound_s, math.inf, (Care.ROUGH,)) for states in parts])]
    few = len(bounds) > 1 and sum(bound < enough_s for bound in bounds) <= 1
    return sorted(Case(bound, states, whole.priced) for bound, states in zip(bounds, parts)) if few else [whole]


def _in_turn(search: PointSearch, parts: Iterable[Part]) -> Iterator[Case]:
    return (looked_at(search, *part) for part in parts)


def looked_at(search: PointSearch, states: Allowed, least_s: float, enough_s: float, cares: Sequence[Care]) -> Case:
    """A part of a case that takes `least_s`: no less than that. It is looked at more and more closely until that is enough."""
    bound_s, rough, priced = least_s, dict[str, Priced](), dict[str, Priced]()
    for care in cares:
        if bound_s < enough_s:
            bound_s = max(bound_s, part_s(search, states, rough if care.is_rough else priced, care))
    return Case(bound_s, states, priced or rough)


def part_s(search: PointSearch, states: Allowed, found: dict[str, Priced], care: Care) -> float:
    """No plan whose nodes are in these states takes less; inf where even what holds least does not fit. `found`: what is looked at, by side."""

    def priced(side: str) -> Priced:
        if side not in found:
            solved = search.tables.case(side, states)
            found[side] = Priced(solved, Envelope(solved.forms, ROUGH if care.is_rough else TOLERANCE))
        return found[side]

    try:
        return search.within_s(priced, care)
    except InfeasibleError:
        return math.inf


def _parts(search: PointSearch, case: Case) -> Iterator[Allowed]:
    """Of a case, that which holds most first. By one node, as that often is enough and costs least; by all where modes are told apart and memory binds in spite of that."""
    found = parted(search, case)
    found = found if search.tables.whole.modes.keys() & dict(case.states).keys() else found[:1]
    yield from (much for _, much in found[-1:])
    yield from (little for little, _ in found)


def parted(search: PointSearch, case: Case) -> list[tuple[Allowed, Allowed]]:
    """Two parts of a case, two of the second of these, and so on: where one more node holds little, and where it holds much. Empty where what blocks mix differs in
    the bytes of no node."""
    params, nodes = search.tables.whole.params, search.tables.whole.folded.problem.nodes
    held, most = _held(case)
    left = {node: np.array(dict(case.states).get(node, range(nodes[node].num_states))) for node in held}
    lean = {node: min(found) for node, found in held.items()}
    if any(max(held[node]) > lean[node] for node in params & held.keys()):  # where some state is cut to save memory, other may be cut instead
        lean |= {node: float(nodes[node].memory_bytes[left[node]].min()) for node in params & held.keys()}
    apart = {node: (max(found) - lean[node]) * (1.0 if node in params else most) for node, found in held.items()}
    least = SHARE * max(apart.values(), default=0.0)
    parts, rest = [], dict(case.states)
    for node in sorted((n for n, more in apart.items() if more > least), key=lambda n: (-apart[n], n)):
        little = nodes[node].memory_bytes[left[node]] <= (max(held[node]) + lean[node]) / 2
        before, rest = rest, {**rest, node: tuple(left[node][~little].tolist())}
        parts.append((_allowed({**before, node: tuple(left[node][little].tolist())}), _allowed(rest)))
    return parts


def _allowed(states: Mapping[int, tuple[int, ...]]) -> Allowed:
    return tuple(sorted(states.items()))


def _held(case: Case) -> tuple[dict[int, set[float]], float]:
    """Bytes of each node in what blocks mix, and the most microbatches in flight that are counted."""
    held: dict[int, set[float]] = {}
    most = 1.0
    for priced in case.priced.values():
        for (flight, _), price in priced.prices.items():
            most = max(most, counted(flight))
            for chosen in _close(priced.solved, price, counted(flight)) if price else ():
                for node, num_bytes in chosen.items():
                    held.setdefault(node, set()).add(num_bytes)
    return held, most


def _close(solved: Solved, price: float, flight: float) -> Iterator[Mapping[int, float]]:
    """What the nodes of blocks hold that cost about as little as any at a price of a byte."""
    least = min(form.at(price, price * flight).bound_s for form in solved.forms)
    for near in (price / ASIDE, price, price * ASIDE):
        form = min(solved.forms, key=lambda form: form.at(near, near * flight).bound_s)
        found = form.at(near, near * flight)
        if found.seconds + price * (found.state_bytes + flight * found.kept_bytes) <= CLOSE * least:
            yield form.bytes_at(near, near * flight)
