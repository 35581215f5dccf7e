"""What a user fixes: `dp=2`, `zero=3`, `recompute=full`, or a word for a named parameter or operator."""

from collections.abc import Sequence
from dataclasses import dataclass

from autopar.core.residency import RECOMPUTE
from autopar.errors import PinConflictError, UsageError

DEGREES = ("dp", "tp", "sp", "cp", "ep", "pp", "vpp")
OTHERS = ("zero", "micro_batch", "recompute")
LATER = ("cp", "ep", "pp", "vpp")
"""Degrees that this version does not search yet; 1 is what it does and is accepted."""


@dataclass(frozen=True)
class Pin:
    """`pattern=axis:word`: a parameter or operator whose name or module path matches must do `word` on `axis`.

    For a parameter the word is a placement (`S0`, `I`), for an operator a factor of its rule, `I` or `R`.
    """

    pattern: str
    axis: str
    word: str
    text: str


@dataclass(frozen=True)
class Pins:
    """All user constraints: mesh degrees by role, ZeRO stage, samples per data-parallel rank and microbatch, recomputation of every
    block, and words for names."""

    degrees: tuple[tuple[str, int], ...] = ()
    named: tuple[Pin, ...] = ()
    zero: int | None = None
    micro_batch: int | None = None
    recompute: str | None = None

    @property
    def mesh_axes(self) -> tuple[tuple[str, int], ...]:
        """Degrees that make mesh axes, outermost first: dp, then tp."""
        given = dict(self.degrees)
        return tuple((name, given[name]) for name in ("dp", "tp") if name in given)


def parse_pins(texts: Sequence[str]) -> Pins:
    """Read `--pin` values; raises UsageError for an unknown one and PinConflictError for two that contradict."""
    found: dict[str, tuple[str, str]] = {}
    named: list[Pin] = []
    for text in (item.strip() for entry in texts for item in _split(entry)):
        key, equals, value = text.rpartition("=")
        if not equals or not value:
            raise UsageError(f"--pin {text!r}: write NAME=VALUE (dp=2) or PATTERN=AXIS:WORD ('*.mlp.*=tp:o')")
        if ":" in value:
            axis, _, word = value.partition(":")
            named.append(Pin(key, axis, word, text))
            continue
        _check(key, value, text)
        if key in found and found[key][0] != value:
            raise PinConflictError(f"pins {found[key][1]!r} and {text!r} contradict each other; keep one")
        found[key] = (value, text)
    values = {key: value for key, (value, _) in found.items()}
    return Pins(
        degrees=tuple((k, int(v)) for k, v in values.items() if k in ("dp", "tp")),
        named=tuple(named),
        zero=int(values["zero"]) if "zero" in values else None,
        micro_batch=int(values["micro_batch"]) if "micro_batch" in values else None,
        recompute=values.get("recompute"),
    )


def _split(entry: str) -> list[str]:
    return entry.split(",") if ":" not in entry else [entry]


def _check(key: str, value: str, text: str) -> None:
    if key not in (*DEGREES, *OTHERS):
        raise UsageError(f"--pin {text!r}: unknown name {key!r}; known are {', '.join((*DEGREES, *OTHERS))}, or PATTERN=AXIS:WORD")
    if key == "recompute":
        if value not in RECOMPUTE:
            raise UsageError(f"--pin {text!r}: recompute is {', '.join(RECOMPUTE)}")
        return
    if not value.isdigit() or len(value) > 6 or (int(value) < 1 and key not in ("zero", "sp")):
        raise UsageError(f"--pin {text!r}: {value!r} is not a positive whole number")
    if key == "zero" and int(value) > 3:
        raise UsageError(f"--pin {text!r}: ZeRO has stages 0 to 3")
    if key in LATER and int(value) != 1:
        raise UsageError(f"--pin {text!r}: {key} is not searched by this version; only {key}=1 is possible")
    if key == "sp" and int(value) > 1:
        raise UsageError(f"--pin {text!r}: sequence parallelism is found along tp when it is cheaper; pin tp instead")
