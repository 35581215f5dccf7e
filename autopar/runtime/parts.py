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
        # What every step asks of every tensor is worked out once: a Python call a tensor is what a small model's step waits for.
        self.straight = [cut.even and cut.dim == 0 and cut.outer == 1 for cut in self.cuts]
        self.whole = len(self.cuts) == 1 and self.straight[0]  # the memory of the one tensor is that of the rows
        self.own_numels = [cut.numel(me) for cut in self.cuts]
        self.own_shapes = [cut.part_shape(me) for cut in self.cuts]

    def rows(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Room for the tensors of all members, [ranks, total], in the order in which a reduce-scatter hands them out."""
        make = torch.zeros if self.padded else torch.empty
        return make((self.ranks, self.total), dtype=dtype, device=device)

    def put(self, rows: torch.Tensor, i: int, x: torch.Tensor) -> None:
        """Copy the i-th whole (working) tensor to its place."""
        cut, start, length = self.cuts[i], self.starts[i], self.lengths[i]
        if self.straight[i]:
            rows.narrow(1, start, length).copy_(x.reshape(self.ranks, length))
            return
        for m, part in enumerate(cut.split(x)):
            rows[m, start : start + cut.numel(m)].view(part.shape).copy_(part)

    def clear(self, rows: torch.Tensor, i: int) -> None:
        """Zeros in place of the i-th tensor."""
        rows[:, self.starts[i] : self.starts[i] + self.lengths[i]].zero_()

    def unpack(self, rows: torch.Tensor) -> list[torch.Tensor]:
        """Rows [ranks, total] of an all-gather -> whole tensors."""
        found = []
        for cut, part, straight in zip(self.cuts, rows.split(self.lengths, 1), self.straight):
            found.append(part.reshape(cut.shape) if straight else cut.join(list(part)))
        return found

    def unpack_into(self, rows: torch.Tensor, whole: Sequence[torch.Tensor]) -> None:
        """`unpack` into memory that is there."""
        for cut, part, straight, out in zip(self.cuts, rows.split(self.lengths, 1), self.straight, whole):
            if straight:
                out.view(part.shape).copy_(part)
            else:
                out.copy_(cut.join(list(part)))

    def own(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """This rank's parts as views of its row."""
        stretches = flat.split(self.lengths)
        if self.padded:
            stretches = [stretch.narrow(0, 0, n) for stretch, n in zip(stretches, self.own_numels)]
        return [stretch.view(shape) for stretch, shape in zip(stretches, self.own_shapes)]
