"""Local forms of operators that need more than their ATen operator on local shapes."""

import math

import torch
import torch.nn.functional as F

from autopar.runtime.draws import global_index, keep_mask, parse_layout
from autopar.runtime.rank import Rank


def dropout(x: torch.Tensor, mesh: Rank, p: float, site: int, shape: list[int], layout: str) -> torch.Tensor:
    """Dropout whose mask depends on the global index of every element, so that every mesh draws the same bits."""
    if p >= 1:
        return x * 0
    keep = keep_mask(mesh.stream, site, p, shape, global_index(mesh, shape, parse_layout(layout)))
    return x * keep.to(x.dtype).mul_(1 / (1 - p))


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, mesh: Rank, p: float, causal: bool,
              scale: float | None, site: int, shape: list[int], layout: str) -> torch.Tensor:  # fmt: skip
    """Attention with dropout on the probabilities, written out. `shape` and `layout` are those of the probabilities."""
    groups = q.shape[1] // k.shape[1]
    k, v = (k, v) if groups == 1 else (k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1))
    scores = q @ k.transpose(-2, -1) * (scale if scale is not None else 1 / math.sqrt(q.shape[-1]))
    if causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~allowed, -math.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    return dropout(scores.softmax(-1), mesh, p, site, shape, layout) @ v


def rows_of_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mesh: Rank, axes: list[str], causal: bool, scale: float | None, grouped: bool) -> torch.Tensor:
    """Attention of this rank's rows to all keys; row i of the whole sees keys 0 to i."""
    rows = torch.arange(q.shape[2], device=q.device) + shard_start(mesh, axes, q.shape[2])
    seen = rows.unsqueeze(1) >= torch.arange(k.shape[2], device=q.device) if causal else None
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=grouped)


def slots_of_experts(x: torch.Tensor, mesh: Rank, axes: list[str], count: int, experts: int, chosen: int) -> torch.Tensor:
    """The slots of this rank's `count` experts; x [n, h] -> [count, slots, h]."""
    groups = x.unflatten(0, (-1, experts // chosen))
    return groups[:, _experts_here(x, mesh, axes, count) // chosen].transpose(0, 1)


def sum_of_experts(y: torch.Tensor, weights: torch.Tensor, mesh: Rank, axes: list[str], experts: int) -> torch.Tensor:
    """This rank's addend of what the experts of every token made; y [count, slots, h] -> [n, h]."""
    chosen = weights.shape[1]
    mine = _experts_here(y, mesh, axes, y.shape[0])
    each = weights.unflatten(0, (-1, experts // chosen))[:, mine // chosen, mine % chosen]  # [slots, count]
    whole = y.new_zeros(y.shape[1], experts // chosen, y.shape[2])
    return whole.index_add(1, mine // chosen, y.transpose(0, 1) * each.unsqueeze(-1)).flatten(0, 1)


def _experts_here(x: torch.Tensor, mesh: Rank, axes: list[str], count: int) -> torch.Tensor:
    return torch.arange(count, device=x.device) + shard_start(mesh, axes, count)


def shard_start(mesh: Rank, axes: list[str], part: int) -> int:
    """First global index of this rank's part of a dimension cut by `axes`, `part` indices a rank."""
    position = 0
    for axis in axes:
        position = position * mesh.sizes[axis] + mesh.coordinates[axis]
    return position * part


def embedding_rows(weight: torch.Tensor, indices: torch.Tensor, mesh: Rank, axes: list[str], padding_idx: int) -> torch.Tensor:
    """Look up the rows that this rank holds, zeros for the others: an addend of the whole look-up."""
    start = shard_start(mesh, axes, weight.shape[0])
    here = indices - start
    mine = (here >= 0) & (here < weight.shape[0])
    if padding_idx >= 0:
        pad = padding_idx - start if 0 <= padding_idx - start < weight.shape[0] else -1
        rows = F.embedding(here.clamp(0, weight.shape[0] - 1), weight, padding_idx=pad if pad >= 0 else None)
    else:
        rows = F.embedding(here.clamp(0, weight.shape[0] - 1), weight)
    return rows * mine.unsqueeze(-1).to(rows.dtype)


def row_max(logits: torch.Tensor) -> torch.Tensor:
    """Largest logit of every row, without gradient: it cancels in the loss."""
    return logits.detach().amax(-1)


def cross_entropy_parts(logits: torch.Tensor, target: torch.Tensor, largest: torch.Tensor, mesh: Rank, axes: list[str], smoothing: float) -> torch.Tensor:
    """[3 or 4, n] addends of every row: sum of exponentials, target logit, (sum of logits,) all relative to the largest."""
    here = target - shard_start(mesh, axes, logits.shape[-1])
    mine = (here >= 0) & (here < logits.shape[-1])
    shifted = logits - largest.unsqueeze(-1)
    picked = shifted.gather(-1, here.clamp(0, logits.shape[-1] - 1).unsqueeze(-1)).squeeze(-1)
    parts = [shifted.exp().sum(-1), torch.where(mine, picked, 0.0)]
    return torch.stack([*parts, shifted.sum(-1)] if smoothing else parts)


def cross_entropy_rows(parts: torch.Tensor, target: torch.Tensor, ignore_index: int, smoothing: float, num_classes: int) -> torch.Tensor:
    """Loss of every row from the summed parts; zero where the target is ignored."""
    log_sum = parts[0].log()
    loss = log_sum - parts[1]
    if smoothing:
        loss = (1 - smoothing) * loss + smoothing * (log_sum - parts[2] / num_classes)
    return torch.where(target == ignore_index, 0.0, loss)


def channel_mean(x: torch.Tensor, count: int) -> torch.Tensor:
    """Addend of the mean over all dimensions but the channels; `count` is the global number of elements per channel."""
    return x.sum([d for d in range(x.dim()) if d != 1]) / count


def channel_variance(x: torch.Tensor, mean: torch.Tensor, count: int) -> torch.Tensor:
    """Addend of the biased variance per channel."""
    return channel_mean((x - _per_channel(mean, x)).square(), count)


def normalise_channels(x: torch.Tensor, mean: torch.Tensor, var: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    y = (x - _per_channel(mean, x)) * _per_channel((var + eps).rsqrt(), x)
    y = y if weight is None else y * _per_channel(weight, x)
    return y if bias is None else y + _per_channel(bias, x)


def _per_channel(v: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return v.view(1, -1, *[1] * (x.dim() - 2))
