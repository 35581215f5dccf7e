"""Calls of the command line inside this process, and what every failure must look like."""

from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from autopar.cli.main import main


@dataclass(frozen=True)
class Called:
    """How a call ended and what it wrote."""

    code: int
    out: str
    err: str


class Call:
    """`call("plan", "gpt2-tiny", ...)`."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: object) -> Called:
        self._capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        out, err = self._capsys.readouterr()
        return Called(code, out, err)


def assert_refused(called: Called, code: int, words: Sequence[str]) -> None:
    """The exit code, nothing on stdout, and one readable line on stderr that holds all `words`."""
    assert called.code == code, called
    assert called.out == ""
    assert called.err.startswith("autopar: ") and called.err.endswith("\n"), called.err
    line = called.err[:-1]
    assert "\n" not in line and line.isprintable() and len(line) < 700, called.err
    assert "Traceback" not in line
    for word in words:
        assert word in line, f"{word!r} is not in {line!r}"
