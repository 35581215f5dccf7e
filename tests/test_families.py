"""Graphs read off short traces are those that full traces give, to the last name; what is no family is refused and says why."""

import json
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from autopar.core.graph import OpGraph
from autopar.core.unroll import Run
from autopar.errors import NoFamilyError, TraceError
from autopar.models import catalog
from autopar.models.load import LoadedModel, load_model
from autopar.trace.capture import trace
from autopar.trace.family import family_of, find_family

CONFIGS = json.loads((Path(__file__).parent / "models" / "tiny_configs.json").read_text())
DEPTH_FIELDS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers", "layers", "depth")
WITHOUT_RUN = {"alexnet-tiny", "dlrm-tiny", "ConvNextForImageClassification", "ResNetForImageClassification"}
REFUSED: dict[str, str] = {}
"""Models whose blocks are not read off short traces, and a word of the reason."""


def deeper(fields: dict[str, Any], depth: int) -> dict[str, Any]:
    """The configuration with so many blocks, in its parts too."""
    found = {name: deeper(value, depth) if isinstance(value, dict) else value for name, value in fields.items()}
    return found | {name: depth for name in DEPTH_FIELDS if name in fields}


def loaded(name: str, batch: int, depth: int, folder: Path) -> LoadedModel:
    """A preset, or a class with a small configuration."""
    if name in catalog.names():
        return load_model(name, batch=batch, overrides=deeper({k: v for k, v in catalog.preset(name).config.items() if k in DEPTH_FIELDS}, depth))
    (folder / "config.json").write_text(json.dumps({"architectures": [name], **deeper(CONFIGS[name], depth)}))
    return load_model(str(folder), batch=batch, seq=16)


def check_equal(found: OpGraph, model: nn.Module, kwargs: dict[str, Any]) -> None:
    """All of both graphs, the names that plans are bound by included."""
    traced = trace(model, (), kwargs).graph
    for ours, theirs in zip((*found.values, *found.ops), (*traced.values, *traced.ops), strict=True):
        assert ours == theirs
    assert found == traced
    assert found.digest == traced.digest


@pytest.mark.parametrize("name", [p.name for p in catalog.presets() if p.is_tiny] + list(CONFIGS))
def test_every_model(name: str, long: bool, tmp_path: Path) -> None:
    """Five blocks, three of them traced: for each number of samples, and for models less deep and deeper."""
    if not long:
        pytest.skip("the next test looks at two of them; --long at all")
    example = loaded(name, 4, 5, tmp_path)
    if name in WITHOUT_RUN | set(REFUSED):
        with pytest.raises(NoFamilyError, match=REFUSED.get(name, "no row of blocks")):
            find_family(example.module, example.kwargs)
        return
    family = find_family(example.module, example.kwargs)
    for samples in (1, 2, 4, 6):
        other = loaded(name, samples, 5, tmp_path)
        check_equal(family.graph(samples), other.module, other.kwargs)
    if len({(run.depth, run.first) for run in family.runs}) == 1:
        for blocks in (4, 7):
            other = loaded(name, 4, blocks, tmp_path)
            check_equal(family.graph(4, blocks - family.runs[0].first), other.module, other.kwargs)


def test_blocks_with_dropout() -> None:
    """Random operators are numbered across blocks; one sample, many, less deep and deeper."""
    given = {"layers": 5, "dropout": 0.1}
    example = load_model("transformer-tiny", batch=4, overrides=given)
    family = find_family(example.module, example.kwargs)
    assert family.runs == (Run("blocks", 0, 5),) and family.depth == 5
    for samples, depth in ((1, None), (6, 7)):
        other = load_model("transformer-tiny", batch=samples, overrides=given | {"layers": depth or 5})
        check_equal(family.graph(samples, depth), other.module, other.kwargs)


def test_tied_weights_and_an_untouched_model() -> None:
    """A model of transformers with weights: equal at another number of samples, and as it was before."""
    example = load_model("gpt2-tiny", batch=4, device="cpu", overrides={"n_layer": 5})
    model = example.module

    def state() -> list[Any]:
        parts = [(name, id(m), vars(m).keys(), list(m._modules), len(m._forward_hooks)) for name, m in model.named_modules()]
        return [parts, [(name, id(p), p.sum().item(), p.device) for name, p in model.named_parameters(remove_duplicate=False)]]

    before = state()
    family = family_of(model, example.kwargs)
    assert family is not None and state() == before
    check_equal(family.graph(6), model, load_model("gpt2-tiny", batch=6).kwargs)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="processes cannot be forked here")
def test_who_traces_does_not_matter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In processes beside this one, in some of them, or in this one alone; with weights, and where traces fail in the others."""
    example = load_model("gpt2-tiny", batch=4, device="cpu", overrides={"n_layer": 5})
    here, traced, log = os.getpid(), trace, tmp_path / "pids"

    def watched(*given: Any, **also: Any) -> Any:
        if failing and os.getpid() != here:
            raise TraceError("not here")
        with log.open("a") as pids:
            print(os.getpid(), file=pids)
        return traced(*given, **also)

    monkeypatch.setattr("autopar.trace.family.trace", watched)
    found = []
    for processes, failing in ((0, False), (2, False), (3, False), (4, False), (3, True)):
        monkeypatch.setattr("autopar.trace.family.most_processes", lambda processes=processes: processes)
        family = find_family(example.module, example.kwargs)
        found.append([family.graph(samples) for samples in (1, 2, 6)])
        pids = log.read_text().split()
        assert len(pids) == 4 and str(here) in pids, "each trace is made once"
        assert set(pids) == {str(here)} or (processes and not failing)
        log.unlink()
    assert all(graphs == found[0] and [g.digest for g in graphs] == [g.digest for g in found[0]] for graphs in found)


class Block(nn.Module):
    """A linear layer with what a test puts into it."""

    def __init__(self, k: int, inner: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.k, self.inner = k, inner
        self.linear = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor, *extra: Any) -> torch.Tensor:
        return x + self.inner(self, self.linear(x), *extra)


class Stack(nn.Module):
    """Six blocks, called as a test says: x [b, 4] -> a number."""

    def __init__(self, inner: Callable[..., torch.Tensor] = lambda block, x: x.relu(), outer: Callable[..., torch.Tensor] | None = None) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(k, inner) for k in range(6)))
        self.outer = outer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.outer(self.blocks, x) if self.outer else self.blocks(x)).square().mean()


def counted(block: Block, x: torch.Tensor) -> torch.Tensor:
    block.calls.add_(1.0)
    return x * block.calls


def chunked(blocks: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    """A mask for all, and a second result for the end."""
    mask = torch.arange(4, device=x.device) * x.new_ones(x.shape[0], 1)
    for block in blocks:
        x = block(x, mask)
    return x.unsqueeze(1).expand(-1, 2, -1).reshape(2 * x.shape[0], 4)


def part_frozen() -> Stack:
    model = Stack()
    model.blocks[0].requires_grad_(False)
    return model


FAMILIES: dict[str, Callable[[], Stack]] = {
    "a sequence": Stack,
    "buffers that every block updates": lambda: Stack(counted),
    "what all share, and a reshaped end": lambda: Stack(lambda block, x, mask: x * mask, chunked),
    "the first block frozen": part_frozen,
}


@pytest.mark.parametrize("what", FAMILIES)
def test_families(what: str) -> None:
    model = FAMILIES[what]()
    family = find_family(model, (torch.zeros(8, 4),))
    for samples in (1, 2, 7):
        traced = trace(model, (torch.zeros(samples, 4),)).graph
        assert family.graph(samples) == traced
        assert family.graph(samples).digest == traced.digest


def loop(call: Callable[[int, Block, torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A forward that calls block after block as `call` says."""

    def outer(blocks: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
        for k, block in enumerate(blocks):
            x = call(k, block, x)
        return x

    return outer


def one_frozen(k: int, block: Block, x: torch.Tensor) -> torch.Tensor:
    with torch.set_grad_enabled(k != 3):
        return block(x)


def long_way(blocks: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    """U-shaped: what a block in the middle makes is used at the end."""
    seen = [x]
    for block in blocks:
        seen.append(block(seen[-1]))
    return seen[-1] + seen[3]


def first_for_all(blocks: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    first = x = blocks[0](x, x)
    for block in blocks[1:]:
        x = block(x, first)
    return x


def shared() -> Stack:
    model = Stack()
    for block in model.blocks:
        block.linear.bias = model.blocks[0].linear.bias
    return model


NO_FAMILIES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "no row of blocks": (lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), "no row of blocks"),
    "a block computes with its number": (lambda: Stack(lambda block, x: x / (block.k + 1)), "not copies"),
    "every sixth block is another": (lambda: Stack(lambda block, x: x.sin() if block.k == 4 else x.cos()), "blocks.4 does not compute"),
    "a block is called in another way": (lambda: Stack(lambda block, x, *s: x * 2.0, loop(lambda k, b, x: b(x, 1.0) if k == 3 else b(x))), "other arguments"),
    "a number counts blocks": (lambda: Stack(lambda block, x, s: x * s, loop(lambda k, b, x: b(x, k))), "takes int"),
    "work between blocks": (lambda: Stack(outer=loop(lambda k, b, x: b(x).tanh())), "neither the last one's result"),
    "a block is left out": (lambda: Stack(outer=loop(lambda k, b, x: x if k == 3 else b(x))), "called as number 4"),
    "no gradient through one block": (lambda: Stack(outer=loop(one_frozen)), "blocks.3"),
    "the middle is used at the end": (lambda: Stack(outer=long_way), "outside the run"),
    "all take the first one's result": (lambda: Stack(lambda block, x, y: x * y, first_for_all), "blocks"),
    "shared weights": (shared, "is shared"),
    "the square of the batch beside it": (lambda: Stack(outer=lambda blocks, x: blocks(x) + x.new_ones(len(x) ** 2).sum()), "linear function"),
    "the square of the batch": (lambda: Stack(outer=lambda blocks, x: (blocks(x) @ x.T).reshape(-1)), "linear function"),
    "another way for many": (lambda: Stack(outer=lambda blocks, x: blocks(x).sin() if len(x) > 9 else blocks(x)), "with another"),
}


@pytest.mark.parametrize("what", NO_FAMILIES)
def test_what_is_no_family_is_refused(what: str) -> None:
    make, reason = NO_FAMILIES[what]
    model, inputs = make(), (torch.zeros(8, 4),)
    assert family_of(model, inputs) is None
    with pytest.raises(NoFamilyError, match=reason):
        find_family(model, inputs)
