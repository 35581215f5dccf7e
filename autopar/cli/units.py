"""Quantities in the words of a report."""

TIMES = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"))
SIZES = ((2.0**40, "TiB"), (2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"))
COUNTS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K"))


def duration(seconds: float) -> str:
    """`47.0 ms`."""
    return _scaled(seconds, TIMES) or f"{seconds * 1e9:.3g} ns"


def size(num_bytes: float) -> str:
    """`5.53 MiB`."""
    return _scaled(num_bytes, SIZES) or f"{num_bytes:.0f} B"


def count(number: float) -> str:
    """`124 M`."""
    return _scaled(number, COUNTS) or f"{number:.0f}"


def _scaled(value: float, units: tuple[tuple[float, str], ...]) -> str:
    for scale, unit in units:
        if value >= scale:
            return f"{_digits(value / scale)} {unit}"
    return ""


def _digits(value: float) -> str:
    """Three digits, all of them where there are more before the point."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"
