"""Whether forecasts put the plans of one model on one cluster in the order in which they were measured, and how far that can go at all.

Kendall's tau of every setting with enough runs, weighted by its runs. Runs that are forecast alike, of one plan most of all, tie and count for neither
side; between two plans that were each run several times no forecast can agree with all pairs of runs where the two overlap. What is left when every
two plans are in the order that most of their runs want is the ceiling.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean, median

from autopar.forecast.price import Result

FEWEST_RANKED = 4
"""Plans of one model on one cluster from which on their order says something."""

NAMED = 3
"""Runs that are named, of those that are out of order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """Of one source. `ceiling`: the most that forecasts can reach; `repeats`: by how much runs of one plan differ, median of |log| over their pairs, None
    where nothing was run twice; `misplaced`: (run, share of all pairs in the wrong order that it is one of), the most first."""

    kendall: float
    ceiling: float
    repeats: float | None
    misplaced: tuple[tuple[str, float], ...]


def ranking(rows: Sequence[Result]) -> Ranking | None:
    """Of the runs of one source; None where no setting has enough of them, or all tie."""
    sets: dict[str, list[Result]] = defaultdict(list)
    for r in rows:
        sets[r.setting].append(r)
    ranked = [of_set for of_set in sets.values() if len(of_set) >= FEWEST_RANKED]
    known = [(tau, _ceiling(of_set), len(of_set)) for of_set in ranked if (tau := kendall([(r.predicted_s, _measured(r)) for r in of_set])) is not None]
    if not known:
        return None
    total, pairs = sum(n for *_, n in known), [pair for of_set in ranked for pair in combinations(of_set, 2)]
    repeats = [abs(math.log(_measured(a) / _measured(b))) for a, b in pairs if a.predicted_s == b.predicted_s]
    wrong = [pair for pair in pairs if _sign(*pair) < 0]
    blamed = Counter(r.id for pair in wrong for r in pair)
    return Ranking(
        kendall=sum(tau * n for tau, _, n in known) / total, ceiling=sum(most * n for _, most, n in known) / total,
        repeats=median(repeats) if repeats else None,
        misplaced=tuple((name, count / len(wrong)) for name, count in blamed.most_common(NAMED)),
    )  # fmt: skip


def kendall(pairs: Sequence[tuple[float, float]]) -> float | None:
    """(concordant - discordant) / (concordant + discordant) pairs of pairs; ties of either count for neither, None where all tie."""
    signs = [(a - c) * (b - d) for (a, b), (c, d) in combinations(pairs, 2)]
    decided = [sign > 0 for sign in signs if sign]
    return 2 * fmean(decided) - 1 if decided else None


def _ceiling(rows: Sequence[Result]) -> float:
    """Every two plans in the order that most of their runs want."""
    votes: dict[tuple[float, float], int] = defaultdict(int)
    decided = 0
    for a, b in combinations(rows, 2):
        low, high = sorted((a, b), key=lambda r: r.predicted_s)
        if _sign(a, b):
            votes[low.predicted_s, high.predicted_s] += 1 if _measured(low) < _measured(high) else -1
            decided += 1
    return sum(map(abs, votes.values())) / decided


def _sign(a: Result, b: Result) -> float:
    """Above 0 where both runs are in the order of their forecasts, below where not, 0 where either ties."""
    return (a.predicted_s - b.predicted_s) * (_measured(a) - _measured(b))


def _measured(r: Result) -> float:
    return r.measured_s or 0.0
