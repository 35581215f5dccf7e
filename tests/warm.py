"""Imported once by the process that the ranks of all tests are forked from: imports, and what a first trace fills in, take longer than
most tests, and so does tracing the same model for every case."""

import torch.distributed.fsdp  # noqa: F401
import transformers.models.gpt2.modeling_gpt2
import transformers.models.llama.modeling_llama  # noqa: F401

import autopar
import autopar.checkpoint.checkpoint  # noqa: F401
from autopar.models.load import load_model
from tests.tracing import remember_traces

loaded = load_model("mlp-tiny", batch=2, device="meta")
autopar.plan(loaded.module, autopar.Cluster.local(2), loaded.kwargs)
remember_traces()
