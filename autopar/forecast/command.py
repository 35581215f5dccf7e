"""`python -m autopar.cost_models.validate runs.csv`: price every run of a file, and say how near that comes."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from autopar.errors import AutoparError
from autopar.forecast.price import price_rows
from autopar.forecast.report import as_json, as_svg, print_tables
from autopar.forecast.runs import OWN_ROWS, read_rows
from autopar.forecast.score import score


def validate(
    runs: Annotated[Path | None, typer.Argument(help="A CSV file of runs; without one, the rows that the costs were calibrated on.")] = None,
    as_text: Annotated[bool, typer.Option("--json", help="Everything as JSON, every row included.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Write predicted over measured step times as SVG.")] = None,
    mixtures: Annotated[bool, typer.Option("--mixtures", help="Price mixtures of experts too; their forecasts are not near enough to count.")] = False,
    workers: Annotated[int, typer.Option(min=1, max=64, help="Processes.")] = 2,
) -> None:
    """Price the rows of a file of published runs and score the forecasts."""
    priced = price_rows(read_rows(runs or OWN_ROWS), workers, mixtures=mixtures)
    found = score(priced)
    if plot is not None:
        plot.write_text(as_svg(priced), encoding="utf-8")
    if as_text:
        print(as_json(priced, found))
    else:
        print_tables(priced, found, Console(width=None if sys.stdout.isatty() else 170))


def main() -> int:
    """Run the command line; one line on stderr and the exit code of the error where it cannot be done."""
    try:
        typer.run(validate)
    except AutoparError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0
