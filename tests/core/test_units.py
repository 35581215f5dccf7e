"""Quantities with units: a table of what is read, and the round trip."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopar.core.units import BANDWIDTH, COMPUTE, DURATION, MEMORY, Dimension, format_quantity, parse_quantity
from autopar.errors import UsageError

READ = [
    (MEMORY, "80 GB", 80e9),
    (MEMORY, "80GB", 80e9),
    (MEMORY, " 80 GB ", 80e9),
    (MEMORY, "80 GiB", 80 * 2**30),
    (MEMORY, "1.5 TiB", 1.5 * 2**40),
    (MEMORY, "512 B", 512),
    (MEMORY, "1e3 kB", 1e6),
    (MEMORY, "2.5e-1 MB", 250_000),
    (BANDWIDTH, "450 GB/s", 450e9),
    (BANDWIDTH, "400 Gb/s", 50e9),
    (BANDWIDTH, "400 Gbit/s", 50e9),
    (BANDWIDTH, "8 b/s", 1),
    (BANDWIDTH, "3.35 TB/s", 3.35e12),
    (BANDWIDTH, "1 GiB/s", 2**30),
    (COMPUTE, "989 TFLOP/s", 989e12),
    (COMPUTE, "1.979 PFLOP/s", 1.979e15),
    (COMPUTE, "80 GFLOP/s", 80e9),
    (DURATION, "3 us", 3e-6),
    (DURATION, "0.3 us", 3e-7),
    (DURATION, "250 ns", 2.5e-7),
    (DURATION, "1 s", 1),
    (DURATION, "0 us", 0),
]


@pytest.mark.parametrize(("dimension", "text", "value"), READ)
def test_a_quantity_is_read_exactly(dimension: Dimension, text: str, value: float) -> None:
    assert parse_quantity(text, dimension) == value


@pytest.mark.parametrize(
    "text",
    [
        "80",
        "80 gb",
        "80 Gb",
        "80 GBytes",
        "GB",
        "80 GB GB",
        "80,5 GB",
        "٨٠ GB",
        "0x50 GB",
        "1e9999 GB",
        "1e999 GB",
        "-1 GB",
        "inf GB",
        "80\nGB",
        80,
        80.0,
        None,
        True,
        [],
        b"80 GB",
    ],
)
def test_what_is_no_quantity_is_refused_with_an_example(text: object) -> None:
    with pytest.raises(UsageError, match="write a memory size|write a number and a unit|write text such as") as caught:
        parse_quantity(text, MEMORY)
    assert len(str(caught.value).splitlines()) == 1


@given(value=st.floats(0, 1e30, allow_subnormal=False), dimension=st.sampled_from([MEMORY, BANDWIDTH, COMPUTE, DURATION]))
def test_a_written_quantity_is_read_back_equal(value: float, dimension: Dimension) -> None:
    assert parse_quantity(format_quantity(value, dimension), dimension) == value


@pytest.mark.parametrize(
    ("value", "dimension", "text"),
    [
        (450e9, BANDWIDTH, "450 GB/s"),
        (50e9, BANDWIDTH, "50 GB/s"),
        (989e12, COMPUTE, "989 TFLOP/s"),
        (3e-6, DURATION, "3 us"),
        (0.0, DURATION, "0 s"),
        (80 * 2**30, MEMORY, "80 GiB"),
        (1e-12, DURATION, "1e-12 s"),
    ],
)
def test_a_quantity_is_written_shortly_and_never_in_bits(value: float, dimension: Dimension, text: str) -> None:
    assert format_quantity(value, dimension) == text
