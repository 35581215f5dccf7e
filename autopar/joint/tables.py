"""What a point's plans may do and what that costs, whatever the limit of memory: the folded problem, its bounds, and the programs of its shardings."""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache, cached_property, partial

import numpy as np

from autopar.core.layout import Layout
from autopar.core.problem import SearchProblem
from autopar.core.residency import GATHER, gathers_again
from autopar.core.unroll import Run
from autopar.errors import InfeasibleError
from autopar.joint.asked import AGAIN, FEW, GATHERED, KEPT, Asked
from autopar.joint.bounds import Parts
from autopar.joint.deep import Deep, Sharding
from autopar.joint.ends import fullest_bytes
from autopar.joint.envelope import Envelope
from autopar.joint.fold import Fold, places, sides, times
from autopar.joint.relaxed import Allowed, Relaxed, in_states, passes_alone, with_gathers
from autopar.joint.solved import Answers, Solved
from autopar.joint.space import Point
from autopar.planner.decode import decode
from autopar.planner.keeping import Keeping
from autopar.planner.lengths import Task
from autopar.planner.liveness import Engine
from autopar.planner.pins import Pins
from autopar.planner.problem import Ports, ProblemBuilder
from autopar.planner.roles import Constraints
from autopar.planner.states import Pricing, States
from autopar.search.elimination import Prepared, prepare
from autopar.search.lagrange import Point as Bought
from autopar.search.simplify import BYTES, SECONDS, Price
from autopar.search.tables import Eliminated, TableStore

ROUGH = 1e-2
"""Of the seconds of the blocks: how much less a bound may be that only says which points are looked at."""

STANDING = 0.5
"""Of the state, where there is a single microbatch: gradients, which are no more than parameters, are made as activations go."""

MOST_PRICES = 40
"""That are looked at between two."""


@dataclass
class PointTables:
    """Of one point on one cluster. A cache, not a value."""

    point: Point
    run: Run
    task: Task
    pricing: Pricing
    keeping: Keeping
    pins: Pins
    answers: Answers = field(default_factory=Answers)
    """To all that a search asks but for programs."""
    _shardings: dict[tuple[int, ...], Sharding] = field(default_factory=dict)
    _last: tuple[tuple[float, float, str], Prepared, TableStore] | None = None

    @cached_property
    def built(self) -> tuple[SearchProblem, Ports]:
        constraints = Constraints(self.point.mesh, self.pins, strict=bool(self.pins.mesh_axes))
        return ProblemBuilder(self.task.graph, self.task.rules, self.task.batch, self.pricing, constraints, self.keeping).build(None)

    @property
    def are_built(self) -> bool:
        """So that another question costs little more than its answer."""
        return "built" in vars(self)

    @cached_property
    def whole(self) -> Relaxed:
        """All that a step costs."""
        return self._relaxed(self.built[0])

    @cached_property
    def passes(self) -> Relaxed:
        """Only what its passes cost."""
        problem, ports = self.built
        return self._relaxed(passes_alone(problem, ports.once_s))

    def side(self, side: str) -> Solved:
        """What is known of either."""
        if side not in self._sides:
            self._sides[side] = self._solved(side, (side,), lambda relaxed: relaxed)
        return self._sides[side]

    def case(self, side: str, states: Allowed) -> Solved:
        """The same where nodes of the folded problem may be in these of their states alone."""
        return self._solved(side, (side, states), lambda relaxed: relaxed.where(states))

    def _solved(self, side: str, about: tuple, made: Callable[[Relaxed], Relaxed]) -> Solved:
        found = None
        for form in reversed(range(len(self._forms))):
            found = Solved((*about, form), cache(lambda form=form: made(self._form(side, form))), self.run.depth, self.point.num_ranks, self.answers, found)
        assert found is not None
        return found

    @cached_property
    def _sides(self) -> dict[str, Solved]:
        return {}

    def _form(self, side: str, form: int) -> Relaxed:
        relaxed = self.whole if side == "whole" else self.passes
        return relaxed if form == 0 else relaxed.forms[form]

    def rough(self, side: str) -> Envelope:
        """What is known of the blocks, by whoever asks: an answer depends on what was asked before, within its tolerance."""
        if side not in self.envelopes:
            self.envelopes[side] = Envelope(self.side(side).forms, ROUGH)
        return self.envelopes[side]

    @cached_property
    def envelopes(self) -> dict[str, Envelope]:
        """See `rough`."""
        return {}

    @property
    def _forms(self) -> tuple[bool, ...]:
        """Whether blocks gather again what all-gathers bring, of all that they may do."""
        return tuple(sorted(set(map(gathers_again, self.keeping.programs))))

    @property
    def ways(self) -> tuple[str, ...]:
        """In which blocks may be computed again."""
        return (AGAIN,) if len(self._forms) == 1 else (AGAIN, GATHERED)

    @property
    def operators(self) -> Parts:
        """What every operator takes of a step at least, whatever the links do: those with collectives inside are left out."""
        return self.answers.of("operators", self._operators)

    def _operators(self) -> Parts:
        graph, rules, (problem, ports) = self.task.graph, self.task.rules, self.built
        place, side, found = places(self.run, graph), sides(self.run, graph), [0.0, 0.0, 0.0]
        for i, node in ports.op_node.items():
            if not rules[i].inner:
                found[side[i]] += times(self.run, place[i]) * float(problem.nodes[node].cost_s.min())
        return Parts(found[0] / self.run.depth, found[1], found[2])

    def end_bytes(self, solved: Solved) -> tuple[float, float]:
        """What is before and behind the run holds at least of one microbatch, that behind it also when it begins to be differentiated."""
        first, last = solved.end_bytes
        return first, max(last, self.answers.of("last bytes", self._last_bytes))

    def unseen_bytes(self, choices: tuple[int, ...], deep: Deep) -> float:
        """What the first rank of a plan of a sharding holds beside that, and what the linear model counts of its blocks."""
        whole = self.side("whole")
        return whole.figures(choices).beside_bytes(deep, 0) - sum(self.end_bytes(whole)[: 1 if deep.order.num_ranks > 1 else 2])

    def _last_bytes(self) -> float:
        whole, nodes = self.whole, self.whole.folded.problem.nodes
        state = sum([float(nodes[n].memory_bytes.min()) for n in whole.folded.nodes_of(2) if n in whole.params])
        return whole.standing * state + fullest_bytes(self.task.graph, self.task.rules, *self.built, self.run, self.point.mesh)

    @cached_property
    def _fold(self) -> Fold:
        return Fold(self.task.graph, self.run, self.built[1])

    @cached_property
    def _eliminated(self) -> Eliminated:
        return Eliminated()

    def _relaxed(self, problem: SearchProblem, form: int = 0) -> Relaxed:
        ports, again = self.built[1], self._forms[form]
        folded = self._fold.folded(with_gathers(problem, ports.gathers, again=again))
        params = frozenset(folded.node[n] for n in ports.param_node.values())
        modes = {folded.node[n]: tuple(_in_form(mode, again=again) for mode in ports.states[n].modes) for n in ports.block_node.values()}
        lean = partial(self._relaxed, problem, form + 1) if form + 1 < len(self._forms) else None
        return Relaxed(folded, params, self.run.depth, modes, lean, STANDING if self.point.num_microbatches == 1 else 1.0, self._eliminated)

    def sharding(self, choices: tuple[int, ...]) -> Sharding:
        """Of these choices of the folded problem."""
        if choices not in self._shardings:
            task, ports = self.task, self.built[1]
            program = decode(task.graph, task.rules, self.pricing, ports, self.whole.folded.unfolded(choices), self.keeping)
            self._shardings[choices] = Sharding.of(program, self.pricing, self.run, Engine.of(self.pricing.cluster), self.keeping.programs)
        return self._shardings[choices]

    def chosen(self, asking: Iterable[Asked]) -> list[tuple[int, ...]]:
        """The choices of each sharding, once."""
        asking = list(asking)
        for asked in asking:
            if asked not in self.answers:
                free = asked.zero is None and asked.fixed is None
                found = self._bought(asked.flight, asked.price, asked.how).choices if free else self._least(asked)
                # blocks are kept, as recomputation is decided later
                self.answers[asked] = None if found is None else tuple([0 if n in self.whole.modes else c for n, c in enumerate(found)])
        return list(dict.fromkeys(choices for asked in asking if (choices := self.answers[asked]) is not None))

    def choices(self, sharding: Sharding) -> tuple[int, ...] | None:
        """None where the sharding is that of another machine or batch."""
        return next((choices for choices, found in self._shardings.items() if found is sharding), None)

    def asked_for(self, sharding: Sharding) -> tuple[Asked, ...]:
        """The questions that it is the answer to, of those that were asked."""
        choices = self.choices(sharding)
        return tuple(asked for asked, found in self.answers.items() if isinstance(asked, Asked) and found == choices and asked.fixed is None)

    def _least(self, asked: Asked) -> tuple[int, ...] | None:
        """The choices of the folded problem that cost least. None where none may be joined to what is fixed."""
        prepared, store = self._at_price(asked.flight, asked.price, asked.how)
        allowed = self._of_stage(asked.zero)
        if asked.fixed is not None:
            node, state = asked.fixed
            allowed[node] = allowed.get(node, True) & (np.arange(prepared.shrunk.problem.nodes[node].num_states) == state)
        try:
            return prepared.shrunk.restore(prepared.minimise(Price(1.0, asked.price), store, allowed).choices)
        except InfeasibleError:
            return None

    def _bought(self, flight: float, price: float, how: str) -> Bought:
        """The same with nothing fixed."""
        return self.answers.of(("bought", flight, price, how), lambda: self._buy(flight, price, how))

    def _buy(self, flight: float, price: float, how: str) -> Bought:
        prepared, store = self._at_price(flight, price, how)
        choices = prepared.minimise(Price(1.0, price), store).choices
        return Bought(prepared.shrunk.restore(choices), *prepared.terms.of_plan(choices))

    def between(self, flight: float, low: float, high: float, how: str) -> list[float]:
        """Of two prices of a byte and those between them, one for every plan that is the cheapest at any (Eisner and Severance 1976): where two of them cost
        the same, another costs less, or none between does."""
        return self.answers.of(("between", flight, low, high, how), lambda: self._between(flight, low, high, how))

    def _between(self, flight: float, low: float, high: float, how: str) -> list[float]:
        prices = [low, high]
        todo = deque([(self._bought(flight, low, how), self._bought(flight, high, how))])
        while todo and len(prices) < MOST_PRICES:
            fast, lean = todo.popleft()
            if fast.memory_bytes > lean.memory_bytes:
                price = (lean.cost_s - fast.cost_s) / (fast.memory_bytes - lean.memory_bytes)
                found = self._bought(flight, price, how)
                if found.at(price) < fast.at(price) * (1 - 1e-9):
                    prices.append(price)
                    todo += [(fast, found), (found, lean)]
        return prices

    def _at_price(self, flight: float, price: float, how: str) -> tuple[Prepared, TableStore]:
        """The folded problem with so many microbatches in flight, and what its minima at a price share. The last one is at hand."""
        key = flight, price, how
        if self._last is None or self._last[0] != key:
            same = self._last is not None and self._last[0][::2] == key[::2]
            prepared = self._last[1] if same else self._prepared(flight, how)
            self._last = key, prepared, prepared.store(Price(1.0, price))
        return self._last[1:]

    def _prepared(self, flight: float, how: str) -> Prepared:
        if how not in self._alone:
            form = self.whole.leaner if how == GATHERED and self.whole.leaner is not None else self.whole
            problem = form.folded.problem
            apart = frozenset(range(len(problem.nodes))) if self.few else form.params
            self._alone[how] = prepare(in_states(problem, {n: np.zeros(1, dtype=int) for n in form.modes}) if how == KEPT else problem, (SECONDS, BYTES), apart=apart, shared=self._eliminated)
        alone = self._alone[how]
        return alone.with_bytes(alone.shrunk.problem.in_flight(flight, self.whole.params))

    @cached_property
    def _alone(self) -> dict[str, Prepared]:
        """By how blocks may be computed again, with one microbatch in flight."""
        return {}

    @property
    def sizes(self) -> list[int]:
        """How many states every node of the folded problem has."""
        return self.answers.of("sizes", lambda: self.whole.folded.problem.node_columns.sizes.tolist())

    @property
    def few(self) -> bool:
        """Whether a sharding may be looked at for each of these states."""
        return sum(self.sizes) <= FEW

    def _of_stage(self, zero: int | None) -> dict[int, np.ndarray]:
        """By parameter, for every layout the states whose stage of ZeRO is nearest to this one."""
        ports = self.built[1]
        return {} if zero is None else {self.whole.folded.node[n]: _nearest(ports.states[n], zero) for n in ports.param_node.values()}


def _in_form(mode: str, *, again: bool) -> str:
    return mode + GATHER if again and not gathers_again(mode) else mode


def _nearest(states: States, zero: int) -> np.ndarray:
    stages = [z.stage if z else 0 for z in states.zeros]
    off = [(abs(stage - zero), stage) for stage in stages]
    nearest: dict[Layout, tuple[int, int]] = {}
    for layout, distance in zip(states.result_layouts[0], off, strict=True):
        nearest[layout] = min(distance, nearest.get(layout, distance))
    return np.array([off[n] == nearest[layout] for n, layout in enumerate(states.result_layouts[0])])
