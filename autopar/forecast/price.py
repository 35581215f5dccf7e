"""Rows to forecasts, in as many processes as are wanted."""

import math
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context

from autopar.errors import AutoparError
from autopar.forecast.cases import Case, case_of, with_recompute
from autopar.forecast.machines import HOST_BYTES_PER_S
from autopar.forecast.runs import Row, Unpriced
from autopar.forecast.step import Step, StepPlan

RESERVED_BYTES = 3_000_000_000
"""Of a device, for its context, the libraries' workspaces and the buffers of communicators. Source: assumed, the usual 2 to 4 GB."""

CHUNK = 24
"""Rows that a process takes at a time, neighbours in model and layout, which share what is planned once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One row with its forecast. `measured_s` None: memory ran out; `setting`: what plans that compete have in common."""

    id: str
    source: str
    group: str
    machine: tuple[str, str]
    setting: str
    predicted_s: float
    measured_s: float | None
    memory_bytes: int
    device_bytes: int
    recompute: str
    usable_bytes: int

    @property
    def log_error(self) -> float | None:
        """log(predicted / measured)."""
        return math.log(self.predicted_s / self.measured_s) if self.measured_s else None

    @property
    def fits(self) -> bool:
        return self.memory_bytes <= self.usable_bytes


@dataclass(frozen=True, slots=True)
class Refused:
    """A row without a forecast, and why."""

    id: str
    source: str
    reason: str


@dataclass(frozen=True, slots=True)
class Priced:
    """All rows of a file: none is missing."""

    results: tuple[Result, ...]
    refused: tuple[Refused, ...]


def price_rows(rows: Sequence[Row], workers: int = 1, *, mixtures: bool = False) -> Priced:
    """Price every run and every report of memory running out among the rows, in the order of the file. `mixtures`: those of experts too, whose forecasts
    are not near enough to count."""
    order = sorted(range(len(rows)), key=lambda n: (rows[n].text("pp"), rows[n].text("hidden"), rows[n].text("tp"), n))
    chunks = [[rows[n] for n in order[i : i + CHUNK]] for i in range(0, len(order), CHUNK)]
    each = partial(price_chunk, mixtures=mixtures)
    if workers == 1:
        found = [each(chunk) for chunk in chunks]
    else:
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            found = list(pool.map(each, chunks))
    by_id = {r.id: r for chunk in found for r in chunk}
    in_order = [by_id[row.id] for row in rows]
    return Priced(tuple(r for r in in_order if isinstance(r, Result)), tuple(r for r in in_order if isinstance(r, Refused)))


def price_chunk(rows: Sequence[Row], *, mixtures: bool = False) -> list[Result | Refused]:
    return [price_row(row, mixtures=mixtures) for row in rows]


def price_row(row: Row, *, mixtures: bool = False) -> Result | Refused:
    try:
        if row.text("kind") not in ("run", "oom"):
            raise Unpriced(f"kind {row.text('kind')[:20]}: not the run of a step")
        if row.text("scorable") == "no":
            raise Unpriced("marked as not scorable")
        if row.text("experts") and not mixtures:
            raise Unpriced("mixture of experts: forecasts of dispatchers are not near enough, --mixtures shows them")
        return price(case_of(row))
    except AutoparError as error:
        return Refused(row.id, row.source, str(error))


def price(case: Case) -> Result:
    """The forecast of a case: of each of its plans with the lightest mode of recomputation that fits, the heaviest where none does; of several the
    fastest that fits."""
    device = case.cluster.device
    limit = round((device.memory_bytes - RESERVED_BYTES) * (1 - case.software.fragments))
    found = [_lightest(case, plan, limit) for plan in case.plans]
    seconds, num_bytes, mode = min(found, key=lambda f: (f[1] > limit, f[0]))
    row, dims = case.row, case.dims
    return Result(
        id=row.id, source=row.source, group=row.text("split_group"), machine=(case.gpu, case.software.name),
        setting=" ".join(map(str, (case.gpu, row.text("num_gpus"), dims.layers, dims.hidden, dims.seq, dims.vocab, row.text("global_batch"), _state(row)))),
        predicted_s=seconds, measured_s=case.measured_s, memory_bytes=num_bytes,
        device_bytes=device.memory_bytes, recompute=mode, usable_bytes=limit,
    )  # fmt: skip


def _state(row: Row) -> str:
    """Of the machine, where notes say that rows from before and after a repair do not compare."""
    return "repaired" if "do not compare with rows dated before" in row.notes else ""


def _lightest(case: Case, plan: StepPlan, limit: int) -> tuple[float, int, str]:
    """(seconds, bytes, mode of recomputation)."""
    for mode in case.recompute:
        seconds, num_bytes = _offloaded(case, plan, limit) if mode == "offload" else _step(case, plan, mode)
        if num_bytes <= limit:
            break
    return seconds, num_bytes, mode


def _offloaded(case: Case, plan: StepPlan, limit: int) -> tuple[float, int]:
    """Seconds and bytes with as much of the activations on the host as does not fit, of what recomputation would save; they go there and come back
    beside the computation, which waits where that takes longer."""
    (seconds, num_bytes), (_, least) = _step(case, plan, "none"), _step(case, plan, "full")
    moved = max(0, num_bytes - max(limit, least)) * plan.num_microbatches
    return max(seconds, 2 * moved / HOST_BYTES_PER_S[case.gpu]), max(limit, least)


def _step(case: Case, plan: StepPlan, mode: str) -> tuple[float, int]:
    """Seconds and bytes; of software that computes every second block again, half of all and of none of them."""
    if mode == "selective" and case.software.selects_blocks:
        (a, b), (c, d) = (_step(case, plan, half) for half in ("none", "full"))
        return (a + c) / 2, (b + d) // 2
    step = Step(case.dims, with_recompute(plan, mode), case.cluster, case.precision, case.dtype, case.kernels, case.software.overlap)
    return step.step_s, step.memory.expected_bytes
