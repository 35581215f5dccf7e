"""Quantities in the words of a report."""

from autopar.core.units import scaled, size

__all__ = ["count", "duration", "size"]

TIMES = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"))
COUNTS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K"))


def duration(seconds: float) -> str:
    """`47.0 ms`."""
    return scaled(seconds, TIMES) or f"{seconds * 1e9:.3g} ns"


def count(number: float) -> str:
    """`124 M`."""
    return scaled(number, COUNTS) or f"{number:.0f}"
