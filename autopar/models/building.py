"""Construct modules on a device, in a dtype and from a seed, leaving the process as it was."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def building(device: str, dtype: torch.dtype, seed: int) -> Iterator[None]:
    """Modules made inside live on `device` in `dtype`; on the CPU their weights are the same for the same `seed`."""
    before = torch.get_default_dtype()
    with torch.device(device), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)
