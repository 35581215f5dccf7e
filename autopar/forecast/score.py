"""How near forecasts come to what was measured: medians within a group, then within a source, then the mean of sources.

Rows of one split group share model, device and plan, so that a median within it is one observation. A *machine* is a (device, software) pair; its
fitted efficiency is one number, the median over its groups of the median log error.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from zlib import crc32

from autopar.forecast.price import Priced, Result
from autopar.forecast.ranking import Ranking, ranking

FOLDS = 3
"""Every third of the groups, by a checksum of their names, is held back in turn from what intervals are made of."""

COVERAGE = 0.95
"""Of the residuals that the interval is made of. It is to hold for nine tenths of others, which differ; nine tenths of its own were tried first and held
for 89 % of a third that was held back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceScore:
    """One source. Errors are medians over groups of medians of |log(predicted / measured)|: as they are, with the sign, after the fit."""

    source: str
    rows: int
    groups: int
    error: float
    bias: float
    fitted_error: float
    kendall: float | None
    ranking: Ranking | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Feasibility:
    """Of the sources that report memory running out: how many such reports and how many runs, and how many of each are forecast not to fit."""

    out_of_memory: int
    recalled: int
    runs: int
    false_alarms: int

    @property
    def recall(self) -> float:
        return self.recalled / self.out_of_memory if self.out_of_memory else 1.0

    @property
    def false_alarm_share(self) -> float:
        return self.false_alarms / self.runs if self.runs else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """Predicted times of a fitted machine are within a factor exp(half_width) up or down; `coverage`: of intervals that are made without a third of
    the groups, on that third, over all thirds."""

    half_width: float
    coverage: float
    held_back_rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """All of it. `efficiency`: by (device, software), the factor that a forecast is divided by after the fit, as a logarithm."""

    sources: tuple[SourceScore, ...]
    efficiency: tuple[tuple[tuple[str, str], float], ...]
    feasibility: Feasibility
    interval: Interval

    @property
    def error(self) -> float:
        return fmean(s.error for s in self.sources) if self.sources else 0.0

    @property
    def fitted_error(self) -> float:
        return fmean(s.fitted_error for s in self.sources) if self.sources else 0.0


def score(priced: Priced) -> Score:
    """The four numbers of a file, and what they are made of."""
    timed = [r for r in priced.results if r.log_error is not None]
    shift = fit(timed)
    by_source: dict[str, list[Result]] = defaultdict(list)
    for r in timed:
        by_source[r.source].append(r)
    sources = tuple(_source_score(source, rows, shift) for source, rows in sorted(by_source.items()))
    return Score(sources=sources, efficiency=tuple(sorted(shift.items())), feasibility=_feasibility(priced.results), interval=_interval(timed))


def fit(results: Iterable[Result]) -> dict[tuple[str, str], float]:
    """The median log error of every machine."""
    found: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for r in results:
        if r.log_error is not None:
            found[r.machine][r.group].append(r.log_error)
    return {machine: median(map(median, groups.values())) for machine, groups in found.items()}


def of_groups(results: Iterable[Result], value: dict[str, float]) -> float:
    """The median over groups of the median of a value (by row id) within a group."""
    groups: dict[str, list[float]] = defaultdict(list)
    for r in results:
        groups[r.group].append(value[r.id])
    return median(map(median, groups.values()))


def _source_score(source: str, rows: Sequence[Result], shift: dict[tuple[str, str], float]) -> SourceScore:
    errors = {r.id: r.log_error or 0.0 for r in rows}
    fitted = {r.id: abs(errors[r.id] - shift[r.machine]) for r in rows}
    order = ranking(rows)
    return SourceScore(
        source=source, rows=len(rows), groups=len({r.group for r in rows}), error=of_groups(rows, {k: abs(e) for k, e in errors.items()}),
        bias=of_groups(rows, errors), fitted_error=of_groups(rows, fitted), kendall=order and order.kendall, ranking=order,
    )  # fmt: skip


def _feasibility(results: Sequence[Result]) -> Feasibility:
    reporting = {r.source for r in results if r.measured_s is None}
    out = [r for r in results if r.measured_s is None]
    runs = [r for r in results if r.measured_s is not None and r.source in reporting]
    return Feasibility(
        out_of_memory=len(out), recalled=sum(not r.fits for r in out), runs=len(runs), false_alarms=sum(not r.fits for r in runs)
    )  # fmt: skip


def _interval(timed: Sequence[Result]) -> Interval:
    """From the fit and the residuals of all; tried on every third of the groups with what the other two make, where their machine is known."""
    holds: list[bool] = []
    for fold in range(FOLDS):
        held = {r.id for r in timed if crc32(r.group.encode()) % FOLDS == fold}
        shift, half = _made([r for r in timed if r.id not in held])
        holds += [abs((r.log_error or 0.0) - shift[r.machine]) <= half for r in timed if r.id in held and r.machine in shift]
    return Interval(half_width=_made(timed)[1], coverage=fmean(holds) if holds else 1.0, held_back_rows=len(holds))


def _made(timed: Sequence[Result]) -> tuple[dict[tuple[str, str], float], float]:
    """(fit, half width)."""
    shift = fit(timed)
    residuals = sorted(abs((r.log_error or 0.0) - shift[r.machine]) for r in timed)
    return shift, residuals[min(len(residuals) - 1, int(COVERAGE * len(residuals)))] if residuals else 0.0
