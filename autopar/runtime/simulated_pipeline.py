"""A pipeline on a simulated mesh: the lists of all its ranks walked in turn inside one process, each stage with all its ranks side by side."""

from collections.abc import Mapping, Sequence

import torch

from autopar.core.ledger import Ledger
from autopar.core.pipeline import PP
from autopar.core.schedule import Action, Schedule
from autopar.errors import ScheduleError
from autopar.runtime.simulated_module import SimulatedModule
from autopar.runtime.stage_run import Column, Columns, StageRun
from autopar.runtime.walk import Walk
from autopar.stages import Stages


class SimulatedPost:
    """A place where messages lie until they are fetched; every simulated rank counts what it sends and receives."""

    def __init__(self, stages: Stages, modules: Sequence[SimulatedModule]) -> None:
        self.stages, self.modules = stages, modules
        self.lying: dict[Action, Columns] = {}
        self.there: dict[int, set[int]] = {}
        self.summed: set[int] = set()

    def _count(self, stage: int, primitive: str, columns: Columns, size: int = 2) -> None:
        for r, rank in enumerate(self.modules[stage].ranks):
            rank.counter.add(primitive, PP, size, sum(column[r].numel() * column[r].element_size() for column in columns.values()))

    def send(self, action: Action, columns: Columns) -> None:
        self._count(action.stage, "send", columns)
        self.lying[action.partner] = {v: [x.detach().clone() for x in column] for v, column in columns.items()}

    def expect(self, action: Action) -> None:
        """Nothing to make room for."""

    def receive(self, action: Action) -> Columns | None:
        columns = self.lying.pop(action, None)
        if columns is not None:
            self._count(action.stage, "receive", columns)
        return columns

    def sum_shared(self, rank: int, first: int) -> bool:
        group = next(g for g in self.stages.tied if g[0] == first)
        there = self.there.setdefault(first, set())
        there.add(rank)
        if there != set(self.stages.ranks_of(group)):
            return False
        if first not in self.summed:
            self.summed.add(first)
            for v, numbers in self.stages.shared_by(first).items():
                self._sum(v, numbers)
        return True

    def _sum(self, v: int, numbers: Sequence[int]) -> None:
        modules, ranks = [self.modules[s] for s in numbers], self.stages.ranks_of(numbers)
        for r in range(len(modules[0].ranks)):
            parts = [m.stored[r][v] for m in modules]
            total = sum((p.grad for p in parts if p.grad is not None), torch.zeros_like(parts[0]))
            assert isinstance(total, torch.Tensor)
            for p in parts:
                p.grad = total.clone()
        if len(ranks) > 1:
            for place in ranks:
                s = next(s for s in numbers if self.stages.placement[s] == place)
                self._count(s, "all_reduce", {v: [mine[v].detach() for mine in self.modules[s].stored]}, len(ranks))


class SimulatedPipeline:
    """All stages of a pipeline, `modules[s]` for stage s, and the lists that run them."""

    def __init__(self, stages: Stages, schedule: Schedule, modules: Sequence[SimulatedModule]) -> None:
        self.stages, self.schedule, self.modules = stages, schedule, modules
        self.runs = [StageRun(stage, module, stages.whole.graph.seeds, keeps_outputs=True) for stage, module in zip(stages.stages, modules)]
        self.walks: list[Walk] = []

    def step(
        self, inputs: Sequence[Mapping[int, torch.Tensor]], weights: Sequence[float], cotangents: Sequence[torch.Tensor] | None = None
    ) -> list[list[Column]]:
        """Forwards, backwards and sums of one step; returns the model's outputs by microbatch and number. Gradients are in the modules, which
        are then to be updated. Raises ScheduleError where the lists get stuck."""
        given = {} if cotangents is None else dict(zip(self.stages.whole.graph.seeds, cotangents))
        for number, run in enumerate(self.runs):
            run.start(inputs, weights, given, len(self.schedule.microbatches(number)))
        post = SimulatedPost(self.stages, self.modules)
        placement = self.stages.placement
        self.walks = [
            Walk(r, self.stages, {s: run for s, run in enumerate(self.runs) if placement[s] == r}, post, actions, True) for r, actions in enumerate(self.schedule.ranks)
        ]
        waiting = list(self.walks)
        while waiting:
            before = [walk.position for walk in self.walks]
            waiting = [walk for walk in waiting if not walk.advance()]
            if waiting and before == [walk.position for walk in self.walks]:
                walk = waiting[0]
                raise ScheduleError(self.schedule.name, walk.rank, str(walk.actions[walk.position]), "waits for ever")
        return [self._outputs(m) for m in range(len(inputs))]

    def _outputs(self, m: int) -> list[Column]:
        found = {number: run.results[m, n] for run in self.runs for n, number in enumerate(run.stage.output_numbers) if (m, n) in run.results}
        return [found[n] for n in range(len(self.stages.whole.graph.outputs))]

    def update(self) -> None:
        """The optimizer steps of all stages."""
        for module in self.modules:
            module.update()

    def counted(self) -> list[Ledger]:
        """What every rank has communicated, pipeline rank by pipeline rank."""
        found = []
        for place in range(self.stages.pipeline.num_ranks):
            mine = [m for s, m in enumerate(self.modules) if self.stages.placement[s] == place]
            found += [Ledger.sum(item for m in mine for item in m.ranks[r].counter.ledger.input_bytes) for r in range(len(mine[0].ranks))]
        return found
