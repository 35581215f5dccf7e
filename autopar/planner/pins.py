"""What a user fixes: `dp=2`, `pp=4`, `schedule=1f1b`, `zero=3`, `recompute=full`, or a word for a named parameter or operator."""

from collections.abc import Sequence
from dataclasses import dataclass

from autopar.core.residency import RECOMPUTE
from autopar.errors import PinConflictError, UsageError
from autopar.schedules.orders import ORDERS

DEGREES = ("dp", "tp", "pp", "sp", "cp", "ep")
OTHERS = ("zero", "micro_batch", "recompute", "schedule", "virtual")
LATER = ("cp", "ep")
"""Degrees that this version does not search yet; 1 is what it does and is accepted."""

SCHEDULES = tuple(name for name in ORDERS if name != "forward")
"""Those that train."""


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
    block, words for names; of a pipeline its length, its schedule and its stages per rank (`virtual`)."""

    degrees: tuple[tuple[str, int], ...] = ()
    named: tuple[Pin, ...] = ()
    zero: int | None = None
    micro_batch: int | None = None
    recompute: str | None = None
    pp: int | None = None
    schedule: str | None = None
    virtual: int | None = None

    @property
    def wants_pipeline(self) -> bool:
        """Whether only a pipeline does what is asked."""
        return (self.pp or 1) > 1 or self.schedule is not None or self.virtual is not None

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
    _check_pipeline(values)
    return Pins(
        degrees=tuple((k, int(v)) for k, v in values.items() if k in ("dp", "tp")),
        named=tuple(named),
        zero=int(values["zero"]) if "zero" in values else None,
        micro_batch=int(values["micro_batch"]) if "micro_batch" in values else None,
        recompute=values.get("recompute"),
        pp=int(values["pp"]) if "pp" in values else None,
        schedule=values.get("schedule"),
        virtual=int(values["virtual"]) if "virtual" in values else None,
    )


def _check_pipeline(values: dict[str, str]) -> None:
    """Refuse what no pipeline can be."""
    schedule, virtual, zero = values.get("schedule"), int(values.get("virtual", "0")), values.get("zero", "0")
    if values.get("pp") == "1" and ("schedule" in values or "virtual" in values):
        raise PinConflictError("pin pp=1 is no pipeline, it has neither schedule nor virtual stages; leave them out or pin a larger pp")
    if schedule == "interleaved" and virtual == 1:
        raise PinConflictError("pins schedule=interleaved and virtual=1 contradict each other: with one stage per rank it is 1f1b; pin virtual=2 or more")
    if schedule == "1f1b" and virtual > 1:
        raise PinConflictError(f"pins schedule=1f1b and virtual={virtual} contradict each other: 1f1b has one stage per rank; pin schedule=interleaved")
    if schedule == "zero-bubble" and zero in ("2", "3"):
        raise PinConflictError(
            f"pins schedule=zero-bubble and zero={zero} contradict each other: the two halves of a split backward would each reduce-scatter the gradients "
            "of every microbatch, twice the traffic; pin zero=1 or schedule=1f1b"
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
    if key == "schedule":
        if value not in SCHEDULES:
            raise UsageError(f"--pin {text!r}: schedule is {', '.join(SCHEDULES)}")
        return
    if not value.isdigit() or len(value) > 6 or (int(value) < 1 and key not in ("zero", "sp")):
        raise UsageError(f"--pin {text!r}: {value!r} is not a positive whole number")
    if key == "zero" and int(value) > 3:
        raise UsageError(f"--pin {text!r}: ZeRO has stages 0 to 3")
    if key in LATER and int(value) != 1:
        raise UsageError(f"--pin {text!r}: {key} is not searched by this version; only {key}=1 is possible")
    if key == "sp" and int(value) > 1:
        raise UsageError(f"--pin {text!r}: sequence parallelism is found along tp when it is cheaper; pin tp instead")
