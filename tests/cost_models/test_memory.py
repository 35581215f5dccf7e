"""Training state: bytes per element from dtypes, and the figures of the ZeRO paper."""

from itertools import pairwise

import numpy as np
import pytest

from autopar.cost_models.memory import StatePolicy, adam, state_bytes, zero_state_bytes
from autopar.errors import UsageError


@pytest.mark.parametrize(
    ("policy", "parts"),
    [
        (adam("float32"), (4, 4, 8)),
        (adam("float64"), (8, 8, 16)),
        (adam("bfloat16"), (2, 2, 12)),
        (adam("float16"), (2, 2, 12)),
        (adam("bfloat16", gradient="float32"), (2, 4, 12)),
        (adam("bfloat16", master=None), (2, 2, 4)),
        (adam("int64"), (8, 0, 0)),
        (StatePolicy(parameter="bfloat16", gradient="bfloat16", optimizer=("float32",)), (2, 2, 4)),  # momentum without master
    ],
)
def test_bytes_per_element(policy: StatePolicy, parts: tuple[int, int, int]) -> None:
    assert (policy.parameter_bytes, policy.gradient_bytes, policy.optimizer_bytes) == parts
    assert state_bytes(1000, policy) == 1000 * sum(parts)


def test_a_dtype_stands_for_adam_and_arrays_are_welcome() -> None:
    assert state_bytes(10) == state_bytes(10, "bfloat16") == 160
    assert state_bytes(np.array([1, 2]), "float32").tolist() == [16, 32]


@pytest.mark.parametrize(("stage", "gigabytes"), [(0, 120.0), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_the_figures_of_the_zero_paper(stage: int, gigabytes: float) -> None:
    """Rajbhandari et al. 2020, figure 1 and table 1: 7.5 billion parameters in mixed precision on 64 devices."""
    assert zero_state_bytes(7.5e9, 64, stage, "bfloat16") / 1e9 == pytest.approx(gigabytes, abs=0.05)


def test_more_ranks_and_higher_stages_never_need_more() -> None:
    table = [[zero_state_bytes(1e9, ranks, stage, "bfloat16") for stage in range(4)] for ranks in (1, 2, 8, 64)]
    assert table[0] == [16e9] * 4
    assert all(a >= b for row in table for a, b in pairwise(row))
    assert all(a >= b for upper, lower in pairwise(table) for a, b in zip(upper, lower))


def test_unknown_dtypes_and_stages_are_errors() -> None:
    with pytest.raises(UsageError, match="'float33'"):
        StatePolicy(parameter="float33", gradient=None, optimizer=())
    with pytest.raises(UsageError, match="master copy of dtype 'float33'"):
        adam("bfloat16", master="float33")
    with pytest.raises(UsageError, match="stage 4"):
        zero_state_bytes(1, 8, 4)
