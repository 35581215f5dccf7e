"""What one rank knows: its place on the mesh, its groups, its random stream and its communication counter."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from autopar.core.ledger import Ledger, LedgerKey
from autopar.core.mesh import Mesh


class Work(Protocol):
    """A collective under way."""

    def wait(self) -> Any: ...


class Exchange(Protocol):
    """Raw communication inside one group; lists hold one tensor per member, in group order."""

    def all_reduce(self, x: torch.Tensor, op: str) -> torch.Tensor: ...
    def start_all_reduce(self, x: torch.Tensor) -> tuple[torch.Tensor, Work]: ...
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

    def advance(self, *, last: bool) -> None:
        """To the next microbatch, or after the last one to the next step."""
        self.step, self.microbatch = (self.step + 1, 0) if last else (self.step, self.microbatch + 1)


@dataclass
class Rank:
    """One rank of a mesh. `exchanges` maps axis names joined by '+' to the communication of that group (absent when simulated).

    `units`: what is gathered for each segment of the program; `tape`: what the block at hand keeps for its backward, where that is not
    everything (`tape.py`); `deferred`: where a backward of inputs only leaves what the gradients of weights need (`split.py`); `late`: where a
    forward leaves the sums that its backward does not read, for whoever reads them to wait for, None where they are waited for at once; `gathers`: as
    `exchanges`, for parameters that are gathered while others are computed with: collectives of one group go one after the other."""

    mesh: Mesh
    rank: int
    device: torch.device
    exchanges: Mapping[str, Exchange] = field(default_factory=dict)
    stream: Stream = field(default_factory=Stream)
    counter: Counter = field(default_factory=Counter)
    units: Mapping[int, Any] = field(default_factory=dict)
    offload: bool = False
    tape: Any = None
    replaying: bool = False
    deferred: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, bool]] | None = None
    late: list[Work] | None = None
    gathers: Mapping[str, Exchange] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.coordinates = dict(zip(self.mesh.names, self.mesh.coordinates(self.rank)))
        self.sizes = dict(zip(self.mesh.names, self.mesh.sizes))

    def count(self, primitive: str, axis: str, x: torch.Tensor) -> None:
        size = 1
        for name in axis.split("+"):
            size *= self.sizes[name]
        self.counter.add(primitive, axis, size, x.numel() * x.element_size())

    def on_device(self, x: torch.Tensor) -> torch.Tensor:
        """A stored tensor where it is computed with; under offload a counted copy, also where host and device are one."""
        return self._transfer("to_device", x, self.device)

    def on_host(self, x: torch.Tensor) -> torch.Tensor:
        """A computed tensor where it is stored."""
        return self._transfer("to_host", x, torch.device("cpu"))

    def _transfer(self, name: str, x: torch.Tensor, device: torch.device) -> torch.Tensor:
        if not self.offload:
            return x
        self.counter.add(name, "host", 1, x.numel() * x.element_size())
        return x.to(device, copy=True)

    @contextmanager
    def summing_late(self) -> Iterator[list[Work]]:
        """Sums that end a forward in this block are only started; the caller waits for what is in the list."""
        self.late = found = []
        try:
            yield found
        finally:
            self.late = None

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Communication in this block is housekeeping, not part of the step."""
        before, self.counter.enabled = self.counter.enabled, False
        try:
            yield
        finally:
            self.counter.enabled = before
