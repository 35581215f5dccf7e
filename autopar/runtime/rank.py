"""What one rank knows: its place on the mesh, its groups, its random stream and its communication counter."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch

from autopar.core.ledger import Ledger, LedgerKey
from autopar.core.mesh import Mesh


class Exchange(Protocol):
    """Raw communication inside one group; lists hold one tensor per member, in group order."""

    def all_reduce(self, x: torch.Tensor, op: str) -> torch.Tensor: ...
    def all_gather(self, x: torch.Tensor) -> list[torch.Tensor]: ...
    def reduce_scatter(self, pieces: list[torch.Tensor]) -> torch.Tensor: ...
    def all_to_all(self, pieces: list[torch.Tensor]) -> list[torch.Tensor]: ...


@dataclass
class Counter:
    """Counts the bytes that enter collectives; `ledger` is comparable with the predicted one."""

    entries: dict[LedgerKey, int] = field(default_factory=dict)
    enabled: bool = True

    def add(self, primitive: str, axes: str, size: int, num_bytes: int) -> None:
        if self.enabled:
            key = (primitive, axes, size)
            self.entries[key] = self.entries.get(key, 0) + num_bytes

    @property
    def ledger(self) -> Ledger:
        return Ledger.of(self.entries)

    def reset(self) -> None:
        self.entries.clear()


@dataclass
class Stream:
    """Names the random draws: (seed, step, microbatch). All ranks hold the same; a draw adds its site and element index."""

    seed: int = 0
    step: int = 0
    microbatch: int = 0


@dataclass
class Rank:
    """One rank of a mesh. `exchanges` maps axis names joined by '+' to the communication of that group (absent when simulated)."""

    mesh: Mesh
    rank: int
    device: torch.device
    exchanges: Mapping[str, Exchange] = field(default_factory=dict)
    stream: Stream = field(default_factory=Stream)
    counter: Counter = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.coordinates = dict(zip(self.mesh.names, self.mesh.coordinates(self.rank)))
        self.sizes = dict(zip(self.mesh.names, self.mesh.sizes))

    def count(self, primitive: str, axis: str, x: torch.Tensor) -> None:
        size = 1
        for name in axis.split("+"):
            size *= self.sizes[name]
        self.counter.add(primitive, axis, size, x.numel() * x.element_size())

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Communication in this block is housekeeping, not part of the step."""
        before, self.counter.enabled = self.counter.enabled, False
        try:
            yield
        finally:
            self.counter.enabled = before
