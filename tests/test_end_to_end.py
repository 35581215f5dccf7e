"""Whole models through the whole path: planned, rewritten, run on a simulated mesh and compared with one process."""

import dataclasses

import pytest
import torch

import autopar
from autopar.core.mesh import Mesh
from autopar.core.plan import Plan
from autopar.models.load import LoadedModel, load_model

MODELS = ("gpt2-tiny", "llama-tiny", "bert-tiny", "t5-tiny", "vit-tiny", "mlp-tiny", "alexnet-tiny", "dlrm-tiny")
FORCED = (("dp=2", 2), ("tp=2", 2), ("dp=3", 3), ("tp=3", 3), ("dp=2,tp=2", 4), ("dp=2,tp=4", 8))
DROPOUT_FIELDS = {
    "gpt2-tiny": ("resid_pdrop", "embd_pdrop", "attn_pdrop"),
    "llama-tiny": ("attention_dropout",),
    "bert-tiny": ("hidden_dropout_prob", "attention_probs_dropout_prob"),
    "t5-tiny": ("dropout_rate",),
    "vit-tiny": ("hidden_dropout_prob", "attention_probs_dropout_prob"),
    "alexnet-tiny": ("dropout",),
}


def load(name: str, *, dropout: bool = False) -> LoadedModel:
    """A tiny model with a batch that 2, 3, 4 and 8 divide; some targets are ignored."""
    torch.set_num_threads(1)
    overrides = {field: 0.1 if dropout else 0.0 for field in DROPOUT_FIELDS.get(name, ())}
    return load_model(name, batch=24, seq=12, device="cpu", overrides=overrides, ragged=name == "gpt2-tiny")


def compute_bound(num_devices: int) -> autopar.Cluster:
    """A made-up machine on which sharing the work always pays, so that the searched plan of a tiny model is not trivial."""
    local = autopar.Cluster.local(num_devices)
    device = dataclasses.replace(local.device, peak_flops_per_s=(("float32", 1e6),), memory_bytes_per_s=1e6, kernel_launch_s=0.0)
    link = dataclasses.replace(local.intra_node, latency_s=1e-6, bandwidth_bytes_per_s=1e8)
    return dataclasses.replace(local, device=device, intra_node=link, name=f"slow:{num_devices}")


def prove(loaded: LoadedModel, plan: Plan, dtype: str = "float64") -> None:
    report = autopar.verify(loaded.module, plan, loaded.kwargs, steps=3, dtype=dtype)
    assert report.equal, str(report)
    assert report.bytes_predicted == report.bytes_counted
    assert report.ops_without_rule == ()


@pytest.mark.parametrize("pins,num_ranks", FORCED, ids=[pins for pins, _ in FORCED])
@pytest.mark.parametrize("name", MODELS)
def test_forced_plans_are_equal(name: str, pins: str, num_ranks: int) -> None:
    loaded = load(name)
    plan = autopar.plan(loaded.module, autopar.Cluster.local(num_ranks), loaded.kwargs, pins=[pins])
    prove(loaded, plan)


@pytest.mark.parametrize("name", MODELS)
def test_float32_is_equal(name: str) -> None:
    loaded = load(name)
    prove(loaded, autopar.plan(loaded.module, autopar.Cluster.local(4), loaded.kwargs, pins=["dp=2", "tp=2"]), "float32")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("sizes", [(4,), (2, 2, 2)], ids=str)
def test_searched_plans_are_equal(name: str, sizes: tuple[int, ...]) -> None:
    loaded = load(name)
    mesh = Mesh.of(**{f"x{i}": n for i, n in enumerate(sizes)})
    plan = autopar.plan(loaded.module, compute_bound(mesh.num_ranks), loaded.kwargs, mesh=mesh)
    assert plan.predicted.communicated_bytes > 0
    prove(loaded, plan)


@pytest.mark.parametrize("name", sorted(DROPOUT_FIELDS))
def test_dropout_draws_the_same_bits_on_any_mesh(name: str) -> None:
    loaded = load(name, dropout=True)
    for pins, num_ranks in (("dp=2,tp=2", 4), ("tp=3", 3)):
        prove(loaded, autopar.plan(loaded.module, autopar.Cluster.local(num_ranks), loaded.kwargs, pins=[pins]))
