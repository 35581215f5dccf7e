"""How near forecasts come to what was measured: medians within a group, then within a source, then the mean of sources."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, median

import numpy as np

from autopar.errors import AutoparError
from autopar.forecast.cases import Case, case_of, with_recompute
from autopar.forecast.runs import Row, Unpriced
from autopar.forecast.step import Step

FITS = 1.0
"""Share of a device's memory that a run may have used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One row with its forecast. `log_error`: log(predicted / measured); None for rows that report that memory ran out."""

    id: str
    source: str
    group: str
    machine: str
    software: str
    plan_key: str
    predicted_s: float
    measured_s: float | None
    memory_bytes: float
    device_bytes: float
    recompute: str

    @property
    def log_error(self) -> float | None:
        return math.log(self.predicted_s / self.measured_s) if self.measured_s else None

    @property
    def fits(self) -> bool:
        return self.memory_bytes <= FITS * self.device_bytes


@dataclass(frozen=True)
class Priced:
    """All rows of a file: those priced, and those that were not with the reason."""

    results: tuple[Result, ...]
    unpriced: tuple[tuple[str, str, str], ...]


def price_rows(rows: Sequence[Row], progress: Callable[[int], None] = lambda done: None) -> Priced:
    """Price every run and every out-of-memory report among the rows."""
    results, unpriced = [], []
    for n, row in enumerate(rows):
        try:
            results.append(price(case_of(_scorable(row))))
        except AutoparError as error:
            unpriced.append((row.id, row.source, str(error)))
        progress(n + 1)
    return Priced(tuple(results), tuple(unpriced))


def _scorable(row: Row) -> Row:
    if row.text("kind") not in ("run", "oom"):
        raise Unpriced(f"kind {row.text('kind')}: no run of a step")
    if row.text("scorable") == "no":
        raise Unpriced("marked as not scorable")
    return row


def price(case: Case) -> Result:
    """The forecast of a case; with the lightest of its modes of recomputation that fits, the heaviest where none does."""
    device_bytes = case.cluster.device.memory_bytes
    for mode in case.recompute:
        step = Step(case.dims, with_recompute(case.plan, mode), case.cluster, case.precision, case.dtype, case.kernels, case.software.overlap)
        if mode == case.recompute[-1] or step.memory.expected_bytes <= FITS * device_bytes:
            break
    row = case.row
    return Result(
        id=row.id, source=row.source, group=row.text("split_group"), machine=case.gpu, software=case.software.name,
        plan_key=f"{row.text('model_family')} {row.text('params_b')} {case.dims.layers} {case.dims.hidden} {case.dims.seq} {row.text('num_gpus')} {row.text('global_batch')}",
        predicted_s=step.step_s, measured_s=case.measured_s, memory_bytes=step.memory.expected_bytes, device_bytes=device_bytes, recompute=mode,
    )  # fmt: skip
