"""Example batches: numbers within their ranges, labels that end in -100, counts of tokens."""

import pytest
import torch

from autopar.models.inputs import IGNORED, Draw
from autopar.models.load import load_model


def test_ragged_labels_end_differently_in_each_row() -> None:
    labels = load_model("gpt2-tiny", batch=4, device="cpu", ragged=True).kwargs["labels"]
    ignored = (labels == IGNORED).sum(dim=1).tolist()
    assert ignored == [4, 8, 12, 16]
    assert all((row[len(row) - n :] == IGNORED).all() for row, n in zip(labels, ignored))


@pytest.mark.parametrize("name", ["vit-tiny", "dlrm-tiny", "mlp-tiny"])
def test_ragged_changes_only_token_labels(name: str) -> None:
    plain, ragged = (load_model(name, batch=2, device="cpu", ragged=flag).kwargs["labels"] for flag in (False, True))
    assert torch.equal(plain, ragged)


def test_ragged_leaves_a_label_in_every_row_whatever_the_length() -> None:
    for batch, seq in ((1, 1), (3, 2), (5, 7)):
        labels = load_model("transformer-tiny", batch=batch, seq=seq, device="cpu", ragged=True).kwargs["labels"]
        assert (labels != IGNORED).any(dim=1).all()


@pytest.mark.parametrize(
    "name, kind, tokens",
    [
        ("llama-tiny", "token", 2 * 16), ("bert-tiny", "token", 2 * 16), ("t5-tiny", "token", 2 * 16), ("transformer-tiny", "token", 2 * 16),
        ("vit-tiny", "class", 2), ("alexnet-tiny", "class", 2), ("dlrm-tiny", "binary", 2),
    ],
)  # fmt: skip
def test_labels_kind_and_tokens(name: str, kind: str, tokens: int) -> None:
    loaded = load_model(name, batch=2, seq=16)
    assert (loaded.labels_kind, loaded.tokens_per_batch) == (kind, tokens)


def test_causal_labels_are_the_inputs_and_masked_ones_are_not() -> None:
    causal, masked = (load_model(name, batch=2, device="cpu").kwargs for name in ("llama-tiny", "bert-tiny"))
    assert torch.equal(causal["input_ids"], causal["labels"])
    assert not torch.equal(masked["input_ids"], masked["labels"])


def test_tokens_avoid_special_ones_and_stay_in_the_vocabulary() -> None:
    draw = Draw.seeded("cpu", torch.float32, 0)
    ids = draw.tokens(12, {0, 11}, 64, 8)
    assert set(ids.unique().tolist()) == set(range(1, 11))
    assert draw.tokens(12, {0, 11}, 64, 8).dtype == torch.int64


def test_meta_draws_have_shapes_only() -> None:
    draw = Draw.seeded("meta", torch.bfloat16, 0)
    assert (draw.tokens(12, {0}, 2, 3).shape, draw.tokens(12, {0}, 2, 3).device.type) == ((2, 3), "meta")
    assert draw.normal(4).dtype == torch.bfloat16
