"""Models of the same make are traced once a process: most tests of running plans would spend their time on nothing else."""

from typing import Any

import torch
import torch.utils._pytree as pytree  # the public alias lacks the parts of a spec in torch 2.13
from torch import nn

from autopar import api, verification
from autopar.trace.capture import Traced, trace

_known: dict[Any, Traced] = {}


def _meta(x: Any) -> Any:
    return (x.shape, x.dtype, x.requires_grad) if isinstance(x, torch.Tensor) else x


def traced_once(model: nn.Module, args: tuple = (), kwargs: dict[str, Any] | None = None, **options: Any) -> Traced:
    """`trace` with a memory: two models are the same to it if they print alike and their tensors and inputs have the same names, shapes
    and dtypes, so it is for the models of `load_model`, not for those that hide what they are in a function."""
    inputs, spec = pytree.tree_flatten((args, kwargs or {}))
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    key = (repr(model), model.training, tuple((name, _meta(x)) for name, x in tensors), repr(spec), tuple(map(_meta, inputs)), tuple(options.items()))
    if key not in _known:
        _known[key] = trace(model, args, kwargs, **options)
    return _known[key]


def remember_traces() -> None:
    """From now on this process traces so: for ranks, which live for one test."""
    api.trace = verification.trace = traced_once
