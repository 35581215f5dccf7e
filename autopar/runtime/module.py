"""The module a user trains: parameters as DTensors in their storage layout, forward through the emitted program."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils._pytree as pytree  # the public alias lacks unflatten by spec in torch 2.13
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.fx import GraphModule

from autopar.core.layout import Layout
from autopar.core.ledger import Ledger
from autopar.program import Program
from autopar.runtime.microbatches import loss_weights, split_batch
from autopar.runtime.rank import Rank, Stream
from autopar.runtime.reducer import Bucket, Reducer
from autopar.runtime.store import Store, as_dtensor
from autopar.runtime.weights import Weights


class _Holder(nn.Module):
    """A named place in the tree of parameters."""


class ParallelModule(nn.Module):
    """One rank's share of a model. Call it like the model, on every rank with the same global batch.

    Parameters keep their names and are DTensors; their gradients are complete after `backward`. Any torch optimizer takes them, quickest
    with `fused=True` or `foreach=True` (torch's default on a CPU dispatches every operator for every parameter). Outputs are whole tensors,
    except that beside a scalar loss the others stay cut and come as DTensors.
    """

    def __init__(
        self, program: Program, emitted: GraphModule, inputs: Sequence[int], positions: Mapping[int, Mapping[int, int]], traced: Any, weights: Weights, rank: Rank,
        mesh: DeviceMesh, stored_mesh: DeviceMesh,
    ) -> None:  # fmt: skip
        """`mesh` is that of the computation, `stored_mesh` that of the parameters (the host's under offload)."""
        super().__init__()
        self._program, self._rank, self._device_mesh, self._traced = program, rank, mesh, traced
        self._emitted = (emitted,)  # in a tuple: its submodules are code, not part of the module tree
        self._inputs = tuple(inputs)
        self._store = Store(program, weights, rank, stored_mesh)
        self._buffer_values: dict[int, torch.Tensor] = {}
        self._add_parameters()
        self._add_buffers(weights)
        rank.units, sharded = self._store.units(positions, lambda bucket, grads: self._reducer.scatter(bucket, grads))
        buckets: list[Bucket] = [*sharded, *self._store.buckets()]
        leaves = {v: x for v, x in self._store.leaves.items() if program.residency.stage(v) < 3 or self._store.kind(v).stage < 3}
        self._reducer = Reducer(buckets, leaves, rank, self._deliver)

    def _add_parameters(self) -> None:
        for v, parameter in self._store.parameters.items():
            for name in self._program.graph.values[v].source:
                holder, leaf = self._holder(name)
                holder.register_parameter(leaf, parameter)

    def _add_buffers(self, weights: Weights) -> None:
        for v, value in enumerate(self._program.graph.values):
            if value.role == "buffer":
                holder, leaf = self._holder(value.source[0])
                data = weights.get(value.source[0]).clone().to(self._rank.device)
                holder.register_buffer(leaf, data, persistent=value.source[0] in weights.persistent)
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
        """The model's outputs for a global batch (of one microbatch, where the plan has several)."""
        given = iter(self._traced.flat_inputs(args, kwargs))
        if self._rank.stream.microbatch == 0:  # within a step nobody changes parameters
            self._store.refresh()
            for unit in self._rank.units.values():
                unit.forget()
        values = [self._rank]
        for v in self._inputs:
            value = self._store.leaves.get(v)
            value = self._buffer_values.get(v) if value is None else value
            values.append(next(given).to(self._rank.device) if value is None else value)
        outputs, updates = self._emitted[0](*values)
        if self.training:
            self._rank.stream.advance(last=self._reducer.enabled)
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

    def _deliver(self, v: int, grad: torch.Tensor) -> None:
        """Hand a complete gradient to its parameter, added to what is there."""
        parameter = self._store.parameters[v]
        grad = grad if grad.dtype == parameter.dtype else grad.to(parameter.dtype)
        if parameter.grad is None:
            # The constructor that FSDP uses (torch 2.13): from_local takes 60 us, this 4, once a parameter and step.
            parameter.grad = DTensor(grad, parameter._spec, requires_grad=False)
        else:
            with torch.no_grad():
                parameter.grad.to_local().add_(grad)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backwards in this block only add up; the next one outside completes the sum, with one reduction where the ZeRO stage
        of a parameter is 0 or 1 (2 and 3 reduce-scatter in every backward: they keep no whole gradient)."""
        before, self._reducer.enabled = self._reducer.enabled, False
        try:
            yield
        finally:
            self._reducer.enabled = before

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for leaf in self._store.leaves.values():
            leaf.grad = None

    def train_step(self, batch: dict[str, Any] | tuple, *, scaler: torch.amp.GradScaler | None = None) -> torch.Tensor:
        """Forward and backward of one global batch, in the plan's number of microbatches; returns the loss of the whole batch.

        Microbatches count by what their loss is a mean over (tokens), so that unequal ones add up to the gradient of the batch.
        The optimizer step is the caller's. `scaler` scales what is differentiated, not what is returned; its `step` and `update` then
        come to the same verdict on every rank, since it looks at gradients that are DTensors.
        """
        pieces = split_batch(batch, self._program.residency.micro_batches)
        weights = loss_weights(self._traced, pieces)
        total = torch.zeros(())
        for n, (piece, weight) in enumerate(zip(pieces, weights)):
            if n + 1 < len(pieces):
                with self.no_sync():
                    total = total + self._micro_step(piece, weight, scaler)
            else:
                total = total + self._micro_step(piece, weight, scaler)
        return total

    def _micro_step(self, batch: dict[str, Any] | tuple, weight: float, scaler: torch.amp.GradScaler | None) -> torch.Tensor:
        out = self(**batch) if isinstance(batch, dict) else self(*batch)
        flat, _ = pytree.tree_flatten(out)
        position = self._program.graph.outputs.index(self._program.graph.seeds[0])
        loss = flat[position] if weight == 1.0 else flat[position] * weight
        del out, flat  # the other outputs need not live through the backward
        (loss if scaler is None else scaler.scale(loss)).backward()
        return loss.detach()

    @property
    def device_mesh(self) -> DeviceMesh:
        """The mesh of the computation, in torch's own type."""
        return self._device_mesh

    @property
    def stream(self) -> Stream:
        """What names the next random draws; the same on all ranks."""
        return self._rank.stream

    def addends(self) -> Iterator[tuple[nn.Parameter, Layout, tuple[int, ...], torch.Tensor]]:
        """What the backwards of an unfinished step have left: (parameter, layout, mesh axes, tensor).

        The tensor is this rank's addend, laid out so, of a gradient that is still to be summed over the axes.
        """
        for v, x, stored in self._reducer.addends():
            zero = self._program.residency.zero[v].axes if stored else ()
            layout = self._program.stored[v] if stored else self._program.storage[v]
            yield self._store.parameters[v], layout, tuple(a for a in self._program.deferred[v] if a not in zero), x

    def restart(self, parameters: Iterable[nn.Parameter]) -> None:
        """Take over parameters that were changed in the middle of a step, with zero addends for those given and none for others."""
        chosen = set(parameters)
        self._reducer.restart({v for v, p in self._store.parameters.items() if p in chosen})
        with self._rank.uncounted():
            self._store.refresh()

    @property
    def predicted(self) -> Ledger:
        """What the plan says that this rank communicates in one `train_step`."""
        return self._program.ledger

    def counted(self) -> Ledger:
        """What this rank communicated since the last call."""
        found = self._rank.counter.ledger
        self._rank.counter.reset()
        return found

    @property
    def code(self) -> str:
        """The emitted program, as text: the top level and every distinct block."""
        top = self._emitted[0]
        parts = [top.code, *(m.code for m in top.children())]
        return "\n".join(p.strip() for p in parts)
