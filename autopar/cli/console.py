"""What goes where: the result to stdout, progress to stderr, colour only to a terminal."""

import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rich.console import Console

JSON_SCHEMA_VERSION = 1
"""Version of the objects that `--json` prints; it changes when a key changes its meaning or goes."""

PAGE_WIDTH = 160
"""Columns of a table that is not written to a terminal."""


class _Output(Console):
    def on_broken_pipe(self) -> None:
        """Leaves the decision to `main`; rich would end the process with code 1."""
        raise BrokenPipeError


def output() -> Console:
    """stdout. Text is printed as it is: no markup, no numbers in colour, no line folded unless a terminal is too narrow."""
    terminal = sys.stdout.isatty()
    return _Output(width=None if terminal else PAGE_WIDTH, markup=False, highlight=False, emoji=False, soft_wrap=not terminal)


def print_json(content: Mapping[str, Any]) -> None:
    """One JSON object with its version first. Numbers that JSON has no word for (a loss that is NaN) become null."""
    print(json.dumps({"schema_version": JSON_SCHEMA_VERSION, **_finite(content)}, indent=1, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value


@contextlib.contextmanager
def working(first: str) -> Iterator[Callable[[str], None]]:
    """While something takes time: what is being done, on stderr and only if that is a terminal.

    Yields the function that says what comes next. What model code prints meanwhile goes to stderr too.
    """
    if not sys.stderr.isatty():
        with contextlib.redirect_stdout(sys.stderr):
            yield lambda text: None
        return
    from rich.markup import escape
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(escape(first))
        yield lambda text: bar.update(task, description=escape(text))
