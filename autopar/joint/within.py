"""What chains of passes take at least when every rank of a pipeline has only so much memory.

A block of a stage takes e seconds of a step beyond the fastest block there is, and holds h bytes; (e, h) lies above a convex line. A chain k takes at least
s_k + sum w_ks e_s over the blocks of all stages, and so do means of chains. With shares x_k of chains, that are 1 together, and a price p_r of the bytes of
every rank, no choice of blocks takes less than

    sum_k x_k s_k  +  sum_r ( sum_s min over corners of (sum_k x_k w_ks e + p_r h)  -  p_r room_r )

whatever x and p are. That is concave in x, and for given x the best price of a rank is one at which two corners of a stage cost the same: all are tried. Shares
grow where chains are long for the blocks that pay least (multiplicative weights, Freund and Schapire 1999).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

ROUNDS = 40
"""Of shares that are tried."""

PACE = 1.5
"""How fast shares grow at first."""

NEAR = 2e-4
"""Of the bound: how much more other shares could make of it."""

HOPELESS = 10.0
"""Times what the longest chain takes with all memory: no more is worth to be known."""

Corner = tuple[float, float]
"""Seconds beyond the fastest, and bytes."""


def corners(lines: Sequence[tuple[float, float]], fastest_s: float) -> list[Corner]:
    """Of what takes at least so many seconds with its bytes at such a price, the first at none; beyond `fastest_s`."""
    free, *more = lines
    upper = [free]
    for price, seconds in sorted(more):
        while len(upper) > 1 and _bytes(upper[-2], upper[-1]) <= _bytes(upper[-1], (price, seconds)):
            upper.pop()
        if price > upper[-1][0] and seconds > upper[-1][1]:
            upper.append((price, seconds))
    found = [(seconds - price * (held := _bytes((price, seconds), following)) - fastest_s, held) for (price, seconds), following in zip(upper, upper[1:])]
    return [*found, (upper[-1][1] - fastest_s, 0.0)]


def _bytes(line: tuple[float, float], following: tuple[float, float]) -> float:
    """Where two lines meet."""
    return (following[1] - line[1]) / max(following[0] - line[0], 1e-300)


@dataclass(frozen=True, eq=False)
class Within:
    """`chains_s`: [cut, chain], with all blocks at their fastest. `blocks`: [cut, rank, stage]. `weights`: [chain, rank, stage], of what a block takes longer.
    `fronts`: [rank, stage, corner, 2]; `room_bytes`: by rank."""

    chains_s: np.ndarray
    blocks: np.ndarray
    weights: np.ndarray
    fronts: np.ndarray
    room_bytes: np.ndarray

    def highest(self, cut: int, enough_s: float = np.inf) -> tuple[float, np.ndarray]:
        """The highest bound that was found for a cut, none above `enough_s`; and what the same shares and prices make of all cuts."""
        chains_s, shares = self.chains_s[cut], np.full(len(self.weights), 1.0 / len(self.weights))
        best, of_all, paid = -1.0, chains_s, np.zeros(self.weights.shape[1:])
        for n in range(1, ROUNDS + 1):
            bound, prices, taken = self._bound_s(cut, shares)
            if bound > best:
                best, of_all = bound, self._of_all_s(shares, prices)
            paid += taken
            if best >= enough_s or best > HOPELESS * chains_s.max() or self._chains_s(cut, paid / n).max() <= best * (1 + NEAR):
                break
            found = self._chains_s(cut, taken)
            shares = shares * np.exp((found - found.max()) * (PACE / np.sqrt(n) / max(found.max() - bound, 1e-12 * best)))
            shares /= shares.sum()
        return best, of_all

    def _chains_s(self, cut: int, longer_s: np.ndarray) -> np.ndarray:
        """Where blocks of stages take so much longer."""
        return self.chains_s[cut] + np.tensordot(self.weights, longer_s * self.blocks[cut], axes=2)

    @cached_property
    def _prices(self) -> np.ndarray:
        """[rank, stage, corner]: at which it costs as much as the next one."""
        more, fewer = np.diff(self.fronts[..., 0]), -np.diff(self.fronts[..., 1])
        return np.divide(more, fewer, out=np.zeros_like(more), where=fewer > 0)

    def _of_all_s(self, shares: np.ndarray, prices: np.ndarray) -> np.ndarray:
        """By cut: a bound at shares of chains and prices of the bytes of every rank."""
        seconds = np.tensordot(shares, self.weights, axes=1)[..., None] * self.fronts[..., 0]
        paid = (seconds + prices[:, None, None] * self.fronts[..., 1]).min(axis=2)
        return self.chains_s @ shares + np.tensordot(self.blocks, paid, axes=2) - prices @ self.room_bytes

    def _bound_s(self, cut: int, shares: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        """With the best prices, and how much longer blocks of every stage take that pay least then."""
        weights = np.tensordot(shares, self.weights, axes=1)[..., None]
        seconds, blocks = weights * self.fronts[..., 0], self.blocks[cut]
        prices = np.concatenate([np.zeros((len(weights), 1)), (weights * self._prices).reshape(len(weights), -1)], axis=1)
        paid = (seconds[:, None] + prices[..., None, None] * self.fronts[:, None, ..., 1]).min(axis=3)
        found = (paid * blocks[:, None]).sum(axis=2) - prices * self.room_bytes[:, None]
        ranks, best = np.arange(len(found)), found.argmax(axis=1)
        chosen = prices[ranks, best]
        return float(self.chains_s[cut] @ shares + found[ranks, best].sum()), chosen, self._taken_s(blocks, seconds, chosen[:, None, None])

    def _taken_s(self, blocks: np.ndarray, seconds: np.ndarray, prices: np.ndarray) -> np.ndarray:
        """[rank, stage]: of the corners that cost least just below and just above the prices as much of each as fits."""
        chosen = [(seconds + prices * (1 + side) * self.fronts[..., 1]).argmin(axis=2)[..., None, None] for side in (-1e-9, 1e-9)]
        fast, lean = (np.take_along_axis(self.fronts, corner, axis=2)[:, :, 0] for corner in chosen)
        high, low = ((blocks * held[..., 1]).sum(axis=1) for held in (fast, lean))
        share = np.clip((high - self.room_bytes) / np.maximum(high - low, 1.0), 0.0, 1.0)[:, None]
        return (1 - share) * fast[..., 0] + share * lean[..., 0]
