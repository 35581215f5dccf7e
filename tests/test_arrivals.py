"""What plans of one sharding share: passes that are walked once for all microbatches, against a step walked one by one with all in one memory; and what is found of a
program whatever its modes of recomputation are, against that of a program made anew."""

import random
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from autopar.core.buckets import IN_FLIGHT
from autopar.core.cluster import Cluster
from autopar.core.graph import OpGraph
from autopar.core.layout import I
from autopar.core.memory import MemoryUse
from autopar.core.residency import RECOMPUTE, Residency
from autopar.core.zero import Zero, zero_layout
from autopar.models.load import load_model
from autopar.planner.arrivals import Arrival
from autopar.planner.held import UPDATE, Group, Held, Holdings, resident
from autopar.planner.liveness import Engine, Liveness, _Walk
from autopar.planner.plan import plan_graph
from autopar.planner.search import Options
from autopar.planner.steps import steps_of
from autopar.program import Program
from autopar.trace.capture import trace
from tests.harness import mesh_of
from tests.programs import RandomModel
from tests.whole import ModelCase


class InOneMemory(_Walk):
    """Gradients of parameters in the memory of the passes, arrival by arrival."""

    def start(self, engine: Engine) -> None:
        self.receives, self.last = engine.receives, False
        self.leaf: dict[int, int] = {}
        self.totals: dict[int, int] = {}
        self.filling: dict[int, int] = {}
        self.in_flight: list[tuple[int, list[int], int]] = []
        self.bucket_of = {h.value: b for b, bucket in enumerate(self.holdings.buckets) for h in bucket.members}
        self.once()
        assert self.opening is not None
        self.memory.most = self.opening.total  # the fullest moment is that of all microbatches together

    def microbatch(self, *, last: bool) -> None:
        self.last, self.missing = last, {b: len(bucket.members) for b, bucket in enumerate(self.holdings.buckets)}
        self.forward()
        self.backward()

    def _until(self, arrival: Arrival | None = None) -> None:
        if arrival is None:
            self._end()
            return
        unit, key = self.units[arrival.number][arrival.size], -1 - (arrival.number << 10) - arrival.size
        grads = [self.leaf.pop(h.value) for h in unit.members if h.value in self.leaf]
        if grads:
            self._fill(key, unit, grads)
            self._launch(key, unit)

    def _arrived(self, held: Held, storage: int) -> None:
        memory, v = self.memory, held.value
        if v in self.leaf:
            memory.drop(storage)
        else:
            if memory.shared(storage):
                memory.drop(storage)
                storage = memory.new(held.working, "gradients")
            self.leaf[v] = memory.move(storage, "gradients")
        b = self.bucket_of.get(v)
        if b is not None and (self.last or held.stage == 2):
            bucket = self.holdings.buckets[b]
            self._fill(b, bucket, [self.leaf.pop(v)])
            self.missing[b] -= 1
            if self.missing[b] == 0:
                self._launch(b, bucket)

    def _fill(self, key: int, bucket: Group, grads: list[int]) -> None:
        while key not in self.filling and len(self.in_flight) >= IN_FLIGHT:
            self._collect()
        if key >= 0 and bucket.sent_whole:
            self.filling[key] = self.memory.move(grads[0], "communication")
            return
        if key not in self.filling:
            self.filling[key] = self.memory.new(bucket.rows, "communication")
        self.memory.note("reduction of gradients")
        self._drop(grads)

    def _launch(self, key: int, bucket: Group) -> None:
        rows = self.filling.pop(key)
        if bucket.stage == 0:
            self.totals[key] = rows
            return
        sent = [rows, self.memory.new(bucket.rows_of_others if self.receives else 0, "communication")]
        self.in_flight.append((key, sent, self.memory.new(bucket.part, "communication")))
        self.memory.note("reduction of gradients")

    def _collect(self) -> None:
        key, sent, part = self.in_flight.pop(0)
        self._drop(sent)
        if key in self.totals:
            self.memory.drop(part)
        else:
            self.totals[key] = self.memory.move(part, "gradients")

    def _end(self) -> None:
        for key in list(self.filling):
            self._launch(key, self.holdings.buckets[key])
        while self.in_flight:
            self._collect()
        if self.last:
            for key, storage in self.totals.items():
                self._deliver(storage, (self.holdings.buckets[key] if key >= 0 else self.units[(-1 - key) >> 10][(-1 - key) & 1023]).members)
            for v, storage in self.leaf.items():
                self._deliver(storage, (self.holdings.parameters[v],))

    def _deliver(self, storage: int, members: tuple[Held, ...]) -> None:
        device = not self.program.residency.offload
        if device and all(h.stored == (h.reduced if h.reduced_over * h.ranks > 1 else h.working) for h in members):
            self.memory.move(storage, "gradients")
            return
        if device:
            self.memory.new(sum(h.stored for h in members), "gradients")
            self.memory.note("reduction of gradients")
        self.memory.drop(storage)


def one_by_one(program: Program, engine: Engine) -> tuple[MemoryUse, ...]:
    """See `Liveness.moments`; of every microbatch up to the third one."""
    holdings = Holdings(program)
    walk = InOneMemory(program, steps_of(program), holdings, resident(program, holdings))
    walk.start(engine)
    times = min(program.residency.micro_batches, 3)
    for m in range(times):
        walk.microbatch(last=m + 1 == times)
    _, parts, moment = walk.memory._peak
    peak = MemoryUse(moment=" of ".join(moment), **parts)
    stored = [h.stored for h in holdings.parameters.values() if h.trained]
    if not stored or program.residency.offload:
        return (peak,)
    left = walk.memory.parts | {"activations": 0}
    left["temporaries"] += 2 * max(stored) if engine.one_by_one else sum(stored)
    return peak, MemoryUse(moment=UPDATE, **left)


def kept_somehow(program: Program, rng: random.Random) -> Program:
    """With ZeRO stages, modes and microbatches drawn for every parameter and block."""
    zero, mesh = dict[int, Zero](), program.mesh
    for v, layout in program.storage.items():
        free = tuple(a for a, p in enumerate(layout) if p == I and mesh.sizes[a] > 1)
        axes = tuple(sorted(rng.sample(free, rng.randint(0, len(free)))))
        if axes and zero_layout(program.graph.values[v].meta.shape, layout, axes, mesh) != layout:
            stages = (1, 2) if v in program.graph.finals else (1, 2, 3)
            zero[v] = Zero(rng.choice(stages), axes)
    recompute = {block: mode for block in program.blocks if (mode := rng.choice(("none", *RECOMPUTE))) != "none"}
    return replace(program, residency=Residency(zero=zero, recompute=recompute, micro_batches=rng.randint(1, 4), offload=rng.random() < 0.15))


def check(program: Program, rng: random.Random) -> None:
    engine = Engine(receives=rng.random() < 0.5, one_by_one=rng.random() < 0.5)
    walk, asked = Liveness.of(program), rng.random() < 0.5
    kept = walk.kept_by_segment() if asked else ()  # a walk that has begun goes on
    assert walk.moments(engine) == one_by_one(program, engine), program.residency
    assert not asked or walk.kept_by_segment() == kept
    assert walk.moments(engine) == one_by_one(program, engine), "what was walked once can be walked again"


@pytest.mark.parametrize("seed", range(25))
def test_random_programs(seed: int) -> None:
    rng, model = random.Random(seed), RandomModel(seed)
    case = ModelCase(model, model.inputs(seed), seed)
    for mesh in (mesh_of(2), mesh_of(2, 2)):
        for _ in range(4):
            check(kept_somehow(case.random_program(mesh, rng), rng), rng)


@cache
def graph_of(name: str) -> OpGraph:
    given: dict[str, Any] = {"batch": 4, "seq": 16} if name != "mlp-tiny" else {"batch": 8}
    loaded = load_model(name, device="meta", **given)
    return trace(loaded.module, (), loaded.kwargs).graph


@pytest.mark.parametrize("pins", [("dp=2", "tp=2"), ("dp=4",), ("tp=4",)], ids=" ".join)
@pytest.mark.parametrize("name", ["llama-tiny", "gpt2-tiny", "mlp-tiny"])
def test_blocks_under_every_mode(name: str, pins: tuple[str, ...]) -> None:
    program, rng = plan_graph(graph_of(name), Cluster.local(4), Options(pins=pins)).program, random.Random(f"{name} {pins}")
    for _ in range(12):
        check(kept_somehow(program, rng), rng)


@pytest.mark.parametrize("pins", [("dp=2", "tp=2"), ("tp=4",)], ids=" ".join)
@pytest.mark.parametrize("name", ["llama-tiny", "gpt2-tiny"])
def test_programs_in_other_modes_are_as_if_made_anew(name: str, pins: tuple[str, ...]) -> None:
    rng = random.Random(name)
    program = first = kept_somehow(plan_graph(graph_of(name), Cluster.local(4), Options(pins=pins)).program, rng)
    for _ in range(8):
        recompute = {block: rng.choice(("none", *RECOMPUTE)) for block in program.blocks}
        program = rng.choice((program, first)).in_modes(recompute)
        anew = replace(first, residency=replace(first.residency, recompute=recompute))
        assert list(program.move_of.items()) == list(anew.move_of.items()) and program.moves == anew.moves
        assert (program.ledger, program.replays, program.becomes, program.repeated) == (anew.ledger, anew.replays, anew.becomes, anew.repeated)
