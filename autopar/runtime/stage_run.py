"""One stage of a pipeline while it runs: what it holds of every microbatch between its forward and its backward.

Written for the ranks at hand: one, or all ranks of a simulated stage side by side. A value is a column with a tensor of each.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from autopar.runtime.rank import Rank
from autopar.runtime.split import weight_gradient
from autopar.stages import Stage

Column = list[torch.Tensor]
Columns = dict[int, Column]
"""By value number."""


class Engine(Protocol):
    """What computes a stage: of a real rank, or of all ranks of a simulated mesh. `splits`: gradients of weights can be put off."""

    splits: bool

    @property
    def ranks(self) -> Sequence[Rank]: ...
    def start(self) -> None: ...
    def compute(self, microbatch: int, given: Mapping[int, Column]) -> list[Column]: ...
    def differentiate(self, tensors: Sequence[torch.Tensor], grads: Sequence[torch.Tensor], *, last: bool) -> None: ...
    def finish(self) -> None: ...


@dataclass
class InFlight:
    """What is kept of one microbatch. `taken`: values of other stages, leaves of this stage's autograd graph; `outputs`: by position;
    `answers`: gradients that later stages have sent, summed; `deferred`: what is left for the weights."""

    taken: Columns = field(default_factory=dict)
    outputs: list[Column] = field(default_factory=list)
    answers: Columns = field(default_factory=dict)
    deferred: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, bool]] = field(default_factory=list)


class StageRun:
    """Forwards and backwards of one stage. `seeds`: model outputs that a step differentiates; `results[m, n]`: the n-th output of the
    stage for microbatch m, of the seeds or of all."""

    def __init__(self, stage: Stage, engine: Engine, seeds: Sequence[int], *, keeps_outputs: bool = False) -> None:
        self.stage, self.engine, self.seeds, self.keeps_outputs = stage, engine, seeds, keeps_outputs
        self.graph = stage.program.graph
        self.users = [v for v, value in enumerate(self.graph.values) if value.role == "input" and not any(v in values for values in stage.takes.values())]
        self.held: dict[int, InFlight] = {}
        self.in_flight = 0

    def start(
        self, inputs: Sequence[Mapping[int, torch.Tensor]], weights: Sequence[float], cotangents: Mapping[int, torch.Tensor], num_backwards: int
    ) -> None:
        """Begin a step. `inputs[m]`: the user's, of microbatch m; `weights[m]`: its share in the loss; `cotangents`: gradients of the seeds
        where they are no scalar loss."""
        self.inputs, self.weights, self.cotangents = inputs, weights, cotangents
        self.held.clear()
        self.results: dict[tuple[int, int], Column] = {}
        self.left, self.finished, self.in_flight = num_backwards, False, 0
        self.engine.start()

    def _of(self, m: int) -> InFlight:
        return self.held.setdefault(m, InFlight())

    def take(self, m: int, columns: Columns) -> None:
        """Values from another stage."""
        live = self.stage.answered
        self._of(m).taken |= {v: [x.detach().requires_grad_(v in live) for x in column] for v, column in columns.items()}

    def given(self, m: int, values: Iterable[int]) -> Columns:
        """Values for another stage."""
        places = {v: n for n, v in enumerate(self.graph.outputs) if n >= self.stage.program.first_handed}
        outputs = self.held[m].outputs
        return {v: [x.detach() for x in outputs[places[v]]] for v in values}

    def answer(self, m: int, columns: Columns) -> None:
        """Gradients of what was given."""
        answers = self._of(m).answers
        for v, column in columns.items():
            answers[v] = [a + b for a, b in zip(answers[v], column)] if v in answers else column

    def answers(self, m: int, values: Iterable[int]) -> Columns:
        """Gradients of what was taken; zeros where nothing depends on it on a rank."""
        taken = self.held[m].taken
        return {v: [torch.zeros_like(x) if x.grad is None else x.grad for x in taken.pop(v)] for v in values}

    def forward(self, m: int, *, training: bool = True) -> None:
        here, ranks = self._of(m), len(self.engine.ranks)
        device = self.engine.ranks[0].device
        inputs = {v: [self.inputs[m][v].to(device)] * ranks for v in self.users}
        with torch.set_grad_enabled(training):
            here.outputs = self.engine.compute(m, inputs | here.taken)
        for n, v in enumerate(self.stage.own_outputs):
            if self.keeps_outputs or v in self.seeds:
                self.results[m, n] = [x.detach() for x in here.outputs[n]]
            if v not in self.seeds:
                here.outputs[n] = []  # what nothing differentiates need not live through the backward
        self.in_flight += training

    def backward(self, m: int) -> None:
        if self.engine.splits:
            self.backward_inputs(m)
            self.backward_weights(m)
            return
        self._differentiate(m)
        self.release(m)

    def backward_inputs(self, m: int) -> None:
        """The half that other stages wait for; what concerns weights of contractions is put off."""
        for rank in self.engine.ranks:
            rank.deferred = []
        self._differentiate(m, last=False)
        here = self._of(m)
        for rank in self.engine.ranks:
            here.deferred += rank.deferred or []
            rank.deferred = None
        here.outputs, here.answers = [], {}

    def backward_weights(self, m: int) -> None:
        """The other half. A weight that is used twice gets the sum in one go: what moves its gradient must run once. Nobody waits for that of a leaf
        before the step ends."""
        sums: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for weight, x, output_grad, transposed in self._of(m).deferred:
            grad = weight_gradient(weight, x, output_grad, transposed)
            if grad is not None:
                sums[id(weight)] = (weight, grad if id(weight) not in sums else sums[id(weight)][1] + grad)
        self.engine.differentiate([w for w, _ in sums.values()], [g for _, g in sums.values()], last=False)
        self.release(m)

    def release(self, m: int) -> None:
        """Nothing of the microbatch is needed but the gradients that are still to be sent."""
        self.left -= 1
        self.in_flight -= 1
        here = self._of(m)
        here.outputs, here.answers, here.deferred = [], {}, []
        here.taken = {v: column for v, column in here.taken.items() if v in self.stage.answered}

    def _differentiate(self, m: int, last: bool | None = None) -> None:
        here, program = self.held[m], self.stage.program
        tensors, grads = [], []
        for n, (v, column) in enumerate(zip(self.graph.outputs, here.outputs)):
            if n >= program.first_handed and v in here.answers:
                tensors += column
                grads += here.answers[v]
            elif n < program.first_handed and v in self.seeds and v not in program.handed:
                tensors += column
                grads += [self.weights[m] * (self.cotangents[v] if v in self.cotangents else torch.ones_like(x)) for x in column]
        self.engine.differentiate(tensors, grads, last=self.left == 1 if last is None else last)

    def finish(self) -> None:
        """Complete the sums of gradients over replicas, unless that is done."""
        if not self.finished:
            self.finished = True
            self.engine.finish()
