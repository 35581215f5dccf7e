"""What a block keeps for its backward under every mode of recomputation: by formula, and as counted of tensors that are still there after a forward."""

import gc
import weakref
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import autopar
from autopar.core.again import AGAIN, KEPT, UNREAD, Part, replayed
from autopar.core.residency import RECOMPUTE
from autopar.forecast.forced import Forced, Layout3D
from autopar.forecast.transformer import Dims
from autopar.models.load import LoadedModel, load_model
from autopar.planner.bind import bind
from autopar.planner.liveness import kept_by_segment
from autopar.program import Program
from autopar.rewrite.build import build
from autopar.runtime.simulated_module import SimulatedModule
from autopar.trace.capture import Traced, trace

A100 = autopar.Cluster.preset("a100-sxm", nodes=1)
LLAMA = Dims(layers=3, hidden=1024, heads=16, kv_heads=4, inner=3072, vocab=2048, seq=256, norm="rms", activation="swiglu", positions="rotary", biases=False)


SCALARS = 16
"""Bytes of the loss and what it is divided by."""


def in_mode(program: Program, mode: str) -> Program:
    blocks = {s.block: mode for s in program.graph.segments if s.block}
    return program.in_modes(blocks if mode != "none" else {})


def kept_by_a_block(program: Program, mode: str) -> int:
    """The second of three."""
    found = kept_by_segment(in_mode(program, mode))
    blocks = [n for n, segment in enumerate(program.graph.segments) if segment.block]
    return found[blocks[1]]


@pytest.mark.parametrize("tp", (2, 4))
def test_of_a_block_of_megatron_with_sequence_parallelism(tp: int) -> None:
    """Korthikanti et al. 2022, sections 4.2 and 5: of full recomputation with gathering again what a block takes and what it sums stay, both in parts."""
    program = Forced(LLAMA, Layout3D(tp=tp, sp=True), A100).program
    tokens, h, kv, f = 2 * LLAMA.seq, LLAMA.hidden, LLAMA.hidden // 4, LLAMA.inner  # bytes of all tokens' numbers of one kind; widths
    part, whole = tokens * h // tp, tokens * h
    summed = {"full+gather": 2 * part, "full": 2 * part + 2 * whole}
    products = tokens * (h + 2 * kv + 2 * f) // tp
    expected = summed | {"selective+gather": summed["full+gather"] + products, "selective": summed["full"] + products}
    assert {mode: kept_by_a_block(program, mode) for mode in expected} == expected
    none, gathering = (kept_by_a_block(program, mode) for mode in ("none", "none+gather"))
    assert none - gathering == 2 * whole - 2 * part, "what is gathered is kept in parts"


@pytest.mark.parametrize("layout", (Layout3D(), Layout3D(dp=2), Layout3D(tp=4), Layout3D(tp=4, sp=True), Layout3D(dp=2, tp=2, sp=True, zero=3)), ids=str)
def test_who_computes_more_again_keeps_no_more(layout: Layout3D) -> None:
    program = Forced(LLAMA, layout, A100).program
    kept = {mode: kept_by_a_block(program, mode) for mode in RECOMPUTE}
    for modes in (("none", "selective", "full"), tuple(m for m in RECOMPUTE if m.endswith("+gather"))):
        assert sorted(modes, key=kept.__getitem__, reverse=True) == list(modes)
    assert all(kept[mode + "+gather"] <= kept[mode] for mode in ("none", "selective", "full"))


def test_what_nothing_reads_is_not_kept() -> None:
    """norm -> gather -> product -> sum over ranks -> add -> norm -> product -> sum over ranks, the last for the next block."""
    block = (
        Part(("x",), ("n",), ("x",)),
        Part(("n",), ("gathered",), collective=True, gather=True),
        Part(("gathered", "w"), ("addends",), ("gathered", "w"), contraction=True, addends=True),
        Part(("addends",), ("sum",), collective=True),
        Part(("x", "sum"), ("y",)),
        Part(("y",), ("m",), ("y",)),
        Part(("m", "v"), ("more",), ("m", "v"), contraction=True, addends=True),
        Part(("more",), ("last",), collective=True),
    )  # fmt: skip
    assert replayed(block, "full") == (UNREAD, KEPT, UNREAD, KEPT, AGAIN, AGAIN, UNREAD, UNREAD)
    assert replayed(block, "selective") == replayed(block, "full")
    assert replayed(block, "full+gather") == (AGAIN, AGAIN, UNREAD, KEPT, AGAIN, AGAIN, UNREAD, UNREAD)
    assert replayed(block, "none+gather")[:4] == (KEPT, AGAIN, UNREAD, UNREAD)


class Made(TorchDispatchMode):
    """Memory that operators make inside this context."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[weakref.ref] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        before = {x.untyped_storage().data_ptr() for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        made = (x.untyped_storage() for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, torch.Tensor))
        self.found += [weakref.ref(storage) for storage in made if storage.data_ptr() not in before]
        return result

    @property
    def alive_bytes(self) -> int:
        gc.collect()
        there = [storage for ref in self.found if (storage := ref()) is not None]
        return sum({storage.data_ptr(): storage.nbytes() for storage in there}.values())


@lru_cache(maxsize=4)
def loaded(name: str) -> tuple[LoadedModel, Traced]:
    model = load_model(name, batch=8, seq=32, device="cpu")
    return model, trace(model.module, (), model.kwargs)


def counted_bytes(name: str, program: Program) -> int:
    """What a rank keeps after a forward, of what operators have made."""
    model, traced = loaded(name)
    graph, built = program.graph, build(program, traced)
    known = {**dict(model.module.named_parameters()), **dict(model.module.named_buffers()), **traced.constants}
    values = {v: known[x.source[0]].detach() for v, x in enumerate(graph.values) if x.role in ("param", "buffer", "constant")}
    module = SimulatedModule(program, built, values, lambda params: torch.optim.SGD(params, lr=0.1))
    inputs = zip((v for v, x in enumerate(graph.values) if x.role == "input"), traced.flat_inputs((), dict(model.kwargs)), strict=True)
    module.start()
    with Made() as made:
        outputs = module.compute(0, {v: [x] * program.mesh.num_ranks for v, x in inputs})
    kept = made.alive_bytes - sum(x.untyped_storage().nbytes() for column in outputs for x in column if x.dim())
    return kept // program.mesh.num_ranks


@pytest.mark.parametrize("mode", RECOMPUTE)
@pytest.mark.parametrize("name,pins", [("llama-tiny", ("tp=4",)), ("llama-tiny", ("dp=2", "tp=2", "zero=3")), ("gpt2-tiny", ("dp=2", "tp=2"))], ids=str)
def test_what_is_counted_was_predicted(name: str, pins: tuple[str, ...], mode: str) -> None:
    model, traced = loaded(name)
    plan = autopar.plan(model.module, autopar.Cluster.local(4), model.kwargs, pins=(*pins, "recompute=selective+gather"))
    program = in_mode(bind(plan, traced.graph), mode)
    predicted, counted = sum(kept_by_segment(program)), counted_bytes(name, program)
    assert 0 <= counted - predicted <= SCALARS


@pytest.mark.parametrize("mode", RECOMPUTE)
@pytest.mark.parametrize("name,pins", [("llama-tiny", ("dp=2", "tp=2", "zero=3")), ("gpt2-tiny", ("tp=4",)), ("gpt2-tiny", ("pp=2", "tp=2", "schedule=zero-bubble"))], ids=str)
def test_one_plan_trains_alike_in_every_mode(name: str, pins: tuple[str, ...], mode: str) -> None:
    """Every gradient, and the bytes that are sent."""
    model = load_model(name, batch=4, seq=8, device="cpu")
    plan = autopar.plan(model.module, autopar.Cluster.local(4), model.kwargs, pins=(*pins, "recompute=selective+gather"), micro_batches=2)
    assert any(mode.endswith("+gather") for mode in plan.residency.recompute.values())
    blocks = dict.fromkeys(plan.residency.recompute, mode) if mode != "none" else {}
    report = autopar.verify(model.module, replace(plan, residency=replace(plan.residency, recompute=blocks)), model.kwargs, steps=2)
    assert report.equal, str(report)
