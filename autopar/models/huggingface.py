"""Build a transformers model from checked configuration fields: no weights, no network, no remote code.

transformers is imported in the functions, so that everything else works where it is not installed.
"""

import dataclasses
import difflib
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from autopar.errors import FileFormatError, UsageError
from autopar.models.building import building
from autopar.models.config_file import check_config, shown
from autopar.models.foreign import ForeignCode

# Old field names that transformers translates although no configuration class declares them.
TRANSLATED_FIELDS = ("num_labels", "rope_theta", "rope_scaling", "partial_rotary_factor", "image_size")


def build_model(
    fields: dict[str, Any], where: str, *, overrides: Mapping[str, Any] | None, device: str, dtype: torch.dtype, seed: int
) -> nn.Module:
    """The module that `fields` (a checked config.json) describe; `where` starts every message about them."""
    model_class = resolve_class(fields, where)
    if overrides:
        fields = check_config(override(model_class.config_class, fields, overrides), where)
    _refuse_method_names(model_class.config_class, fields, where)
    name = model_class.__name__
    with _quiet(), ForeignCode(FileFormatError, f"{where}: {name} cannot be built from these fields; correct the one named here"):
        config = _configuration(model_class, fields)
        with building(device, dtype, seed):
            module = model_class(config)
    if getattr(module, "loss_type", "") is None:  # transformers would take this one too, with a warning
        module.loss_type = "ForCausalLM"
    return module


def resolve_class(fields: Mapping[str, Any], where: str) -> type:
    """The transformers class named first in `architectures`, a concrete `PreTrainedModel`."""
    try:
        import transformers
    except ImportError as error:
        raise UsageError(f"{where}: needs the transformers package to build; pip install transformers") from error
    named = fields.get("architectures")
    if not (isinstance(named, list) and named and isinstance(named[0], str) and re.fullmatch(r"[A-Za-z]\w{0,99}", named[0])):
        raise FileFormatError(f'{where}: architectures is {shown(named)}; write a class name such as ["LlamaForCausalLM"]')
    name = named[0]
    with ForeignCode(UsageError, f"{where}: transformers {transformers.__version__} cannot import {name}; install what it needs"):
        found = getattr(transformers, name, None)
        usable = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    if not usable or found.config_class is None or found.forward is nn.Module.forward:
        near = difflib.get_close_matches(name, [known for known in dir(transformers) if re.search(r"For[A-Z]|Model$", known)], n=2)
        advice = f"did you mean {' or '.join(near)}" if near else "use a class of this version, or package.module:function"
        raise UsageError(f"{where}: transformers {transformers.__version__} has no model class {name}; {advice}")
    if found.config_class.model_type.startswith("timm"):
        raise UsageError(f"{where}: {name} is built through timm, which may fetch files by name; give package.module:function instead")
    expected, given = found.config_class.model_type, fields.get("model_type")
    if given is not None and given != expected:
        raise FileFormatError(
            f"{where}: model_type {shown(given)} does not belong to {name}, which needs {expected!r}; correct one of them"
        )
    return found


def override(config_class: type, fields: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`fields` with `overrides` put in: aliases resolved, tables merged, per-layer lists fitted to a new number of layers."""
    aliases = config_class.attribute_map
    merged = {aliases.get(key, key): value for key, value in fields.items()}
    known = {field.name for field in dataclasses.fields(config_class)} | set(merged) | set(aliases) | set(TRANSLATED_FIELDS)
    layers_name = aliases.get("num_hidden_layers", "num_hidden_layers")
    layers_before = merged.get(layers_name)
    for key, value in check_overrides(overrides).items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=2)
            raise UsageError(f"override {key} is not a field of {config_class.__name__}; {_did_you_mean(near)}")
        key = aliases.get(key, key)
        old = merged.get(key)
        merged[key] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
    layers = merged.get(layers_name)
    if isinstance(layers, int) and isinstance(layers_before, int) and layers != layers_before:
        for key, value in merged.items():
            if "layer" in key and key not in overrides and isinstance(value, list) and len(value) == layers_before > 0:
                merged[key] = [value[i % layers_before] for i in range(layers)]
    return merged


def check_overrides(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The overrides, each within the limits of a file; a field that a file may not set may not be overridden either."""
    try:
        checked = check_config(dict(overrides), "override")
    except FileFormatError as error:
        raise UsageError(str(error)) from error
    for key in overrides:
        if key not in checked:
            raise UsageError(f"override {shown(key)} is not about the model's shape; use the option for it, or leave it out")
    return checked


def _did_you_mean(near: list[str]) -> str:
    return f"did you mean {' or '.join(near)}" if near else "see the fields in its config.json"


def _configuration(model_class: type, fields: dict[str, Any]) -> Any:
    """The configuration object, with what would keep a training step from being one fixed graph turned off."""
    config_class = model_class.config_class
    # Experts as one batched product: the other forms loop over data-dependent counts, which no graph can hold.
    config = config_class(**_fit_token_ids(config_class, fields), experts_implementation="batched_mm")
    for part in _with_parts(config):
        for name in ("layerdrop", "encoder_layerdrop", "decoder_layerdrop"):
            if hasattr(part, name):
                setattr(part, name, 0.0)  # it would skip whole layers on the flip of a coin in Python
        if hasattr(part, "apply_spec_augment"):
            part.apply_spec_augment = False  # masks drawn by numpy would be frozen into the graph
        if hasattr(part, "use_cache"):
            part.use_cache = False
    text = config.get_text_config()
    if "ForSequenceClassification" in model_class.__name__ and getattr(text, "vocab_size", None) and text.pad_token_id is None:
        text.pad_token_id = text.vocab_size - 1  # decoders look for the last token that is no padding
    return config


def _refuse_method_names(config_class: type, fields: Mapping[str, Any], where: str) -> None:
    for key, value in fields.items():
        if callable(getattr(config_class, key, None)):
            raise FileFormatError(f"{where}: field {shown(key)} would replace a method of {config_class.__name__}; remove it")
        if isinstance(value, dict):
            _refuse_method_names(config_class, value, where)


def _with_parts(config: Any) -> Iterator[Any]:
    yield config
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if part is not None:
            yield from _with_parts(part)


def _fit_token_ids(config_class: type, fields: dict[str, Any]) -> dict[str, Any]:
    """`fields` with every special token inside the vocabulary; those outside move to its end, one place each.

    A shrunken configuration keeps the token ids of the full one, by its text or by the defaults of its class.
    """
    fitted = dict(fields)
    defaults = {field.name: field.default for field in dataclasses.fields(config_class)}
    for name, part_class in config_class.sub_configs.items():
        part = fields.get(name)
        if isinstance(part, dict) and dataclasses.is_dataclass(part_class) and hasattr(part_class, "attribute_map"):
            fitted[name] = _fit_token_ids(part_class, part)
    text = fields.get("text_config")
    vocab = (text if isinstance(text, dict) else {}).get("vocab_size", fields.get("vocab_size", defaults.get("vocab_size")))
    if not isinstance(vocab, int):
        return fitted
    free = iter(range(vocab - 1, -1, -1))
    for name in dict.fromkeys([*fields, *defaults]):
        value = fields.get(name, defaults.get(name))
        if name.endswith("_token_id"):
            ids = value if isinstance(value, list) else [value]
            inside = [next(free, 0) if isinstance(one, int) and not 0 <= one < vocab else one for one in ids]
            if inside != ids:
                fitted[name] = inside if isinstance(value, list) else inside[0]
    return fitted


@contextmanager
def _quiet() -> Iterator[None]:
    """No advice from transformers about weights and generation: nothing here is loaded and nothing is generated."""
    logger = logging.getLogger("transformers")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
