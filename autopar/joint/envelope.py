"""What a block costs at any two prices of bytes, from few exact minima.

    g(a, b) = min over all that blocks may choose of  seconds + a * state bytes + b * bytes that a microbatch in flight keeps

is concave, and so is every plan's plane above it: the least of the plans that are known is no less than g. From below: whatever plan there is, with its three
figures x = (seconds, state, kept) >= 0, obeys x_1 + a x_2 + b x_3 >= g(a, b) for every pair of prices at which g is known. The least of a price over all such x is at
a corner of that polyhedron, and no more than g. So questions between known prices are answered by corners. The best price of a limit is looked for among the plans
(Kelley's cutting planes, 1960) and what is near to them (`near.py`): where they and the corners differ by too much at that price, one more exact minimum is asked for.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from typing import NamedTuple, Protocol

import numpy as np

from autopar.errors import InfeasibleError
from autopar.joint.near import Figure, Near

LEAN = 1e4
"""A price of all bytes, in the seconds of the fastest plan, at which hardly anything but bytes counts."""

ROUNDING = 1e-9

MOST = 60
"""Exact minima that one question takes at most."""


class Vertex(NamedTuple):
    """An exact minimum: no plan costs less than `bound_s` at the prices asked for; what the cheapest takes and holds, and what is `near` to it."""

    bound_s: float
    seconds: float
    state_bytes: float
    kept_bytes: float
    near: Near | None = None

    @property
    def figures(self) -> Figure:
        return self.seconds, self.state_bytes, self.kept_bytes


class Form(Protocol):
    """Something with exact minima. `least_bytes`: of state, and kept, that no plan is under."""

    @property
    def least_bytes(self) -> tuple[float, float]: ...

    def at(self, state_price: float, kept_price: float) -> Vertex: ...


@dataclass
class Corners:
    """Of the polyhedron of all x that no known minimum of one form rules out, in units of its fastest plan."""

    form: Form
    units: np.ndarray
    faces: np.ndarray = field(default_factory=lambda: np.eye(3))
    least: np.ndarray = field(init=False)
    """Of each face."""
    points: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.least = np.array([0.0, *self.form.least_bytes]) / self.units
        self.points = self.least[None, :]

    def __getstate__(self) -> dict[str, object]:
        """A form stays where it is; see `Envelope.of`."""
        return {name: value for name, value in vars(self).items() if name != "form"}

    def low(self, state_price: float, kept_price: float) -> float:
        return float((self.points @ (np.array([1.0, state_price, kept_price]) * self.units)).min()) * (1 - ROUNDING)

    def add(self, state_price: float, kept_price: float, bound_s: float) -> None:
        """No plan costs less than `bound_s` at these prices."""
        face = np.array([1.0, state_price, kept_price]) * self.units
        scale = face.sum()
        face, bound = face / scale, bound_s / scale
        kept = self.points @ face >= bound * (1 - ROUNDING)
        if kept.all():
            return
        pairs = np.array(list(combinations(range(len(self.faces)), 2)))
        systems = np.stack([self.faces[pairs[:, 0]], self.faces[pairs[:, 1]], np.broadcast_to(face, (len(pairs), 3))], axis=1)
        sides = np.stack([self.least[pairs[:, 0]], self.least[pairs[:, 1]], np.full(len(pairs), bound)], axis=1)
        solvable = np.abs(np.linalg.det(systems)) > ROUNDING**1.5
        met = np.linalg.solve(systems[solvable], sides[solvable][:, :, None])[:, :, 0]
        inside = (met @ self.faces.T >= self.least - ROUNDING * np.maximum(1.0, np.abs(self.least))).all(axis=1)
        self.points = np.concatenate([self.points[kept], met[inside].clip(min=0.0)])
        self.faces, self.least = np.vstack([self.faces, face]), np.append(self.least, bound)


class Envelope:
    """Of several forms of one problem, any of which a plan may have: none is faster than the first, none leaner than the last."""

    def __init__(self, forms: Sequence[Form], tolerance: float) -> None:
        """`tolerance`: how much less than the least an answer may be at a best price, as a share of the fastest plan's seconds."""
        self._forms, self._tolerance = forms, tolerance
        fastest = forms[0].at(0.0, 0.0)
        self.fastest_s = fastest.bound_s
        self._plans, self._near = np.array([fastest.figures]), [near for near in (fastest.near,) if near is not None]

    @cached_property
    def _corners(self) -> list[Corners]:
        """Of every form; who asks for no more than the fastest needs none."""
        _, state_bytes, kept_bytes = self._plans[0].tolist()
        corners = [Corners(form, np.array([self.fastest_s, max(state_bytes, 1.0), max(kept_bytes, 1.0)])) for form in self._forms]
        for each in corners:
            each.add(0.0, 0.0, self.fastest_s)
        return corners

    def __getstate__(self) -> dict[str, object]:
        """Forms stay where they are; see `of`."""
        return {name: value for name, value in vars(self).items() if name != "_forms"}

    def of(self, forms: Sequence[Form]) -> "Envelope":
        """What another process knows of the same forms, which it could not send along."""
        self._forms = forms
        for corners, form in zip(vars(self).get("_corners", ()), forms):
            corners.form = form
        return self

    def low(self, state_price: float, kept_price: float) -> float:
        """No plan costs less, by what is known."""
        return min(corners.low(state_price, kept_price) for corners in self._corners)

    def look(self, state_price: float, kept_price: float) -> None:
        """So that what is known there is as near to the least as the tolerance says."""
        for _ in range(MOST):
            if self._known(state_price, kept_price):
                break

    def best_price(self, flight: float, total_bytes: float) -> float:
        """At which the bound on all blocks is the highest, with so many microbatches in flight and so many bytes for all. Raises InfeasibleError where even the
        leanest plan holds more."""
        lean = LEAN * self.fastest_s / max(total_bytes, 1.0)
        if not self._fits(flight, total_bytes) and not (self._nearer(lean, lean * flight) and self._fits(flight, total_bytes)):
            self._ask(self._corners[-1], lean, lean * flight)
            if not self._fits(flight, total_bytes):
                raise InfeasibleError(f"no plan of the blocks holds less than {self._held(flight).min():.0f} bytes")
        for _ in range(MOST):
            price = _highest(self._plans[:, 0], self._held(flight), total_bytes)
            if price == 0.0 or not self._nearer(price, price * flight) and self._known(price, price * flight):
                break
        return price

    def _fits(self, flight: float, total_bytes: float) -> bool:
        return bool((self._held(flight) <= total_bytes).any())

    def _nearer(self, state_price: float, kept_price: float) -> bool:
        """Whether a plan near to those that were found is cheaper than they are: then it is one of them."""
        face = np.array([1.0, state_price, kept_price])
        near = min(self._near, key=lambda near: near.least(face), default=None)
        if near is None or near.least(face) >= (self._plans @ face).min() - self._tolerance / 2 * self.fastest_s:
            return False
        self._plans = np.vstack([self._plans, near.cheapest(face)])
        return True

    def _held(self, flight: float) -> np.ndarray:
        return self._plans[:, 1] + flight * self._plans[:, 2]

    def _known(self, state_price: float, kept_price: float) -> bool:
        """Whether plans and corners agree; if not, one more minimum is found."""
        high = float((self._plans @ np.array([1.0, state_price, kept_price])).min())
        lowest = min(self._corners, key=lambda corners: corners.low(state_price, kept_price))
        if high - lowest.low(state_price, kept_price) <= self._tolerance * self.fastest_s:
            return True
        self._ask(lowest, state_price, kept_price)
        return False

    def _ask(self, corners: Corners, state_price: float, kept_price: float) -> None:
        vertex = corners.form.at(state_price, kept_price)
        corners.add(state_price, kept_price, vertex.bound_s)
        self._plans = np.vstack([self._plans, vertex.figures])
        if vertex.near is not None:
            self._near.append(vertex.near)


def _highest(seconds: np.ndarray, held: np.ndarray, total_bytes: float) -> float:
    """The price p >= 0 at which the least of seconds + p * (held - total) is the highest; some plan holds no more than that. It is that at which two plans cost the
    same, to the last bit whatever the total is."""
    over = held - total_bytes
    first = int(np.lexsort((held, seconds))[0])
    if over[first] <= 0:
        return 0.0
    within = min(np.flatnonzero(over <= 0), key=lambda i: (held[i], seconds[i]))
    while True:
        price = (seconds[within] - seconds[first]) / (held[first] - held[within])
        costs = seconds + price * over
        lowest = int(costs.argmin())
        if price <= 0 or costs[lowest] >= costs[within] - 1e-12 * abs(seconds[within]):
            return max(0.0, float(price))
        first, within = (first, lowest) if over[lowest] <= 0 else (lowest, within)
