"""Quantities as people write them ("450 GB/s") and as autopar computes with them (4.5e11 bytes per second).

Inside the program everything is decimal and without prefix: bytes, bytes per second, floating-point operations per
second, seconds. A number without a unit is never accepted: 400 could be gigabits or gigabytes, and nobody would see it.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from fractions import Fraction

from autopar.errors import UsageError

# Three digits of exponent reach past the range of a float, so a longer one can only be an attack on the parser.
QUANTITY = re.compile(r"(?P<sign>[+-]?)(?P<number>[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]{1,3})?)[ ]*(?P<unit>[^0-9\s][^\s]*)?")
MICRO = str.maketrans("µμ", "uu")
MAX_TEXT = 64
SHOWN = 40

PREFIXES: tuple[tuple[str, Fraction], ...] = tuple((p, Fraction(1000) ** i) for i, p in enumerate(("", "k", "M", "G", "T", "P", "E")))
BINARY: tuple[tuple[str, Fraction], ...] = tuple((p, Fraction(1024) ** i) for i, p in enumerate(("Ki", "Mi", "Gi", "Ti"), start=1))
FRACTIONS: tuple[tuple[str, Fraction], ...] = tuple((p, Fraction(1, 1000**i)) for i, p in enumerate(("", "m", "u", "n")))


@dataclass(frozen=True)
class Dimension:
    """One kind of quantity: its units with their factor to the base unit, which is the first one, and how to write it.

    `read_only` units are understood and never written: bits are how people name a network, bytes what autopar counts.
    """

    name: str
    units: Mapping[str, Fraction]
    example: str
    advice: str
    read_only: frozenset[str] = frozenset()


MEMORY = Dimension("a memory size", {f"{p}B": f for p, f in PREFIXES + BINARY}, "80 GB", "in bytes: MB, GB, TB or MiB, GiB, TiB")
BIT_RATES = {f"{p}{bit}/s": f / 8 for bit in ("b", "bit") for p, f in PREFIXES}
BANDWIDTH = Dimension(
    "a bandwidth",
    {f"{p}B/s": f for p, f in PREFIXES + BINARY} | BIT_RATES,
    "450 GB/s' or, in bits, '400 Gb/s",
    "in bytes (MB/s, GB/s, TB/s) or in bits (Mb/s, Gb/s, Tb/s)",
    read_only=frozenset(BIT_RATES),
)
COMPUTE = Dimension("a compute rate", {f"{p}FLOP/s": f for p, f in PREFIXES}, "989 TFLOP/s", "in GFLOP/s, TFLOP/s or PFLOP/s")
DURATION = Dimension("a duration", {f"{p}s": f for p, f in FRACTIONS}, "3 us", "in s, ms, us or ns")


def shown(value: object) -> str:
    """A value from an untrusted file as one short printable word, whatever it is."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int) and value.bit_length() > 64:
        return f"a whole number of {value.bit_length()} bits"  # str() of a huge int raises
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list):
        return "an array"
    if isinstance(value, str) and len(value) > SHOWN:
        text = repr(value[:SHOWN])
        return f"{text[:-1]}...{text[-1]}"
    return repr(value)


def parse_quantity(text: object, dimension: Dimension) -> float:
    """The value in the base unit of `dimension`, finite and not negative; `UsageError` says what to write instead.

    The product of number and factor is rounded once: "0.3 us" is exactly the float 3e-07.
    """
    what = shown(text)
    if isinstance(text, (int, float)) and not isinstance(text, bool):
        raise UsageError(f"{what} is a bare number; write {dimension.name} as text with its unit, such as '{dimension.example}'")
    if not isinstance(text, str):
        raise UsageError(f"{what} is not {dimension.name}; write text such as '{dimension.example}'")
    match = QUANTITY.fullmatch(text.strip()) if len(text) <= MAX_TEXT else None
    if match is None:
        raise UsageError(f"{what} is not {dimension.name}; write a number and a unit, such as '{dimension.example}'")
    unit = match["unit"]
    if unit is None:
        raise UsageError(f"{what} has no unit; write {dimension.name} such as '{dimension.example}'")
    if unit not in dimension.units:
        close = get_close_matches(unit.translate(MICRO), dimension.units, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise UsageError(f"{what} has the unknown unit {shown(unit)}; {hint}write {dimension.name} {dimension.advice}")
    if match["sign"] == "-":
        raise UsageError(f"{what} is negative; write {dimension.name} such as '{dimension.example}'")
    try:
        return float(Fraction(match["number"]) * dimension.units[unit])
    except OverflowError:
        raise UsageError(
            f"{what} is larger than any number autopar computes with; write {dimension.name} such as '{dimension.example}'"
        ) from None


def format_quantity(value: float, dimension: Dimension) -> str:
    """The shortest text that `parse_quantity` reads back to exactly this value, with 1 <= number < 1000 where possible."""
    best = f"{_number(value)} {next(iter(dimension.units))}"
    if not value:
        return best
    candidates = []
    for unit, factor in dimension.units.items():
        if unit in dimension.read_only:
            continue
        scaled = float(Fraction(value) / factor)
        text = f"{_number(scaled)} {unit}"
        if 1 <= scaled < 1000 and math.isfinite(scaled) and parse_quantity(text, dimension) == value:
            candidates.append(text)
    return min(candidates, key=len, default=best)


def _number(value: float) -> str:
    return repr(int(value)) if float(value).is_integer() and abs(value) < 1e15 else repr(float(value))


SIZES = ((2.0**40, "TiB"), (2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"))


def size(num_bytes: float) -> str:
    """`5.53 MiB`: memory as a report says it, in the largest binary unit that is not above it, three digits."""
    return scaled(num_bytes, SIZES) or f"{num_bytes:.0f} B"


def scaled(value: float, units: tuple[tuple[float, str], ...]) -> str:
    """The value in the first unit that is not above it; empty where all are."""
    for scale, unit in units:
        if value >= scale:
            return f"{_digits(value / scale)} {unit}"
    return ""


def _digits(value: float) -> str:
    """Three digits, all of them where there are more before the point."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"
