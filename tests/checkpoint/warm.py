"""Imported once by the process that ranks are forked from: what a rank imports and what a first trace fills in takes longer than a rank lives."""

import resume  # type: ignore[import-not-found]  # a script, not a module of the package
import torch

import autopar
import autopar.checkpoint.checkpoint  # noqa: F401

settings = resume.Settings("")
autopar.plan(resume.Loss(resume.build(settings)), autopar.Cluster.local(2), resume.batch(settings, torch.Generator()), pins=settings.pins)
