"""State sharding, recomputation, master copies, accumulation and offload: the same training, and the bytes that were predicted.

Every case trains on a simulated mesh beside one process; accumulation is compared with one pass over the whole batch.
"""

import itertools
from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import autopar
from autopar import request, verification
from autopar.core.residency import RECOMPUTE
from autopar.models.load import LoadedModel, load_model
from autopar.planner.bind import bind
from autopar.planner.liveness import kept_by_segment
from autopar.runtime.microbatches import split_batch
from tests.tracing import traced_once

MESHES = {"(2)": ("dp=2",), "(4)": ("dp=4",), "(2, 2)": ("dp=2", "tp=2")}
STAGES, MODES, DTYPES, PIECES, MODELS = (0, 1, 2, 3), RECOMPUTE, ("float64", "bfloat16"), (1, 3), ("gpt2-tiny", "llama-tiny", "mlp-tiny")
EVERYTHING = list(itertools.product(MODELS, MESHES, STAGES, MODES, DTYPES, PIECES))
SPREAD = EVERYTHING[:: len(EVERYTHING) // 16 | 1]
"""A stride that is odd and divides no dimension of the product visits all values of each."""


@lru_cache(maxsize=16)
def load(name: str, pieces: int, dtype: str) -> LoadedModel:
    return load_model(name, batch=4 * pieces, seq=12, device="cpu", dtype="bfloat16" if dtype == "bfloat16" else "float32")


@pytest.fixture(autouse=True)
def remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is planned and verified here is traced once."""
    monkeypatch.setattr(request, "trace", traced_once)
    monkeypatch.setattr(verification, "trace", traced_once)


def check(name: str, mesh: str, stage: int, mode: str, dtype: str, pieces: int, **options: object) -> None:
    loaded = load(name, pieces, dtype)
    pins = (*MESHES[mesh], f"zero={stage}", f"recompute={mode}")
    cluster = autopar.Cluster.local(4 if "4" in mesh or "," in mesh else 2)
    plan = autopar.plan(loaded.module, cluster, loaded.kwargs, pins=pins, micro_batches=pieces, **options)
    assert len(plan.residency.zero) == (len(plan.params) if stage else 0)
    assert autopar.Plan.from_json(plan.to_json()) == plan
    report = autopar.verify(loaded.module, plan, loaded.kwargs, steps=2, dtype=dtype)
    assert report.equal, str(report)


@pytest.mark.parametrize("case", SPREAD, ids=str)
def test_equal(case: tuple) -> None:
    check(*case)


@pytest.mark.parametrize("case", [case for case in EVERYTHING if case not in SPREAD], ids=str)
def test_equal_everywhere(case: tuple, long: bool) -> None:
    if not long:
        pytest.skip("the whole matrix runs with --long")
    check(*case)


@pytest.mark.parametrize("stage", STAGES)
def test_optimizer_state_on_the_host(stage: int) -> None:
    check("gpt2-tiny", "(2, 2)", stage, "none", "bfloat16", 1, offload=True)
    check("mlp-tiny", "(2)", stage, "full", "float64", 3, offload=True)


@pytest.mark.parametrize("mode", MODES)
def test_dropout_draws_the_same_when_computed_again(mode: str) -> None:
    loaded = load_model("gpt2-tiny", batch=8, seq=12, device="cpu", overrides={"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1})
    loaded.module.train()
    plan = autopar.plan(loaded.module, autopar.Cluster.local(4), loaded.kwargs, pins=("dp=2", "tp=2", "zero=3", f"recompute={mode}"), micro_batches=2)
    report = autopar.verify(loaded.module, plan, loaded.kwargs, steps=2)
    assert report.equal, str(report)


def kept_bytes(plan: autopar.Plan) -> int:
    """Of one microbatch, from forward to backward."""
    loaded = load("llama-tiny", 1, "float64")
    return sum(kept_by_segment(bind(plan, traced_once(loaded.module, (), split_batch(loaded.kwargs, plan.residency.micro_batches)[0]).graph)))


@pytest.mark.parametrize("pins", [("tp=4",), ("dp=2", "tp=2", "zero=3"), ("pp=2", "tp=2", "schedule=1f1b")], ids=" ".join)
def test_what_was_gathered_is_gathered_again(pins: tuple[str, ...]) -> None:
    """Under sequence parallelism: fewer bytes kept, more sent by what is predicted, the same training."""
    loaded, cluster = load("llama-tiny", 1, "float64"), autopar.Cluster.local(4)
    for mode in ("selective", "full"):
        kept, again = (autopar.plan(loaded.module, cluster, loaded.kwargs, pins=(*pins, f"recompute={m}"), micro_batches=2) for m in (mode, f"{mode}+gather"))
        reports = [autopar.verify(loaded.module, plan, loaded.kwargs, steps=2) for plan in (kept, again)]
        assert all(report.equal for report in reports), str(reports)
        assert reports[1].bytes_counted > reports[0].bytes_counted
        assert kept_bytes(again) < kept_bytes(kept)
        # a product whose gathered result is kept is not computed again, but is where that is to be gathered again
        assert again.predicted.recomputed_flops >= kept.predicted.recomputed_flops and again.predicted.step_time_s > kept.predicted.step_time_s


class Mixing(nn.Module):
    """Attention with nothing after it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return x + F.scaled_dot_product_attention(q, k, v, dropout_p=0.2).transpose(1, 2).flatten(2)


class Mixed(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Mixing(width) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


def test_what_is_computed_again_ends_when_all_is_there() -> None:
    """In an attention that ends its block: with the probabilities, before they are multiplied with the values."""
    model, batch = Mixed(8, 3), (torch.randn(2, 6, 8),)
    counted, predicted = {}, {}
    for mode in MODES:
        plan = autopar.plan(model, autopar.Cluster.local(1), batch, pins=(f"recompute={mode}",))
        predicted[mode] = plan.predicted.recomputed_flops
        assert autopar.verify(model, plan, batch, steps=1).equal  # the model is traced: from now on it is not, or always
        with FlopCounterMode(display=False) as counter:
            assert autopar.verify(model, plan, batch, steps=1).equal
        counted[mode] = counter.get_total_flops()
    assert 0 < predicted["selective"] < predicted["full"]
    assert {mode: counted[mode] - counted["none"] for mode in MODES} == predicted


@pytest.mark.parametrize("ranks", (2, 3))
def test_parameters_that_no_even_cut_fits_are_sharded_too(ranks: int) -> None:
    """Prime widths: nothing divides by 2 or 3."""
    model = torch.nn.Sequential(torch.nn.Linear(7, 11), torch.nn.Tanh(), torch.nn.Linear(11, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))
    batch = (torch.randn(6 * ranks, 7),)
    for stage in STAGES:
        plan = autopar.plan(model, autopar.Cluster.local(ranks), batch, pins=(f"dp={ranks}", f"zero={stage}"))
        sharded = sum(p.numel() for n, p in model.named_parameters() if n in plan.residency.zero)
        assert stage == 0 or sharded >= 0.99 * sum(p.numel() for p in model.parameters())
        report = autopar.verify(model, plan, batch, steps=2)
        assert report.equal, str(report)


def test_unequal_token_counts_are_one_batch() -> None:
    """Half of the targets of one microbatch are ignored: its loss counts for less."""
    loaded = load("gpt2-tiny", 3, "float64")
    labels = loaded.kwargs["labels"].clone()
    labels[:4, 3:] = -100
    batch = loaded.kwargs | {"labels": labels}
    plan = autopar.plan(loaded.module, autopar.Cluster.local(2), batch, pins=("dp=2", "zero=2"), micro_batches=3)
    report = autopar.verify(loaded.module, plan, batch, steps=2)
    assert report.equal, str(report)


def test_frozen_parameters_are_sharded_and_not_trained() -> None:
    loaded = load_model("gpt2-tiny", batch=4, seq=12, device="cpu")
    for name, p in loaded.module.named_parameters():
        p.requires_grad_("ln_" in name)
    plan = autopar.plan(loaded.module, autopar.Cluster.local(2), loaded.kwargs, pins=("dp=2", "zero=3"))
    assert len(plan.residency.zero) == len(plan.params)
    report = autopar.verify(loaded.module, plan, loaded.kwargs, steps=2)
    assert report.equal, str(report)
