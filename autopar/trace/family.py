"""A model's `Family`, read off traces of a few of its blocks.

Three batches are traced: one with three blocks of every run, which says how blocks are joined, and two with one block, since all
are alike. Two batches give the numbers that depend on the samples, the third must be what they say. One sample is another case, since its
dimension broadcasts: it is traced by itself, when its graph is asked for, or beside the others where there is a core for it.

A search can begin with what two batches give. So the third is traced while it goes on, and what it found is thrown away where they do not agree.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

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

MORE, SINGLE, CHECK = range(3)
"""Works aside, in the order in which a search needs them."""

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
    with early_family(model, inputs, busy=False) as family:
        return family


@contextmanager
def early_family(model: nn.Module, inputs: Batch, *, busy: bool = True) -> Iterator[Family]:
    """The same as soon as there is something to begin with; processes trace the rest, and last no longer than this. `busy`: this process goes on with other work meanwhile;
    else it does its share of that. Raises NoFamilyError where it is left too, whatever came of the family till then; not where that was an interrupt."""
    finder = _Finder(model, inputs)
    with Aside(finder.works, max(0, most_processes() - 1), partial(torch.set_num_threads, 1)) as aside:  # they have none of the threads of this one
        family = finder.family(aside, busy=busy)
        try:
            yield family
        except Exception:  # perhaps because there is no such family
            family.confirm()
            raise
        family.confirm()


def num_rows(model: nn.Module) -> int:
    """How many rows of blocks of one make a model has, which is known before anything is traced."""
    return len(runs_of(model))


class _Finder:
    def __init__(self, model: nn.Module, inputs: Batch) -> None:
        self.model, self.inputs = model, inputs
        self.runs = runs_of(model)
        if not self.runs:
            raise NoFamilyError(f"{type(model).__name__} has no row of blocks of one make")

        self.works: list[Callable[[], Any]] = [lambda: self._short(MORE_SAMPLES), self._single, lambda: self._short(CHECK_SAMPLES)]

    def family(self, aside: Aside[Any], *, busy: bool) -> Family:
        """With what is found `aside`, or here where it is not. It is confirmed at once where nothing goes on aside."""
        form, chains = self._form(SAMPLES)
        for chain in chains:
            check_alike(self.model, chain)
        if aside.at_work and not busy:
            aside.share()

        def found(work: int) -> Any:
            return aside.found(work) or self.works[work]()

        form = form.fitted(SAMPLES, found(MORE), MORE_SAMPLES)

        def check() -> None:
            expected, traced = form.at(form.unrolled(1), CHECK_SAMPLES), found(CHECK)
            if expected != traced or expected.digest != traced.digest:
                raise NoFamilyError(f"the graph of {type(self.model).__name__} is no linear function of the number of samples")
            aside.found(SINGLE)  # as long as there is somebody to tell it

        family = Family(form, lambda: found(SINGLE), check)
        if not aside.at_work:
            family.confirm()
        return family

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
