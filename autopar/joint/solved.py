"""What was found out of the problems of a point: small answers, which hold whoever found them, in place of tables that are made where another is asked."""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from autopar.joint.bounds import Parts
from autopar.joint.envelope import Vertex
from autopar.joint.figures import Figures
from autopar.joint.relaxed import Relaxed
from autopar.planner.blocks import Order

T = TypeVar("T")


class Answers(dict[Hashable, Any]):
    """By question. Each depends on its question alone, so it does not matter when, in which order or in which process they were found."""

    def of(self, question: Hashable, find: Callable[[], T]) -> T:
        if question not in self:
            self[question] = find()
        return self[question]  # type: ignore[no-any-return]


@dataclass
class Bounded:
    """What is known of shardings, by what they choose. A cache, not a value. `orders`: each with what it takes at least, whatever memory there is, the fastest first;
    `least`: by limit what plans take at least, and up to what that was looked for."""

    orders: dict[tuple[int, ...], list[tuple[float, Order]]] = field(default_factory=dict)
    least: dict[tuple[int, ...], dict[float, tuple[float, float]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Solved:
    """One form of a `relaxed` problem, which is made where it is asked something new; `leaner`: see there. `about`: which of the point's problems it is."""

    about: Hashable
    relaxed: Callable[[], Relaxed]
    depth: int
    num_ranks: int
    answers: Answers
    leaner: "Solved | None" = None

    def _asked(self, find: Callable[[Relaxed], T], *question: Hashable) -> T:
        return self.answers.of((self.about, *question), lambda: find(self.relaxed()))

    @property
    def forms(self) -> "tuple[Solved, ...]":
        return (self,) if self.leaner is None else (self, self.leaner)

    @property
    def parts(self) -> Parts:
        """Seconds of a block, and of what is before and behind the run, each at its least."""
        return Parts(self.at(0.0, 0.0).bound_s / self.depth, *self._asked(Relaxed.ends, "ends"))

    def at(self, state_price: float, kept_price: float) -> Vertex:
        return self._asked(lambda relaxed: relaxed.at(state_price, kept_price), "at", state_price, kept_price)

    @property
    def least_bytes(self) -> tuple[float, float]:
        return self._asked(lambda relaxed: relaxed.least_bytes, "least bytes")

    @property
    def end_bytes(self) -> tuple[float, float]:
        """What is before and behind the run holds at least, of one microbatch, in any form."""
        first, last = zip(*(form._asked(Relaxed.end_bytes, "end bytes") for form in self.forms))
        return min(first), min(last)

    def parts_of(self, choices: tuple[int, ...]) -> Parts:
        """The same as `parts` of one sharding."""
        return self._asked(lambda relaxed: relaxed.parts_of(choices), "parts of", choices)

    def figures(self, choices: tuple[int, ...]) -> Figures:
        return self._asked(lambda relaxed: relaxed.figures(choices), "figures", choices)

    def bytes_at(self, state_price: float, kept_price: float) -> Mapping[int, float]:
        return self._asked(lambda relaxed: relaxed.bytes_at(state_price, kept_price), "bytes at", state_price, kept_price)
