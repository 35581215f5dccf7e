"""Fitting sums of known counts at unknown prices to measured seconds: relative least squares, no price below zero, with its R^2."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

ROUNDS = 8
"""How often prices and the counts that depend on them are found in turn."""

STEP = 1e-3
"""How far a price is moved to see its count, as a share of it."""


EXACT = 1e-12
"""Squared error of a logarithm: of one measurement alone all or nothing is explained."""


@dataclass(frozen=True)
class Fit:
    """`prices`: seconds per unit of each count. `r2`: the share of the variance of the logarithm of the seconds that it explains."""

    prices: tuple[float, ...]
    r2: float
    num_points: int

    def __str__(self) -> str:
        return f"{self.num_points} points, R^2 {self.r2:.3f}"


def linear(counts: Sequence[Sequence[float]], seconds: Sequence[float], known: Sequence[float] | None = None) -> Fit:
    """Prices p >= 0 for which counts @ p, and `known` seconds beside it, is near `seconds`, each error taken relative to its own seconds.

    Every price is tried as zero where the best solution makes it negative: the counts are few, so all such choices are looked at. Of counts that only
    come together one has the price of all.
    """
    measured = np.asarray(seconds, dtype=float)
    beside = np.zeros(len(measured)) if known is None else np.asarray(known, dtype=float)
    table, left = np.asarray(counts, dtype=float) / measured[:, None], 1 - beside / measured
    best, best_error = np.zeros(table.shape[1]), float((left**2).sum())
    for mask in range(1, 2 ** table.shape[1]):
        chosen = [c for c in range(table.shape[1]) if mask >> c & 1]
        scale = np.abs(table[:, chosen]).max(axis=0)
        if not scale.all():
            continue
        found, _, rank, _ = np.linalg.lstsq(table[:, chosen] / scale, left, rcond=None)
        if rank < len(chosen):
            continue
        found = found / scale
        error = float(((table[:, chosen] @ found - left) ** 2).sum())
        if (found >= 0).all() and error < best_error:
            best, best_error = np.zeros(table.shape[1]), error
            best[chosen] = found
    return Fit(tuple(best.tolist()), r_squared(beside + np.asarray(counts, dtype=float) @ best, measured), len(measured))


def in_turn(price: Callable[[tuple[float, ...]], Sequence[float]], seconds: Sequence[float], start: tuple[float, ...]) -> Fit:
    """The same where the counts depend on the prices (a roofline: which ceiling an operator is under). `price`: seconds of every row at such prices,
    piecewise linear in them; the counts are its slopes, and what no price explains is known."""
    fit = Fit(start, 0.0, len(seconds))
    for _ in range(ROUNDS):
        here = np.asarray(price(fit.prices), dtype=float)
        steps = [max(abs(p) * STEP, s * STEP**2) for p, s in zip(fit.prices, start)]
        counts = np.stack([(np.asarray(price((*fit.prices[:n], fit.prices[n] + step, *fit.prices[n + 1 :]))) - here) / step for n, step in enumerate(steps)], axis=1)
        fit = linear(counts, seconds, here - counts @ np.asarray(fit.prices))
    return fit


def r_squared(predicted: np.ndarray, measured: np.ndarray) -> float:
    """Of the logarithms: seconds range over orders of magnitude, and the small ones count as well."""
    there, wanted = np.log(np.maximum(predicted, 1e-12)), np.log(measured)
    spread = float(((wanted - wanted.mean()) ** 2).sum())
    left = float(((there - wanted) ** 2).sum())
    return 1.0 - left / spread if spread else float(left < EXACT)
