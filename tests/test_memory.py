"""What a rank needs: predicted from the plan, measured while it trains."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import autopar
from autopar.core.cluster import Cluster
from autopar.core.mesh import Mesh
from autopar.errors import InfeasibleError
from autopar.models.load import load_model
from autopar.planner.held import Holdings
from autopar.planner.liveness import Engine, memory_use
from autopar.planner.plan import plan_graph
from autopar.planner.search import Options
from autopar.trace.capture import trace
from tests.memory import measured_bytes

GPT2: dict[str, Any] = {"batch": 4, "seq": 64, "overrides": {"n_embd": 128, "vocab_size": 512, "n_layer": 4}}
LLAMA: dict[str, Any] = {"batch": 4, "seq": 64, "overrides": {"hidden_size": 128, "intermediate_size": 352, "vocab_size": 512, "num_hidden_layers": 4}}
BERT: dict[str, Any] = {"batch": 4, "seq": 64, "overrides": {"hidden_size": 128, "intermediate_size": 512, "vocab_size": 512, "num_hidden_layers": 4}}
VIT: dict[str, Any] = {"batch": 8, "overrides": {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4}}
MLP: dict[str, Any] = {"batch": 512, "overrides": {"width": 256, "depth": 5}}
CLOSE = 0.10
WIDE = 0.15
"""How far the upper end may lie above what was measured: messages of a pipeline may be there or not."""

ONE_RANK = [
    ("gpt2-tiny", GPT2, (), 1),
    ("llama-tiny", LLAMA | {"dtype": "bfloat16"}, (), 1),
    ("mlp-tiny", MLP, ("recompute=full",), 1),
]
TWO_RANKS = [
    ("gpt2-tiny", GPT2, ("tp=2",), 1),
    ("gpt2-tiny", GPT2, ("dp=2", "zero=3"), 1),
    ("gpt2-tiny", GPT2 | {"batch": 12, "dtype": "bfloat16"}, ("dp=2", "zero=1"), 3),
    ("llama-tiny", LLAMA | {"batch": 12}, ("dp=2", "zero=2", "recompute=full"), 3),
    ("llama-tiny", LLAMA, ("dp=2", "zero=3", "recompute=selective"), 1),
    ("llama-tiny", LLAMA, ("tp=2", "recompute=full+gather"), 1),
    ("llama-tiny", LLAMA, ("tp=2", "recompute=selective+gather"), 1),
    ("bert-tiny", BERT, ("tp=2",), 1),
    ("vit-tiny", VIT, ("dp=2", "recompute=selective"), 1),
    ("mlp-tiny", MLP | {"batch": 1536}, ("dp=2", "zero=0"), 3),
    ("gpt2-tiny", GPT2 | {"batch": 16}, ("pp=2", "schedule=1f1b"), 4),
    ("llama-tiny", LLAMA | {"batch": 16}, ("pp=2", "schedule=gpipe", "recompute=full"), 4),
    ("bert-tiny", BERT | {"batch": 16}, ("pp=2", "schedule=interleaved", "virtual=2"), 4),
    ("gpt2-tiny", GPT2, ("tp=2", "recompute=none+gather"), 1),
    ("gpt2-tiny", GPT2, ("tp=2", "recompute=selective"), 1),
]
FOUR_RANKS = [
    ("llama-tiny", LLAMA | {"batch": 16}, ("dp=2", "pp=2", "schedule=interleaved", "virtual=2", "zero=2"), 4),
    ("llama-tiny", LLAMA | {"seq": 8}, ("tp=2", "dp=2", "zero=1"), 1),
]


@pytest.mark.gloo
@pytest.mark.parametrize("cases,num_ranks", [(ONE_RANK, 1), (TWO_RANKS, 2), (FOUR_RANKS, 4)], ids=["one rank", "two ranks", "four ranks"])
def test_predicted_peak_is_near_the_measured_and_never_below(cases: list, num_ranks: int, long: bool) -> None:
    """Every third pair by default; all with --long."""
    cases = cases if long else cases[::3]
    plans = []
    for name, given, pins, pieces in cases:
        loaded = load_model(name, device="meta", **given)
        plans.append(autopar.plan(loaded.module, Cluster.local(num_ranks), loaded.kwargs, pins=pins, micro_batches=pieces))
    measured = measured_bytes([(name, plan.to_json(), given) for (name, given, _, _), plan in zip(cases, plans)], num_ranks)
    wrong = []
    for (name, _, _, _), plan, peaks in zip(cases, plans, measured):
        memory, peak = plan.predicted.memory, max(peaks)
        if not (1 - CLOSE) * peak <= memory.expected_bytes <= (1 + CLOSE) * peak or not peak <= memory.high_bytes <= (1 + WIDE) * peak:
            wrong.append(f"{name} {plan.summary()}: measured {peaks}, predicted {memory.expected_bytes} to {memory.high_bytes} ({memory.moment})")
    assert not wrong, "\n".join(wrong)


def use_of(model: nn.Module, batch: tuple, pins: tuple[str, ...] = (), **engine: bool) -> Any:
    graph = trace(model, batch).graph
    return memory_use(plan_graph(graph, Cluster.local(1), Options(pins=pins, mesh=Mesh.of(dp=1))).program, Engine(**engine))


class Square(nn.Module):
    """mean((x w)^2): what is held can be counted on one hand."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.weight).relu().sum()


def test_by_hand_when_activations_are_most() -> None:
    """x [1000, 10], w [10, 20]: the product, then relu's result, which is kept, beside it; then its gradient in the backward."""
    use = use_of(Square(10, 20), (torch.empty(1000, 10),))
    weight, x, y = 4 * 200, 4 * 10_000, 4 * 20_000
    assert (use.parameters, use.optimizer, use.gradients) == (weight + x, 2 * weight, 0)
    assert use.activations + use.temporaries == pytest.approx(2 * y, abs=16)


@pytest.mark.parametrize("one_by_one,temporaries", [(True, 2), (False, 1)])
def test_by_hand_when_the_state_is_most(one_by_one: bool, temporaries: int) -> None:
    """One sample: what counts is the optimizer, with its temporaries."""
    weight = 4 * 100 * 200
    use = use_of(Square(100, 200), (torch.empty(1, 100),), one_by_one=one_by_one)
    assert use.moment == "the optimizer step"
    assert (use.gradients, use.optimizer, use.temporaries) == (weight, 2 * weight, temporaries * weight)


def test_what_is_stored_of_a_parameter_lies_inside_its_working_copy_also_behind_another_cut() -> None:
    """ZeRO cuts rows that tensor parallelism has cut before."""
    loaded = load_model("llama-tiny", device="meta", **LLAMA)
    program = plan_graph(trace(loaded.module, (), loaded.kwargs).graph, Cluster.local(4), Options(pins=("tp=2", "dp=2", "zero=1"))).program
    found = [held for v, held in Holdings(program).parameters.items() if [p.dim for p in program.stored[v] if p.kind == "S"] == [0, 0]]
    assert found and all(held.device_bytes(offload=False) == held.working == 2 * held.stored for held in found)


class Viewed(nn.Module):
    """The square of a tensor seen another way; `copied` where the other way is no view."""

    def __init__(self, copied: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(8, 8))
        self.copied = copied

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = (x @ self.weight).view(10, 100, 8)
        y = y.transpose(0, 1).reshape(1000, 8) if self.copied else y.transpose(1, 2)
        return (y * y).sum()


def test_views_take_no_memory_and_copies_do() -> None:
    y = 4 * 8000
    kept = [use_of(Viewed(copied), (torch.empty(1000, 8),)) for copied in (False, True)]
    assert all(use.moment.startswith("backward") for use in kept)
    assert [use.activations for use in kept] == [y, y], "the product is not kept where its copy is"


def test_a_frozen_factor_needs_no_other() -> None:
    """The input of a linear layer is kept for the gradient of its weight alone."""
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 64, bias=False))
    batch = (torch.empty(1000, 8),)
    trained = use_of(model, batch)
    model[1].weight.requires_grad_(False)
    assert trained.activations - use_of(model, batch).activations == 4 * 8000


def test_the_error_says_how_much_is_missing_when_and_what_would_help() -> None:
    """And what it says would help does."""
    loaded = load_model("gpt2-tiny", batch=16, seq=64, device="meta", overrides={"n_layer": 4})
    cluster = Cluster.local(2)
    peak = autopar.plan(loaded.module, cluster, loaded.kwargs, pins=("dp=2", "zero=3", "recompute=full"), max_memory=1.0).predicted.peak_memory_bytes

    def planned(limit: int, **options: Any) -> autopar.Plan:
        small = replace(cluster, device=replace(cluster.device, memory_bytes=limit))
        return autopar.plan(loaded.module, small, loaded.kwargs, pins=("dp=2",), max_memory=1.0, **options)

    with pytest.raises(InfeasibleError, match=r"needs \d+ bytes .* at its fullest moment, (forward|backward) of .*; it would fit with \d+ microbatches") as caught:
        planned(int(0.8 * peak))
    pieces = int(str(caught.value).rsplit("fit with ", 1)[1].split()[0])
    assert planned(int(0.8 * peak), micro_batches=pieces).predicted.peak_memory_bytes <= 0.8 * peak
