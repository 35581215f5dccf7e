"""The table of the score in `cost_models/README.md` is what the rows of the repository give."""

import re
from collections import Counter
from pathlib import Path

from autopar.forecast.price import price_rows
from autopar.forecast.runs import OWN_ROWS, read_rows
from autopar.forecast.score import SourceScore, score

README = Path(__file__).parents[2] / "cost_models" / "README.md"
LINE = re.compile(r"^\| (.+?) \| (\d+) \| (\d+) \| ([\d.]+) \| ([+-][\d.]+) \| ([\d.]+) \| ([-\d.]*) ?\|$", re.MULTILINE)
"""Source, rows, groups, error, sign, error after the fit, Kendall."""

FEW_ROWS = 100
"""Sources of fewer are priced in ten seconds. All of them take a minute; only then is a machine fitted that several sources share."""


def line(s: SourceScore) -> tuple[str, ...]:
    kendall = "" if s.kendall is None else f"{s.kendall:.2f}"
    return (s.source, str(s.rows), str(s.groups), f"{s.error:.3f}", f"{s.bias:+.3f}", f"{s.fitted_error:.3f}", kendall)


def without_fit(cells: tuple[str, ...]) -> tuple[str, ...]:
    return cells[:5] + cells[6:]


def test_the_readme_tells_the_score_of_the_rows_in_the_repository(long: bool) -> None:
    rows = read_rows(OWN_ROWS)
    text = README.read_text(encoding="utf-8")
    told = {cells[0]: cells for cells in LINE.findall(text)}
    size = Counter(row.source for row in rows)
    found = score(price_rows([row for row in rows if long or size[row.source] < FEW_ROWS]))
    assert {s.source for s in found.sources} == {source for source in told if long or size[source] < FEW_ROWS}
    assert [without_fit(line(s)) for s in found.sources] == [without_fit(told[s.source]) for s in found.sources]
    if long:
        assert [line(s) for s in found.sources] == [told[s.source] for s in found.sources]
        assert f"| **mean of sources** | | | **{found.error:.3f}** | | **{found.fitted_error:.3f}** | |" in text
        memory, interval = found.feasibility, found.interval
        assert f"{memory.recalled} of {memory.out_of_memory} reports foreseen" in text
        assert f"false alarms on {memory.false_alarms} of {memory.runs} runs" in text
        assert f"holds for {interval.coverage:.0%} of that third, over all thirds ({interval.held_back_rows} rows" in text
