"""One rank of a pipeline on its way through its list of actions: the same walk on real processes and on a simulated mesh."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from autopar.core.pipeline import RECEIVES_AHEAD
from autopar.core.schedule import COMPUTE, RECEIVES, SENDS, Action, Kind
from autopar.core.timeline import Span
from autopar.runtime.stage_run import Columns, StageRun
from autopar.stages import Stages


class Post(Protocol):
    """Carries messages between the ranks of a pipeline."""

    def send(self, action: Action, columns: Columns) -> None: ...

    def expect(self, action: Action) -> None:
        """Make room for a message, before it is needed."""

    def receive(self, action: Action) -> Columns | None:
        """A message; None where it is not there yet and waiting makes no sense."""

    def sum_shared(self, rank: int, first: int) -> bool:
        """Sum the gradients that a group of stages shares; False where not all its ranks are there yet."""


class Walk:
    """`runs`: the stages of this rank. `spans`: what was done when, if `clock` is given."""

    def __init__(self, rank: int, stages: Stages, runs: Mapping[int, StageRun], post: Post, actions: Sequence[Action], training: bool) -> None:
        self.rank, self.stages, self.runs, self.post, self.actions, self.training = rank, stages, runs, post, actions, training
        self.position = 0
        self.spans: list[Span] = []
        self.peak_in_flight = 0
        self._expected = 0
        computes = [i for i, a in enumerate(actions) if a.kind in COMPUTE]
        self._horizon = {i: computes[n + RECEIVES_AHEAD] if n + RECEIVES_AHEAD < len(computes) else len(actions) for n, i in enumerate(computes)}

    def advance(self, clock: Callable[[], float] = time.perf_counter) -> bool:
        """Go on until something is not there yet; whether the list is at its end."""
        self._expect(0)
        while self.position < len(self.actions):
            action = self.actions[self.position]
            start = clock()
            if not self._perform(action):
                return False
            self._note(action, start, clock())
            self.position += 1
        for run in self.runs.values():
            run.finish()
        return True

    def _note(self, action: Action, start: float, end: float) -> None:
        lane = "send" if action.kind in SENDS else "receive" if action.kind in RECEIVES else "compute" if action.kind in COMPUTE else "collective"
        self.spans.append(Span(self.rank, lane, action, start, end))

    def _expect(self, before: int) -> None:
        """Post the receives that come soon."""
        horizon = self._horizon.get(before, before)
        while self._expected < min(max(horizon, before + 1), len(self.actions)):
            action = self.actions[self._expected]
            if action.kind in RECEIVES:
                self.post.expect(action)
            self._expected += 1

    def _perform(self, action: Action) -> bool:
        kind, m = action.kind, action.microbatch
        if kind is Kind.TIE:
            assert action.peer is not None
            for number in next(group for group in self.stages.tied if group[0] == action.peer):
                if number in self.runs:
                    self.runs[number].finish()
            return self.post.sum_shared(self.rank, action.peer)
        if kind is Kind.REDUCE and m is None:
            self.runs[action.stage].finish()
        if m is None or kind is Kind.REDUCE:
            return True  # GATHER, FREE and REDUCE of a microbatch happen inside the computations, where their operators stand
        if kind in COMPUTE:
            self._expect(self.position)
            self._compute(action, m)
            return True
        return self._transfer(action, m)

    def _compute(self, action: Action, m: int) -> None:
        run, s = self.runs[action.stage], action.stage
        if action.kind is Kind.F:
            run.forward(m, training=self.training)
            self.peak_in_flight = max(self.peak_in_flight, sum(r.in_flight for r in self.runs.values()))
            for t, values in run.stage.gives.items():
                if t in self.runs:
                    self.runs[t].take(m, run.given(m, values))
            return
        if action.kind is Kind.B:
            run.backward(m)
        elif action.kind is Kind.I:
            run.backward_inputs(m)
        else:
            run.backward_weights(m)
            return
        for source in run.stage.takes:
            if source in self.runs:
                self.runs[source].answer(m, run.answers(m, self.stages.answers(source, s)))

    def _transfer(self, action: Action, m: int) -> bool:
        run, peer = self.runs[action.stage], action.peer
        assert peer is not None
        if action.kind is Kind.SEND_F:
            self.post.send(action, run.given(m, run.stage.gives[peer]))
        elif action.kind is Kind.SEND_B:
            self.post.send(action, run.answers(m, self.stages.answers(peer, action.stage)))
        else:
            self._expect(self.position)
            columns = self.post.receive(action)
            if columns is None:
                return False
            if action.kind is Kind.RECV_F:
                run.take(m, columns)
            else:
                run.answer(m, columns)
        return True
