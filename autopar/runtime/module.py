"""The module a user trains: parameters as DTensors in their storage layout, forward through the emitted program."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.utils._pytree as pytree  # the public alias lacks unflatten by spec in torch 2.13
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from autopar.core.layout import Layout
from autopar.core.ledger import Ledger
from autopar.program import Program
from autopar.runtime.built import Built
from autopar.runtime.lasting import Lasting
from autopar.runtime.microbatches import Batch, loss_weights, split_batch
from autopar.runtime.rank import Counter, Rank, Stream
from autopar.runtime.share import ParameterTree, Share
from autopar.runtime.store import as_dtensor
from autopar.runtime.weights import Weights


class ParallelModule(ParameterTree, ABC):
    """One rank's share of a model, to be trained on every rank with the same global batch. Parameters keep their names and are DTensors.

    Any torch optimizer takes them, quickest with `fused=True` or `foreach=True` (torch's default on a CPU dispatches every operator for
    every parameter)."""

    @abstractmethod
    def train_step(self, batch: Batch, *, scaler: torch.amp.GradScaler | None = None) -> torch.Tensor:
        """Forward and backward of one global batch, in the plan's number of microbatches; returns the loss of the whole batch.

        Microbatches count by what their loss is a mean over (tokens), so that unequal ones add up to the gradient of the batch.
        The optimizer step is the caller's. `scaler` scales what is differentiated, not what is returned.
        """

    @abstractmethod
    def evaluate(self, batch: Batch) -> torch.Tensor:
        """The loss of one global batch, without gradients."""

    @abstractmethod
    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> torch.Tensor:
        """Scale all gradients so that their norm, over all ranks, is at most `max_norm`; returns the norm before."""

    @property
    @abstractmethod
    def device_mesh(self) -> DeviceMesh:
        """The mesh of all ranks, in torch's own type."""

    @property
    @abstractmethod
    def stream(self) -> Stream:
        """What names the next random draws; the same on all ranks."""

    @property
    @abstractmethod
    def predicted(self) -> Ledger:
        """What the plan says that this rank communicates in one `train_step`."""

    @property
    @abstractmethod
    def code(self) -> str:
        """The emitted program, as text: the top level and every distinct block."""

    @property
    def duplicates(self) -> frozenset[str]:
        """Names of parameters and buffers that an earlier stage of a pipeline has too."""
        return frozenset()

    @property
    @abstractmethod
    def _counter(self) -> Counter: ...

    def counted(self) -> Ledger:
        """What this rank communicated since the last call."""
        found = self._counter.ledger
        self._counter.reset()
        return found

    def addends(self) -> Iterator[tuple[nn.Parameter, Layout, tuple[int, ...], torch.Tensor]]:
        """What the backwards of an unfinished step have left: (parameter, layout, mesh axes, tensor).

        The tensor is this rank's addend, laid out so, of a gradient that is still to be summed over the axes.
        """
        return iter(())

    def restart(self, parameters: Iterable[nn.Parameter]) -> None:
        """Take over parameters that were changed in the middle of a step, with zero addends for those given and none for others."""


class SpmdModule(ParallelModule):
    """A model of which every rank runs the same program. Call it like the model.

    Gradients are complete after `backward`. Outputs are whole tensors, except that beside a scalar loss the others stay cut and come
    as DTensors.
    """

    def __init__(
        self, program: Program, built: Built, traced: Any, weights: Weights, rank: Rank, mesh: DeviceMesh, stored_mesh: DeviceMesh
    ) -> None:
        """`mesh` is that of the computation, `stored_mesh` that of the parameters (the host's under offload)."""
        super().__init__()
        self._program, self._rank, self._device_mesh, self._traced = program, rank, mesh, traced
        self._share = Share(program, built, traced.constants, weights, rank, stored_mesh, self, Lasting())
        self._user_inputs = [v for v, value in enumerate(program.graph.values) if value.role == "input"]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's outputs for a global batch (of one microbatch, where the plan has several)."""
        if self._rank.stream.microbatch == 0:  # within a step nobody changes parameters
            self._share.refresh()
        given = (x.to(self._rank.device) for x in self._traced.flat_inputs(args, kwargs))
        outputs = self._share.compute(dict(zip(self._user_inputs, given)))
        if self.training:
            self._rank.stream.advance(last=self._share.reducer.enabled)
        return pytree.tree_unflatten([self._output(n, x) for n, x in enumerate(outputs)], self._traced.out_spec)

    def _output(self, n: int, x: torch.Tensor) -> torch.Tensor:
        v, route = self._program.graph.outputs[n], self._program.output_routes[n]
        layout = self._program.full_route(v, route)[-1]
        if all(p.kind == "I" for p in layout):
            return x
        return as_dtensor(x, layout, self._device_mesh, self._program.graph.values[v].meta.shape)

    def no_sync(self) -> AbstractContextManager[None]:
        """Backwards in this block only add up; the next one outside completes the sum, with one reduction where the ZeRO stage
        of a parameter is 0 or 1 (2 and 3 reduce-scatter in every backward: they keep no whole gradient)."""
        return self._share.no_sync()

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self._share.forget_gradients()

    def train_step(self, batch: Batch, *, scaler: torch.amp.GradScaler | None = None) -> torch.Tensor:
        """One step. The `scaler`'s `step` and `update` come to the same verdict on every rank, since it looks at gradients that are DTensors."""
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

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> torch.Tensor:
        pieces = split_batch(batch, self._program.residency.micro_batches)
        stream = (self.stream.step, self.stream.microbatch)
        total = sum(self._loss(piece) * weight for piece, weight in zip(pieces, loss_weights(self._traced, pieces)))
        self.stream.step, self.stream.microbatch = stream
        return torch.as_tensor(total)

    def _loss(self, batch: Batch) -> torch.Tensor:
        flat, _ = pytree.tree_flatten(self(**batch) if isinstance(batch, dict) else self(*batch))
        return flat[self._program.graph.outputs.index(self._program.graph.seeds[0])]

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> torch.Tensor:
        norm: Any = nn.utils.clip_grad_norm_(self.parameters(), max_norm, norm_type)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def _micro_step(self, batch: Batch, weight: float, scaler: torch.amp.GradScaler | None) -> torch.Tensor:
        with self._rank.summing_late() as sums:  # the backward starts from the loss without reading it
            loss = self._loss(batch)  # the other outputs need not live through the backward
        share = torch.full_like(loss, weight)
        loss.backward(share if scaler is None else scaler.scale(share))
        for work in sums:
            work.wait()
        return loss.detach() * weight

    @property
    def device_mesh(self) -> DeviceMesh:
        return self._device_mesh

    @property
    def stream(self) -> Stream:
        return self._rank.stream

    @property
    def _counter(self) -> Counter:
        return self._rank.counter

    def addends(self) -> Iterator[tuple[nn.Parameter, Layout, tuple[int, ...], torch.Tensor]]:
        return self._share.addends()

    def restart(self, parameters: Iterable[nn.Parameter]) -> None:
        chosen = set(parameters)
        self._share.reducer.restart({v for v, p in self._share.store.parameters.items() if p in chosen})
        with self._rank.uncounted():
            self._share.store.refresh()

    @property
    def predicted(self) -> Ledger:
        return self._program.ledger

    @property
    def code(self) -> str:
        return self._share.code
