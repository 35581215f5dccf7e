"""Fits recover the numbers that measurements were made from."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar.profiler.fit import in_turn, linear, r_squared

PRICE = st.one_of(st.just(0.0), st.floats(1e-12, 1e-2))


@settings(max_examples=60, deadline=None)
@given(prices=st.lists(PRICE, min_size=1, max_size=3).filter(any), seed=st.integers(0, 2**32 - 1))
def test_prices_are_recovered(prices: list[float], seed: int) -> None:
    """Of counts that range over orders of magnitude; those that are zero too. Counts are scaled so that every price matters."""
    rng = np.random.default_rng(seed)
    scale = np.array([1.0 / p if p else 1e3 for p in prices])
    counts = np.exp(rng.uniform(-3, 3, (12, len(prices)))) * scale
    fit = linear(counts, counts @ prices)
    assert fit.prices == pytest.approx(prices, rel=1e-6, abs=1e-9 / scale.min())
    assert fit.r2 == pytest.approx(1.0, abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_noise_moves_prices_by_as_much_and_lowers_r2(seed: int) -> None:
    rng = np.random.default_rng(seed)
    counts = np.stack([np.ones(60), np.exp(rng.uniform(5, 15, 60))], axis=1)
    exact = counts @ [1e-3, 1e-8]
    fit = linear(counts, exact * np.exp(rng.normal(0, 0.05, 60)))
    assert fit.prices == pytest.approx((1e-3, 1e-8), rel=0.1)
    assert 0.5 < fit.r2 < 1.0


def test_no_price_is_negative() -> None:
    counts = np.array([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]])
    assert linear(counts, [3.0, 2.0, 1.0]).prices[1] == 0.0


def test_of_counts_that_only_come_together_one_has_the_price_of_all() -> None:
    """However little noise tells them apart."""
    rng = np.random.default_rng(1)
    counts = np.stack([np.ones(12), np.ones(12), np.exp(rng.uniform(5, 15, 12))], axis=1)
    for _ in range(20):
        found = linear(counts, counts @ [1e-3, 2e-3, 1e-8] * np.exp(rng.normal(0, 0.01, 12))).prices
        assert found[1] == 0.0 and found[0] == pytest.approx(3e-3, rel=0.05)


@pytest.mark.parametrize("truth", [(2e-5, 1e-11, 3e-10), (5e-6, 4e-11, 1e-10)])
def test_a_roofline_is_recovered_though_counts_depend_on_prices(truth: tuple[float, float, float]) -> None:
    """Each row has operators, each under one of two ceilings; which, only the prices tell; and something that no price says."""
    rng = np.random.default_rng(3)
    flops, moved = np.exp(rng.uniform(8, 22, (10, 30))), np.exp(rng.uniform(8, 18, (10, 30)))
    beside = rng.uniform(0, 1e-3, 10)

    def price(prices: tuple[float, ...]) -> np.ndarray:
        return beside + 30 * prices[0] + np.maximum(flops * prices[1], moved * prices[2]).sum(axis=1)

    fit = in_turn(price, price(truth), (1e-4, 2 * truth[1], truth[2] / 3))
    assert fit.prices == pytest.approx(truth, rel=1e-6) and fit.r2 == pytest.approx(1.0)


def test_what_is_known_beside_the_prices_is_left_to_it() -> None:
    rng = np.random.default_rng(5)
    counts, known = rng.uniform(1, 9, (12, 2)), rng.uniform(0, 20, 12)
    assert linear(counts, counts @ [2.0, 3.0] + known, known).prices == pytest.approx((2.0, 3.0))
    assert linear(counts, known / 2, known).prices == (0.0, 0.0)


def test_r_squared_of_a_constant_prediction_is_no_better_than_the_mean() -> None:
    measured = np.array([1.0, 2.0, 4.0])
    assert r_squared(np.full(3, 2.0), measured) == pytest.approx(0.0)
    assert r_squared(measured, measured) == 1.0
