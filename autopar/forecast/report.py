"""A score as tables for people, as JSON for programs, and as a plot."""

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any
from xml.sax.saxutils import escape

from rich.console import Console
from rich.table import Table

from autopar.forecast.price import Priced, Result
from autopar.forecast.score import Score

COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb", "#000000")
SIZE, MARGIN = 640, 60

ORDER_ASKED = 0.75
"""Kendall's tau of the plans of a source below which the report says what is in the way."""


def as_json(priced: Priced, score: Score) -> str:
    """Everything that the tables show, and every row."""
    rows = [{**asdict(r), "log_error": r.log_error, "fits": r.fits} for r in priced.results]
    values: dict[str, Any] = {
        "error": score.error, "fitted_error": score.fitted_error,
        "sources": [asdict(s) for s in score.sources],
        "fitted_log_efficiency": [{"device": d, "software": s, "log": e} for (d, s), e in score.efficiency],
        "feasibility": {**asdict(score.feasibility), "recall": score.feasibility.recall, "false_alarm_share": score.feasibility.false_alarm_share},
        "interval": asdict(score.interval), "rows": rows, "refused": [asdict(r) for r in priced.refused],
    }  # fmt: skip
    return json.dumps(values, indent=1, sort_keys=True)


def print_tables(priced: Priced, score: Score, console: Console) -> None:
    table = Table("source", *("rows", "groups", "error", "sign", "fitted", "Kendall"), title="|log(predicted / measured)| of step time, median of groups")
    for column in table.columns[1:]:
        column.justify = "right"
    for s in score.sources:
        tau = "" if s.kendall is None else f"{s.kendall:.2f}"
        table.add_row(escape(s.source), str(s.rows), str(s.groups), f"{s.error:.3f}", f"{s.bias:+.3f}", f"{s.fitted_error:.3f}", tau)
    table.add_section()
    table.add_row("mean of sources", str(sum(s.rows for s in score.sources)), "", f"{score.error:.3f}", "", f"{score.fitted_error:.3f}", "")
    console.print(table)
    fitted = Table("device", "software", "measured / predicted", title="one fitted efficiency each")
    for (device, software), shift in score.efficiency:
        fitted.add_row(device, software, f"{math.exp(-shift):.2f}")
    console.print(fitted)
    f, i = score.feasibility, score.interval
    console.print(f"out of memory: {f.recalled} of {f.out_of_memory} foreseen ({f.recall:.0%}); false alarms on {f.false_alarms} of {f.runs} runs ({f.false_alarm_share:.0%})")
    console.print(f"interval after the fit: a factor of {math.exp(i.half_width):.2f}, holds for {i.coverage:.0%} of {i.held_back_rows} rows held back")
    console.print(_order_table(score))
    refused = Counter((r.source, r.reason) for r in priced.refused)
    missing = Table("source", "rows", "reason", title=f"{len(priced.refused)} rows without a forecast")
    for (source, reason), count in sorted(refused.items()):
        missing.add_row(escape(source), str(count), escape(reason))
    console.print(missing)


def _order_table(score: Score) -> Table:
    """Where plans are not in the order that is asked for: what keeps any forecast from it, and what this one gets wrong."""
    table = Table("source", "Kendall", "at most", "runs of a plan differ by", "runs in most of the wrong pairs", title=f"order of plans below {ORDER_ASKED:g}")
    for s in score.sources:
        if s.ranking is not None and s.ranking.kendall < ORDER_ASKED:
            repeats = "" if s.ranking.repeats is None else f"{s.ranking.repeats:.1%}"
            named = ", ".join(f"{name} {share:.0%}" for name, share in s.ranking.misplaced)
            table.add_row(escape(s.source), f"{s.ranking.kendall:.2f}", f"{s.ranking.ceiling:.2f}", repeats, escape(named))
    return table


def as_svg(priced: Priced) -> str:
    """Predicted over measured seconds, both logarithmic, a colour per source; lines at equal, and at 20 % more and less."""
    timed = [r for r in priced.results if r.measured_s]
    span = [s for r in timed for s in (r.predicted_s, r.measured_s or 1.0)] or [1.0]
    low, high = math.floor(math.log10(min(span))), math.ceil(math.log10(max(span))) or 1
    sources = sorted({r.source for r in timed})
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{SIZE + 330}" height="{SIZE}" font-family="sans-serif" font-size="11">',
        *_frame(low, high), *_points(timed, sources, low, high), "</svg>\n",
    ])  # fmt: skip


def _place(value: float, low: int, high: int) -> float:
    return MARGIN + (math.log10(value) - low) / max(1, high - low) * (SIZE - 2 * MARGIN)


def _frame(low: int, high: int) -> Iterator[str]:
    for power in range(low, high + 1):
        at = _place(10.0**power, low, high)
        yield f'<text x="{at:.0f}" y="{SIZE - MARGIN + 16}" text-anchor="middle">{10.0**power:g} s</text>'
        yield f'<text x="{MARGIN - 6}" y="{SIZE - at:.0f}" text-anchor="end">{10.0**power:g} s</text>'
    for factor, dash in ((1.0, ""), (1.2, "4"), (1 / 1.2, "4")):
        shift = math.log10(factor) / max(1, high - low) * (SIZE - 2 * MARGIN)
        yield f'<line x1="{MARGIN}" y1="{SIZE - MARGIN - shift:.1f}" x2="{SIZE - MARGIN}" y2="{MARGIN - shift:.1f}" stroke="#888" stroke-dasharray="{dash}"/>'
    yield f'<text x="{SIZE / 2}" y="{SIZE - 12}" text-anchor="middle">measured step time</text>'
    yield f'<text x="14" y="{SIZE / 2}" transform="rotate(-90 14 {SIZE / 2})" text-anchor="middle">predicted step time</text>'


def _points(timed: list[Result], sources: list[str], low: int, high: int) -> Iterator[str]:
    colour = {source: COLOURS[n % len(COLOURS)] for n, source in enumerate(sources)}
    for r in timed:
        x, y = _place(r.measured_s or 1.0, low, high), SIZE - _place(r.predicted_s, low, high)
        yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.2" fill="{colour[r.source]}" fill-opacity="0.6"><title>{escape(r.id)}</title></circle>'
    for n, source in enumerate(sources):
        yield f'<text x="{SIZE - MARGIN + 20}" y="{MARGIN + 15 * n}" fill="{colour[source]}">{escape(source[:52])}</text>'
