"""The plain torch models compute what their docstrings say."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from autopar.models.load import load_model
from autopar.models.own import DLRM, Transformer, TransformerBlock


@pytest.mark.parametrize("name", ["mlp-tiny", "alexnet-tiny", "dlrm-tiny", "transformer-tiny"])
def test_loss_is_the_mean_over_the_logits_given_without_labels(name: str) -> None:
    loaded = load_model(name, batch=3, device="cpu", train=False)
    labels = loaded.kwargs["labels"]
    logits = loaded.module(**{k: v for k, v in loaded.kwargs.items() if k != "labels"})["logits"]
    if loaded.labels_kind == "binary":
        expected = F.binary_cross_entropy(torch.sigmoid(logits), labels)
    else:
        expected = -F.log_softmax(logits, dim=-1).gather(-1, labels.unsqueeze(-1)).mean()
    torch.testing.assert_close(loaded.module(**loaded.kwargs), expected)


def test_dlrm_interaction_is_every_pair_once() -> None:
    torch.manual_seed(0)
    model = DLRM(rows=(5, 6), width=4, dense=3, bottom=(), top=()).double()
    dense, sparse = torch.randn(2, 3, dtype=torch.float64), torch.tensor([[1, 2], [4, 0]])
    x = F.relu(model.bottom[0](dense))
    a, b = (table(sparse[:, i]) for i, table in enumerate(model.tables))
    features = torch.cat([x, (x * a).sum(1, keepdim=True), (x * b).sum(1, keepdim=True), (a * b).sum(1, keepdim=True)], dim=1)
    torch.testing.assert_close(model(dense, sparse)["logits"], model.top(features).squeeze(1))


def test_block_attention_equals_torch_multihead() -> None:
    torch.manual_seed(0)
    block = TransformerBlock(hidden=12, heads=3, inner=24).double()
    reference = nn.MultiheadAttention(12, 3, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        reference.in_proj_weight.copy_(torch.cat([block.q.weight, block.k.weight, block.v.weight]))
        reference.in_proj_bias.copy_(torch.cat([block.q.bias, block.k.bias, block.v.bias]))
        reference.out_proj.load_state_dict(block.o.state_dict())
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    future = torch.ones(5, 5, dtype=torch.bool).triu(1)
    torch.testing.assert_close(block.attention(x), reference(x, x, x, attn_mask=future, need_weights=False)[0])


def test_transformer_sees_no_later_token() -> None:
    model = Transformer(vocab=12, positions=8, hidden=12, layers=2, heads=3)
    ids = torch.arange(8).unsqueeze(0)
    changed = ids.clone()
    changed[0, 5] = 11
    before, after = model(ids)["logits"], model(changed)["logits"]
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])


def test_dropout_acts_in_training_only() -> None:
    loaded = load_model("alexnet-tiny", batch=2, device="cpu")
    inputs = loaded.kwargs["inputs"]
    assert not torch.equal(loaded.module(inputs)["logits"], loaded.module(inputs)["logits"])
    loaded.module.eval()
    assert torch.equal(loaded.module(inputs)["logits"], loaded.module(inputs)["logits"])
