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
    (price, seconds), *more = lines
    prices, highest, bytes_between = [price], [seconds], list[float]()
    for price, seconds in sorted(more):
        held = (seconds - highest[-1]) / max(price - prices[-1], 1e-300)
        while bytes_between and bytes_between[-1] <= held:
            del prices[-1], highest[-1], bytes_between[-1]
            held = (seconds - highest[-1]) / max(price - prices[-1], 1e-300)
        if price > prices[-1] and seconds > highest[-1]:
            prices.append(price)
            highest.append(seconds)
            bytes_between.append(held)
    found = [(seconds - price * held - fastest_s, held) for price, seconds, held in zip(prices, highest, bytes_between)]
    return [*found, (highest[-1] - fastest_s, 0.0)]


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
        best, of_best, taken_s = -1.0, None, np.zeros(self.weights.shape[1:])
        for n in range(1, ROUNDS + 1):
            bound, prices, paid, taken = self._bound_s(cut, shares)
            if bound > best:
                best, of_best = bound, (shares, prices, paid)
            taken_s += taken
            if best >= enough_s or best > HOPELESS * chains_s.max() or self._chains_s(cut, taken_s / n).max() <= best * (1 + NEAR):
                break
            found = self._chains_s(cut, taken)
            shares = shares * np.exp((found - found.max()) * (PACE / np.sqrt(n) / max(found.max() - bound, 1e-12 * best)))
            shares /= shares.sum()
        return best, chains_s if of_best is None else self._of_all_s(*of_best)

    @cached_property
    def _ways(self) -> np.ndarray:
        """[chain, stage of all]"""
        return self.weights.reshape(len(self.weights), -1)

    @cached_property
    def _corners(self) -> np.ndarray:
        """[2, corner, rank, stage]: seconds and bytes, in an order in which the least over corners is found soonest."""
        return np.ascontiguousarray(self.fronts.transpose(3, 2, 0, 1))

    @cached_property
    def _places(self) -> tuple[np.ndarray, np.ndarray]:
        """Every rank, and every stage of one."""
        return np.arange(self.weights.shape[1])[:, None], np.arange(self.weights.shape[2])

    @cached_property
    def _prices(self) -> np.ndarray:
        """[rank, stage, corner]: at which it costs as much as the next one."""
        more, fewer = np.diff(self.fronts[..., 0]), -np.diff(self.fronts[..., 1])
        return np.divide(more, fewer, out=np.zeros_like(more), where=fewer > 0)

    def _chains_s(self, cut: int, longer_s: np.ndarray) -> np.ndarray:
        """Where blocks of stages take so much longer."""
        return self.chains_s[cut] + (self._ways @ (longer_s * self.blocks[cut]).reshape(-1, 1))[:, 0]

    def _of_all_s(self, shares: np.ndarray, prices: np.ndarray, paid: np.ndarray) -> np.ndarray:
        """By cut: a bound at shares of chains and prices of the bytes of every rank, where blocks of stages pay so much."""
        return self.chains_s @ shares + (self.blocks.reshape(len(self.blocks), -1) @ paid.reshape(-1, 1))[:, 0] - prices @ self.room_bytes

    def _bound_s(self, cut: int, shares: np.ndarray) -> tuple[float, np.ndarray, np.ndarray, np.ndarray]:
        """With the best prices, what blocks of every stage pay then, and how much longer those take that pay least."""
        longer, held = self._corners
        weights, blocks = (shares[None, :] @ self._ways).reshape(longer.shape[1:]), self.blocks[cut]
        seconds, prices = weights * longer, np.zeros((len(weights), 1 + self._prices[0].size))
        prices[:, 1:] = (weights[..., None] * self._prices).reshape(len(weights), -1)
        paid = (seconds[:, :, None] + prices[..., None] * held[:, :, None]).min(axis=0)  # [rank, price, stage]
        found = (paid * blocks[:, None]).sum(axis=2) - prices * self.room_bytes[:, None]
        ranks, best = self._places[0][:, 0], found.argmax(axis=1)
        chosen = prices[ranks, best]
        return float(self.chains_s[cut] @ shares + found[ranks, best].sum()), chosen, paid[ranks, best], self._taken_s(blocks, seconds, chosen[:, None])

    def _taken_s(self, blocks: np.ndarray, seconds: np.ndarray, prices: np.ndarray) -> np.ndarray:
        """[rank, stage]: of the corners that cost least just below and just above the prices as much of each as fits."""
        (longer, held), (ranks, stages) = self._corners, self._places
        fast, lean = ((seconds + prices * (1 + side) * held).argmin(axis=0) for side in (-1e-9, 1e-9))
        high, low = ((blocks * held[corner, ranks, stages]).sum(axis=1) for corner in (fast, lean))
        share = ((high - self.room_bytes) / np.maximum(high - low, 1.0)).clip(0.0, 1.0)[:, None]
        return (1 - share) * longer[fast, ranks, stages] + share * longer[lean, ranks, stages]
