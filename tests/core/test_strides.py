"""Strides are torch's: what is a view there is one here."""

import random

import torch

from autopar.core.strides import dense_like, is_row_major, view_strides

SHAPES = [(2, 3, 4, 5), (6, 1, 20), (120,), (1, 1, 8, 15), (24, 5), (2, 60), (4, 2, 15), (3, 40)]


def test_reshapes_are_views_where_torch_says_so() -> None:
    rng = random.Random(0)
    views = copies = 0
    for _ in range(600):
        x = torch.empty(rng.choice(SHAPES))
        if rng.random() < 0.7:
            x = x.permute(rng.sample(range(x.dim()), x.dim()))
        if rng.random() < 0.3:
            x = x.narrow(-1, 0, max(1, x.shape[-1] // 2))
        wanted = list(rng.choice(SHAPES)) if x.numel() == 120 else [x.numel() // x.shape[-1], x.shape[-1]]
        found = view_strides(x.shape, x.stride(), wanted)
        try:
            strides = x.view(wanted).stride()
        except RuntimeError:
            copies += 1
            assert found is None, (x.shape, x.stride(), wanted)
            continue
        views += 1
        assert found is not None, (x.shape, x.stride(), wanted)
        assert all(n == 1 or a == b for n, a, b in zip(wanted, found, strides))
    assert views > 100 and copies > 100


def test_elementwise_results_keep_the_order_of_memory() -> None:
    rng = random.Random(1)
    for _ in range(100):
        x = torch.empty(2, 3, 4, 5).permute(rng.sample(range(4), 4))
        y = x + 1
        assert dense_like(x.shape, x.stride()) == y.stride()
        assert is_row_major(y.shape, y.stride()) == y.is_contiguous()
