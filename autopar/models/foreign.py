"""The border to code that is not ours: whatever it raises becomes one line of ours."""

from types import TracebackType
from typing import Self

from autopar.errors import AutoparError

MAX_CAUSE_CHARACTERS = 300


def one_line(cause: BaseException) -> str:
    """`Type: message` of an exception, white space folded and cut to a readable length."""
    text = " ".join(f"{type(cause).__name__}: {cause}".split()).rstrip(": ")
    return text if len(text) <= MAX_CAUSE_CHARACTERS else text[: MAX_CAUSE_CHARACTERS - 1] + "…"


class ForeignCode:
    """Context that turns any failure inside it into `error("WHAT (cause)")`, the cause chained.

    User functions and third-party constructors may raise any class, `SystemExit` included, so the class of the
    failure decides nothing here. Our own errors and an interrupt by the user pass through.
    """

    def __init__(self, error: type[AutoparError], what: str) -> None:
        self._error = error
        self._what = what

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, cause: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(cause, (Exception, SystemExit)) and not isinstance(cause, AutoparError):
            raise self._error(f"{self._what} ({one_line(cause)})") from cause
