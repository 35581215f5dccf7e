"""Read a Hugging Face `config.json` as what it is, untrusted data: caps and types are checked before anything is built."""

import json
import math
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from autopar.errors import FileFormatError, UsageError

MAX_FILE_BYTES = 4 * 2**20
MAX_DEPTH = 64
MAX_PARAMETERS = 10**14
MAX_INTEGER = 2**63 - 1

# What a field may hold, by the words its name is made of; the first pattern that matches decides.
# The upper ends are far above any published model: they bound the time and memory that building may take.
LIMITS: tuple[tuple[re.Pattern[str], int, int], ...] = tuple(
    (re.compile(pattern), low, high)
    for pattern, low, high in (
        (r"^(num_hidden_layers|n_layers?|num_layers)$", 1, 2_000),
        (r"(^|_)(layers?|depths?|blocks|stages|repeats)$|^(num|n)_.*(layers|blocks|stages)|_layers_", 0, 2_000),
        (r"vocab(_size)?$", 1, 10**7),
        (r"^(hidden_size|hidden|width|d_model|n_embd|dim|embed_dim|d_kv|head_dim|image|image_size|classes|positions)$", 1, 10**6),
        (r"^(num_attention_heads|n_heads?|num_heads|num_key_value_heads)$", 1, 10**5),
        (r"(hidden|intermediate|embedding|inner|ffn|conv)_(size|dim)s?$|_ffn_dim$|^(d_ff|n_inner)$", 0, 10**7),
        (r"position|^n_ctx$|_length$|_size$|_size_", -1, 10**8),
        (r"expert", 0, 20_000),
        (r"^num_labels$", 0, 10**6),
        (r"^(num|n)_", -1, 65_536),
    )
)

# Settings of a checkpoint or of a run that do not describe the model's shape; some of them would name code, kernels or
# files to fetch. They are dropped at every depth, so that a file cannot choose what is imported or downloaded.
DROPPED = frozenset(
    (
        "auto_map",
        "dtype",
        "torch_dtype",
        "attn_implementation",
        "experts_implementation",
        "quantization_config",
        "compression_config",
        "use_pretrained_backbone",
        "name_or_path",
        "transformers_version",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "use_cache",
        "gradient_checkpointing",
        "kernel_config",
        "use_kernels",
        "trust_remote_code",
        "torchscript",
        "pruned_heads",
        "custom_pipelines",
        "task_specific_params",
        "generation_config",
        "adapters",
    )
)
REMOTE_NAMES = ("backbone", "backbone_checkpoint", "text_encoder_name", "model_name_or_path")


def read_config(path: Path) -> dict[str, Any]:
    """The checked fields of a `config.json`; `path` is the file or the folder that holds it."""
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise UsageError(f"{path}: no config.json here; give a folder or file with a Hugging Face config.json")
    with file.open("rb") as stream:
        raw = stream.read(MAX_FILE_BYTES + 1)
    if len(raw) > MAX_FILE_BYTES:
        raise FileFormatError(f"{file}: larger than {MAX_FILE_BYTES // 2**20} MiB; a config.json holds settings only, no weights")
    return check_config(_parse(raw, str(file)), str(file))


def check_config(fields: dict[str, Any], where: str) -> dict[str, Any]:
    """`fields` without run settings, every number in its range; raises `FileFormatError` that starts with `where`."""
    return _checked_table(fields, where, "")


def _parse(raw: bytes, where: str) -> dict[str, Any]:
    def constant(word: str) -> None:
        raise FileFormatError(f"{where}: {word} is not a number a model can use; write a finite number")

    def table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        for key, value in pairs:
            if key in fields:
                raise FileFormatError(f"{where}: key {shown(key)} is given twice; keep one of them")
            fields[key] = value
        return fields

    try:
        parsed = json.loads(raw.decode("utf-8-sig"), parse_constant=constant, object_pairs_hook=table)
    except UnicodeDecodeError as error:
        raise FileFormatError(f"{where}: not UTF-8 text at byte {error.start}; save it as UTF-8 JSON") from error
    except json.JSONDecodeError as error:
        raise FileFormatError(f"{where}:{error.lineno}:{error.colno}: not JSON: {error.msg}; fix the text there") from error
    except RecursionError as error:
        raise FileFormatError(f"{where}: nested deeper than {MAX_DEPTH} levels; flatten it") from error
    except ValueError as error:  # integers of thousands of digits
        raise FileFormatError(f"{where}: a number is too long to read; the largest allowed is {MAX_INTEGER}") from error
    if not isinstance(parsed, dict):
        raise FileFormatError(f"{where}: holds a {type(parsed).__name__}, not an object; a config.json starts with {{")
    return parsed


def _checked_table(fields: dict[str, Any], where: str, path: str, depth: int = 1) -> dict[str, Any]:
    kept = {}
    for key, value in fields.items():
        name = f"{path}.{key}" if path else str(key)
        if not isinstance(key, str) or len(key) > 200:
            raise FileFormatError(f"{where}: field name {shown(key)} is not a short text; remove it")
        if key in DROPPED or key.startswith("_"):
            continue
        if key in REMOTE_NAMES and value is not None:
            raise FileFormatError(f"{where}: {name} = {shown(value)} names a model kept elsewhere; write its fields in place")
        if key == "model_type" and str(value).startswith("timm"):  # timm resolves names to downloads and to files on this machine
            raise FileFormatError(f"{where}: {name} = {shown(value)} builds through timm; give package.module:function instead")
        kept[key] = _checked(value, where, name, depth + 1)
    _check_parameters(kept, where, path)
    return kept


def _checked(value: Any, where: str, name: str, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise FileFormatError(f"{where}: {shown(name)} is nested deeper than {MAX_DEPTH} levels; flatten it")
    if isinstance(value, dict):
        return _checked_table(value, where, name, depth)
    if isinstance(value, (list, tuple)):
        return [_checked(item, where, name, depth + 1) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise FileFormatError(f"{where}: {shown(name)} is not finite; write a finite number")
    if isinstance(value, int) and not isinstance(value, bool):
        _check_range(value, where, name)
    return value


def _check_range(value: int, where: str, name: str) -> None:
    low, high = _limits(name.rpartition(".")[2])
    if not low <= value <= high:
        raise FileFormatError(f"{where}: {shown(name)} = {shown(value)} is outside {low} to {high}; write a number in that range")


@lru_cache(maxsize=256)  # a list of a million numbers asks a million times for the same name
def _limits(field: str) -> tuple[int, int]:
    return next(((low, high) for pattern, low, high in LIMITS if pattern.search(field)), (-MAX_INTEGER, MAX_INTEGER))


def _check_parameters(fields: dict[str, Any], where: str, path: str) -> None:
    """Refuses a table whose own fields already imply more parameters than any machine holds."""

    def largest(*names: str) -> int:
        found = [fields[name] for name in names if isinstance(fields.get(name), int)]
        return max([1, *found])

    width = largest("hidden_size", "d_model", "n_embd", "dim", "embed_dim")
    inner = largest("intermediate_size", "ffn_dim", "d_ff", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim", "moe_intermediate_size")
    layers = largest("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers")
    experts = largest("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    estimate = layers * width * (4 * width + 2 * inner * experts) + largest("vocab_size") * width
    if estimate > MAX_PARAMETERS:
        part = f"{path}: " if path else ""
        raise FileFormatError(
            f"{where}: {part}these sizes imply about {estimate:.1e} parameters; the limit is {MAX_PARAMETERS:.0e}, make it smaller"
        )


def shown(value: Any) -> str:
    """A value from a file as a short one-line literal, safe to print."""
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**20 else f"{str(value)[:6]}… ({len(str(value))} digits)"
    return text if len(text) <= 80 else text[:79] + "…"
