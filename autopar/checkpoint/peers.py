"""What the ranks must agree on while they save and load: a failure on one is a failure on all, and none waits for another in vain."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from autopar.errors import AutoparError, CheckpointError


@dataclass(frozen=True, slots=True)
class Peers:
    """This process among those of the default process group; alone where there is none."""

    rank: int
    num_ranks: int

    @classmethod
    def here(cls) -> "Peers":
        return cls(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else cls(0, 1)

    def gather(self, text: str) -> Sequence[str]:
        """Every rank's text, on every rank."""
        if self.num_ranks == 1:
            return [text]
        texts: list[Any] = [None] * self.num_ranks
        dist.all_gather_object(texts, text)
        return texts

    @contextmanager
    def together(self) -> Iterator[None]:
        """A step that every rank takes: if it fails on one, it raises CheckpointError on all. Nobody leaves it before all are done."""
        problem = ""
        try:
            yield
        except (OSError, AutoparError) as error:
            problem = str(error)
        problems = self.gather(problem)
        for rank, text in enumerate(problems):
            if text:
                raise CheckpointError(f"rank {rank}: {text}" if self.num_ranks > 1 else text)

    def on_first(self, action: Callable[[], str | None]) -> str:
        """What `action` returns on rank 0, on every rank; its failure likewise."""
        text = ""
        with self.together():
            text = (action() or "") if self.rank == 0 else ""
        return self.gather(text)[0]
