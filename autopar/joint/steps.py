"""What a search does with a point, each of which may be done by a helper (`ahead`): what is sent of it then, and taken over.

All that later steps go by is sent, small as it is; tables, shardings and their programs stay where they are. So the search is where it would be had it done
the step itself, without tables of points that come to nothing.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Generic, NamedTuple, TypeVar

from autopar.joint.at_point import Found, PointSearch
from autopar.joint.cases import Case, looked_at
from autopar.joint.deep import Deep
from autopar.joint.envelope import Envelope
from autopar.joint.kinds import Depth
from autopar.joint.known import Told
from autopar.joint.priced import Care, Priced
from autopar.joint.solved import Solved
from autopar.planner.blocks import Order

T = TypeVar("T")


@dataclass(frozen=True)
class Step:
    """`here`: of a point and what else is `given`."""

    here: Callable[..., Any]

    def aside(self, search: PointSearch, *given: Any) -> Any:
        """The same in a helper: what is sent of it. None where it is to be done again, which is little with its answers."""
        self.here(search, *given)

    def bound_s(self, sent: Any) -> float:
        """On what follows at the same point; inf where nothing does."""
        return math.inf

    def taken(self, search: PointSearch, sent: Any) -> Any:
        """What it comes to."""
        raise NotImplementedError


@dataclass(frozen=True)
class Looked(Generic[T]):
    """What a step comes to, and where it leaves the search of its point."""

    result: T
    priced: "Mapping[str, Sent]"
    envelopes: Mapping[str, Envelope]
    least: dict[tuple[int, ...], dict[float, tuple[float, float]]]
    told: Told | None

    @classmethod
    def of(cls, search: PointSearch, result: T) -> "Looked[T]":
        return cls(result, sent(search.priced), search.tables.envelopes, search.least, search.told)

    def taken(self, search: PointSearch) -> T:
        side = search.tables.side
        search.priced, search.least = taken(self.priced, side), self.least
        search.tables.envelopes.update({name: envelope.of(side(name).forms) for name, envelope in self.envelopes.items()})
        if self.told is not None:
            search.tell(self.told)
        return self.result


class Bounding(Step):
    """For a bound, or what orders points."""

    def aside(self, search: PointSearch, *given: Any) -> Looked[float]:
        search.told = None
        return Looked.of(search, self.here(search, *given))

    def bound_s(self, sent: Looked[float]) -> float:
        return sent.result

    def taken(self, search: PointSearch, sent: Looked[float]) -> float:
        return sent.taken(search)


class Made(NamedTuple):
    """A plan, by what it takes to make it again from tables of its point."""

    choices: tuple[int, ...]
    light: str
    heavy: str
    order: Order
    depths: tuple[Depth, ...]
    late: bool
    limit_bytes: float

    @classmethod
    def of(cls, found: Found) -> "Made":
        choices, deep = found.search.tables.choices(found.sharding), found.deep
        assert choices is not None, "the sharding is of these tables"
        return cls(choices, deep.light.mode, deep.heavy.mode, deep.order, deep.depths, deep.late, found.limit_bytes)

    def found(self, search: PointSearch) -> Found:
        sharding = search.tables.sharding(self.choices)
        kinds = {kinds.mode: kinds for kinds in sharding.modes}
        return Found(search, sharding, Deep(kinds[self.light], kinds[self.heavy], self.order, self.depths, self.late), self.limit_bytes)


class Planning(Step):
    """For the best plan below some seconds of a step."""

    def aside(self, search: PointSearch, *given: Any) -> Looked[Made | None]:
        search.told, before, search.least = None, search.least, {choices: dict(least) for choices, least in search.least.items()}
        found = self.here(search, *given)
        looked = Looked.of(search, Made.of(found) if found is not None else None)
        search.least = before  # it may be asked again, below others
        return looked

    def taken(self, search: PointSearch, sent: Looked[Made | None]) -> Found | None:
        made = sent.taken(search)
        return made.found(search) if made is not None else None


class Parting(Step):
    """For a part of a case."""

    def aside(self, search: PointSearch, *given: Any) -> tuple[Case, "Mapping[str, Sent]"]:
        case = self.here(search, *given)
        return replace(case, priced={}), sent(case.priced)

    def taken(self, search: PointSearch, sent: "tuple[Case, Mapping[str, Sent]]") -> Case:
        case, priced = sent
        return replace(case, priced=taken(priced, lambda side: search.tables.case(side, case.states)))


class Sent(NamedTuple):
    """Of `Priced`."""

    envelope: Envelope
    prices: dict[tuple[float, float], float]


def sent(priced: Mapping[str, Priced]) -> dict[str, Sent]:
    return {side: Sent(found.envelope, found.prices) for side, found in priced.items()}


def taken(found: Mapping[str, Sent], solved: Callable[[str], Solved]) -> dict[str, Priced]:
    return {side: Priced(of_side := solved(side), envelope.of(of_side.forms), prices) for side, (envelope, prices) in found.items()}


LONG = 3
"""Steps from this place on wait for a helper that has nothing else to do, whoever has the tables of the point: these are made in less time."""

PROMISING, PLANNING, PARTING = 5, 6, 7
"""Places of steps that are no bounds: of what says which point is planned next, and of what follows that."""


def steps() -> tuple[Step, ...]:
    """Those of every point, one after the other, by level; then those of a few."""
    return (
        Bounding(PointSearch.fastest_s),
        *(Bounding(lambda search, care=care: search.rough_s(care)) for care in (Care.ONE, Care.ROUGH)),
        *(Bounding(lambda search, care=care: search.fitting_s(care)) for care in (Care.NEAR, Care.CLOSE)),
        Bounding(lambda search: search.promised_s(search.joint.limit_bytes)),
        Planning(lambda search, below_s: search.plan(search.joint.limit_bytes, below_s)),
        Parting(looked_at),
    )
