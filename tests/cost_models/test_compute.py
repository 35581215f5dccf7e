"""Operators: the roofline against hand-computed numbers."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopar.core.cluster import Cluster, Device
from autopar.cost_models.compute import KINDS, bound_by, op_seconds
from autopar.errors import UsageError

DEVICE = Device(
    name="round numbers",
    memory_bytes=10**10,
    memory_bytes_per_s=1e12,
    peak_flops_per_s=(("float32", 10e12), ("bfloat16", 100e12)),
    matmul_efficiency=0.5,
    memory_efficiency=0.8,
    kernel_launch_s=5e-6,
)


@pytest.mark.parametrize(
    ("flops", "num_bytes", "dtype", "kind", "seconds"),
    [
        (1e12, 1e9, "bfloat16", "contract", 5e-6 + 1e12 / 50e12),  # 20 ms of flops against 1.25 ms of bytes
        (4e12, 1e9, "bfloat16", "contract", 5e-6 + 4e12 / 50e12),
        (1e9, 1e9, "bfloat16", "contract", 5e-6 + 1e9 / 0.8e12),
        (1e12, 1e9, "float32", "contract", 5e-6 + 1e12 / 5e12),
        (1e9, 1e9, "bfloat16", "pointwise", 5e-6 + 1e9 / 0.8e12),
        (1e12, 1e9, "int64", "pointwise", 5e-6 + 1e12 / 5e12),
        (0, 0, "float32", "pointwise", 5e-6),
        (1e12, 1e9, "float32", "view", 0.0),
    ],
)
def test_seconds_by_hand(flops: float, num_bytes: float, dtype: str, kind: str, seconds: float) -> None:
    assert op_seconds(DEVICE, flops, num_bytes, dtype, kind) == pytest.approx(seconds, rel=1e-12, abs=0)


def test_a_matrix_product_of_an_h100() -> None:
    """8192 x 8192 x 8192 in bfloat16: 2 n^3 flops at 0.803 of 989.4 TFLOP/s, 5 us of launch; about 1.39 ms."""
    n = 8192
    seconds = op_seconds(Cluster.preset("h100-sxm").device, 2 * n**3, 3 * n * n * 2, "bfloat16", "contract")
    assert seconds == pytest.approx(5e-6 + 2 * n**3 / (989.4e12 * 0.803))
    assert 1.3e-3 < seconds < 1.5e-3


def test_arrays_in_array_out_and_numbers_in_number_out() -> None:
    flops, num_bytes = np.array([1e9, 1e12]), np.array([[1e6], [1e9], [1e10]])
    table = op_seconds(DEVICE, flops, num_bytes, "bfloat16", "contract")
    assert table.shape == (3, 2)
    assert table[1, 0] == op_seconds(DEVICE, 1e9, 1e9, "bfloat16", "contract")
    assert type(op_seconds(DEVICE, 1, 1, "float32", "view")) is type(op_seconds(DEVICE, 1, 1, "float32", "contract")) is float
    assert op_seconds(DEVICE, flops, 0.0, "float32", "view").tolist() == [0.0, 0.0]


@given(flops=st.floats(0, 1e18), num_bytes=st.floats(0, 1e15), more=st.floats(1, 100), kind=st.sampled_from(KINDS))
def test_more_work_never_takes_less_time(flops: float, num_bytes: float, more: float, kind: str) -> None:
    less = op_seconds(DEVICE, flops, num_bytes, "bfloat16", kind)
    assert 0 <= less <= op_seconds(DEVICE, flops * more, num_bytes, "bfloat16", kind)
    assert less <= op_seconds(DEVICE, flops, num_bytes * more, "bfloat16", kind)


def test_the_bound_is_named() -> None:
    assert bound_by(DEVICE, 1e12, 1e9, "bfloat16", "contract") == "flops"
    assert bound_by(DEVICE, 1e9, 1e9, "bfloat16", "contract") == "bytes"
    assert bound_by(DEVICE, 1e6, 1e3, "bfloat16", "contract") == "launch"
    assert bound_by(DEVICE, 1e12, 1e9, "bfloat16", "view") == "nothing"


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ((1.0, 1.0, "float16", "contract"), "no float16 peak"),
        ((1.0, 1.0, "float32", "matmul"), "operator kind 'matmul'"),
        ((-1.0, 1.0, "float32", "view"), "negative"),
        ((1.0, float("nan"), "float32", "pointwise"), "undefined"),
    ],
)
def test_what_has_no_price_is_an_error(arguments: tuple, part: str) -> None:
    with pytest.raises(UsageError, match=part):
        op_seconds(DEVICE, *arguments)
