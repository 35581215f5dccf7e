"""A model's `Family`, read off traces of a few of its blocks.

Three batches are traced: one with three blocks of every run, which says how blocks are joined, and two with one block, since all
are alike. Two batches give the numbers that depend on the samples, the third must be what they say. One sample is another case, since its
dimension broadcasts: it is traced by itself, when its graph is asked for, or beside the others where there is a core for it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from autopar.core.family import Family, Form
from autopar.core.forked import Aside, most_processes
from autopar.core.graph import OpGraph
from autopar.core.unroll import check_run
from autopar.errors import NoFamilyError, TraceError
from autopar.runtime.microbatches import Batch, resized
from autopar.trace.blocks import Chain, check_alike, runs_of, shortened
from autopar.trace.capture import trace

T = TypeVar("T")

SAMPLES = 2
MORE_SAMPLES = 19
CHECK_SAMPLES = 5
"""Primes, so that what is rounded to a multiple, limited or squared is not taken for a multiple of the samples."""


def family_of(model: nn.Module, inputs: Batch) -> Family | None:
    """The graphs of `model` for any number of samples like those of `inputs`, a batch; None where `find_family` refuses."""
    try:
        return find_family(model, inputs)
    except NoFamilyError:
        return None


def find_family(model: nn.Module, inputs: Batch) -> Family:
    """The graphs of `model` for any number of samples like those of `inputs`. Raises NoFamilyError, which says why, where they do not
    follow from short traces; then every graph is to be traced in full."""
    return _Finder(model, inputs).family()


def num_rows(model: nn.Module) -> int:
    """How many rows of blocks of one make a model has, which is known before anything is traced."""
    return len(runs_of(model))


class _Finder:
    def __init__(self, model: nn.Module, inputs: Batch) -> None:
        self.model, self.inputs = model, inputs
        self.runs = runs_of(model)
        if not self.runs:
            raise NoFamilyError(f"{type(model).__name__} has no row of blocks of one make")

    def family(self) -> Family:
        works: list[Callable[[], Any]] = [self._single, lambda: self._short(MORE_SAMPLES), lambda: self._short(CHECK_SAMPLES)]
        with Aside([partial(_alone, work) for work in works], most_processes()) as aside:
            form, chains = self._form(SAMPLES)
            for chain in chains:
                check_alike(self.model, chain)
            more, check, single = map(aside.found, (1, 2, 0))
        form = form.fitted(SAMPLES, more or self._short(MORE_SAMPLES), MORE_SAMPLES)
        found, traced = form.at(form.unrolled(1), CHECK_SAMPLES), check or self._short(CHECK_SAMPLES)
        if found != traced or found.digest != traced.digest:
            raise NoFamilyError(f"the graph of {type(self.model).__name__} is no linear function of the number of samples")
        return Family(form, self._single if single is None else lambda: single)

    def _single(self) -> Form:
        return self._form(1)[0]

    def _short(self, samples: int) -> OpGraph:
        return self._graph(samples, 1)[0]

    def _form(self, samples: int) -> tuple[Form, list[Chain]]:
        graph, chains = self._graph(samples, 3)
        for run in self.runs:
            check_run(graph, run)
        return Form(graph, self.runs), chains

    def _graph(self, samples: int, kept: int) -> tuple[OpGraph, list[Chain]]:
        """A trace with so many blocks of every run."""
        try:
            short, chains = shortened(self.model, self.runs, kept)
        except (TypeError, RuntimeError, AttributeError) as error:
            raise NoFamilyError(f"{type(self.model).__name__} cannot be copied: {error}") from error
        batch: Any = resized(self.inputs, samples)
        try:
            graph = trace(short, *(((), batch) if isinstance(batch, dict) else (batch, {}))).graph
        except TraceError as error:
            refusals = [chain.refusal for chain in chains if chain.refusal]
            raise NoFamilyError(refusals[0] if refusals else str(error)) from error
        for chain in chains:
            chain.check_complete()
        return graph, chains


def _alone(work: Callable[[], T]) -> T:
    """In a process that has none of the threads of the one it was forked from."""
    torch.set_num_threads(1)
    return work()
