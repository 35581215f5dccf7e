"""Kernels: tiles and waves by hand, attention, and what every shape must obey."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar.core.cluster import Cluster, Device
from autopar.core.kernel_rate import KernelRate
from autopar.cost_models.kernels import FILL, Kernels, Work, backward_halves, backward_seconds, forward_seconds, product_seconds

ROUND = Device(
    name="round numbers", memory_bytes=10**10, memory_bytes_per_s=1e12, peak_flops_per_s=(("float32", 10e12), ("bfloat16", 100e12)),
    matmul_efficiency=0.5, memory_efficiency=0.8, num_multiprocessors=100,
)  # fmt: skip
PLAIN_DEVICE = Device(name="unknown inside", memory_bytes=10**10, memory_bytes_per_s=1e12, peak_flops_per_s=(("float32", 10e12), ("bfloat16", 100e12)))
sizes = st.integers(1, 20_000)


def test_one_full_wave_by_hand() -> None:
    """100 tiles of 256 x 128 on 100 multiprocessors of 0.5 TFLOP/s each: every one does 2 * 256 * 128 * (k + FILL) flops."""
    seconds = product_seconds(ROUND, (1, 2560, 1280, 4096), "bfloat16")
    assert seconds == pytest.approx(2 * 256 * 128 * (4096 + FILL) / 0.5e12)


def test_one_tile_more_costs_less_than_a_wave_more_but_something() -> None:
    full, more = (product_seconds(ROUND, (1, rows, 1280, 4096), "bfloat16") for rows in (2560, 2561))
    assert 1.02 < more / full < 2.0


def test_a_device_of_unknown_structure_is_a_plain_roofline() -> None:
    work = Work("product", 2.0 * 4096**3, 3 * 4096**2 * 2, "bfloat16", (1, 4096, 4096, 4096))
    assert forward_seconds(PLAIN_DEVICE, work) == pytest.approx(2 * 4096**3 / 100e12)


def test_a_core_takes_the_seconds_of_products_and_of_their_bytes() -> None:
    core = replace(PLAIN_DEVICE, loads_ahead=False)
    work = Work("product", 2.0 * 64 * 1024**2, 8e6, "float32", (1, 64, 1024, 1024))
    assert forward_seconds(core, work) == pytest.approx(2 * 64 * 1024**2 / 10e12 + 8e6 / 1e12)
    assert forward_seconds(core, work._replace(kernel="pointwise", flops=1.0)) == pytest.approx(8e6 / 1e12)


@settings(deadline=None)  # a busy machine is no failure
@given(batch=st.integers(1, 64), m=sizes, n=sizes, k=sizes)
def test_no_product_beats_the_peak_and_larger_ones_never_take_less(batch: int, m: int, n: int, k: int) -> None:
    device = Cluster.preset("h100-sxm").device
    seconds = product_seconds(device, (batch, m, n, k), "bfloat16")
    assert seconds * device.peak("bfloat16") * device.matmul_efficiency >= 2.0 * batch * m * n * k
    for larger in ((batch + 1, m, n, k), (batch, 2 * m, n, k), (batch, m, 2 * n, k), (batch, m, n, k + 100)):
        assert product_seconds(device, larger, "bfloat16") >= seconds * (1 - 1e-12)


def test_efficiency_of_a_dtype_of_its_own() -> None:
    h100 = Cluster.preset("h100-sxm").device
    wide, narrow = (product_seconds(h100, (1, 8192, 8192, 8192), dtype) for dtype in ("bfloat16", "float8_e4m3fn"))
    assert wide / narrow == pytest.approx(h100.peak("float8_e4m3fn") * 0.709 / (h100.peak("bfloat16") * 0.803))


def test_backward_is_two_products_turned_around() -> None:
    m, n, k = 8192, 128, 8192
    inputs, weights = backward_halves(ROUND, Work("product", 2.0 * m * n * k, 0.0, "bfloat16", (1, m, n, k)))
    assert inputs == pytest.approx(product_seconds(ROUND, (1, m, k, n), "bfloat16"))
    assert weights == pytest.approx(product_seconds(ROUND, (1, n, k, m), "bfloat16"))


def test_attention_fused_does_what_its_mask_leaves_and_written_out_pays_for_the_scores() -> None:
    shape, flops = (32, 4096, 4096, 128), 4.0 * 32 * 4096**2 * 128
    whole, causal = (Work("attention", flops, 0.0, "bfloat16", shape, masked) for masked in (1.0, 0.5))
    assert forward_seconds(ROUND, causal) == pytest.approx(forward_seconds(ROUND, whole) / 2) == pytest.approx(flops / 2 / 50e12)
    assert backward_seconds(ROUND, causal) > 2 * forward_seconds(ROUND, causal)
    written = Work("scores", flops, 0.0, "bfloat16", shape)
    assert forward_seconds(ROUND, written) > flops / 50e12 + 2 * 32 * 4096**2 * 2 / 0.8e12


def test_weights_are_multiplied_in_the_dtype_of_the_software() -> None:
    h100 = Cluster.preset("h100-sxm").device
    work = Work("product", 2.0 * 8192**3, 0.0, "bfloat16", (1, 8192, 8192, 8192))
    float8 = Kernels(product_dtype="float8_e4m3fn")
    assert forward_seconds(h100, work, float8) == forward_seconds(h100, work)
    assert forward_seconds(h100, work._replace(is_weight=True), float8) < 0.65 * forward_seconds(h100, work)


def test_operands_are_cast_before_a_product_in_float8() -> None:
    """Activations forward, gradients backward, each once for both of the products that read them; weights are kept narrow."""
    h100 = Cluster.preset("h100-sxm").device
    tokens, out, width = 8192, 4096, 16384
    work = Work("product", 2.0 * tokens * out * width, 0.0, "bfloat16", (1, tokens, out, width), is_weight=True)
    float8, all_of_it = Kernels(product_dtype="float8_e4m3fn"), h100.memory_bytes_per_s * h100.memory_efficiency
    bare = product_seconds(h100, (1, tokens, out, width), "float8_e4m3fn")
    assert forward_seconds(h100, work, float8) == pytest.approx(h100.kernel_launch_s + bare + 4 * tokens * width / all_of_it)
    inputs, weights = backward_halves(h100, work, float8)
    assert inputs == pytest.approx(h100.kernel_launch_s + product_seconds(h100, (1, tokens, width, out), "float8_e4m3fn") + 4 * tokens * out / all_of_it)
    assert weights == pytest.approx(h100.kernel_launch_s + product_seconds(h100, (1, out, width, tokens), "float8_e4m3fn"))
    scaled = forward_seconds(h100, work, Kernels(product_dtype="float8_e4m3fn", product_share=0.5))
    assert scaled - forward_seconds(h100, work, float8) == pytest.approx(bare)
    assert forward_seconds(h100, work._replace(is_weight=False), float8) == forward_seconds(h100, work)


def test_views_are_free_and_passes_over_memory_are_read_again_in_the_backward() -> None:
    assert forward_seconds(ROUND, Work("view", 0.0, 1e9, "bfloat16")) == backward_seconds(ROUND, Work("view", 0.0, 1e9, "bfloat16")) == 0
    once = Work("pointwise", 0.0, 8e8, "bfloat16")
    assert forward_seconds(ROUND, once) == pytest.approx(1e-3)
    assert math.isclose(backward_seconds(ROUND, once._replace(reads_again=True)), 1.5e-3)


def test_what_was_measured_of_a_kind_takes_the_place_of_the_general_numbers() -> None:
    """By hand: 10 us, 1e9 flops at half of 10 TFLOP/s, 2e8 bytes at twice 1 TB/s; the backward three times that, and the launch of the device."""
    rate = KernelRate("normalisation", 1e-5, compute=0.5, memory=2.0, backward=3.0)
    device = replace(PLAIN_DEVICE, kernel_launch_s=1e-6, function_s=1e-9, kernels=(rate,))
    work = Work("pointwise", 1e9, 2e8, "float32", functions=1e6, evaluates_again=True, kind="normalisation")
    busy = 1e9 / 5e12 + 2e8 / 2e12
    assert forward_seconds(device, work) == pytest.approx(1e-5 + busy)
    assert backward_halves(device, work) == pytest.approx((1e-6 + 3 * busy, 0.0))
    general = replace(device, kernels=(replace(rate, backward=0.0),))
    assert backward_seconds(general, work) == backward_seconds(replace(device, kernels=()), work)
    bare = replace(device, kernels=())
    for other in (work._replace(kind="loss"), work._replace(kind="")):
        assert (forward_seconds(device, other), *backward_halves(device, other)) == (forward_seconds(bare, work), *backward_halves(bare, work))


def test_measured_products_have_two_backwards_and_pointwise_operators_their_exponentials() -> None:
    device = replace(PLAIN_DEVICE, kernel_launch_s=1e-6, function_s=1e-9, kernels=(KernelRate("product", 1e-5, 0.5, 0.0, 2.5), KernelRate("pointwise", 1e-5, 0.0, 1.0)))
    assert backward_halves(device, Work("product", 1e12, 1e6, "bfloat16", (1, 2, 3, 4), kind="product")) == pytest.approx((1e-6 + 1.25 * 1e12 / 50e12,) * 2)
    assert forward_seconds(device, Work("pointwise", 1.0, 1e6, "float32", functions=1e6, kind="pointwise")) == pytest.approx(1e-5 + 1e-6 + 1e-3)
    assert forward_seconds(device, Work("view", 0.0, 1e9, "float32", kind="copy")) == 0.0


def test_heads_of_an_odd_width_have_no_matrix_units() -> None:
    """Attention that is written out, 8 short of the width on either side: 108 is no multiple of 8, and slower than 112."""
    widths = {width: Work("scores", 0.0, 1.0, "bfloat16", (32, 2048, 2048, width)) for width in (104, 108, 112)}
    passes = Kernels(score_passes=0.0)
    seconds = {width: forward_seconds(ROUND, work, passes) for width, work in widths.items()}
    assert seconds[104] <= seconds[112] < seconds[108] / 4


def test_a_kernel_for_the_devices_before_has_their_instructions() -> None:
    device = Cluster.preset("h100-sxm").device
    work = Work("attention", 1e14, 1.0, "bfloat16", (64, 8192, 8192, 128), 0.5)
    now, before = (forward_seconds(device, work, Kernels(attention_before=there)) - device.kernel_launch_s for there in (False, True))
    assert now / before == pytest.approx(device.previous_rate) and device.previous_rate < 1


@given(st.tuples(sizes, sizes, sizes, sizes), st.integers(0, 3), st.sampled_from((2, 3, 8, 64)), st.sampled_from(("product", "attention", "scores", "pointwise")), st.booleans())
@settings(max_examples=400, deadline=None)
def test_parts_take_no_less_together_than_the_whole(shape: tuple[int, int, int, int], cut: int, parts: int, kernel: str, known: bool) -> None:
    """Beside its launch; the bound of the joint search on operators that are cut evenly rests on it."""
    device = ROUND if known else PLAIN_DEVICE
    cut = min(cut, 2) if kernel == "scores" else cut  # a head is not cut
    whole = tuple(size * (parts if k == cut else 1) for k, size in enumerate(shape))
    flops, num_bytes = 2.0 * math.prod(whole), 2.0 * sum(whole) * 100
    work = Work(kernel, flops, num_bytes, "bfloat16", None if kernel == "pointwise" else whole, reads_again=True)
    share = work._replace(flops=flops / parts, num_bytes=num_bytes / parts, shape=work.shape and shape)
    nothing = work._replace(flops=0.0, num_bytes=0.0, shape=work.shape and (0, 0, 0, 0))
    for seconds in (forward_seconds, backward_seconds):
        launch = seconds(device, nothing)
        assert seconds(device, work) - launch <= parts * (seconds(device, share) - launch) * (1 + 1e-9)


def test_a_loss_by_elementary_operators_takes_their_passes() -> None:
    """1e9 bytes read and kept of the logits: two passes of one kernel, eight of operators; three and two in the backward."""
    work = Work("pointwise", 0.0, 1e9, "float32", reads_again=True, kind="loss")
    written_out = Kernels(loss_passes=(8.0, 2.0), loss_launches=(20, 7))
    for kernels, there, back in ((Kernels(), 1.0, 1.5), (written_out, 4.0, 1.0)):
        assert forward_seconds(PLAIN_DEVICE, work, kernels) == pytest.approx(there * 1e9 / 1e12)
        assert backward_seconds(PLAIN_DEVICE, work, kernels) == pytest.approx(back * 1e9 / 1e12)
    assert written_out.launches("pointwise", "loss", 1) == (20, 7) and Kernels().launches("pointwise", "loss", 1) == (1, 1)


def test_a_softmax_of_heads_that_its_kernel_does_not_take_is_elementary() -> None:
    fours = Kernels(softmax_batches=4)
    seconds = [forward_seconds(PLAIN_DEVICE, Work("scores", 1.0, 1.0, "bfloat16", (heads, 1024, 1024, 64)), fours) / heads for heads in (2, 4, 6, 8)]
    assert seconds[0] == pytest.approx(seconds[2]) and seconds[1] == pytest.approx(seconds[3])
    assert seconds[0] - seconds[1] == pytest.approx((14 - 6) * 1024**2 * 2 / 1e12)
    assert [fours.launches("scores", "scores", heads) for heads in (2, 4)] == [(5, 5), (1, 1)]
    assert Kernels().launches("scores", "scores", 2) == (1, 1)
