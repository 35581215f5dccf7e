"""Pipelines on real processes train like one process of plain PyTorch: losses, norms before clipping, parameters; every step communicates
what was predicted, keeps as many microbatches as its schedule says, and goes on from a checkpoint of any other plan."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

import autopar
from autopar.core.pipeline import SHARED, Pipeline
from autopar.core.plan import Plan
from autopar.errors import UsageError
from autopar.models.load import LoadedModel, load_model
from autopar.planner.plan import plan_graph
from autopar.planner.search import Options
from autopar.runtime.launch import Worker, launch
from autopar.runtime.microbatches import split_batch
from autopar.trace.capture import trace
from tests.pipelines import cut

STEPS, MAX_NORM = 3, 0.5
TOLERANCE = 1e-5
"""Relative. The language models compute their loss in float32 whatever they are given."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """`accumulate`: global batches per optimizer step; `in_flight`: most microbatches at once, by rank of the pipeline."""

    model: str
    schedule: str
    ranks: int
    micro_batches: int
    pins: tuple[str, ...] = ("dp=1",)
    accumulate: int = 1
    in_flight: tuple[int, ...] | None = None
    offload: bool = False
    overrides: tuple[tuple[str, int], ...] = ()

    def load(self) -> LoadedModel:
        loaded = load_model(self.model, batch=4 * self.micro_batches, seq=8, device="cpu", dtype="float64", ragged=True, overrides=dict(self.overrides))
        loaded.module.eval()
        return loaded

    def plan(self, loaded: LoadedModel, num_devices: int, seed: int = 1) -> Plan:
        graph = trace(loaded.module, (), split_batch(loaded.kwargs, self.micro_batches)[0]).graph
        options = Options(pins=self.pins, micro_batches=self.micro_batches, offload=self.offload)
        plan = plan_graph(graph, autopar.Cluster.local(num_devices // self.ranks), options).plan
        if self.schedule == SHARED:
            return replace(plan, pipeline=Pipeline(self.ranks, (), SHARED, shares=(1,) * (self.ranks - 1) + (self.micro_batches - self.ranks + 1,)))
        return cut(plan, graph, self.ranks, self.schedule, 2 if self.schedule == "interleaved" else 1, seed)

    def batches(self, loaded: LoadedModel) -> list[dict[str, Any]]:
        return [{name: x.roll(n, 0) for name, x in loaded.kwargs.items()} for n in range(self.accumulate)]


WIDE = (("n_embd", 256), ("n_head", 4))
"""Parameters large enough to be gathered each by itself, and so in place."""

CASES = {
    2: (
        Case(model="gpt2-tiny", schedule="gpipe", ranks=2, micro_batches=3, in_flight=(3, 3)),
        Case(model="gpt2-tiny", schedule="1f1b", ranks=2, micro_batches=4, accumulate=2, in_flight=(2, 1)),
        Case(model="llama-tiny", schedule="interleaved", ranks=2, micro_batches=4),
        Case(model="gpt2-tiny", schedule="zero-bubble", ranks=2, micro_batches=3, accumulate=2, in_flight=(2, 2)),
        Case(model="t5-tiny", schedule="1f1b", ranks=2, micro_batches=1, in_flight=(1, 1)),
        Case(model="gpt2-tiny", schedule=SHARED, ranks=2, micro_batches=4, accumulate=2, in_flight=(1, 1)),
    ),
    4: (
        Case(model="gpt2-tiny", schedule="1f1b", ranks=4, micro_batches=6, in_flight=(4, 3, 2, 1)),
        Case(model="gpt2-tiny", schedule="1f1b", ranks=2, micro_batches=2, pins=("dp=2", "zero=3", "recompute=full")),
        Case(model="llama-tiny", schedule="zero-bubble", ranks=2, micro_batches=2, pins=("tp=2",)),
        Case(model="gpt2-tiny", schedule="interleaved", ranks=2, micro_batches=2, pins=("dp=2", "zero=1"), offload=True),
        Case(model="gpt2-tiny", schedule="interleaved", ranks=2, micro_batches=2, pins=("dp=2", "zero=1"), offload=True, overrides=WIDE),
        Case(model="gpt2-tiny", schedule="interleaved", ranks=2, micro_batches=2, pins=("dp=2", "zero=1"), overrides=WIDE),
        Case(model="llama-tiny", schedule="interleaved", ranks=2, micro_batches=4, pins=("dp=2", "zero=2"), accumulate=2),
        Case(model="gpt2-tiny", schedule="gpipe", ranks=2, micro_batches=2, pins=("dp=2", "zero=2"), accumulate=2),
        Case(model="llama-tiny", schedule=SHARED, ranks=2, micro_batches=3, pins=("dp=2", "zero=1"), offload=True),
        Case(model="gpt2-tiny", schedule=SHARED, ranks=2, micro_batches=4, pins=("dp=2", "zero=3"), accumulate=2),
    ),
    8: (Case(model="gpt2-tiny", schedule="1f1b", ranks=2, micro_batches=2, pins=("dp=2", "tp=2")),),
}

Trained = tuple[list[tuple[float, float]], dict[str, np.ndarray]]


def optimizer_of(module: nn.Module) -> torch.optim.Optimizer:
    """With an eps that keeps gradients of nothing but rounding (a key bias) from being blown up."""
    return torch.optim.AdamW(module.parameters(), lr=1e-3, eps=1e-3)


def one_process(case: Case) -> Trained:
    loaded = case.load()
    optimizer, found = optimizer_of(loaded.module), []
    for _ in range(STEPS):
        optimizer.zero_grad()
        total = 0.0
        for batch in case.batches(loaded):
            loss = loaded.module(**batch).loss
            loss.backward()
            total += float(loss.detach())
        norm = nn.utils.clip_grad_norm_(loaded.module.parameters(), MAX_NORM)
        optimizer.step()
        found.append((total, float(norm)))
    return found, {name: p.detach().numpy() for name, p in loaded.module.named_parameters(remove_duplicate=False)}


def whole(module: nn.Module) -> dict[str, np.ndarray]:
    """Parameters of this rank's stages, gathered over their stage."""
    return {name: (p.detach().full_tensor() if isinstance(p, DTensor) else p.detach()).numpy() for name, p in module.named_parameters(remove_duplicate=False)}


def train(worker: Worker, cases: tuple[Case, ...]) -> None:
    for number, case in enumerate(cases):
        loaded = case.load()
        plan = case.plan(loaded, worker.num_ranks)
        model = autopar.parallelize(loaded.module, autopar.Cluster.local(worker.num_ranks), loaded.kwargs, plan=plan)
        optimizer, found = optimizer_of(model), []
        for _ in range(STEPS):
            optimizer.zero_grad()
            total = 0.0
            for batch in case.batches(loaded):
                total += float(model.train_step(batch))
                assert model.counted() == model.predicted, case
            norm = model.clip_grad_norm_(MAX_NORM)
            optimizer.step()
            found.append((total, float(norm)))
        if case.in_flight is not None:
            assert model.peak_in_flight == case.in_flight[worker.rank // (worker.num_ranks // case.ranks)], case
        timeline = model.timeline()
        assert len(timeline.spans) == sum(map(len, model.schedule.ranks)) and 0 < timeline.bubble_fraction < 1
        with torch.no_grad():
            assert abs(float(model.evaluate(loaded.kwargs)) / float(model.train_step(loaded.kwargs)) - 1) < TOLERANCE
        worker.send((number, worker.rank, (found, whole(model))))


@pytest.mark.gloo
@pytest.mark.parametrize("num_ranks", CASES)
def test_trains_like_one_process(num_ranks: int) -> None:
    received: dict[tuple[int, int], Trained] = {}
    cases = CASES[num_ranks]
    launch(train, num_ranks, cases, on_message=lambda message: received.update({message[:2]: message[2]}), preload=("autopar.api", "transformers.modeling_utils"))
    assert len(received) == len(cases) * num_ranks
    for number, case in enumerate(cases):
        expected, parameters = one_process(case)
        seen: set[str] = set()
        for rank in range(num_ranks):
            losses, mine = received[number, rank]
            assert np.allclose(losses, expected, rtol=TOLERANCE, atol=0.0), (case, losses, expected)
            seen |= mine.keys()
            for name, p in mine.items():
                error = np.linalg.norm(p - parameters[name]) / max(np.linalg.norm(parameters[name]), 1e-2)
                assert error < TOLERANCE, (case, name)
        assert seen == parameters.keys()


def save_and_reload(worker: Worker, folder: str) -> None:
    """ZeRO-1 x pipeline -> ZeRO-3 -> deeper pipeline -> copies that share the batch -> pipeline: parameters and optimizer state as saved, bit by bit, and the next loss the same."""
    first_case = Case(model="gpt2-tiny", schedule="1f1b", ranks=2, micro_batches=2, pins=("dp=2", "zero=1"))
    shared = Case(model="gpt2-tiny", schedule=SHARED, ranks=2, micro_batches=2, pins=("dp=2", "zero=1"))
    others = (None, Case(model="gpt2-tiny", schedule="interleaved", ranks=4, micro_batches=4), shared, first_case)
    loaded = first_case.load()
    model = autopar.parallelize(loaded.module, autopar.Cluster.local(4), loaded.kwargs, plan=first_case.plan(loaded, 4))
    optimizer = optimizer_of(model)
    for number, case in enumerate(others):
        step(model, optimizer, loaded)
        autopar.save_checkpoint(folder, model, optimizer, {"number": number})
        want = state_of(model, optimizer)
        if case is None:
            other = autopar.parallelize(case_model(), autopar.Cluster.local(4), loaded.kwargs, pins=("dp=4", "zero=3"), seed=number)
        else:
            other = autopar.parallelize(case_model(), autopar.Cluster.local(4), loaded.kwargs, plan=case.plan(loaded, 4, seed=number), seed=number)
        again = optimizer_of(other)
        assert autopar.load_checkpoint(folder, other, again) == {"number": number}
        found = state_of(other, again)
        assert want.keys() == found.keys() and all(np.array_equal(found[key], x) for key, x in want.items())
        model, optimizer = other, again
    worker.send(float(step(model, optimizer, loaded)))


def case_model() -> nn.Module:
    return load_model("gpt2-tiny", batch=8, seq=8, device="meta", dtype="float64").module.eval()


def step(model: Any, optimizer: torch.optim.Optimizer, loaded: LoadedModel) -> torch.Tensor:
    optimizer.zero_grad()
    loss = model.train_step(loaded.kwargs)
    optimizer.step()
    optimizer.zero_grad()
    return loss


def state_of(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, np.ndarray]:
    """Parameters and moments of all stages, on every rank."""
    mine = whole(module)
    for name, p in module.named_parameters(remove_duplicate=False):
        for key, x in optimizer.state[p].items():
            mine[f"{name}.{key}"] = (x.full_tensor() if isinstance(x, DTensor) else x).numpy()
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return {key: x for table in everyone for key, x in table.items()}


@pytest.mark.gloo
def test_checkpoints_go_from_any_plan_to_any_other(tmp_path: Path) -> None:
    received: list[float] = []
    launch(save_and_reload, 4, str(tmp_path), on_message=received.append, preload=("autopar.api", "transformers.modeling_utils"))
    loaded = Case(model="gpt2-tiny", schedule="", ranks=1, micro_batches=2).load()
    optimizer = optimizer_of(loaded.module)
    for _ in range(5):
        optimizer.zero_grad()
        loss = loaded.module(**loaded.kwargs).loss
        loss.backward()
        optimizer.step()
    assert np.allclose(received, float(loss.detach()), rtol=TOLERANCE)


def refuse(worker: Worker, case: Case) -> None:
    loaded = case.load()
    model = autopar.parallelize(loaded.module, autopar.Cluster.local(2), loaded.kwargs, plan=case.plan(loaded, 2))
    with pytest.raises(UsageError, match="train_step"):
        model(**loaded.kwargs)
    with pytest.raises(UsageError, match="bfloat16"):
        model.train_step(loaded.kwargs, scaler=torch.amp.GradScaler("cpu"))
    worker.send(worker.rank)


@pytest.mark.gloo
def test_what_a_pipeline_does_not_do_it_says() -> None:
    received: list[int] = []
    launch(refuse, 2, CASES[2][0], on_message=received.append, preload=("autopar.api", "transformers.modeling_utils"))
    assert sorted(received) == [0, 1]
