"""What a model writes out and one operator computes; copies that eager mode does not make."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN, GELUActivation

import autopar
from autopar.core.cluster import Cluster
from autopar.trace.capture import trace

WRITTEN_OUT = {"gelu_new": ACT2FN["gelu_new"], "gelu_fast": ACT2FN["gelu_fast"], "gelu_python": GELUActivation(use_gelu_python=True)}


class Between(nn.Module):
    """A function between two layers."""

    def __init__(self, function: nn.Module) -> None:
        super().__init__()
        self.first, self.second, self.function = nn.Linear(8, 8), nn.Linear(8, 8), function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.function(self.first(x))).square().mean()


class ByCube(nn.Module):
    """A GELU with this constant, which may hand out what it made on the way as well."""

    def __init__(self, constant: float, *, shows: bool = False) -> None:
        super().__init__()
        self.constant, self.shows = constant, shows

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        curve = torch.tanh(self.constant * (x + 0.044715 * torch.pow(x, 3.0)))
        return 0.5 * x * (1.0 + curve) + (curve if self.shows else 0.0)


def kinds(model: nn.Module, x: torch.Tensor) -> list[str]:
    return [op.kind for op in trace(model, (x,)).graph.ops]


@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_a_written_out_gelu_is_one_operator_and_the_same_training(name: str) -> None:
    model, x = Between(WRITTEN_OUT[name]), torch.randn(4, 8)
    assert kinds(model, x)[1] == "aten.gelu.default" and len(kinds(model, x)) == len(kinds(Between(nn.GELU()), x))
    assert autopar.verify(model, autopar.plan(model, Cluster.local(2), (x,)), (x,)).equal


@pytest.mark.parametrize(("function", "fused"), [(ByCube(math.sqrt(2 / math.pi)), True), (ByCube(0.8), False), (ByCube(math.sqrt(2 / math.pi), shows=True), False)], ids=["gelu", "constant", "shown"])
def test_only_a_gelu_that_nobody_looks_into_is_fused(function: nn.Module, fused: bool) -> None:
    model, x = Between(function), torch.randn(4, 8)
    assert ("aten.gelu.default" in kinds(model, x)) == fused
    assert autopar.verify(model, autopar.plan(model, Cluster.local(2), (x,)), (x,)).equal


class Attention(nn.Module):
    def __init__(self, dropout: float, *, reshaped: bool = True) -> None:
        super().__init__()
        self.given, self.out, self.dropout, self.reshaped = nn.Linear(8, 24), nn.Linear(8, 8), dropout, reshaped

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (y.unflatten(-1, (2, 4)).transpose(1, 2) for y in self.given(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout).transpose(1, 2).contiguous()
        return (self.out(y.flatten(2)) if self.reshaped else y.exp()).square().mean()


@pytest.mark.parametrize(("model", "copies"), [(Attention(0.0), 0), (Attention(0.1), 1), (Attention(0.0, reshaped=False), 1)], ids=["fused", "dropout", "read as it is"])
def test_rows_of_fused_attention_are_not_copied(model: nn.Module, copies: int) -> None:
    x = torch.randn(4, 6, 8)
    assert kinds(model, x).count("aten.clone.default") == copies
    assert autopar.verify(model, autopar.plan(model, Cluster.local(2), (x,)), (x,)).equal
