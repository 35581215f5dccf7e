"""What to say where nothing fits: how much is missing, when, and the smallest change that was computed to be enough."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

from autopar.core.graph import OpGraph
from autopar.core.memory import MemoryUse
from autopar.core.residency import GATHER, RECOMPUTE
from autopar.errors import AutoparError, InfeasibleError
from autopar.planner.search import Candidate, DoesNotFit, MeshSearch

Retrace = Callable[[int], OpGraph | None]
"""The graph of one of this many microbatches; None where the batch does not divide."""

HEAVY = ("full", "full" + GATHER)
"""Modes of recomputation that are proposed."""

MAX_FACTOR = 64
"""More devices or microbatches than this many times those given are not proposed."""


def infeasible(failures: list[tuple[MeshSearch, DoesNotFit]], retrace: Retrace) -> InfeasibleError:
    """The error for a model that fits on none of the meshes that were searched."""
    search, failure = min(failures, key=lambda pair: pair[1].leanest.memory.high_bytes)
    memory, limit = failure.leanest.memory, failure.limit_bytes
    share = search.options.memory_share
    return InfeasibleError(
        f"no plan fits: {search.graph.name} on {search.cluster.name} needs {memory.high_bytes} bytes on a device with the leanest plan found, "
        f"{memory.high_bytes - int(limit)} over the limit of {int(limit)} ({share:.0%} of its memory), at its fullest moment, {memory.moment} "
        f"({_largest(memory)}); {_advice(search, failure.leanest, retrace)}"
    )


def _largest(memory: MemoryUse) -> str:
    """`parameters 12 %, activations 70 %`: the parts that are a tenth or more."""
    return ", ".join(f"{part} {size / memory.high_bytes:.0%}" for part, size in memory.parts if size >= memory.high_bytes / 10)


def _advice(search: MeshSearch, leanest: Candidate, retrace: Retrace) -> str:
    for words, changed in _changes(search, retrace):
        try:
            found = changed.leanest()
        except AutoparError:
            continue  # not a plan: the mesh or the pins do not allow it
        if found.memory.high_bytes <= changed.limit_bytes:
            return f"it would fit with {words}"
    return f"it would fit devices of {math.ceil(leanest.memory.high_bytes / search.options.memory_share)} bytes; a smaller batch needs less"


def _changes(search: MeshSearch, retrace: Retrace) -> Iterator[tuple[str, MeshSearch]]:
    """Changes from small to large."""
    pins = search.pins
    if pins.zero is not None and pins.zero < 3:
        yield "zero=3", replace(search, pins=replace(pins, zero=3))
    for mode in HEAVY:
        if pins.recompute is not None and RECOMPUTE.index(pins.recompute) < RECOMPUTE.index(mode):
            yield f"recompute={mode}", replace(search, pins=replace(pins, recompute=mode))
    if pins.zero is not None or pins.recompute is not None:
        yield from ((f"zero=3 and recompute={mode}", replace(search, pins=replace(pins, zero=3, recompute=mode))) for mode in HEAVY)
    times = search.options.micro_batches
    while (graph := retrace(times := 2 * times)) is not None and times <= MAX_FACTOR * search.options.micro_batches:
        yield f"{times} microbatches", search.with_micro_batches(graph, times)
    if not search.options.offload:
        yield "offload=True", replace(search, options=replace(search.options, offload=True))
    factor = 2
    while factor <= MAX_FACTOR:
        more = search.with_more_nodes(factor)
        yield f"{more.cluster.num_devices} devices instead of {search.cluster.num_devices}", more
        factor *= 2
