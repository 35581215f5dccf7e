"""The module a user trains: parameters as DTensors in their storage layout, forward through the emitted program."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils._pytree as pytree  # the public alias lacks unflatten by spec in torch 2.13
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor import Placement as TorchPlacement
from torch.distributed.tensor.placement_types import _StridedShard  # private; the only DTensor form of a fused projection's cut (torch 2.13)
from torch.fx import GraphModule

from autopar.core.layout import Layout
from autopar.errors import LayoutError
from autopar.program import Program
from autopar.runtime.rank import Rank
from autopar.runtime.reducer import Reducer, Slot
from autopar.runtime.weights import Weights, shard


def torch_placements(layout: Layout) -> list[TorchPlacement]:
    """A storage or output layout (S and I only) in torch's terms."""
    found: list[TorchPlacement] = []
    for p in layout:
        if p.kind == "S":
            found.append(Shard(p.dim) if p.outer == 1 else _StridedShard(p.dim, split_factor=p.outer))
        elif p.kind == "I":
            found.append(Replicate())
        else:
            raise LayoutError(f"{layout} is not a layout that a tensor can be stored in")
    return found


def as_dtensor(local: torch.Tensor, layout: Layout, mesh: DeviceMesh, shape: Sequence[int]) -> DTensor:
    """A local part as the DTensor it is part of."""
    stride = torch.empty(tuple(shape), device="meta").stride()
    return DTensor.from_local(local, mesh, torch_placements(layout), run_check=False, shape=torch.Size(shape), stride=stride)


class _Holder(nn.Module):
    """A named place in the tree of parameters."""


class ParallelModule(nn.Module):
    """One rank's share of a model. Call it like the model, on every rank with the same global batch.

    Parameters keep their names and are DTensors; their gradients are complete after `backward`. Outputs are whole tensors,
    except that beside a scalar loss the others stay cut and come as DTensors.
    """

    def __init__(self, program: Program, emitted: GraphModule, inputs: Sequence[int], traced: Any, weights: Weights, rank: Rank, mesh: DeviceMesh) -> None:
        super().__init__()
        self._program, self._rank, self._device_mesh, self._traced = program, rank, mesh, traced
        self._emitted = (emitted,)  # in a tuple: its submodules are code, not part of the module tree
        self._inputs = tuple(inputs)
        self._leaves: dict[int, torch.Tensor] = {}
        self._dtensors: dict[int, nn.Parameter] = {}
        self._buffer_values: dict[int, torch.Tensor] = {}
        self._add_parameters(weights)
        self._add_buffers(weights)
        order = [v for v in self._inputs if v in self._leaves]
        names = program.mesh.names
        slots = [Slot(self._leaves[v], "+".join(names[a] for a in program.deferred[v] if program.mesh.sizes[a] > 1)) for v in order]
        self._reducer = Reducer(slots, rank, self._deliver)
        self._order = order

    def _add_parameters(self, weights: Weights) -> None:
        point = self._program.mesh.coordinates(self._rank.rank)
        for v in self._program.graph.params:
            value = self._program.graph.values[v]
            layout = self._program.storage[v]
            local = shard(weights.get(value.source[0]), layout, self._program.mesh, point).to(self._rank.device)
            parameter = nn.Parameter(as_dtensor(local, layout, self._device_mesh, value.meta.shape), requires_grad=value.meta.requires_grad)
            with torch.no_grad():
                self._leaves[v] = parameter.to_local().detach().requires_grad_(value.meta.requires_grad)
            self._dtensors[v] = parameter
            for name in value.source:
                holder, leaf = self._holder(name)
                holder.register_parameter(leaf, parameter)

    def _add_buffers(self, weights: Weights) -> None:
        for v, value in enumerate(self._program.graph.values):
            if value.role == "buffer":
                holder, leaf = self._holder(value.source[0])
                holder.register_buffer(leaf, weights.get(value.source[0]).clone().to(self._rank.device))
                self._buffer_values[v] = holder.get_buffer(leaf)
            elif value.role == "constant":
                self._buffer_values[v] = self._traced.constants[value.source[0]].to(self._rank.device)

    def _holder(self, name: str) -> tuple[nn.Module, str]:
        *path, leaf = name.split(".")
        module: nn.Module = self
        for part in path:
            if part not in module._modules:
                module.add_module(part, _Holder())
            module = module.get_submodule(part)
        return module, leaf

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's outputs for a global batch."""
        given = iter(self._traced.flat_inputs(args, kwargs))
        values = [self._rank]
        for v in self._inputs:
            value = self._leaves.get(v)
            value = self._buffer_values.get(v) if value is None else value
            values.append(next(given).to(self._rank.device) if value is None else value)
        outputs, updates = self._emitted[0](*values)
        if self.training:
            self._rank.stream.step += 1
        with torch.no_grad():
            for (buffer, _), new in zip(self._program.graph.updates, updates):
                self._buffer_values[buffer].copy_(new)
        return pytree.tree_unflatten([self._output(n, x) for n, x in enumerate(outputs)], self._traced.out_spec)

    def _output(self, n: int, x: torch.Tensor) -> torch.Tensor:
        v, route = self._program.graph.outputs[n], self._program.output_routes[n]
        layout = self._program.full_route(v, route)[-1]
        if all(p.kind == "I" for p in layout):
            return x
        return as_dtensor(x, layout, self._device_mesh, self._program.graph.values[v].meta.shape)

    def _deliver(self, grads: Sequence[torch.Tensor | None]) -> None:
        """Hand complete local gradients to the parameters, added to what is there."""
        for v, grad in zip(self._order, grads):
            if grad is None:
                continue
            parameter = self._dtensors[v]
            if parameter.grad is None:
                # The constructor that FSDP uses (torch 2.13): from_local takes 60 us, this 4, once a parameter and step.
                parameter.grad = DTensor(grad, parameter._spec, requires_grad=False)
            else:
                with torch.no_grad():
                    parameter.grad.to_local().add_(grad)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backwards in this block only add up locally; the next one outside reduces the sum, once."""
        before, self._reducer.enabled = self._reducer.enabled, False
        try:
            yield
        finally:
            self._reducer.enabled = before

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for leaf in self._leaves.values():
            leaf.grad = None

    def train_step(self, batch: dict[str, Any] | tuple) -> torch.Tensor:
        """Forward and backward of one global batch; returns the loss. The optimizer step is the caller's."""
        out = self(**batch) if isinstance(batch, dict) else self(*batch)
        flat, _ = pytree.tree_flatten(out)
        position = self._program.graph.outputs.index(self._program.graph.seeds[0])
        loss = flat[position]
        loss.backward()
        return loss.detach()

    @property
    def code(self) -> str:
        """The emitted program, as text: the top level and every distinct block."""
        top = self._emitted[0]
        parts = [top.code, *(m.code for m in top.children())]
        return "\n".join(p.strip() for p in parts)
