"""Real processes over gloo: the emitted module trains like the model, with stock optimizers and clipping."""

from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

import autopar
from autopar.core.mesh import Mesh
from autopar.models.load import LoadedModel, load_model
from autopar.runtime.distributed import connect, device_mesh, group_of
from autopar.runtime.launch import Worker, launch

STEPS = 3


def load(name: str) -> LoadedModel:
    """A tiny model without dropout: torch's own draws are not those of the emitted program."""
    overrides = {"dropout": 0.0} if name == "alexnet-tiny" else None
    return load_model(name, batch=8, seq=12, device="cpu", dtype="float64", overrides=overrides)


def one_process(name: str) -> list[tuple[float, float]]:
    """(loss, gradient norm before clipping) of each step."""
    loaded = load(name)
    optimizer = torch.optim.AdamW(loaded.module.parameters(), lr=1e-3)
    found = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = loaded.module(**loaded.kwargs)
        loss = loss if isinstance(loss, torch.Tensor) else loss.loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(loaded.module.parameters(), 0.5)
        optimizer.step()
        found.append((float(loss.detach()), float(norm)))
    return found


def train(worker: Worker, name: str, pins: list[str]) -> None:
    """One rank: the same steps as `one_process`, on parameters that are DTensors."""
    torch.set_num_threads(1)
    loaded = load(name)
    model = autopar.parallelize(loaded.module, autopar.Cluster.local(worker.num_ranks), loaded.kwargs, pins=pins)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    assert set(dict(model.named_parameters())) <= set(dict(loaded.module.named_parameters(remove_duplicate=False)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    found = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = model.train_step(loaded.kwargs)
        norm: Any = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        found.append((float(loss), float(norm.full_tensor() if isinstance(norm, DTensor) else norm)))
    worker.send((worker.rank, found))


@pytest.mark.gloo
@pytest.mark.parametrize(
    "name,pins,num_ranks",
    [("gpt2-tiny", ["dp=2"], 2), ("llama-tiny", ["dp=2", "tp=2"], 4), ("t5-tiny", ["tp=2"], 2), ("transformer-tiny", ["tp=4"], 4), ("alexnet-tiny", ["dp=2"], 2)],
    ids=str,
)
def test_processes_train_like_one(name: str, pins: list[str], num_ranks: int) -> None:
    expected = one_process(name)
    received: list[tuple[int, list[tuple[float, float]]]] = []
    launch(train, num_ranks, name, pins, on_message=received.append)
    assert sorted(rank for rank, _ in received) == list(range(num_ranks))
    for _, found in received:
        assert torch.allclose(torch.tensor(found, dtype=torch.float64), torch.tensor(expected, dtype=torch.float64), rtol=1e-6)


def accumulate(worker: Worker) -> None:
    """Two halves of a batch, the first without reduction, have the gradient of the sum; collectives run once."""
    torch.set_num_threads(1)
    loaded = load_model("mlp-tiny", batch=8, device="cpu", dtype="float64")
    model = autopar.parallelize(loaded.module, autopar.Cluster.local(2), loaded.kwargs, pins=["dp=2"])
    model.train_step(loaded.kwargs)
    once = model._rank.counter.ledger
    whole = {n: p.grad.full_tensor() for n, p in model.named_parameters()}
    model.zero_grad()
    model._rank.counter.reset()
    with model.no_sync():
        model.train_step(loaded.kwargs)
    local_only = model._rank.counter.ledger
    model.train_step(loaded.kwargs)
    for name, p in model.named_parameters():
        assert torch.allclose(p.grad.full_tensor(), 2 * whole[name], rtol=1e-12)
    gradient = dict(once.input_bytes)[("all_reduce", "dp", 2)]
    twice = dict(model._rank.counter.ledger.input_bytes)[("all_reduce", "dp", 2)]
    held_back = dict(local_only.input_bytes).get(("all_reduce", "dp", 2), 0)
    assert once == model._program.ledger
    parameters = sum(p.numel() * 8 for p in model.parameters())
    assert gradient >= parameters and twice - gradient == held_back == gradient - parameters


@pytest.mark.gloo
def test_accumulated_gradients_are_reduced_once() -> None:
    launch(accumulate, 2)


def connect_twice(worker: Worker) -> None:
    mesh = Mesh.of(dp=2, tp=1)
    first, second = (connect(mesh, [(0, 1)], torch.device("cpu")) for _ in range(2))
    assert {name: x.group for name, x in first.exchanges.items()} == {name: x.group for name, x in second.exchanges.items()}
    assert group_of((0, 1), "up") is group_of((0, 1), "up") is not group_of((0, 1), "down")
    assert device_mesh(mesh, torch.device("cpu")) is device_mesh(mesh, torch.device("cpu"))
    for names in (("dp", "tp"), ("pp", "idle")):
        torch_mesh = device_mesh(Mesh.of(**dict(zip(names, mesh.sizes))), torch.device("cpu"))
        assert [torch_mesh.get_group(name) for name in names] == [first.exchanges[name].group for name in mesh.names]


@pytest.mark.gloo
def test_modules_share_their_groups() -> None:
    launch(connect_twice, 2)


def from_meta(worker: Worker) -> None:
    """A meta model is initialised shard by shard to the same values on any mesh."""
    loaded = load_model("llama-tiny", batch=8, seq=12, device="meta")
    shapes = {k: torch.zeros(v.shape, dtype=v.dtype) for k, v in loaded.kwargs.items()}
    sums = []
    for pins in (["dp=2"], ["tp=2"]):
        model = autopar.parallelize(loaded.module, autopar.Cluster.local(2), shapes, pins=pins, seed=3)
        sums.append({n: p.full_tensor() for n, p in model.named_parameters()})
        assert torch.isfinite(model.train_step(shapes))
    for name, value in sums[0].items():
        assert torch.equal(value, sums[1][name]), name
    worker.send(float(sums[0]["model.layers.0.self_attn.q_proj.weight"].std()))


@pytest.mark.gloo
def test_meta_models_are_initialised_alike_on_any_mesh() -> None:
    received: list[float] = []
    launch(from_meta, 2, on_message=received.append)
    assert all(0.01 < spread < 0.03 for spread in received)
