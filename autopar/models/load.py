"""MODEL on the command line, to a module and one example batch: a preset, a config.json, or a function of the user.

torch and transformers are imported inside the functions: `autopar --help` and the planner's own work need neither.
"""

import inspect
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autopar.core.collector import collector_paused
from autopar.errors import FileFormatError, UsageError
from autopar.models import catalog
from autopar.models.config_file import read_config, shown
from autopar.models.foreign import ForeignCode

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from autopar.models.inputs import Example

DTYPES = {
    "float32": "float32", "fp32": "float32", "float64": "float64", "fp64": "float64",
    "bfloat16": "bfloat16", "bf16": "bfloat16", "float16": "float16", "fp16": "float16",
}  # fmt: skip
FUNCTION = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A module with the keyword arguments of one training step; what its labels are counted in, None without labels."""

    module: "nn.Module"
    kwargs: "dict[str, Tensor | bool]"
    name: str
    tokens_per_batch: int
    labels_kind: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Request:
    """The checked arguments of `load_model`."""

    batch: int
    seq: int | None
    device: str
    dtype: "torch.dtype"
    seed: int
    ragged: bool
    overrides: Mapping[str, Any]


@collector_paused()
def load_model(
    spec: str,
    *,
    batch: int,
    seq: int | None = None,
    device: str = "meta",
    dtype: str = "float32",
    train: bool = True,
    seed: int = 0,
    ragged: bool = False,
    overrides: Mapping[str, Any] | None = None,
) -> LoadedModel:
    """The model that `spec` names and one batch for it.

    On "meta" there are shapes only; on "cpu" weights and batch are the same for the same `seed`. `overrides` replace
    fields of the configuration. `ragged` ends token labels in -100, differently in each row. Where the configuration
    asks for a random choice in Python (LayerDrop, SpecAugment), it is turned off: a graph holds one path only.
    """
    check_name(spec)
    request = _checked(batch, seq, device, dtype, seed, ragged, overrides)
    if spec in catalog.names():
        module, example = _from_preset(catalog.preset(spec), request)
    elif _is_file(spec):
        module, example = _from_file(Path(spec), request)
    else:
        module, example = _from_function(spec, request)
    return LoadedModel(
        module=module.train(train),
        kwargs=example.kwargs,
        name=spec,
        tokens_per_batch=example.tokens,
        labels_kind=example.labels_kind,
    )


def check_name(spec: str) -> None:
    """Raise UsageError unless `spec` can name a model. Quick: nothing is imported and no model built."""
    if not (spec in catalog.names() or _is_file(spec) or FUNCTION.fullmatch(spec)):
        raise UsageError(f"model {shown(spec)} is unknown; {catalog.hint(spec)}")


def _is_file(spec: str) -> bool:
    return os.path.exists(spec) or spec.endswith(".json")  # unlike Path.exists, never raises on a strange text


def _checked(
    batch: int, seq: int | None, device: str, dtype: str, seed: int, ragged: bool, overrides: Mapping[str, Any] | None
) -> _Request:
    import torch

    for name, value in (("batch", batch), ("seq", 1 if seq is None else seq)):
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 10**9:
            raise UsageError(f"{name} is {shown(value)}; give a whole number from 1 to {10**9}")
    if device not in ("meta", "cpu"):
        raise UsageError(f"device is {shown(device)}; models are built on 'meta' (shapes only) or 'cpu'")
    if dtype not in DTYPES:
        raise UsageError(f"dtype is {shown(dtype)}; give one of {', '.join(DTYPES)}")
    return _Request(
        batch=batch,
        seq=seq,
        device=device,
        dtype=getattr(torch, DTYPES[dtype]),
        seed=seed,
        ragged=ragged,
        overrides=dict(overrides or {}),
    )


def _from_preset(preset: catalog.Preset, request: _Request) -> "tuple[nn.Module, Example]":
    where = f"preset {preset.name}"
    if preset.own_class is None:
        return _from_fields(preset.config, where, request, preset.default_seq)
    module = _own_module(preset, request)
    return module, _example(module, None, request, preset.default_seq)


def _own_module(preset: catalog.Preset, request: _Request) -> "nn.Module":
    from autopar.models import own
    from autopar.models.building import building
    from autopar.models.huggingface import check_overrides

    model_class = {"MLP": own.MLP, "AlexNet": own.AlexNet, "DLRM": own.DLRM, "Transformer": own.Transformer}[preset.own_class]
    for key in check_overrides(request.overrides):
        if key not in inspect.signature(model_class).parameters:
            raise UsageError(f"override {key} is not an argument of {preset.own_class}; it takes {', '.join(preset.config)}")
    arguments = preset.config | dict(request.overrides)
    failure = f"preset {preset.name}: cannot be built with {shown(dict(request.overrides))}; correct the override"
    with ForeignCode(UsageError, failure), building(request.device, request.dtype, request.seed):
        return model_class(**arguments)


def _from_file(path: Path, request: _Request) -> "tuple[nn.Module, Example]":
    file = path / "config.json" if path.is_dir() else path
    try:
        fields = read_config(path)
    except OSError as error:
        raise UsageError(f"{file}: cannot be read: {error.strerror}; check the path and its permissions") from error
    return _from_fields(fields, str(file), request, None)


def _from_fields(fields: dict[str, Any], where: str, request: _Request, default_seq: int | None) -> "tuple[nn.Module, Example]":
    from autopar.models.huggingface import build_model

    module = build_model(fields, where, overrides=request.overrides, device=request.device, dtype=request.dtype, seed=request.seed)
    with ForeignCode(FileFormatError, f"{where}: no example batch fits {type(module).__name__}; correct the field named here"):
        return module, _example(module, module.config, request, default_seq)


def _example(module: "nn.Module", config: Any, request: _Request, default_seq: int | None) -> "Example":
    from autopar.models.inputs import example_inputs

    return example_inputs(
        module,
        config,
        request.batch,
        request.seq,
        request.device,
        request.seed,
        ragged=request.ragged,
        default_seq=default_seq,
    )


def _from_function(spec: str, request: _Request) -> "tuple[nn.Module, Example]":
    from autopar.models import user_function
    from autopar.models.building import building
    from autopar.models.inputs import Example

    if request.overrides:
        raise UsageError(f"model {spec}: overrides {', '.join(request.overrides)} apply to presets and config.json; change the function")
    arguments = {"batch": request.batch, "seq": request.seq}
    with building(request.device, request.dtype, request.seed):
        module, given = user_function.call(spec, arguments)
    module = module.to(request.device)
    config = getattr(module, "config", None) if hasattr(module, "main_input_name") else None
    if given is None and (config is not None or callable(getattr(module, "example_inputs", None))):
        with ForeignCode(UsageError, f"model {spec}: no example batch fits it; return (module, example_inputs) instead"):
            return module, _example(module, config, request, None)
    kwargs = user_function.as_kwargs(spec, module, given, request.device)
    return module, Example(kwargs, getattr(module, "labels_kind", None))
