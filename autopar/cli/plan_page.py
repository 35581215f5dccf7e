"""The page that `autopar plan` prints."""

from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from autopar.cli.layout import Group, axis_uses, parameter_groups
from autopar.cli.units import count, duration, size
from autopar.core.memory import MemoryUse
from autopar.core.mixed import Machines
from autopar.core.pipeline import StagePrediction
from autopar.core.plan import Plan

if TYPE_CHECKING:
    from autopar.choice import Chosen

MAX_ROWS = 40
ROUNDING = 1e-9
LEGEND = "S1 is cut along dimension 1, counted from 0; 'whole' is the same on every rank. Letters are loops: addmm is [m,k] x [k,n], linear [b,i] x [o,i]."


def print_plan(page: Console, plan: Plan, cluster: Machines, *, tokens: bool, next_command: str) -> None:
    """The answer, what is cut and where it lies, what it costs, how good it is, what comes next."""
    p = plan.predicted
    memory = f"{size(p.peak_memory_bytes)} of {_device_memory(plan, cluster)} per device"
    page.print(f"{plan.summary()}  for {plan.model} on {plan.cluster}: {duration(p.step_time_s)} per step, {memory} (predicted)", style="bold")
    page.print()
    page.print(_axes_table(plan, cluster))
    page.print()
    if p.stages:
        page.print(_stage_table(p.stages, plan.pipeline.places if plan.pipeline is not None else ()))
        page.print()
    page.print(_parameter_table(parameter_groups(plan)))
    page.print(LEGEND, style="dim")
    page.print()
    rate = f"; {count(p.tokens_per_s)} {'tokens' if tokens else 'samples'}/s" if p.tokens_per_s else ""
    time = f"{duration(p.step_time_s)} = {duration(p.compute_s)} compute + {duration(p.communication_s)} communication"
    if plan.pipeline is not None:
        waiting = p.step_time_s - p.compute_s - p.communication_s
        waiting = waiting if waiting > ROUNDING * p.step_time_s else 0.0
        time += f" + {duration(waiting)} waiting on the busiest rank; bubble {p.bubble:.1%}"
    lines = [
        ("time", f"{time}{rate}; MFU {p.mfu:.1%}"),
        ("memory", _memory(p.memory)),
        *_residency(plan),
        ("communication", f"{size(p.communicated_bytes)} into collectives per device and step"),
        ("proof", _proof(plan)),
        *(("note", note) for note in _notes(plan)),
    ]
    for name, text in lines:
        page.print(f"{name:<15}{text}")
    page.print()
    page.print(f"next: {next_command}")


def print_looked(page: Console, chosen: "Chosen") -> None:
    """What the plan was chosen from: parts of the cluster, or plans that hold less and less."""
    table = Table("", "DEVICES", "PLAN", "STEP", "MEMORY", "DEVICE TIME A STEP", box=None, pad_edge=False)
    for looked in chosen.looked:
        mark, devices = ">" if looked.cluster is chosen.best.cluster and looked.plan is not None and looked.step_s == chosen.best.step_s else "", str(looked.cluster.num_devices)
        if looked.plan is None:
            table.add_row(mark, devices, looked.refusal.partition("; ")[0].partition(": ")[0], "", "", "")
        else:
            table.add_row(mark, devices, looked.plan.summary(), duration(looked.step_s), size(looked.plan.predicted.peak_memory_bytes), duration(looked.device_s))
    page.print(table)
    page.print()


def _residency(plan: Plan) -> list[tuple[str, str]]:
    """What is done about memory and batch, where anything is."""
    kept, found = plan.residency, []
    for zero, number in sorted(Counter(kept.zero.values()).items(), key=lambda item: (item[0].stage, item[0].axes)):
        axes = " and ".join(plan.mesh.names[a] for a in zero.axes)
        found.append(("ZeRO", f"stage {zero.stage} over {axes}: {number} of {len(plan.params)} parameters"))
    if kept.recompute:
        modes = ", ".join(f"{number} block{'s' * (number > 1)} {mode}" for mode, number in sorted(Counter(kept.recompute.values()).items()))
        found.append(("recompute", f"{modes}; {count(plan.predicted.recomputed_flops)} flops more per device and step"))
    if kept.micro_batches > 1:
        found.append(("microbatches", f"{kept.micro_batches} a step"))
    if kept.precision.master is not None:
        found.append(("master", f"{kept.precision.master} copy of the weights, updated by the optimizer{', on the host' if kept.offload else ''}"))
    elif kept.offload:
        found.append(("offload", "the optimizer's state is on the host"))
    return found


def _memory(memory: MemoryUse) -> str:
    """The parts of the fullest moment, those of nothing left out."""
    parts = [f"{size(num_bytes)} {part}" for part, num_bytes in (*memory.parts, ("margin", memory.margin)) if num_bytes]
    return f"{size(memory.high_bytes)} at the fullest moment ({memory.moment}) = {' + '.join(parts)}"


def _device_memory(plan: Plan, cluster: Machines) -> str:
    """Of the devices that the fullest stage lies on."""
    fullest = max(plan.predicted.stages, key=lambda s: s.peak_memory_bytes == plan.predicted.peak_memory_bytes, default=None)
    places = plan.pipeline.places if plan.pipeline is not None else ()
    group = next((g for g in cluster.groups if fullest is not None and places and g.name == places[fullest.rank]), cluster.groups[0])
    return size(group.device.memory_bytes)


def _stage_table(stages: Sequence[StagePrediction], places: Sequence[str]) -> Table:
    """Seconds per microbatch, bytes per device; of groups of different devices, on which of them a stage lies."""
    table = Table("STAGE", "RANK", *(["ON"] if places else []), "BLOCKS", "PARAMETERS", "FORWARD", "BACKWARD", "IN FLIGHT", "PEAK MEMORY", "SENDS A STEP", box=None, pad_edge=False)
    for n, s in enumerate(stages):
        blocks = s.first if s.first == s.last else f"{s.first} - {s.last}"
        figures = count(s.num_params), duration(s.forward_s), duration(s.backward_s), str(s.in_flight), size(s.peak_memory_bytes), size(s.sent_bytes)
        table.add_row(str(n), str(s.rank), *([places[s.rank]] if places else []), blocks, *figures)
    return table


def _axes_table(plan: Plan, cluster: Machines) -> Table:
    table = Table("AXIS", "RANKS", "LINKS", "CUTS", box=None, pad_edge=False)
    for use in axis_uses(plan, cluster):
        table.add_row(use.name, str(use.size), use.link, use.cuts)
    return table


def _parameter_table(groups: tuple[Group, ...]) -> Table:
    """Cut parameters one by one; the others, which say less, in one line where there are cut ones."""
    table = Table("PARAMETER", "STORED", "COUNT", box=None, pad_edge=False)
    cut = [group for group in groups if not group.whole]
    for group in cut[:MAX_ROWS]:
        table.add_row(group.pattern, group.layout, f"x{group.count}")
    if len(cut) > MAX_ROWS:
        table.add_row(f"... and {len(cut) - MAX_ROWS} more patterns", "cut", f"x{sum(group.count for group in cut[MAX_ROWS:])}")
    whole = sum(group.count for group in groups if group.whole)
    if whole:
        table.add_row("all others" if cut else "all", "whole", f"x{whole}")
    return table


def _proof(plan: Plan) -> str:
    proof = plan.proof
    how = f"({proof.status}, {proof.solver})"
    if proof.gap == 0:
        return f"no plan of the searched space is faster {how}"
    gap = f"{proof.gap:.2%}" if proof.gap >= 1e-4 else "0.01%"
    return f"no plan of the searched space takes less than {duration(proof.bound)}, this one at most {gap} more {how}"


def _notes(plan: Plan) -> list[str]:
    idle = [axis for axis in plan.mesh.axes if axis.name.startswith("idle") and axis.size > 1]
    advice = "all compute the same, cutting costs more than it saves here; use"
    found = [f"the ranks of axis {axis.name} {advice} {plan.num_ranks // axis.size} devices, or more work per step" for axis in idle]
    return [*found, *_places(plan), *plan.notes]


def _places(plan: Plan) -> list[str]:
    """Which ranks are on which group of different devices, neighbours of one group together; of copies of the model, with how many microbatches each."""
    found, first = [], 0
    places = plan.pipeline.places if plan.pipeline is not None else ()
    shares = plan.pipeline.shares or (0,) * len(places) if plan.pipeline is not None else ()
    for (place, share), of_group in groupby(zip(places, shares)):
        count = len(list(of_group)) * plan.mesh.num_ranks
        found.append(f"{first} to {first + count - 1} on {place}" + (f" with {share} microbatch{'es' * (share > 1)} a copy" if share else ""))
        first += count
    return [f"processes in this order: {', '.join(found)}"] if found else []
