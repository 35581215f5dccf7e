"""Flat buffers: the parts of several parameters or gradients that travel together in one collective."""

from collections.abc import Sequence
from itertools import accumulate

import torch

from autopar.runtime.pieces import Cut


class Parts:
    """One row per member of a group; in it, one padded stretch per tensor. `me` is this rank's row."""

    def __init__(self, cuts: Sequence[Cut], me: int = 0) -> None:
        self.cuts, self.me = tuple(cuts), me
        self.ranks = len(self.cuts[0].sizes)
        self.lengths = [cut.padded for cut in self.cuts]
        self.starts = [0, *accumulate(self.lengths)][:-1]
        self.total = sum(self.lengths)
        self.padded = any(not cut.even for cut in self.cuts)

    def rows(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Room for the tensors of all members, [ranks, total], in the order in which a reduce-scatter hands them out."""
        make = torch.zeros if self.padded else torch.empty
        return make((self.ranks, self.total), dtype=dtype, device=device)

    def put(self, rows: torch.Tensor, i: int, x: torch.Tensor) -> None:
        """Copy the i-th whole (working) tensor to its place."""
        cut, start, length = self.cuts[i], self.starts[i], self.lengths[i]
        if cut.even and cut.dim == 0 and cut.outer == 1:
            rows[:, start : start + length].copy_(x.reshape(self.ranks, length))
            return
        for m, part in enumerate(cut.split(x)):
            rows[m, start : start + cut.numel(m)].view(part.shape).copy_(part)

    def clear(self, rows: torch.Tensor, i: int) -> None:
        """Zeros in place of the i-th tensor."""
        rows[:, self.starts[i] : self.starts[i] + self.lengths[i]].zero_()

    def unpack(self, rows: torch.Tensor) -> list[torch.Tensor]:
        """Rows [ranks, total] of an all-gather -> whole tensors."""
        found = []
        for cut, start, length in zip(self.cuts, self.starts, self.lengths):
            part = rows[:, start : start + length]
            straight = cut.even and cut.dim == 0 and cut.outer == 1
            found.append(part.reshape(cut.shape) if straight else cut.join(list(part)))
        return found

    def unpack_into(self, rows: torch.Tensor, whole: Sequence[torch.Tensor]) -> None:
        """`unpack` into memory that is there."""
        for cut, start, length, out in zip(self.cuts, self.starts, self.lengths, whole):
            part = rows[:, start : start + length]
            if cut.even and cut.dim == 0 and cut.outer == 1:
                out.view(self.ranks, length).copy_(part)
            else:
                out.copy_(cut.join(list(part)))

    def own(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """This rank's parts as views of its row."""
        return [flat[start : start + cut.numel(self.me)].view(cut.part_shape(self.me)) for cut, start in zip(self.cuts, self.starts)]
