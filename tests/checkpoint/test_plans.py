"""On real processes: what is saved under one plan is what is loaded under another, and a run that goes on is the run that never stopped."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import autopar
from autopar.errors import CheckpointError
from autopar.models.load import load_model
from autopar.runtime.launch import Worker, launch

GPT2 = {"spec": "gpt2-tiny", "batch": 8, "seq": 12, "device": "cpu", "dtype": "float64"}
"""Fused projections, an embedding tied to the head, dropout."""

Run = tuple[nn.Module, torch.optim.Optimizer]


def whole(x: torch.Tensor) -> torch.Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def everything(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Parameters and optimizer state by name, gathered."""
    found = {name: whole(p.detach()).clone() for name, p in module.named_parameters(remove_duplicate=False)}
    for name, p in module.named_parameters(remove_duplicate=False):
        found |= {f"{name}.{key}": whole(x).clone() for key, x in optimizer.state[p].items()}
    return found


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(x, b[name]) for name, x in a.items())


def groups(module: nn.Module) -> list[dict[str, Any]]:
    """Decay for matrices only, as everybody does: two parameter groups."""
    matrices, others = [p for p in module.parameters() if p.dim() > 1], [p for p in module.parameters() if p.dim() <= 1]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0, "lr": 2e-3}]


def adamw(module: nn.Module, lr: float = 1e-3) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups(module), lr=lr, amsgrad=True)


def planned(pins: tuple[str, ...], seed: int = 5, dtype: str = "float64", **options: Any) -> Run:
    loaded = load_model(**GPT2 | {"dtype": dtype}, seed=seed)
    module = autopar.parallelize(loaded.module, autopar.Cluster.local(dist.get_world_size()), loaded.kwargs, pins=pins, seed=seed, **options)
    return module, adamw(module)


def step(run: Run) -> torch.Tensor:
    module, optimizer = run
    loss = module.train_step(load_model(**GPT2).kwargs)
    optimizer.step()
    optimizer.zero_grad()
    return loss


def save_and_reload(worker: Worker, folder: str) -> None:
    """dp4 -> tp2 x dp2 -> FSDP2 -> ZeRO-3 -> ZeRO-1 with offload -> tp4: after each load all is as it was after the save, bit by bit."""
    first = planned(("dp=4",))
    for _ in range(2):
        step(first)
    want, settings_before = everything(*first), first[1].state_dict()["param_groups"]
    autopar.save_checkpoint(folder, *first, {"step": 2, "pair": (1, float("inf")), "table": {3: [torch.arange(3)]}})

    second = planned(("tp=2", "dp=2"), seed=6)
    second[1].param_groups[0]["lr"] = 7.0
    state = autopar.load_checkpoint(folder, *second)
    assert same(everything(*second), want)
    assert second[1].state_dict()["param_groups"] == settings_before
    assert state["step"] == 2 and state["pair"] == (1, float("inf")) and torch.equal(state["table"][3][0], torch.arange(3))
    assert second[0].stream == first[0].stream and second[0].stream.seed == 5
    assert torch.allclose(step(second), step(first), rtol=1e-6)  # transformers computes the loss in float32
    autopar.save_checkpoint(folder, *second)
    want = everything(*second)

    plain = load_model(**GPT2, seed=7).module
    for block in plain.transformer.h:
        fully_shard(block, mesh=init_device_mesh("cpu", (4,)))
    third = plain, adamw(plain)
    assert autopar.load_checkpoint(folder, *third) is None
    assert sum(isinstance(p, DTensor) for p in plain.parameters()) > 10
    assert same(everything(*third), want)
    autopar.save_checkpoint(folder, *third, keep=1)

    for pins, options in ((("dp=4", "zero=3"), {}), (("dp=2", "tp=2", "zero=1"), {"offload": True}), (("tp=4",), {})):
        other = planned(pins, seed=8, **options)
        autopar.load_checkpoint(folder, *other)
        assert same(everything(*other), want)
        step(other)
        autopar.save_checkpoint(folder, *other, keep=1)
        want = everything(*other)
    worker.send({name: x.numpy() for name, x in want.items()})  # tensors would travel by a socket of this process, which ends


@pytest.mark.gloo
def test_saved_under_one_plan_loaded_under_another(tmp_path: Path) -> None:
    received: list[dict[str, Any]] = []
    launch(save_and_reload, 4, str(tmp_path), on_message=received.append)
    assert len(received) == 4 and len(list(tmp_path.iterdir())) == 1
    alone = load_model(**GPT2, seed=9).module
    optimizer = adamw(alone)
    autopar.load_checkpoint(tmp_path, alone, optimizer)
    assert same(everything(alone, optimizer), {name: torch.from_numpy(x) for name, x in received[0].items()})
    with pytest.raises(CheckpointError, match="parameter groups"):
        autopar.load_checkpoint(tmp_path, alone, torch.optim.AdamW(alone.parameters()))
    with pytest.raises(CheckpointError, match="was saved as float64.* and is float32"):
        autopar.load_checkpoint(tmp_path, alone.float())
    with pytest.raises(CheckpointError, match="has no parameter"):
        autopar.load_checkpoint(tmp_path, nn.Linear(2, 2))


def micro(run: Run, number: int) -> None:
    """One of the microbatches of a step; gradients are complete after the last."""
    module, _ = run
    kwargs = load_model(**GPT2, seed=number).kwargs
    if number < 3:
        with module.no_sync():
            module.train_step(kwargs)
    else:
        module.train_step(kwargs)


SAME = [(("dp=2",), "float64"), (("dp=2", "zero=1"), "float64"), (("dp=2", "zero=2"), "bfloat16"), (("dp=2", "zero=3"), "float64")]
OTHERS = [("dp=2", "zero=3"), ("tp=2",), ("dp=2", "zero=1")]


def resume_inside_a_step(worker: Worker, folder: str) -> None:
    """Saved between two microbatches. On the same plan the rest of the step gives the same bits, on another the same numbers."""
    for n, (pins, dtype) in enumerate(SAME):
        place = f"{folder}/{n}"
        calm = planned(pins, dtype=dtype)
        step(calm)
        for number in (1, 2):
            micro(calm, number)
        autopar.save_checkpoint(place, *calm, {"microbatch": 2})
        micro(calm, 3)
        calm[1].step()
        want = everything(*calm)
        for others in (pins, OTHERS[n % len(OTHERS)]):
            run = planned(others, seed=6, dtype=dtype)
            micro(run, 1)  # what was there before does not matter
            assert autopar.load_checkpoint(place, *run) == {"microbatch": 2}
            micro(run, 3)
            run[1].step()
            found, tolerance = everything(*run), 1e-9 if dtype == "float64" else 1e-1
            assert same(found, want) if others == pins else all(torch.allclose(x, want[name], rtol=tolerance, atol=1e-3 * tolerance) for name, x in found.items())
            assert run[0].stream == calm[0].stream
    worker.send(True)


@pytest.mark.gloo
def test_going_on_inside_an_accumulation(tmp_path: Path) -> None:
    received: list[bool] = []
    launch(resume_inside_a_step, 2, str(tmp_path), on_message=received.append)
    assert received == [True, True]


def uneven(worker: Worker, folder: str) -> None:
    """Three ranks, which divide no size: the last hold less, or nothing."""
    loaded = load_model("mlp-tiny", batch=9, device="cpu", dtype="float32")
    module = autopar.parallelize(loaded.module, autopar.Cluster.local(3), loaded.kwargs, pins=["dp=3", "zero=3"])
    assert len({p.to_local().shape for p in module.parameters()}) > 1
    optimizer = torch.optim.AdamW(module.parameters())
    module.train_step(loaded.kwargs)
    optimizer.step()
    autopar.save_checkpoint(folder, module, optimizer)
    want = everything(module, optimizer)
    module.train_step(loaded.kwargs)
    optimizer.step()
    autopar.load_checkpoint(folder, module, optimizer)
    assert same(everything(module, optimizer), want)
    worker.send({name: x.numpy() for name, x in want.items()})


@pytest.mark.gloo
def test_uneven_parts(tmp_path: Path) -> None:
    received: list[dict[str, Any]] = []
    launch(uneven, 3, str(tmp_path), on_message=received.append)
    alone = load_model("mlp-tiny", batch=9, device="cpu", dtype="float32", seed=3).module
    optimizer = torch.optim.AdamW(alone.parameters())
    autopar.load_checkpoint(tmp_path, alone, optimizer)
    assert same(everything(alone, optimizer), {name: torch.from_numpy(x) for name, x in received[0].items()})


def fail_on_one(worker: Worker, folder: str) -> None:
    """A failure of one rank is a failure of all, at once, and leaves what was there."""
    run = planned(("dp=2",))
    autopar.save_checkpoint(folder, *run, {"good": True})
    bad = {"x": torch.zeros(1, dtype=torch.complex128)} if worker.rank == 1 else {}
    with pytest.raises(CheckpointError, match="rank 1: .*complex128"):
        autopar.save_checkpoint(folder, *run, bad)
    newest = max(Path(folder).glob("checkpoint-*[0-9]"))
    dist.barrier()
    if worker.rank == 0:
        damaged = newest.with_name("checkpoint-00000009")
        damaged.mkdir()
        for file in newest.iterdir():
            (damaged / file.name).write_bytes(file.read_bytes())
        data = (damaged / "rank-00001.safetensors").read_bytes()
        (damaged / "rank-00001.safetensors").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    dist.barrier()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert autopar.load_checkpoint(folder, *run) == {"good": True}
    worker.send([str(w.message) for w in seen if "passed over" in str(w.message)])


@pytest.mark.gloo
def test_failures_reach_all_ranks(tmp_path: Path) -> None:
    received: list[list[str]] = []
    launch(fail_on_one, 2, str(tmp_path), on_message=received.append)
    assert len(received) == 2 and all(len(texts) == 1 and "checkpoint-00000009" in texts[0] for texts in received)
