"""Recomputation: what a deep network keeps for its backward, and what it costs not to.

    python examples/recompute.py [--blocks 10] [--hidden 256] [--seq 128]

10 blocks of written-out attention and MLP, data parallel on 2 processes, each mode forced for every block:

none       everything stays that the backward reads.
selective  results of contractions with weights stay; attention's scores and everything elementwise are computed again.
           (Korthikanti et al. 2022, https://arxiv.org/abs/2205.05198, section 5.)
full       only the input of a block stays. (Chen et al. 2016, https://arxiv.org/abs/1604.06174.)

kept       Bytes of all tensors that the forward made and that are alive when the backward begins, counted on rank 0.
extra      Flops beyond those of mode none: by torch's FlopCounterMode, and as the plan predicts.
equal      Largest relative difference of losses and parameters to plain PyTorch in one process.
"""

import argparse
import math
import warnings
from dataclasses import dataclass

import torch
from resident import Made, worst_difference
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import autopar
from autopar.core.residency import MODES
from autopar.runtime.launch import Worker, launch

LEARNING_RATE = 1e-4
LEAST_SAVING = 0.70
"""Of full recomputation, in kept bytes."""


@dataclass(frozen=True)
class Settings:
    blocks: int = 10
    hidden: int = 256
    heads: int = 8
    seq: int = 128
    batch: int = 8
    vocab: int = 256
    processes: int = 2
    steps: int = 2

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return AttentionNet(self)

    def batches(self) -> list[dict[str, Tensor]]:
        """Random tokens; what is to be predicted is the next one."""
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(self.vocab, (self.steps, self.batch, self.seq + 1), generator=generator)
        return [{"tokens": row[:, :-1], "following": row[:, 1:]} for row in tokens]


@dataclass(frozen=True)
class Row:
    """What one mode was measured to do, on rank 0."""

    mode: str
    kept_bytes: int
    flops: int
    recomputed_flops: float
    difference: float


class Block(nn.Module):
    """Pre-norm attention and MLP: [batch, seq, hidden] -> the same."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.q, self.k, self.v, self.o = (nn.Linear(hidden, hidden) for _ in range(4))
        self.up, self.down = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (part(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        scores = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1)
        x = x + self.o((scores @ v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class AttentionNet(nn.Module):
    """Tokens [batch, seq] -> mean loss of the tokens that follow."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.embed = nn.Embedding(settings.vocab, settings.hidden)
        self.blocks = nn.ModuleList(Block(settings.hidden, settings.heads) for _ in range(settings.blocks))
        self.head = nn.Linear(settings.hidden, settings.vocab)

    def forward(self, tokens: Tensor, following: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), following.flatten())


def train_alone(settings: Settings) -> tuple[list[float], dict[str, Tensor]]:
    """Plain PyTorch: losses, and the parameters after all steps."""
    model = settings.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9)
    losses = []
    for batch in settings.batches():
        optimizer.zero_grad()
        loss = model(**batch)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, {name: p.detach() for name, p in model.named_parameters()}


def measure(worker: Worker, settings: Settings, plans: list[str]) -> None:
    """What one rank does: train by every plan in turn. Rank 0 sends a `Row` for each."""
    warnings.simplefilter("ignore")
    expected = train_alone(settings) if worker.rank == 0 else None
    batches = settings.batches()
    for mode, text in zip(MODES, plans, strict=True):
        plan = autopar.Plan.from_json(text)
        model = autopar.parallelize(settings.model(), autopar.Cluster.local(settings.processes), batches[0], plan=plan)
        optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9)
        losses, kept, flops = [], 0, 0
        for batch in batches:
            optimizer.zero_grad()
            with FlopCounterMode(display=False) as counter:
                with Made() as forward:
                    loss = model(**batch)
                kept = forward.alive_bytes
                loss.backward()
            flops = counter.get_total_flops()
            optimizer.step()
            losses.append(float(loss.detach()))
        whole = {name: p.detach().full_tensor() for name, p in model.named_parameters()}
        if expected is not None:
            worker.send(Row(mode, kept, flops, plan.predicted.recomputed_flops, worst_difference(losses, whole, *expected)))


def run(settings: Settings) -> list[Row]:
    """Plan once for every mode, then train by all plans on the same processes."""
    with torch.device("meta"):
        model, batch = settings.model(), settings.batches()[0]
    cluster = autopar.Cluster.local(settings.processes)
    plans = [autopar.plan(model, cluster, batch, pins=(f"dp={settings.processes}", f"recompute={mode}")).to_json() for mode in MODES]
    rows: list[Row] = []
    launch(measure, settings.processes, settings, plans, on_message=rows.append, preload=("autopar.api",))
    return rows


def main(settings: Settings) -> None:
    print(f"{settings.blocks} blocks of hidden {settings.hidden}, seq {settings.seq}, batch {settings.batch} on {settings.processes} processes")
    print("mode             kept    saved    extra flops: counted    predicted    difference to one process")
    rows = run(settings)
    for row in rows:
        saved = 1 - row.kept_bytes / rows[0].kept_bytes
        print(f"{row.mode:<10}{row.kept_bytes / 2**20:7.1f} MiB {saved:8.1%} {row.flops - rows[0].flops:23,} {row.recomputed_flops:12,.0f}    {row.difference:.1e}")
    saved = 1 - rows[-1].kept_bytes / rows[0].kept_bytes
    print(f"full recomputation saves {saved:.1%} of the kept bytes (expected: at least {LEAST_SAVING:.0%})")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in Settings.__dataclass_fields__:
        parser.add_argument(f"--{name}", type=int, default=getattr(Settings(), name), metavar="N")
    main(Settings(**vars(parser.parse_args())))
