"""One rank's share of a program: its stored parameters and buffers, the emitted code, and the sums of its gradients."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from autopar.core.layout import Layout
from autopar.program import Program
from autopar.runtime.built import Built
from autopar.runtime.lasting import Lasting
from autopar.runtime.rank import Rank
from autopar.runtime.reducer import Bucket, Reducer
from autopar.runtime.store import Store
from autopar.runtime.weights import Weights


class Share:
    """What `ParallelModule` computes with. `constants` by name; the buffers are those of `tree`, where parameters are added too."""

    def __init__(
        self, program: Program, built: Built, constants: Mapping[str, torch.Tensor], weights: Weights, rank: Rank, stored_mesh: DeviceMesh, tree: "ParameterTree",
        lasting: Lasting,
    ) -> None:  # fmt: skip
        self.program, self.built, self.rank, self.lasting = program, built, rank, lasting
        self.store = Store(program, weights, rank, stored_mesh)
        self._fixed: dict[int, torch.Tensor] = {}
        for v, parameter in self.store.parameters.items():
            for name in program.graph.values[v].source:
                tree.add_parameter(name, parameter)
        for v, value in enumerate(program.graph.values):
            if value.role == "buffer":
                name = value.source[0]
                self._fixed[v] = tree.add_buffer(name, weights.get(name).clone().to(rank.device), persistent=name in weights.persistent)
            elif value.role == "constant":
                self._fixed[v] = constants[value.source[0]].to(rank.device)
        rank.units, sharded = self.store.units(built.positions, lambda bucket, grads: self.reducer.scatter(bucket, grads))
        buckets: list[Bucket] = [*sharded, *self.store.buckets()]
        leaves = {v: x for v, x in self.store.leaves.items() if program.residency.stage(v) < 3 or self.store.kind(v).stage < 3}
        self.reducer = Reducer(buckets, leaves, rank, self._deliver)

    def refresh(self) -> None:
        """Begin a step: take over what the optimizer left in the stored parameters, and what the user left in buffers."""
        self.lasting.clear()
        self._once()
        self.store.refresh()
        self._forget_units()

    def begin_refresh(self) -> None:
        """`refresh` that `compute` waits for: until then the parameters are on their way."""
        self._once()
        self.store.begin_refresh()
        self._forget_units()

    def _once(self) -> list[torch.Tensor]:
        """What is the same for all microbatches of a step."""
        return self.lasting.of(self.built, [self.rank, *(self._fixed[v] for v in self.built.once_inputs)])

    def _forget_units(self) -> None:
        for unit in self.rank.units.values():
            unit.forget()

    def compute(self, given: Mapping[int, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The program's outputs, from what is neither parameter nor buffer, by value number."""
        self.store.end_refresh()
        leaves, fixed = self.store.leaves, self._fixed
        values = [leaves[v] if v in leaves else fixed[v] if v in fixed else given[v] for v in self.built.inputs]
        outputs, updates = self.built.module(self.rank, *values, *self._once())
        for x in outputs:
            if x.grad_fn is not None:
                x.grad_fn.metadata[Share] = self  # a backward needs what the hooks of the leaves know only weakly
        with torch.no_grad():
            for (buffer, _), new in zip(self.program.graph.updates, updates):
                fixed[buffer].copy_(new)
        return outputs

    def _deliver(self, v: int, grad: torch.Tensor) -> None:
        """Hand a complete gradient to its parameter, added to what is there."""
        parameter = self.store.parameters[v]
        grad = grad if grad.dtype == parameter.dtype else grad.to(parameter.dtype)
        if parameter.grad is None:
            # The constructor that FSDP uses (torch 2.13): from_local takes 60 us, this 4, once a parameter and step.
            parameter.grad = DTensor(grad, parameter._spec, requires_grad=False)
        else:
            with torch.no_grad():
                parameter.grad.to_local().add_(grad)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backwards in this block only add up."""
        before, self.reducer.enabled = self.reducer.enabled, False
        try:
            yield
        finally:
            self.reducer.enabled = before

    def forget_gradients(self) -> None:
        for leaf in self.store.leaves.values():
            leaf.grad = None

    def addends(self) -> Iterator[tuple[nn.Parameter, Layout, tuple[int, ...], torch.Tensor]]:
        """What the backwards of an unfinished step have left: (parameter, layout, mesh axes, tensor).

        The tensor is this rank's addend, laid out so, of a gradient that is still to be summed over the axes.
        """
        for v, x, stored in self.reducer.addends():
            zero = self.program.residency.zero[v].axes if stored else ()
            layout = self.program.stored[v] if stored else self.program.storage[v]
            yield self.store.parameters[v], layout, tuple(a for a in self.program.deferred[v] if a not in zero), x

    @property
    def code(self) -> str:
        """The emitted program, as text: what is computed once a step, the top level and every distinct block."""
        return self.built.code


class _Holder(nn.Module):
    """A named place in the tree of parameters."""


class ParameterTree(nn.Module):
    """A module whose parameters and buffers stand under the names that they have in the model."""

    def add_parameter(self, name: str, parameter: nn.Parameter) -> None:
        """A name that is taken stays with its first parameter."""
        holder, leaf = self._holder(name)
        if leaf not in holder._parameters:
            holder.register_parameter(leaf, parameter)

    def add_buffer(self, name: str, buffer: torch.Tensor, *, persistent: bool) -> torch.Tensor:
        holder, leaf = self._holder(name)
        if leaf not in holder._buffers:
            holder.register_buffer(leaf, buffer, persistent=persistent)
        return holder.get_buffer(leaf)

    def _holder(self, name: str) -> tuple[nn.Module, str]:
        *path, leaf = name.split(".")
        module: nn.Module = self
        for part in path:
            if part not in module._modules:
                module.add_module(part, _Holder())
            module = module.get_submodule(part)
        return module, leaf
