"""Graphs made without torch against traced models, operator for operator, and against the published sizes of known architectures."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autopar.core.graph import OpGraph
from autopar.errors import UsageError
from autopar.forecast.flops import model_flops, num_parameters
from autopar.forecast.transformer import Dims, transformer_graph
from autopar.models.own import Transformer
from autopar.planner.rulebook import rules_of
from autopar.trace.capture import trace

GPT = Dims(layers=2, hidden=48, heads=4, kv_heads=4, inner=192, vocab=96, seq=32)
LLAMA = Dims(layers=2, hidden=48, heads=4, kv_heads=2, inner=80, vocab=96, seq=32, norm="rms", activation="swiglu", positions="rotary", biases=False)


class Llama(nn.Module):
    """The form of Llama in plain torch, with tables of rotary positions as buffers."""

    def __init__(self, dims: Dims) -> None:
        super().__init__()
        self.dims = dims
        self.register_buffer("cos", torch.zeros(dims.seq, dims.head_dim))
        self.register_buffer("sin", torch.zeros(dims.seq, dims.head_dim))
        self.token = nn.Embedding(dims.vocab, dims.hidden)
        self.blocks = nn.ModuleList(LlamaBlock(dims) for _ in range(dims.layers))
        self.norm = nn.RMSNorm(dims.hidden)
        self.head = nn.Linear(dims.hidden, dims.vocab, bias=False)

    def forward(self, inputs: Tensor, labels: Tensor) -> Tensor:
        x = self.token(inputs)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), labels.flatten())


class LlamaBlock(nn.Module):
    def __init__(self, dims: Dims) -> None:
        super().__init__()
        self.dims, kv = dims, dims.kv_heads * dims.head_dim
        self.norm1, self.norm2 = nn.RMSNorm(dims.hidden), nn.RMSNorm(dims.hidden)
        self.q, self.k, self.v = (nn.Linear(dims.hidden, width, bias=False) for width in (dims.hidden, kv, kv))
        self.o = nn.Linear(dims.hidden, dims.hidden, bias=False)
        self.gate, self.up = (nn.Linear(dims.hidden, dims.inner, bias=False) for _ in range(2))
        self.down = nn.Linear(dims.inner, dims.hidden, bias=False)

    def attention(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (-1, self.dims.head_dim)).transpose(1, 2) for part in (self.q, self.k, self.v))
        q, k = (y * cos + rotated(y) * sin for y in (q, k))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.dims.kv_heads != self.dims.heads)
        return self.o(mixed.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), cos, sin)
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def rotated(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def traced(model: nn.Module, batch: int, seq: int) -> OpGraph:
    tokens = torch.zeros(batch, seq, dtype=torch.int64)
    return trace(model.to(torch.bfloat16), (), {"inputs": tokens, "labels": tokens}).graph


def calls(graph: OpGraph) -> list[tuple]:
    """What every operator is, takes and gives, in order of kind and shape: independent branches may come in any order."""
    metas = [value.meta for value in graph.values]
    return sorted((op.kind, *(str(metas[v]) for v in (*op.operands, *op.results))) for op in graph.ops)


def totals(graph: OpGraph) -> Sequence[float]:
    rules = rules_of(graph)
    moved = sum(graph.values[v].meta.num_bytes for op in graph.ops for v in (*op.operands, *op.results))
    return graph.num_params, sum(r.flops for r in rules if r.cost == "contract"), moved, len(graph.ops)


@pytest.mark.parametrize("dims", [GPT, LLAMA], ids=["gpt", "llama"])
def test_the_same_operators_as_the_traced_model(dims: Dims) -> None:
    model: nn.Module
    if dims is GPT:
        model = Transformer(vocab=dims.vocab, positions=dims.seq, hidden=dims.hidden, layers=dims.layers, heads=dims.heads)
    else:
        model = Llama(dims)
    ours, theirs = transformer_graph(dims, 3), traced(model, 3, dims.seq)
    assert calls(ours) == calls(theirs)
    assert totals(ours) == totals(theirs)
    assert [(s.block, len(s.ops)) for s in ours.segments] == [(s.block, len(s.ops)) for s in theirs.segments]


LLAMA_3 = {"norm": "rms", "activation": "swiglu", "positions": "rotary", "biases": False, "vocab": 128256, "seq": 8192, "kv_heads": 8}
KNOWN = {
    "GPT-2": (Dims(layers=12, hidden=768, heads=12, kv_heads=12, inner=3072, vocab=50257, seq=1024, tied=True), 124.44e6),
    "GPT-2 XL": (Dims(layers=48, hidden=1600, heads=25, kv_heads=25, inner=6400, vocab=50257, seq=1024, tied=True), 1557.6e6),
    "GPT-3": (Dims(layers=96, hidden=12288, heads=96, kv_heads=96, inner=49152, vocab=51200, seq=2048, tied=True), 174.6e9),
    "Llama 2 7B": (Dims(**{**LLAMA_3, "vocab": 32000, "seq": 4096, "kv_heads": 32}, layers=32, hidden=4096, heads=32, inner=11008), 6738.4e6),
    "Llama 3.1 8B": (Dims(**LLAMA_3, layers=32, hidden=4096, heads=32, inner=14336), 8030.3e6),
    "Llama 3.1 70B": (Dims(**LLAMA_3, layers=80, hidden=8192, heads=64, inner=28672), 70553.7e6),
    "Llama 3.1 405B": (Dims(**LLAMA_3, layers=126, hidden=16384, heads=128, inner=53248), 405853.4e6),
}
"""Dimensions and published numbers of parameters."""


@pytest.mark.parametrize("name", KNOWN)
def test_parameters_and_flops_of_known_architectures(name: str) -> None:
    dims, published = KNOWN[name]
    graph = transformer_graph(dims.with_layers(2), 1)
    per_block = transformer_graph(dims.with_layers(3), 1).num_params - graph.num_params
    assert graph.num_params + (dims.layers - 2) * per_block == num_parameters(dims) == pytest.approx(published, rel=0.01)
    of_two = dims.with_layers(2)
    forward = sum(rule.flops for rule in rules_of(graph) if rule.cost == "contract")
    assert 3 * forward == pytest.approx(model_flops(of_two, dims.seq), rel=1e-9)


def test_flops_per_token_as_others_print_them() -> None:
    """Llama 3 8B at 8K: 57.9 GFLOP a token with all scores, 51.5 with those of a causal mask; SC21's formula for 175 billion."""
    llama, gpt = KNOWN["Llama 3.1 8B"][0], KNOWN["GPT-3"][0]
    assert model_flops(llama, 1) == pytest.approx(57.9e9, rel=0.01)
    assert model_flops(llama, 1, "model flops with causal-halved attention") == pytest.approx(51.5e9, rel=0.01)
    h, s, n = gpt.hidden, gpt.seq, gpt.layers
    sc21 = 96 * s * n * h**2 * (1 + s / (6 * h) + gpt.vocab / (16 * n * h))
    assert model_flops(gpt, s, "hardware, incl. full recompute") == pytest.approx(sc21, rel=1e-9)


def test_what_is_no_transformer_is_refused() -> None:
    with pytest.raises(UsageError, match="heads that divide"):
        Dims(layers=2, hidden=50, heads=4, kv_heads=4, inner=64, vocab=10, seq=8)
