"""Steps of random models: each takes one or more [batch, sequence, hidden] tensors and makes another."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class Sizes:
    batch: int
    seq: int
    hidden: int
    heads: int

    @property
    def head(self) -> int:
        return self.hidden // self.heads


class Fn(nn.Module):
    """A function of tensors with parameters: `Fn(lambda m, x: m.up(x), up=nn.Linear(4, 8))`; tensors become buffers."""

    def __init__(self, function: Callable[..., torch.Tensor], **children: Any) -> None:
        super().__init__()
        self.function = function
        for name, child in children.items():
            if isinstance(child, torch.Tensor) and not isinstance(child, nn.Parameter):
                self.register_buffer(name, child)
            else:
                setattr(self, name, child)

    def forward(self, *xs: torch.Tensor) -> torch.Tensor:
        return self.function(self, *xs)


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape))


Make = Callable[[random.Random, Sizes], Fn]
STEPS: dict[str, tuple[int, Make]] = {}
"""name -> (number of inputs, maker)."""


def step(inputs: int = 1) -> Callable[[Make], Make]:
    def register(make: Make) -> Make:
        STEPS[make.__name__] = (inputs, make)
        return make

    return register


# --- layers ----------------------------------------------------------------------------------------------------------


@step()
def mlp(rng: random.Random, d: Sizes) -> Fn:
    act = rng.choice([F.gelu, F.relu, F.silu, torch.tanh, F.softplus])
    bias = rng.random() < 0.6
    return Fn(lambda m, x: m.down(act(m.up(x))), up=nn.Linear(d.hidden, 2 * d.hidden, bias), down=nn.Linear(2 * d.hidden, d.hidden, bias))


@step()
def gated_mlp(rng: random.Random, d: Sizes) -> Fn:
    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        gate, value = m.up(x).chunk(2, -1)
        return m.down(F.silu(gate) * value)

    return Fn(run, up=nn.Linear(d.hidden, 4 * d.hidden, bias=False), down=nn.Linear(2 * d.hidden, d.hidden))


@step()
def attention(rng: random.Random, d: Sizes) -> Fn:
    """Fused projection, split by heads, with or without a mask or dropout."""
    causal, masked, p = rng.random() < 0.5, rng.random() < 0.5, rng.choice([0.0, 0.0, 0.2])

    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        qkv = m.qkv(x).view(d.batch, d.seq, 3, d.heads, d.head).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        mask = None if causal or not masked else (m.position[:, None] >= m.position - 1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, dropout_p=p)
        return m.out(y.transpose(1, 2).reshape(d.batch, d.seq, d.hidden))

    return Fn(run, qkv=nn.Linear(d.hidden, 3 * d.hidden), out=nn.Linear(d.hidden, d.hidden), position=torch.zeros(d.seq, dtype=torch.long))


@step()
def grouped_attention(rng: random.Random, d: Sizes) -> Fn:
    """Fewer key heads than query heads, as one call or with the keys repeated."""
    groups, fused = d.heads // 2, rng.random() < 0.5

    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        q = m.q(x).unflatten(-1, (d.heads, d.head)).transpose(1, 2)
        k, v = (w(x).unflatten(-1, (groups, d.head)).transpose(1, 2) for w in (m.k, m.v))
        if not fused:
            k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=fused)
        return y.transpose(1, 2).flatten(2)

    return Fn(run, q=nn.Linear(d.hidden, d.hidden), k=nn.Linear(d.hidden, groups * d.head), v=nn.Linear(d.hidden, groups * d.head))


@step(2)
def cross_attention(rng: random.Random, d: Sizes) -> Fn:
    """Written out, with a learned bias per head and position."""

    def run(m: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        q, k = (z.view(d.batch, d.seq, d.heads, d.head).transpose(1, 2) for z in (x, y))
        scores = q @ k.transpose(-2, -1) / d.head**0.5 + m.bias
        return (scores.softmax(-1) @ k).transpose(1, 2).reshape(d.batch, d.seq, d.hidden)

    return Fn(run, bias=weight(d.heads, d.seq, d.seq))


@step(2)
def einsum_attention(rng: random.Random, d: Sizes) -> Fn:
    def run(m: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        a = torch.einsum("bsh,bth->bst", m.q(x), y).log_softmax(-1).exp()
        return torch.einsum("bst,bth->bsh", m.drop(a), y)

    return Fn(run, q=nn.Linear(d.hidden, d.hidden, bias=False), drop=nn.Dropout(0.1))


@step(2)
def bmm(rng: random.Random, d: Sizes) -> Fn:
    return Fn(lambda m, x, y: torch.baddbmm(x, torch.bmm(x, y.transpose(1, 2)), y, alpha=0.1 / d.hidden))


@step()
def norm(rng: random.Random, d: Sizes) -> Fn:
    kind = rng.choice([nn.LayerNorm, nn.RMSNorm])
    return Fn(lambda m, x: m.norm(x), norm=kind(d.hidden))


@step()
def group_norm(rng: random.Random, d: Sizes) -> Fn:
    return Fn(lambda m, x: m.norm(x.transpose(1, 2)).transpose(1, 2), norm=nn.GroupNorm(d.heads, d.hidden))


@step()
def batch_norm(rng: random.Random, d: Sizes) -> Fn:
    module = nn.BatchNorm1d(d.hidden) if rng.random() < 0.7 else nn.BatchNorm1d(d.hidden).eval()
    return Fn(lambda m, x: m.norm(x.transpose(1, 2)).transpose(1, 2), norm=module)


@step()
def rms_by_hand(rng: random.Random, d: Sizes) -> Fn:
    return Fn(lambda m, x: m.scale * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6), scale=weight(d.hidden))


@step()
def conv1d(rng: random.Random, d: Sizes) -> Fn:
    groups = rng.choice([1, 1, d.heads])
    return Fn(lambda m, x: m.conv(x.transpose(1, 2)).mT, conv=nn.Conv1d(d.hidden, d.hidden, 3, padding=1, groups=groups))


@step()
def conv2d(rng: random.Random, d: Sizes) -> Fn:
    """The sequence as one column of heads: [b, heads, s, head]."""

    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        image = x.view(d.batch, d.seq, d.heads, d.head).transpose(1, 2)
        return F.avg_pool2d(m.conv(image), 3, 1, 1).transpose(1, 2).flatten(2)

    return Fn(run, conv=nn.Conv2d(d.heads, d.heads, 3, padding=1))


@step()
def image(rng: random.Random, d: Sizes) -> Fn:
    """Heads as channels of an image of tokens by head size: halved, and doubled again in one of three ways."""
    way = rng.choice(["transposed", "shuffle", "interpolate"])
    grow = (
        nn.ConvTranspose2d(d.heads, d.heads, 2, 2)
        if way == "transposed"
        else nn.Conv2d(d.heads, d.heads * (4 if way == "shuffle" else 1), 1)
    )

    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        small = F.max_pool2d(m.norm(x.view(d.batch, d.seq, d.heads, d.head).transpose(1, 2)), 2)
        large = m.grow(F.leaky_relu(small))
        large = F.pixel_shuffle(large, 2) if way == "shuffle" else F.interpolate(large, scale_factor=2.0) if way == "interpolate" else large
        return large.transpose(1, 2).flatten(2)

    return Fn(run, grow=grow, norm=nn.InstanceNorm2d(d.heads, affine=True))


@step()
def flat_linear(rng: random.Random, d: Sizes) -> Fn:
    """Tokens merged into one dimension and taken apart again."""
    return Fn(
        lambda m, x: torch.addmm(m.b, x.reshape(-1, d.hidden), m.w).view(d.batch, d.seq, d.hidden),
        w=weight(d.hidden, d.hidden),
        b=weight(d.hidden),
    )


@step()
def shared_linear(rng: random.Random, d: Sizes) -> Fn:
    """One weight used three times, once transposed."""
    return Fn(lambda m, x: m.w(torch.tanh(m.w(x))) @ m.w.weight, w=nn.Linear(d.hidden, d.hidden))


@step()
def bilinear(rng: random.Random, d: Sizes) -> Fn:
    return Fn(
        lambda m, x: x + m.b(x[..., : d.head], x[..., d.head : 2 * d.head]).repeat(1, 1, d.heads), b=nn.Bilinear(d.head, d.head, d.head)
    )


# --- rearranging -----------------------------------------------------------------------------------------------------


@step()
def split_and_join(rng: random.Random, d: Sizes) -> Fn:
    dim = rng.choice([1, 2])
    size = (d.seq, d.hidden)[dim - 1]
    parts = rng.choice([size // 2, size // 4, [size - 2, 2]])

    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        pieces = x.split(parts, dim)
        return torch.cat([pieces[-1], *pieces[:-1]], dim)

    return Fn(run)


@step(2)
def stack_and_pick(rng: random.Random, d: Sizes) -> Fn:
    dim = rng.choice([0, 1, 2, 3])
    return Fn(lambda m, x, y: torch.stack([x, y, x * y], dim).select(dim, 2) + torch.stack([x, y], dim).sum(dim))


@step()
def pad_and_slice(rng: random.Random, d: Sizes) -> Fn:
    return Fn(lambda m, x: F.pad(x, (0, 0, 1, 2))[:, 2 : d.seq + 2] + x.roll(1, 1) - x.flip(2))


@step()
def rotary(rng: random.Random, d: Sizes) -> Fn:
    """Halves of every head rotated by a table that is computed on the way."""

    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        z = x.view(d.batch, d.seq, d.heads, d.head)
        left, right = z.chunk(2, -1)
        angle = torch.arange(d.seq, dtype=x.dtype, device=x.device)[:, None, None] * m.freq
        table = torch.cat([angle, angle], -1)
        return (z * table.cos() + torch.cat([-right, left], -1) * table.sin()).flatten(2)

    return Fn(run, freq=torch.zeros(d.head // 2))


@step()
def class_token(rng: random.Random, d: Sizes) -> Fn:
    return Fn(lambda m, x: torch.cat([m.token.expand(d.batch, 1, d.hidden), x], 1)[:, : d.seq], token=weight(1, 1, d.hidden))


@step()
def windows(rng: random.Random, d: Sizes) -> Fn:
    return Fn(lambda m, x: x.unfold(1, 2, 2).mean(-1).repeat_interleave(2, 1))


# --- choosing --------------------------------------------------------------------------------------------------------


@step()
def where_mask(rng: random.Random, d: Sizes) -> Fn:
    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.where(m.keep > -0.1, x, m.fill).masked_fill(m.rows[:, None] > 0.2, 0.0)

    return Fn(run, keep=torch.zeros(d.hidden), rows=torch.zeros(d.seq), fill=weight(d.hidden))


@step()
def written_in_place(rng: random.Random, d: Sizes) -> Fn:
    """Slices and single columns of a copy overwritten."""

    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = x.clone()
        y[:, 1:3] = m.w
        y[..., 0] += x[..., 1] * x[..., 2]
        y[:, 0] = 0.5
        return y

    return Fn(run, w=weight(2, d.hidden))


@step()
def cast_mask(rng: random.Random, d: Sizes) -> Fn:
    """Tensors without gradient that take dtype or shape from one that has it."""

    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        late = (torch.arange(d.seq, device=x.device) > 1)[:, None]
        return x * late.type_as(x) + m.table.to(x).expand_as(x) * x + x.new_ones(d.seq, 1) + torch.full_like(x, 0.1)

    return Fn(run, table=torch.zeros(d.hidden))


@step()
def gather_tokens(rng: random.Random, d: Sizes) -> Fn:
    """Tokens in another order, chosen by the data."""
    return Fn(lambda m, x: x.gather(1, x.detach().argsort(1)) + x.index_select(1, m.order), order=torch.zeros(d.seq, dtype=torch.long))


@step()
def scatter_tokens(rng: random.Random, d: Sizes) -> Fn:
    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        pairs = torch.zeros_like(x).scatter_add(1, x.detach().argsort(1) // 2, x)
        return pairs + x.index_add(1, m.where, m.w.expand(d.batch, 2, d.hidden))

    return Fn(run, where=torch.zeros(2, dtype=torch.long), w=weight(2, d.hidden))


@step()
def experts(rng: random.Random, d: Sizes) -> Fn:
    """All experts computed, weighted by the two largest gates."""

    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        gates = m.gate(x).softmax(-1)
        value, index = gates.topk(2, -1)
        mixed = torch.zeros_like(gates).scatter(-1, index, value)
        each = torch.einsum("bsh,eho->bseo", x, m.w)
        return (mixed.unsqueeze(-1) * each).sum(2)

    return Fn(run, gate=nn.Linear(d.hidden, d.heads), w=weight(d.heads, d.hidden, d.hidden))


@step()
def one_hot_lookup(rng: random.Random, d: Sizes) -> Fn:
    return Fn(lambda m, x: x + F.one_hot(x.detach().argmax(-1), d.hidden).to(x.dtype) @ m.w, w=weight(d.hidden, d.hidden))


# --- elementwise and reductions --------------------------------------------------------------------------------------


@step()
def gate_by_mean(rng: random.Random, d: Sizes) -> Fn:
    dim = rng.choice([0, 1, (0, 1), 2])
    return Fn(lambda m, x: x * torch.sigmoid(x.mean(dim, keepdim=True)) + x.sum(1, keepdim=True) / d.seq)


@step()
def standardise(rng: random.Random, d: Sizes) -> Fn:
    dim = rng.choice([1, 2])
    return Fn(lambda m, x: (x - x.amax(dim, keepdim=True)) / (x.std(dim, keepdim=True) + 1.0) + x.logsumexp(dim, keepdim=True))


@step()
def scan(rng: random.Random, d: Sizes) -> Fn:
    return Fn(lambda m, x: x.cumsum(1) / (1 + torch.arange(d.seq, dtype=x.dtype, device=x.device)[:, None]))


@step()
def dropout(rng: random.Random, d: Sizes) -> Fn:
    return Fn(lambda m, x: F.dropout(m.drop(x), 0.1), drop=nn.Dropout(0.3))


@step(2)
def add(rng: random.Random, d: Sizes) -> Fn:
    return Fn(lambda m, x, y: x - 0.5 * y)


@step(2)
def multiply(rng: random.Random, d: Sizes) -> Fn:
    return Fn(lambda m, x, y: x * m.scale * torch.tanh(y) / (1 + y.abs()), scale=weight(d.hidden))


@step(3)
def blend(rng: random.Random, d: Sizes) -> Fn:
    return Fn(lambda m, x, y, z: torch.lerp(x, y, torch.sigmoid(z)).clamp(-3, 3) + torch.maximum(x, z))


@step()
def two_products(rng: random.Random, d: Sizes) -> Fn:
    """Two contracted addends: one reduction is enough."""
    return Fn(lambda m, x: m.a(x) + m.b(torch.tanh(x)), a=nn.Linear(d.hidden, d.hidden), b=nn.Linear(d.hidden, d.hidden, bias=False))


@step()
def stopped(rng: random.Random, d: Sizes) -> Fn:
    return Fn(lambda m, x: x + x.detach().square().floor() * 0.1)


@step(2)
def without_rule(rng: random.Random, d: Sizes) -> Fn:
    """An operator that no rule covers."""
    return Fn(lambda m, x, y: x * F.cosine_similarity(x, y, dim=-1).unsqueeze(-1))
