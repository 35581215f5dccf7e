"""Random models: a pool of tensors grown by random steps and ended by a random loss. A seed names a model for good."""

import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tests.steps import STEPS, Sizes

VOCAB = 24


class RandomModel(nn.Module):
    """`forward(ids, labels, features)` -> loss, or (loss, last tensor). Built on the meta device."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        rng = random.Random(seed)
        self.d = d = Sizes(rng.choice([4, 6, 12]), rng.choice([4, 6, 12]), 24, rng.choice([4, 6]))
        self.plan: list[tuple[str, tuple[int, ...]]] = []
        self.steps = nn.ModuleList()
        with torch.device("meta"):
            self.embed = nn.Embedding(VOCAB, d.hidden, padding_idx=rng.choice([None, 3]))
            self.position = nn.Parameter(torch.empty(d.seq, d.hidden))
            for name in rng.choices(sorted(STEPS), k=rng.randint(6, 11)):
                inputs, make = STEPS[name]
                have = len(self.plan) + 2
                self.plan.append((name, tuple(rng.choices(range(have), [1.5**i for i in range(have)], k=inputs))))
                self.steps.append(make(rng, d))
            self.head = nn.Linear(d.hidden, VOCAB, bias=rng.random() < 0.5)
            if rng.random() < 0.5:
                self.head.weight = self.embed.weight
        self.loss, self.smoothing = rng.choice(["cross_entropy", "cross_entropy", "mse", "bce", "both"]), rng.choice([0.0, 0.1])
        self.reduction, self.with_output = rng.choice(["mean", "sum"]), rng.random() < 0.5
        for parameter in self.parameters():
            parameter.requires_grad_(rng.random() < 0.85)
        self.embed.weight.requires_grad_(True)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor, features: torch.Tensor) -> Any:
        pool = [self.embed(ids) + self.position, features * self.position]
        for (_, inputs), module in zip(self.plan, self.steps):
            pool.append(module(*(pool[i] for i in inputs)))
        used = {i for _, inputs in self.plan for i in inputs}
        last = sum(torch.tanh(x) for i, x in enumerate(pool) if i not in used)
        loss = self._loss(last, labels, features)
        return (loss, last) if self.with_output else loss

    def _loss(self, last: torch.Tensor, labels: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        loss = last.square().mean()
        if self.loss in ("cross_entropy", "both"):
            logits = self.head(last).flatten(0, 1)
            loss = loss + F.cross_entropy(logits, labels.flatten(), label_smoothing=self.smoothing, reduction=self.reduction)
        if self.loss in ("mse", "both"):
            loss = loss + F.mse_loss(last, features, reduction=self.reduction) + F.smooth_l1_loss(last, features)
        if self.loss == "bce":
            loss = loss + F.binary_cross_entropy_with_logits(last.mean(-1), (labels > 9).to(last.dtype))
        return loss

    def describe(self) -> str:
        """The steps with their inputs, for messages."""
        return f"{self.d} {self.loss} " + " ".join(f"{i + 2}={name}{list(inputs)}" for i, (name, inputs) in enumerate(self.plan))

    def inputs(self, seed: int) -> dict[str, torch.Tensor]:
        """A batch whose targets are ignored unevenly: all of the first sequence, and some of the others."""
        gen, d = torch.Generator().manual_seed(seed), self.d
        labels = torch.randint(0, VOCAB, (d.batch, d.seq), generator=gen)
        labels[0] = -100
        labels[:, -1] = -100
        features = torch.randn((d.batch, d.seq, d.hidden), generator=gen)
        return {"ids": torch.randint(0, VOCAB, (d.batch, d.seq), generator=gen), "labels": labels, "features": features}
