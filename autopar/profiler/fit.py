"""Fitting sums of known counts at unknown prices to measured seconds: relative least squares, no price below zero, with its R^2."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

ROUNDS = 8
"""How often prices and the counts that depend on them are found in turn."""


@dataclass(frozen=True)
class Fit:
    """`prices`: seconds per unit of each count. `r2`: the share of the variance of the logarithm of the seconds that it explains."""

    prices: tuple[float, ...]
    r2: float
    num_points: int

    def __str__(self) -> str:
        return f"{self.num_points} points, R^2 {self.r2:.3f}"


def linear(counts: Sequence[Sequence[float]], seconds: Sequence[float]) -> Fit:
    """Prices p >= 0 for which counts @ p is near `seconds`, each error taken relative to its own seconds.

    Every price is tried as zero where the best solution makes it negative: the counts are few, so all such choices are looked at.
    """
    measured = np.asarray(seconds, dtype=float)
    table = np.asarray(counts, dtype=float) / measured[:, None]
    best, best_error = np.zeros(table.shape[1]), float(len(measured))
    for mask in range(1, 2 ** table.shape[1]):
        chosen = [c for c in range(table.shape[1]) if mask >> c & 1]
        scale = np.abs(table[:, chosen]).max(axis=0)
        if not scale.all():
            continue
        found = np.linalg.lstsq(table[:, chosen] / scale, np.ones(len(measured)), rcond=None)[0] / scale
        error = float(((table[:, chosen] @ found - 1) ** 2).sum())
        if (found >= 0).all() and error < best_error:
            best, best_error = np.zeros(table.shape[1]), error
            best[chosen] = found
    return Fit(tuple(best.tolist()), r_squared(np.asarray(counts, dtype=float) @ best, measured), len(measured))


def in_turn(counts: Callable[[tuple[float, ...]], Sequence[Sequence[float]]], seconds: Sequence[float], start: tuple[float, ...]) -> Fit:
    """The same where the counts depend on the prices (a roofline: which ceiling an operator is under)."""
    fit = Fit(start, 0.0, len(seconds))
    for _ in range(ROUNDS):
        fit = linear(counts(fit.prices), seconds)
    return fit


def r_squared(predicted: np.ndarray, measured: np.ndarray) -> float:
    """Of the logarithms: seconds range over orders of magnitude, and the small ones count as well."""
    there, wanted = np.log(np.maximum(predicted, 1e-12)), np.log(measured)
    spread = float(((wanted - wanted.mean()) ** 2).sum())
    return 1.0 - float(((there - wanted) ** 2).sum()) / spread if spread else 0.0
