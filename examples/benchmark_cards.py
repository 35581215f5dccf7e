"""Calculon's best plans of six planning problems, forced through the costs of this project, beside the plans that the joint search finds there.

    python examples/benchmark_cards.py [--only c70-1024h] [--seconds 30]

A *card* is a model, a cluster and a batch that Calculon (SC 2023, commit caa4b11, its own system files) was asked for. Its numbers of the device and the
links are the card's: peak, memory bandwidth and size, NVLink, InfiniBand. What a card does not say is that of the preset of the same device: the shares of
these peaks that kernels and messages reach (matrix products 0.78 of an A100's peak and 0.70 of an H100's; Calculon assumes 0.95 of large ones), latencies,
and launches. Both plans may use all 80 GiB of a device, and are priced by the same tables:

    as it is     every decision of Calculon's pinned, also the recomputation: memory is what it is, above the limit or not
    made to fit  the same, with as many blocks computed again as the limit asks for

Attention is fused, so "attention recomputed", which Calculon's model keeps no scores for and gathers again under sequence parallelism, is `selective+gather`
here, and "none" is `none`. Calculon prices blocks alone, all scores of an attention, and hides tensor-parallel traffic behind products in a ring; here there
are an embedding, a head and a loss, a causal mask, and traffic that is waited for. The second table says what that makes of a step, term by term: Calculon's
terms are what it prints of its plan, this project's what `autopar compare` says of a plan. Forced plans are priced a second time in the way that published
runs are (`autopar/forecast/step.py`); the last column is how far the two are apart.
"""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from autopar.core.cluster import Cluster
from autopar.core.device import sources
from autopar.core.graph import OpGraph
from autopar.core.plan import Plan
from autopar.core.residency import Precision
from autopar.core.unroll import Run
from autopar.errors import InfeasibleError
from autopar.forecast.forced import Layout3D, pins_of
from autopar.forecast.step import Step, StepPlan
from autopar.forecast.transformer import Dims, transformer_graph
from autopar.joint.plan import planned_jointly
from autopar.joint.search import JointSearch
from autopar.planner.appraisal import AGAIN, COMPUTE, COPIES, PARAMETERS, STARTING, UPDATE, WAITING, appraise
from autopar.planner.pins import Pins
from autopar.planner.search import Options

GIB = 2**30
PRECISION = Precision(master="float32")
DTYPE = "float16"
FREE = Pins()
LIFTED = 100.0
"""Share of a device's memory that holds any plan."""

AGAIN_AS = {"none": "none", "attn_only": "selective+gather"}
"""Calculon's words for what is computed again -> ours."""

COMMUNICATION, EXCHANGE = "waited for activations", "waited for parameters and gradients"
TERMS = ("operators", "computed again", COMMUNICATION, EXCHANGE, "optimizer", "bubble and messages between stages")


@dataclass(frozen=True, kw_only=True)
class Calculon:
    """Its best plan of a card: degrees, stages a rank, samples of a microbatch, what is computed again; what it predicts in seconds, and the memory.
    `ideal_s`: the model's flops at the peak of all devices; the terms are exposed seconds, together the step."""

    tp: int
    pp: int
    dp: int
    virtual: int
    micro_batch: int
    recompute: str
    gib: float
    ideal_s: float
    operators_s: float
    again_s: float
    tensor_s: float
    data_s: float
    optimizer_s: float
    bubble_s: float

    @property
    def terms(self) -> Mapping[str, float]:
        return dict(zip(TERMS, (self.operators_s, self.again_s, self.tensor_s, self.data_s, self.optimizer_s, self.bubble_s), strict=True))

    @property
    def step_s(self) -> float:
        return sum(self.terms.values())

    @property
    def layout(self) -> Layout3D:
        return Layout3D(dp=self.dp, tp=self.tp, sp=self.tp > 1, zero=1, recompute=AGAIN_AS[self.recompute], micro_batch=self.micro_batch)


@dataclass(frozen=True, kw_only=True)
class Card:
    """`samples` a step of a model on a cluster, and what Calculon says to it."""

    dims: Dims
    cluster: Cluster
    samples: int
    calculon: Calculon

    def graph(self, samples: int) -> OpGraph:
        return transformer_graph(self.dims, samples, DTYPE)

    def search(self, pins: Pins = FREE, *, memory_share: float = 1.0, seconds: float = 30.0) -> JointSearch:
        options = Options(precision=PRECISION, free_micro_batches=True, time_limit_s=seconds, memory_share=memory_share)
        short = partial(transformer_graph, self.dims.with_layers(3), dtype=DTYPE)
        return JointSearch(short, Run("blocks", 0, self.dims.layers), self.samples, self.cluster, options, pins)

    def pins(self, recompute: str | None) -> Pins:
        """All that Calculon's plan decides; None: memory decides what is computed again."""
        plan = self.calculon
        degrees = tuple((name, size) for name, size in (("dp", plan.dp), ("tp", plan.tp)) if size > 1)
        return Pins(degrees, tuple(pins_of(plan.layout)), zero=1, micro_batch=plan.micro_batch, recompute=recompute, pp=plan.pp, virtual=plan.virtual)

    def forced_step(self) -> Step:
        """The same plan, as published runs are priced."""
        plan = self.calculon
        number = self.samples // (plan.dp * plan.micro_batch)
        return Step(self.dims, StepPlan(layout=plan.layout, pp=plan.pp, vpp=plan.virtual, num_microbatches=number), self.cluster, PRECISION, DTYPE)


# --- the cards ---------------------------------------------------------------------------------------------------------

GPT = Dims(layers=96, hidden=12288, heads=96, kv_heads=96, inner=49152, vocab=51200, seq=2048, tied=True)
WIDE_70B = Dims(layers=80, hidden=8192, heads=64, kv_heads=64, inner=43008, vocab=32768, seq=4096)
WIDE_405B = Dims(layers=126, hidden=16384, heads=128, kv_heads=128, inner=79872, vocab=129024, seq=8192)
"""MLPs of two matrices that are as large as the three of the models they stand for; vocabularies padded to what eight ranks divide. Calculon has
128 blocks in place of 126, an embedding and a head."""


def cluster_of(preset: str, nodes: int, tera_flops: float, memory: float, nvlink: float, infiniband: float) -> Cluster:
    """Nodes of eight with a card's numbers; bandwidths in GB/s."""
    base, source = Cluster.preset(preset, nodes), sources("derived: Calculon's system file; efficiencies and latencies: the preset's")
    peaks = {**dict(base.device.peak_flops_per_s), "float16": tera_flops * 1e12, "bfloat16": tera_flops * 1e12}
    device = replace(base.device, memory_bytes=80 * GIB, memory_bytes_per_s=memory * 1e9, peak_flops_per_s=tuple(peaks.items()), source=source)
    inside, between = (replace(link, bandwidth_bytes_per_s=rate * 1e9, source=source) for link, rate in ((base.intra_node, nvlink), (base.inter_node, infiniband)))
    return replace(base, device=device, intra_node=inside, inter_node=between)


def a100(devices: int) -> Cluster:
    return cluster_of("a100-sxm", devices // 8, 312, 2048, 300, 25)


def h100(devices: int) -> Cluster:
    return cluster_of("h100-sxm", devices // 8, 1000, 3072, 450, 50)


CARDS = {
    "c175-64a": Card(dims=GPT, cluster=a100(64), samples=1536, calculon=Calculon(
        tp=4, pp=8, dp=2, virtual=1, micro_batch=2, recompute="attn_only", gib=78.36, ideal_s=169.10,
        operators_s=211.0737, again_s=6.746, tensor_s=0.0, data_s=0.7008, optimizer_s=0.0215, bubble_s=4.861)),
    "c175-1024a": Card(dims=GPT, cluster=a100(1024), samples=1536, calculon=Calculon(
        tp=8, pp=4, dp=32, virtual=8, micro_batch=2, recompute="none", gib=79.06, ideal_s=10.567,
        operators_s=13.5749, again_s=0.0, tensor_s=0.0773, data_s=0.1132, optimizer_s=0.0016, bubble_s=0.4392)),
    "c175-1024h": Card(dims=GPT, cluster=h100(1024), samples=1536, calculon=Calculon(
        tp=4, pp=4, dp=64, virtual=12, micro_batch=3, recompute="attn_only", gib=74.17, ideal_s=3.2967,
        operators_s=4.7242, again_s=0.2621, tensor_s=0.0, data_s=0.0939, optimizer_s=0.0011, bubble_s=0.3259)),
    "c70-64a": Card(dims=WIDE_70B, cluster=a100(64), samples=1024, calculon=Calculon(
        tp=4, pp=2, dp=8, virtual=5, micro_batch=2, recompute="attn_only", gib=79.60, ideal_s=104.97,
        operators_s=142.1286, again_s=9.8349, tensor_s=0.0, data_s=0.1985, optimizer_s=0.0101, bubble_s=1.4451)),
    "c70-1024h": Card(dims=WIDE_70B, cluster=h100(1024), samples=2048, calculon=Calculon(
        tp=8, pp=4, dp=32, virtual=4, micro_batch=1, recompute="none", gib=76.69, ideal_s=4.0938,
        operators_s=7.4552, again_s=0.0, tensor_s=0.3379, data_s=0.0556, optimizer_s=0.0005, bubble_s=0.1983)),
    "c405": Card(dims=WIDE_405B, cluster=h100(16384), samples=2048, calculon=Calculon(
        tp=8, pp=16, dp=128, virtual=1, micro_batch=1, recompute="attn_only", gib=75.02, ideal_s=3.1163,
        operators_s=5.1318, again_s=0.6007, tensor_s=0.0564, data_s=0.2416, optimizer_s=0.0002, bubble_s=5.4746)),
}  # fmt: skip
"""Calculon's terms are those of a step as it prints them: fw_time + bw_time, recompute_time + recomm_exposed_time, tp_comm_exposed_time,
dp_comm_exposed_time, optim_step_time, bubble_time + pp_comm_exposed_time."""


# --- what is made of a card ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The plans of a card: searched, forced as it is, forced and made to fit where that is possible; the terms of the second; its step in the other way."""

    card: Card
    searched: Plan
    as_it_is: Plan
    fitted: Plan | None
    terms: Mapping[str, float]
    step_s: float

    @property
    def holds(self) -> bool:
        """Whether the searched plan is no slower than the forced one, which does as little again as the same limit allows."""
        return self.fitted is None or self.searched.predicted.step_time_s <= self.fitted.predicted.step_time_s

    @property
    def fits(self) -> bool:
        return self.as_it_is.predicted.peak_memory_bytes <= self.card.cluster.device.memory_bytes


def outcome(card: Card, seconds: float = 30.0) -> Outcome:
    """Search and force. Raises InfeasibleError where nothing fits at all."""
    searched, forced = planned_jointly(card.search(seconds=seconds), card.graph).plan, as_it_is(card)
    terms = appraise(forced, card.graph(card.samples // forced.residency.micro_batches), card.cluster).terms
    return Outcome(card=card, searched=searched, as_it_is=forced, fitted=made_to_fit(card), terms=dict(grouped(terms)), step_s=card.forced_step().step_s)


def as_it_is(card: Card) -> Plan:
    """Calculon's plan without a limit."""
    return planned_jointly(card.search(card.pins(AGAIN_AS[card.calculon.recompute]), memory_share=LIFTED), card.graph).plan


def made_to_fit(card: Card) -> Plan | None:
    """Calculon's plan with what is computed again left to the limit; None where all of it is not enough."""
    try:
        return planned_jointly(card.search(card.pins(None)), card.graph).plan
    except InfeasibleError:
        return None


def grouped(terms: Mapping[str, float]) -> Iterator[tuple[str, float]]:
    """Seconds of an appraisal in Calculon's terms, whose order is that of TERMS."""
    own = {COMPUTE: 0, COPIES: 0, STARTING: 0, AGAIN: 1, PARAMETERS: 3, UPDATE: 4, WAITING: 5}
    sums = [0.0] * len(TERMS)
    for name, seconds in terms.items():
        sums[own.get(name, 3 if name.endswith("over dp") else 2)] += seconds
    return zip(TERMS, sums, strict=True)


# --- tables ----------------------------------------------------------------------------------------------------------------


def main(
    only: Annotated[str | None, typer.Option(help=f"One of {', '.join(CARDS)}.")] = None,
    seconds: Annotated[float, typer.Option(help="For every search, from its first plan on.")] = 30.0,
) -> None:
    """Print both tables."""
    found = {}
    for name, card in CARDS.items():
        if only in (None, name):
            print(f"{name}: {card.cluster}", file=sys.stderr)
            found[name] = outcome(card, seconds)
    console = Console(width=None if sys.stdout.isatty() else 220)
    console.print(steps_table(found))
    console.print(terms_table(found))
    print(f"no slower than Calculon's plan under the same limit: {sum(o.holds for o in found.values())} of {len(found)}")


def steps_table(found: Mapping[str, Outcome]) -> Table:
    table = Table("card", "searched plan", "step", "gap", "GiB", "Calculon's plan", "by Calculon", "GiB", "as it is", "GiB", "fits", "made to fit", "no slower", "other way", box=None)
    for name, o in found.items():
        plan, own = o.card.calculon, o.searched.predicted
        forced = f"tp{plan.tp} pp{plan.pp} dp{plan.dp} v{plan.virtual} mbs {plan.micro_batch}, again: {plan.recompute}"
        table.add_row(
            name, o.searched.summary(), f"{own.step_time_s:.3f} s", f"{o.searched.proof.gap:.1%}", f"{own.peak_memory_bytes / GIB:.1f}",
            forced, f"{plan.step_s:.3f} s", f"{plan.gib:.1f}", f"{o.as_it_is.predicted.step_time_s:.3f} s", f"{o.as_it_is.predicted.peak_memory_bytes / GIB:.1f}",
            "yes" if o.fits else "no", f"{o.fitted.predicted.step_time_s:.3f} s" if o.fitted else "-", "yes" if o.holds else "NO",
            f"{o.step_s / o.as_it_is.predicted.step_time_s - 1:+.2%}",
        )  # fmt: skip
    return table


def terms_table(found: Mapping[str, Outcome]) -> Table:
    """Calculon's plan as it is: seconds here minus there, in shares of Calculon's step. Operators in two: more or less work, and the rate it is done at."""
    columns = ("more work", "slower operators", *TERMS[1:], "step", "peak reached by operators", "largest")
    table = Table("here - Calculon", *columns, box=None)
    for name, o in found.items():
        parts, there = apart(o), o.card.calculon.step_s
        rates = f"{ideal_s(o) / o.terms[TERMS[0]]:.1%} against {o.card.calculon.ideal_s / o.card.calculon.operators_s:.1%}"
        table.add_row(name, *(f"{s / there:+.1%}" for s in parts.values()), f"{sum(parts.values()) / there:+.1%}", rates, max(parts, key=lambda part: abs(parts[part])))
    return table


def apart(o: Outcome) -> dict[str, float]:
    """Seconds of every term here, less Calculon's; together the difference of the two steps."""
    plan, own = o.card.calculon, o.terms[TERMS[0]]
    work = (ideal_s(o) - plan.ideal_s) * plan.operators_s / plan.ideal_s
    rest = {term: o.terms[term] - plan.terms[term] for term in TERMS[1:]}
    return {"more work": work, "slower operators": own - plan.operators_s - work, **rest}


def ideal_s(o: Outcome) -> float:
    """The flops of the model at the peak of all devices."""
    return o.as_it_is.predicted.mfu * o.as_it_is.predicted.step_time_s


if __name__ == "__main__":
    typer.run(main)
