"""What no microbatch changes (masks, tables of positions) is computed once a step and is there once on a rank: by the plan, and as counted of tensors."""

import math
from typing import Any

import pytest
import torch
from torch import nn

import autopar
from autopar.core.graph import Op
from autopar.joint.at_point import PointSearch
from autopar.joint.deep import Deep, Sharding, even_depths, kind_of
from autopar.joint.known import Known
from autopar.joint.plan import joint_search, on_whole_graph
from autopar.joint.space import Ideal, Point
from autopar.planner.bind import bind
from autopar.planner.blocks import Order
from autopar.planner.liveness import Engine, Liveness, kept_by_segment
from autopar.planner.pins import Pins
from autopar.planner.steps import steps_of
from autopar.program import Program
from autopar.request import Request, quiet
from autopar.rewrite.build import build
from autopar.runtime.lasting import Lasting
from autopar.runtime.microbatches import split_batch
from autopar.runtime.simulate import simulated_ranks
from autopar.runtime.simulated_module import SimulatedModule
from autopar.stages import cut_into_stages
from autopar.trace.capture import Traced, trace
from tests.joint.models import programs
from tests.test_kept import SCALARS, Made

SEQ, WIDTH, HEADS = 24, 16, 2
TABLE, MASK = 4 * SEQ * WIDTH, SEQ * SEQ
"""Bytes of a table of positions, and of a mask."""


class Block(nn.Module):
    """Attention under a mask that every block makes for itself; `decay`, a buffer, is another in every block."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("decay", torch.linspace(0.1, 1.0 + n, SEQ))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        mask = torch.ones(SEQ, SEQ, dtype=torch.bool, device=x.device).tril()
        scores = (q @ k.transpose(-2, -1) / math.sqrt(WIDTH) - self.decay.exp()).masked_fill(~mask, -1e4)
        return x + self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Masked(nn.Module):
    def __init__(self, layers: int = 4) -> None:
        super().__init__()
        self.token, self.head = nn.Embedding(32, WIDTH), nn.Linear(WIDTH, 32)
        self.blocks = nn.ModuleList(map(Block, range(layers)))
        self.register_buffer("frequencies", torch.rand(WIDTH))

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.token(ids) + torch.sin(torch.arange(SEQ, device=ids.device)[:, None] * self.frequencies)
        for block in self.blocks:
            x = block(x)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def batch(samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(32, (samples, SEQ)), torch.randint(32, (samples, SEQ))


def planned(pins: tuple[str, ...], ranks: int, micro_batches: int = 4) -> tuple[nn.Module, Traced, autopar.Plan]:
    torch.manual_seed(0)
    model, inputs = Masked(), batch(4 * micro_batches)
    plan = autopar.plan(model, autopar.Cluster.local(ranks), inputs, pins=pins, micro_batches=micro_batches)
    return model, trace(model, split_batch(inputs, micro_batches)[0]), plan


def values_of(model: nn.Module, traced: Traced, program: Program) -> dict[int, torch.Tensor]:
    known: dict[str, Any] = {**dict(model.named_parameters()), **dict(model.named_buffers()), **traced.constants}
    return {v: known[x.source[0]].detach() for v, x in enumerate(program.graph.values) if x.role in ("param", "buffer", "constant")}


@pytest.mark.parametrize("pins,mode", [((), "none"), ((), "selective"), (("dp=2",), "none"), (("dp=2",), "full"), (("tp=2",), "selective"), (("tp=2",), "full")], ids=str)
def test_a_microbatch_in_flight_makes_and_keeps_no_mask(pins: tuple[str, ...], mode: str) -> None:
    """What two of them keep is twice what one does by the plan, and no mask is among what they make."""
    model, traced, plan = planned((*pins, f"recompute={mode}"), 2 if pins else 1)
    program = bind(plan, traced.graph)
    module = SimulatedModule(program, build(program, traced), values_of(model, traced, program), lambda params: torch.optim.SGD(params, lr=0.1))
    inputs = [v for v, x in enumerate(program.graph.values) if x.role == "input"]
    given = [{v: [x] * program.mesh.num_ranks for v, x in zip(inputs, batch(4), strict=True)} for _ in range(2)]
    module.start()
    with Made() as made:
        outputs = [module.compute(m, given[m]) for m in range(2)]
        sizes = [storage.nbytes() for ref in made.found if (storage := ref()) is not None]
    assert len(outputs) == 2 and not {TABLE, MASK} & set(sizes)
    assert 0 <= made.alive_bytes // program.mesh.num_ranks - 2 * sum(kept_by_segment(program)) <= 2 * SCALARS


def test_what_depends_on_an_input_or_a_parameter_or_chance_is_made_for_every_microbatch() -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.norm = nn.Parameter(torch.ones(4)), nn.BatchNorm1d(4)
            self.register_buffer("scale", torch.ones(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            kept = torch.arange(4.0, device=x.device).cos() * self.scale
            asked = kept * (x.sum(0) > 0)
            drawn = nn.functional.dropout(kept.exp(), 0.5) + torch.rand(4, device=x.device)
            return (self.norm(x) * self.weight.sin() * kept.cos() * asked.tanh() * drawn.sigmoid() * self.norm.running_mean.sqrt()).sum()

    model = Several().train()
    graph = trace(model, (torch.randn(8, 4),)).graph
    made = {op.kind.split(".")[1] for op in graph.ops if not graph.once.isdisjoint(op.results)}
    beside = {op.kind.split(".")[1] for op in graph.ops if graph.once.isdisjoint(op.results)}
    assert {"arange", "cos", "exp"} <= made and {"gt", "rand", "sin", "tanh", "sigmoid", "sqrt", "dropout"} <= beside
    assert not {v for v, _ in graph.updates} & graph.once


def test_no_operator_that_torch_says_is_random_is_made_once() -> None:
    tagged = set()
    for name in dir(torch.ops.aten):
        packet = getattr(torch.ops.aten, name)
        if hasattr(packet, "overloads"):
            tagged |= {str(getattr(packet, o)) for o in packet.overloads() if torch.Tag.nondeterministic_seeded in getattr(packet, o).tags}
    assert len(tagged) > 50
    assert [kind for kind in sorted(tagged) if not Op("x", kind, (), (0,)).draws] == []


def held_once(model: nn.Module, traced: Traced, program: Program, lasting: Lasting) -> list[torch.Tensor]:
    built, values = build(program, traced), values_of(model, traced, program)
    return lasting.of(built, [simulated_ranks(program.mesh)[0], *(values[v] for v in built.once_inputs)])


def size_of(tensors: list[torch.Tensor], model: nn.Module) -> int:
    given = {b.untyped_storage().data_ptr() for b in model.buffers()}
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors if x.untyped_storage().data_ptr() not in given}.values())


@pytest.mark.parametrize("pins", [(), ("dp=2", "zero=1"), ("tp=2",), ("tp=2", "recompute=full")], ids=str)
def test_what_is_held_once_was_predicted(pins: tuple[str, ...]) -> None:
    """The same mask of every block is one, and a rank keeps it whole through the step."""
    model, traced, plan = planned(pins, 2 if pins else 1)
    program = bind(plan, traced.graph)
    held = size_of(held_once(model, traced, program, Lasting()), model)
    assert held == sum(steps_of(program).lasting.values())
    assert MASK <= held < 2 * MASK + TABLE + 4 * 4 * SEQ


@pytest.mark.parametrize("schedule,ranks", [("1f1b", 2), ("interleaved", 2), ("zero-bubble", 2)])
def test_stages_of_a_rank_have_one_of_each(schedule: str, ranks: int) -> None:
    model, traced, plan = planned(("pp=2", f"schedule={schedule}"), ranks)
    stages = cut_into_stages(bind(plan, traced.graph), plan.pipeline)
    for rank in range(ranks):
        lasting = Lasting()
        here = [s for s, place in enumerate(stages.placement) if place == rank]
        held = [x for s in here for x in held_once(model, traced, stages.stages[s].program, lasting)]
        staged = [Liveness.of(stages.stages[s].program).steps.lasting for s in here]
        assert size_of(held, model) == sum({there: size for sizes in staged for there, size in sizes.items()}.values())
        assert sum(x.dtype == torch.bool and x.numel() == MASK for x in {id(x): x for x in held}.values()) == 1


@pytest.mark.parametrize("ranks,virtual", [(1, 1), (2, 1), (2, 2), (4, 2)])
def test_three_blocks_tell_what_a_rank_of_the_whole_model_holds_once(ranks: int, virtual: int) -> None:
    """Of masks one, of what a block makes of its own buffer one for each."""
    request = Request(Masked(8), batch(32))
    joint = joint_search(request.family, 32, autopar.Cluster.preset("a100-sxm", nodes=1), request.options(), Pins(), quiet, Known())
    search = PointSearch(joint, Point(ranks, 8 // ranks, 1, 4, 8))
    search.ideal_s(Ideal(joint.cluster, joint.run, joint.task))
    light = Sharding.of(next(programs(search)), search.pricing, joint.run, Engine.of(joint.cluster), ("none",)).light
    order = Order("1f1b" if virtual == 1 else "interleaved", ranks, 4, virtual)
    deep = Deep(light, light, order, even_depths(light, order.num_stages))
    staged = on_whole_graph(deep, request.family.graph(8)).staged
    for rank in range(ranks):
        whole = {there: size for s in deep.held(rank) for there, size in staged._lasting[s].items()}
        assert light.cut.lasting_bytes(tuple((kind_of(s, order.num_stages), deep.depths[s].blocks) for s in deep.held(rank))) == sum(whole.values())
        assert sum(whole.values()) >= MASK + 4 * SEQ * sum(deep.depths[s].blocks for s in deep.held(rank))


def test_buffers_that_were_changed_between_steps_are_read_again() -> None:
    model, traced, plan = planned((), 1)
    program, lasting = bind(plan, traced.graph), Lasting()
    first = held_once(model, traced, program, lasting)
    with torch.no_grad():
        model.frequencies += 1.0
    assert all(a is b for a, b in zip(first, held_once(model, traced, program, lasting), strict=True)), "in the same step"
    lasting.clear()
    assert any(not torch.equal(a, b) for a, b in zip(first, held_once(model, traced, program, lasting), strict=True))


@pytest.mark.parametrize(
    "pins,ranks",
    [(("dp=2", "tp=2", "zero=3", "recompute=full"), 4), (("pp=2", "schedule=interleaved", "tp=2", "recompute=selective+gather"), 4), (("pp=2", "schedule=zero-bubble", "zero=1"), 2)],
    ids=str,
)
def test_the_training_is_the_same(pins: tuple[str, ...], ranks: int) -> None:
    model, _, plan = planned(pins, ranks)
    report = autopar.verify(model, plan, batch(16), steps=2)
    assert report.equal, str(report)
