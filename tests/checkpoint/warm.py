"""Imported once by the process that ranks are forked from: what a rank imports and traces takes longer than a rank lives.

With the trace remembered kills fall on training and saving.
"""

import resume  # type: ignore[import-not-found]  # a script, not a module of the package
import torch

import autopar
import autopar.checkpoint.checkpoint  # noqa: F401
from tests.tracing import remember_traces

remember_traces()
settings = resume.Settings("")
autopar.plan(resume.Loss(resume.build(settings)), autopar.Cluster.local(2), resume.batch(settings, torch.Generator()), pins=settings.pins)
