"""Local shards of parameters, taken from a real model or initialised module by module from a meta model."""

import copy
import hashlib
from collections.abc import Sequence

import torch
from torch import nn

from autopar.core.layout import Layout, shard_index
from autopar.core.mesh import Mesh
from autopar.errors import UsageError


def shard(x: torch.Tensor, layout: Layout, mesh: Mesh, coordinates: Sequence[int]) -> torch.Tensor:
    """The part of a whole tensor that the rank at `coordinates` stores, as memory of its own."""
    part = x.detach()
    for dim, ids in enumerate(shard_index(layout, mesh, coordinates, tuple(x.shape))):
        if len(ids) == x.shape[dim]:
            continue
        contiguous = ids[-1] - ids[0] + 1 == len(ids)
        part = part.narrow(dim, ids[0], len(ids)) if contiguous else part.index_select(dim, torch.tensor(ids, device=x.device))
    return part.clone(memory_format=torch.contiguous_format)


def unshard(parts: Sequence[torch.Tensor], layout: Layout, mesh: Mesh, shape: Sequence[int]) -> torch.Tensor:
    """The whole tensor from every rank's part."""
    if not shape:
        return parts[0].clone()
    whole = parts[0].new_zeros(tuple(shape))
    for rank, part in enumerate(parts):
        ids = [torch.tensor(i) for i in shard_index(layout, mesh, mesh.coordinates(rank), shape)]
        whole[torch.meshgrid(*ids, indexing="ij")] = part
    return whole


def _seed_of(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "big")


class Weights:
    """Whole parameters and buffers by name, one module at a time; a meta module is initialised when it is asked for.

    Initial values depend on (seed, module name) alone, so every rank and every mesh draws the same. `persistent`: the names
    that belong to a saved model.
    """

    def __init__(self, model: nn.Module, *, seed: int = 0, device: torch.device | None = None) -> None:
        self.model, self.seed, self.device = model, seed, device or torch.device("cpu")
        self._module_name = ""
        self._tensors: dict[str, torch.Tensor] = {}
        self.persistent = frozenset(model.state_dict(keep_vars=True))

    def get(self, name: str) -> torch.Tensor:
        """A parameter or buffer as a whole tensor; only its own module is held."""
        owner, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(owner)
        tensor = module._parameters.get(leaf)
        tensor = module._buffers.get(leaf) if tensor is None else tensor
        if tensor is None:
            raise UsageError(f"the model has no parameter or buffer {name!r}; plan again with the model as it is now")
        if not tensor.is_meta:
            return tensor.detach()
        if self._module_name != owner or not self._tensors:
            self._tensors = self._initialise(module, owner)
            self._module_name = owner
        return self._tensors[leaf]

    def _initialise(self, module: nn.Module, name: str) -> dict[str, torch.Tensor]:
        clone = copy.copy(module)
        clone._parameters = {k: None if p is None else nn.Parameter(torch.empty_like(p, device=self.device), p.requires_grad) for k, p in module._parameters.items()}
        clone._buffers = {k: None if b is None else torch.zeros_like(b, device=self.device) if b.is_meta else b for k, b in module._buffers.items()}
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(_seed_of(self.seed, name))
            self._fill(clone, name)
        return {k: t.detach() for k, t in (*clone._parameters.items(), *clone._buffers.items()) if t is not None}

    def _fill(self, clone: nn.Module, name: str) -> None:
        for p in clone._parameters.values():
            if p is not None:
                p.normal_(0.0, 0.02) if p.dim() > 1 else p.zero_()
        hugging_face = getattr(self.model, "_init_weights", None)
        reset = getattr(clone, "reset_parameters", None)
        if reset is not None:
            reset()
        if hugging_face is not None:
            hugging_face(clone)
        elif reset is None and any(b is not None and b.is_meta for b in self.model.get_submodule(name)._buffers.values()):
            raise UsageError(f"buffers of {name or 'the model'} are on the meta device and the module has no reset_parameters; build it on a real device")
