"""Imported once by the process that ranks are forked from: what a rank imports and traces takes longer than a rank lives."""

from typing import Any

import resume  # type: ignore[import-not-found]  # a script, not a module of the package
import torch

import autopar
import autopar.checkpoint.checkpoint  # noqa: F401
from autopar import api

settings = resume.Settings("")
traced = api.trace(resume.Loss(resume.build(settings)), resume.batch(settings, torch.Generator()))


def trace_of_the_example(*given: Any) -> Any:
    """Every life traces the same model: this is what it would find, so that kills fall on training and saving, not on tracing."""
    return traced


api.trace = trace_of_the_example
autopar.plan(resume.Loss(resume.build(settings)), autopar.Cluster.local(2), resume.batch(settings, torch.Generator()), pins=settings.pins)
