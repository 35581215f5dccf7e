"""Random draws that are the same bits on any mesh: a counter-based hash of (seed, step, microbatch, site, global element).

The mixer is the 32-bit finaliser `lowbias32` (C. Wellons, hash-prospector), applied once to a key per row and once to
row key + column. One row is one index of all dimensions but the last.
"""

from collections.abc import Sequence

import torch

from autopar.core.layout import Layout, parse_placement, shard_index
from autopar.runtime.rank import Rank, Stream

_MASK = 0xFFFFFFFF
_M1, _M2 = 0x7FEB352D, 0x846CA68B


def _signed(value: int) -> int:
    value &= _MASK
    return value - (1 << 32) if value >= 1 << 31 else value


def _mix_int(x: int) -> int:
    x &= _MASK
    x = (x ^ (x >> 16)) * _M1 & _MASK
    x = (x ^ (x >> 15)) * _M2 & _MASK
    return x ^ (x >> 16)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """lowbias32 on int32, in place; right shifts are made logical by a mask."""
    x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).mul_(_signed(_M1))
    x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF)).mul_(_signed(_M2))
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))


def key_of(stream: Stream, site: int) -> int:
    """32 bits that name one draw."""
    key = 0x9E3779B9
    for word in (stream.seed, stream.seed >> 32, stream.step, stream.microbatch, site):
        key = _mix_int(key ^ (word & _MASK)) + 0x9E3779B9
    return key & _MASK


def bits(stream: Stream, site: int, shape: Sequence[int], index: Sequence[torch.Tensor]) -> torch.Tensor:
    """int32 bits for the elements at the given global indices (one index vector per dimension) of a tensor of `shape`."""
    key = key_of(stream, site)
    device = index[0].device if len(index) else None
    if not shape:
        return _mix(torch.full((), _signed(key), dtype=torch.int32, device=device))
    rows = torch.zeros((), dtype=torch.int64, device=device)
    for n, ids in zip(shape[:-1], index[:-1]):
        rows = rows.unsqueeze(-1) * n + ids
    low = _mix((rows & _MASK).to(torch.int32).bitwise_xor_(_signed(key)))
    high = _mix(((rows >> 32) & _MASK).to(torch.int32).add_(_signed(_mix_int(key))))
    columns = index[-1].to(torch.int32).mul(_signed(0x9E3779B1))
    return _mix((low ^ high).unsqueeze(-1) + columns)


def keep_mask(stream: Stream, site: int, p: float, shape: Sequence[int], index: Sequence[torch.Tensor]) -> torch.Tensor:
    """True where an element survives dropout with probability p of being zeroed."""
    threshold = round(p * (1 << 32)) - (1 << 31)
    return bits(stream, site, shape, index) >= max(min(threshold, (1 << 31) - 1), -(1 << 31))


def global_index(mesh: Rank, shape: Sequence[int], layout: Layout) -> list[torch.Tensor]:
    """For every dimension the global indices that this rank holds."""
    point = tuple(mesh.coordinates[name] for name in mesh.mesh.names)
    return [torch.tensor(ids, dtype=torch.int64, device=mesh.device) for ids in shard_index(layout, mesh.mesh, point, shape)]


def parse_layout(text: str) -> Layout:
    return tuple(parse_placement(word) for word in text.split(",")) if text else ()
