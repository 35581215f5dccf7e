"""The training that `autopar run` does twice: on N processes by a plan, and in one process of plain PyTorch."""

import math
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from autopar.api import parallelize
from autopar.core.mixed import parse_machines
from autopar.core.plan import Plan
from autopar.errors import UsageError
from autopar.models.load import LoadedModel, load_model
from autopar.runtime.launch import Worker

TOKEN_INPUTS = ("input_ids", "inputs")
PRELOAD = ("autopar.api", "torch._export.non_strict_utils", "transformers.modeling_utils")
"""What every rank imports before its first step, once for all: half of a short run is imports."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training run as plain data, the same for every rank. `text` is what the tokens are read from, None for random batches."""

    model: str
    cluster: str
    plan: str
    batch: int
    seq: int | None
    dtype: str = "float32"
    steps: int
    lr: float
    seed: int
    train: bool
    text: bytes | None

    def load(self) -> LoadedModel:
        """The model with weights, the same in every process that asks."""
        return load_model(self.model, batch=self.batch, seq=self.seq, device="cpu", dtype=self.dtype, train=self.train, seed=self.seed)

    def batches(self, loaded: LoadedModel) -> Iterator[dict[str, Any]]:
        """One global batch per step: windows of the text at random places, or the one random batch of a model without tokens."""
        name = token_input(loaded)
        for step in range(self.steps):
            if self.text is None or name is None:
                yield dict(loaded.kwargs)
                continue
            rows, length = _shape(loaded, name)
            window = _windows(self.text, rows, length + 1, self.seed + step) % vocabulary(loaded)
            ids, following = window[:, :-1].contiguous(), window[:, 1:].contiguous()
            yield loaded.kwargs | {name: ids, "labels": following if name == "inputs" else ids.clone()}

    def optimizer(self, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in params if p.requires_grad], lr=self.lr)


def token_input(loaded: LoadedModel) -> str | None:
    """The argument that takes token ids beside labels of the same shape; None where the model reads no text."""
    if loaded.labels_kind != "token":
        return None
    return next((name for name in TOKEN_INPUTS if len(_shape(loaded, name)) == 2 and _shape(loaded, name) == _shape(loaded, "labels")), None)


def _shape(loaded: LoadedModel, name: str) -> tuple[int, ...]:
    value = loaded.kwargs.get(name)
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def vocabulary(loaded: LoadedModel) -> int:
    """How many token ids a byte can become; one beyond the vocabulary is folded back into it."""
    size = next(m.num_embeddings for m in loaded.module.modules() if isinstance(m, nn.Embedding))
    return min(256, size)


def _windows(text: bytes, rows: int, length: int, seed: int) -> torch.Tensor:
    """int64 [rows, length]: stretches of the text, from where a generator says."""
    if len(text) < length:
        raise UsageError(f"the text has {len(text)} bytes, one sequence needs {length}; give a longer one or a smaller --seq")
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    starts = torch.randint(len(text) - length + 1, (rows,), generator=torch.Generator().manual_seed(seed))
    return torch.stack([data[start : start + length] for start in starts.tolist()]).long()


def draws_random_numbers(module: nn.Module) -> bool:
    """Whether a forward in training mode throws dice; then plain PyTorch throws others than ranks that share one stream."""
    for part in module.modules():
        for name, value in vars(part).items():
            if isinstance(value, float) and value > 0 and ("drop" in name or (name == "p" and "Drop" in type(part).__name__)):
                return True
    return False


def on_one_process(job: Job, progress: Callable[[str], None]) -> list[float]:
    """The losses of plain PyTorch; 16-bit weights are updated through float32 copies."""
    loaded = job.load()
    kept = master_copies(loaded.module) if job.dtype == "bfloat16" else {}
    optimizer = job.optimizer(kept.values() or loaded.module.parameters())
    losses = []
    for step, batch in enumerate(job.batches(loaded), start=1):
        progress(f"one process, step {step} of {job.steps}")
        optimizer.zero_grad()
        loss = loss_of(functional_call(loaded.module, {name: p.bfloat16() for name, p in kept.items()}, kwargs=batch, tie_weights=True))
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def master_copies(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(p.detach().float(), p.requires_grad) for name, p in module.named_parameters()}


def loss_of(output: Any) -> torch.Tensor:
    """The scalar that a model returns as its loss, alone, first or by name."""
    loss = output if isinstance(output, torch.Tensor) else getattr(output, "loss", None)
    loss = output[0] if loss is None and isinstance(output, tuple) else loss
    if not isinstance(loss, torch.Tensor) or loss.dim() != 0:
        raise UsageError("the model returns no scalar loss to train on; give it labels, or return the loss first")
    return loss


def on_rank(worker: Worker, job: Job) -> None:
    """One rank of the parallel run; rank 0 sends the loss of every step."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # as in the process that started it
    loaded = job.load()
    module = parallelize(loaded.module, parse_machines(job.cluster), loaded.kwargs, plan=Plan.from_json(job.plan), seed=job.seed)
    optimizer = job.optimizer(module.parameters())
    for batch in job.batches(loaded):
        optimizer.zero_grad()
        loss = float(module.train_step(batch))
        optimizer.step()
        if worker.rank == 0:
            worker.send(loss)


def difference(found: float, expected: float) -> float:
    """Relative; 0 where both are not finite, since then there is nothing left to compare."""
    if not math.isfinite(found) and not math.isfinite(expected):
        return 0.0
    error = abs(found - expected) / max(abs(expected), 1e-30)
    return error if math.isfinite(error) else math.inf
