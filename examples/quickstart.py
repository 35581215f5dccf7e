"""GPT-2 at its real width on four processes: planned, shown, proven, and trained on text beside one process.

    python examples/quickstart.py [TEXT]

Layers are few, so that it ends within two minutes on two cores; hidden size, heads and vocabulary are those of GPT-2.
"""

import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

import autopar
from autopar.errors import AutoparError
from autopar.runtime.launch import Worker, launch

try:
    from transformers import GPT2Config, GPT2LMHeadModel, logging
except ImportError:
    sys.exit("quickstart: transformers is not installed; pip install transformers")


@dataclass(frozen=True)
class Settings:
    """What is trained. The proof computes in float64 on all ranks of one process, so it gets less of everything but width."""

    text: bytes
    processes: int = 4
    hidden: int = 768
    heads: int = 12
    vocab: int = 50257
    layers: int = 2
    batch: int = 8
    seq: int = 64
    steps: int = 10
    lr: float = 1e-3

    def model(self, *, layers: int, vocab: int) -> GPT2LMHeadModel:
        """The same weights wherever it is called; on the meta device shapes only."""
        torch.manual_seed(0)
        config = GPT2Config(
            n_embd=self.hidden, n_head=self.heads, n_layer=layers, vocab_size=vocab, bos_token_id=vocab - 1, eos_token_id=vocab - 1,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
        return GPT2LMHeadModel(config)

    def batches(self) -> Iterator[dict[str, torch.Tensor]]:
        """One global batch per step, equal on all ranks: stretches of the text, a byte a token."""
        data = torch.frombuffer(bytearray(self.text), dtype=torch.uint8).long()
        generator = torch.Generator().manual_seed(0)
        for _ in range(self.steps):
            starts = torch.randint(len(data) - self.seq + 1, (self.batch,), generator=generator)
            ids = torch.stack([data[start : start + self.seq] for start in starts])
            yield {"input_ids": ids, "labels": ids}


def show_plan(settings: Settings) -> autopar.Plan:
    """Plan the whole model without its weights."""
    with torch.device("meta"):
        model = settings.model(layers=settings.layers, vocab=settings.vocab)
        ids = torch.zeros(settings.batch, settings.seq, dtype=torch.int64)
    plan = autopar.plan(model, autopar.Cluster.local(settings.processes), {"input_ids": ids, "labels": ids})
    print(plan)
    for name, layout in plan.params:
        if ".h.0." in name and name.endswith("weight"):
            print(f"  {name:<36} {', '.join(f'{axis.name}={placement}' for axis, placement in zip(plan.mesh.axes, layout, strict=True))}")
    return plan


def prove(settings: Settings) -> None:
    """Loss, every gradient and every parameter against one process; one layer and few words, to be quick."""
    model = settings.model(layers=1, vocab=512)
    ids = torch.randint(512, (settings.processes, 16))
    batch = {"input_ids": ids, "labels": ids}
    plan = autopar.plan(model, autopar.Cluster.local(settings.processes), batch, pins=["dp=2", f"tp={settings.processes // 2}"])
    report = autopar.verify(model, plan, batch, steps=2)
    print(report)
    if not report.equal:
        sys.exit("quickstart: the parallel training is not the same training")


def train(worker: Worker, settings: Settings, plan: str) -> None:
    """What one rank does: ordinary PyTorch, but for the one line that makes the model parallel."""
    be_quiet()
    whole = settings.model(layers=settings.layers, vocab=settings.vocab)
    cluster = autopar.Cluster.local(settings.processes)
    model = autopar.parallelize(whole, cluster, next(settings.batches()), plan=autopar.Plan.from_json(plan))
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr)
    for batch in settings.batches():
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        if worker.rank == 0:
            worker.send((float(loss.detach()), time.perf_counter() - start))


def train_alone(settings: Settings) -> list[float]:
    """The same training in one process, without autopar."""
    model = settings.model(layers=settings.layers, vocab=settings.vocab)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr)
    losses = []
    for batch in settings.batches():
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def main(settings: Settings) -> None:
    """Plan, prove, train; ends with an error if the two trainings differ."""
    print(f"1. plan: GPT-2 with {settings.layers} layers of {settings.hidden} on {settings.processes} processes")
    plan = show_plan(settings)
    print("\n2. proof: the emitted program on simulated ranks against one process")
    prove(settings)
    print(f"\n3. training on {len(settings.text)} bytes of text\nstep  {settings.processes} processes  one process  difference  seconds")
    alone = train_alone(settings)
    differences: list[float] = []

    def show(step: tuple[float, float]) -> None:
        (loss, seconds), expected = step, alone[len(differences)]
        differences.append(abs(loss - expected))
        print(f"{len(differences):4d}  {loss:11.6f}  {expected:11.6f}  {differences[-1]:10.1e}  {seconds:7.2f}", flush=True)

    launch(train, settings.processes, settings, plan.to_json(), on_message=show, preload=("autopar.api", "transformers.models.gpt2.modeling_gpt2"))
    print(f"largest difference of the loss: {max(differences):.1e}")
    if not max(differences) <= 1e-3:
        sys.exit("quickstart: the losses are not those of one process")


def be_quiet() -> None:
    """No advice of libraries to their own developers between the numbers."""
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()


def read_text(paths: list[str]) -> bytes:
    """The file that was named, or the licence of this repository."""
    root = Path(__file__).resolve().parents[1]
    path = next((Path(path) for path in paths), root / "LICENSE")
    try:
        text = path.read_bytes()
    except OSError as error:
        sys.exit(f"quickstart: {path}: {error.strerror}; give the path of a text file")
    if len(text) < 1000:
        sys.exit(f"quickstart: {path}: only {len(text)} bytes; give a text of at least 1000")
    return text


if __name__ == "__main__":
    be_quiet()
    try:
        main(Settings(read_text(sys.argv[1:2])))
    except AutoparError as error:
        sys.exit(f"quickstart: {error}")
