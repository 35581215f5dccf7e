"""The published efficiencies of ZeRO-Infinity, figure 3, at 70 TFLOP/s and sequences of 1024."""

import pytest

from autopar.cost_models.offload import checkpoint_intensity, efficiency, optimizer_intensity, parameter_intensity

PEAK = 70e12


@pytest.mark.parametrize(
    "flops_per_byte,bandwidth_bytes_per_s,published",
    [(parameter_intensity(1024, 1), 70e9, 0.506), (optimizer_intensity(1024, 2), 1.5e12, 0.916), (checkpoint_intensity(2048), 2e9, 0.58)],
)
def test_published(flops_per_byte: float, bandwidth_bytes_per_s: float, published: float) -> None:
    assert efficiency(flops_per_byte, bandwidth_bytes_per_s, PEAK) == pytest.approx(published, abs=0.005)


def test_limits() -> None:
    """Without bandwidth nothing is done; twice the intensity is worth twice the bandwidth; the peak is never passed."""
    assert efficiency(1e3, 0.0, PEAK) == 0.0
    assert efficiency(2e3, 1e9, PEAK) == efficiency(1e3, 2e9, PEAK)
    assert 0.99 < efficiency(1e9, 1e9, PEAK) < 1.0
