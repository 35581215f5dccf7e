"""State sharding on real processes: stages, recomputation, microbatches, master copies, offload and frozen parameters train like one
process of plain PyTorch: losses, norms before clipping, parameters; and every step communicates what was predicted."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

import autopar
from autopar.models.load import LoadedModel, load_model
from autopar.runtime.launch import Worker, launch

STEPS = 3
TOLERANCE = {"float64": 1e-5, "bfloat16": 3e-2}
"""Relative. The language models compute their loss in float32 whatever they are given; a bfloat16 carries 8 bits."""

MAX_NORM = 0.5


@dataclass(frozen=True, kw_only=True)
class Case:
    """`trained`: the part of their names that trained parameters have in common; `width`: of a model that has one."""

    model: str
    pins: tuple[str, ...]
    micro_batches: int = 1
    dtype: str = "float64"
    offload: bool = False
    trained: str = ""
    width: int = 0

    def load(self) -> LoadedModel:
        """A batch whose rows have unequal numbers of targets where the model has tokens, so that microbatches and ranks have too."""
        overrides = {"width": self.width} if self.width else None
        loaded = load_model(self.model, batch=12, seq=12, device="cpu", dtype=self.dtype, ragged="mlp" not in self.model, overrides=overrides)
        for name, p in loaded.module.named_parameters():
            p.requires_grad_(self.trained in name)
        return loaded


WIDE = 512
"""Weights of 2 MiB, which travel without company and without a copy."""

CASES = {
    2: (
        Case(model="gpt2-tiny", pins=("dp=2", "zero=0"), micro_batches=3),
        Case(model="gpt2-tiny", pins=("dp=2", "zero=1"), micro_batches=3),
        Case(model="gpt2-tiny", pins=("dp=2", "zero=2", "recompute=full"), micro_batches=3),
        Case(model="llama-tiny", pins=("dp=2", "zero=3", "recompute=selective"), micro_batches=3),
        Case(model="mlp-tiny", pins=("dp=2", "zero=1"), dtype="bfloat16"),
        Case(model="llama-tiny", pins=("dp=2", "zero=3", "recompute=full"), micro_batches=3, dtype="bfloat16"),
        Case(model="gpt2-tiny", pins=("dp=2", "zero=0"), offload=True),
        Case(model="gpt2-tiny", pins=("dp=2", "zero=3"), micro_batches=3, offload=True),
        Case(model="mlp-tiny", pins=("dp=2", "zero=2"), dtype="bfloat16", offload=True),
        Case(model="gpt2-tiny", pins=("dp=2", "zero=3", "recompute=full"), trained="ln_"),
        Case(model="gpt2-tiny", pins=("dp=2", "zero=1"), micro_batches=3, trained="mlp"),
        Case(model="mlp-tiny", pins=("dp=2", "zero=0"), width=WIDE),
        Case(model="mlp-tiny", pins=("dp=2", "zero=1"), width=WIDE),
        Case(model="mlp-tiny", pins=("dp=2", "zero=2"), micro_batches=3, width=WIDE),
        Case(model="mlp-tiny", pins=("dp=2", "zero=1"), dtype="bfloat16", width=2 * WIDE),
        Case(model="mlp-tiny", pins=("dp=2", "zero=1"), offload=True, width=WIDE),
    ),
    4: (
        Case(model="gpt2-tiny", pins=("dp=2", "tp=2", "zero=1"), micro_batches=3, dtype="bfloat16"),
        Case(model="gpt2-tiny", pins=("dp=2", "tp=2", "zero=2", "recompute=selective"), offload=True),
        Case(model="llama-tiny", pins=("dp=2", "tp=2", "zero=3", "recompute=full"), micro_batches=3),
        Case(model="llama-tiny", pins=("dp=2", "tp=2", "zero=3", "recompute=full+gather"), micro_batches=3),
        Case(model="llama-tiny", pins=("tp=4", "recompute=selective+gather")),
        Case(model="gpt2-tiny", pins=("dp=4", "zero=3")),
        Case(model="mlp-tiny", pins=("dp=4", "zero=1"), width=WIDE),
    ),
}

Trained = tuple[list[tuple[float, float]], dict[str, np.ndarray]]
"""(loss, norm before clipping) of every step, and the parameters after the last."""


def optimizer_of(params: Iterator[nn.Parameter] | list[nn.Parameter]) -> torch.optim.Optimizer:
    """With an eps that keeps gradients of nothing but rounding (a key bias) from being blown up."""
    return torch.optim.AdamW(params, lr=1e-3, eps=1e-3)


def one_process(case: Case) -> Trained:
    """Plain PyTorch, the whole batch at once; 16-bit weights are updated through float32 copies."""
    loaded = case.load()
    dtype = getattr(torch, case.dtype)
    kept = {
        name: nn.Parameter(p.detach().float() if case.dtype == "bfloat16" else p.detach().clone(), p.requires_grad) for name, p in loaded.module.named_parameters()
    }
    optimizer = optimizer_of([p for p in kept.values() if p.requires_grad])
    found = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        out = torch.func.functional_call(loaded.module, {name: p.to(dtype) for name, p in kept.items()}, kwargs=loaded.kwargs, tie_weights=True)
        loss = out if isinstance(out, torch.Tensor) else out.loss
        loss.backward()
        norm = nn.utils.clip_grad_norm_(kept.values(), MAX_NORM)
        optimizer.step()
        found.append((float(loss.detach()), float(norm)))
    return found, {name: p.detach().numpy() for name, p in kept.items()}


def train(worker: Worker, cases: tuple[Case, ...]) -> None:
    """One rank: the same steps for every case, on parameters that are DTensors."""
    for number, case in enumerate(cases):
        loaded = case.load()
        model = autopar.parallelize(
            loaded.module, autopar.Cluster.local(worker.num_ranks), loaded.kwargs, pins=case.pins, micro_batches=case.micro_batches, offload=case.offload
        )
        optimizer = optimizer_of([p for p in model.parameters() if p.requires_grad])
        found = []
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss = model.train_step(loaded.kwargs)
            assert model.counted() == model.predicted, case
            norm: Any = nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
            optimizer.step()
            found.append((float(loss), float(norm.full_tensor() if isinstance(norm, DTensor) else norm)))
        whole = {name: p.detach().full_tensor().numpy() for name, p in model.named_parameters()}
        worker.send((number, worker.rank, (found, whole if worker.rank == 0 else {})))


@pytest.mark.gloo
@pytest.mark.parametrize("num_ranks", CASES)
def test_trains_like_one_process(num_ranks: int) -> None:
    received: dict[tuple[int, int], Trained] = {}
    cases = CASES[num_ranks]
    launch(train, num_ranks, cases, on_message=lambda message: received.update({message[:2]: message[2]}), preload=("autopar.api", "transformers.modeling_utils"))
    assert len(received) == len(cases) * num_ranks
    for number, case in enumerate(cases):
        expected, parameters = one_process(case)
        limit = TOLERANCE[case.dtype]
        for rank in range(num_ranks):
            assert np.allclose(received[number, rank][0], expected, rtol=limit, atol=0.0), (case, received[number, rank][0], expected)
        for name, p in received[number, 0][1].items():
            error = np.linalg.norm(p - parameters[name]) / max(np.linalg.norm(parameters[name]), 1e-2)
            assert error < limit, (case, name)
