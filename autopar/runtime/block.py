"""The call of a block in an emitted program, where more happens than running it."""

from typing import Any

from torch import nn

from autopar.runtime.rank import Rank
from autopar.runtime.residence import run


def run_block(mesh: Rank, block: nn.Module, *args: Any, gather: int | None = None, recompute: str = "none") -> Any:
    """Run a block with the weights of segment `gather` whole while it runs; `recompute`: what is not kept for its backward."""
    return run(block, args, [mesh], None if gather is None else mesh.units[gather], recompute)
