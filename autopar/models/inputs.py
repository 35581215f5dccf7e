"""Example batches: inputs and labels of the kind that a model's forward takes, random by seed or shapes only.

Kinds of labels: token (one per token, -100 skips it), class, regression, binary (yes or no, as numbers), span, pixel,
ctc, contrastive (no labels: the batch is compared with itself).
"""

import inspect
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autopar.errors import UsageError

IGNORED = -100
DEFAULT_SEQ = 1024
DEFAULT_IMAGE = 224
SPARE_POSITIONS = 2  # rows that OPT and BART keep in their position tables beyond `max_position_embeddings`
Kwargs = dict[str, Tensor | bool]


@dataclass(frozen=True)
class Draw:
    """Makes tensors on one device: numbers from a generator, or on "meta" only shapes."""

    device: str
    dtype: torch.dtype
    generator: torch.Generator

    @classmethod
    def seeded(cls, device: str, dtype: torch.dtype, seed: int) -> "Draw":
        return cls(device, dtype, torch.Generator().manual_seed(seed))

    def integers(self, high: int, *shape: int) -> Tensor:
        """int64 in 0..high-1."""
        if self.device == "meta":
            return torch.empty(shape, dtype=torch.int64, device="meta")
        return torch.randint(high, shape, generator=self.generator).to(self.device)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers in the floating dtype of the model."""
        if self.device == "meta":
            return torch.empty(shape, dtype=self.dtype, device="meta")
        return torch.randn(shape, generator=self.generator).to(self.device, self.dtype)

    def tokens(self, vocab: int, special: Collection[int], *shape: int) -> Tensor:
        """int64 in 0..vocab-1 without the `special` ones: padding and end marks would change what a row means."""
        ids = self.integers(vocab, *shape)
        ordinary = next((i for i in range(vocab) if i not in special), 0)
        for token in sorted(special):
            ids = ids.masked_fill(ids == token, ordinary)
        return ids


@dataclass(frozen=True)
class Example:
    """Keyword arguments of one training step, and what its labels are counted in (None: no labels, no loss)."""

    kwargs: Kwargs
    labels_kind: str | None

    @property
    def tokens(self) -> int:
        """What throughput counts: tokens of text where there are any, else samples."""
        tensors = {name: value for name, value in self.kwargs.items() if isinstance(value, Tensor)}
        if self.labels_kind == "token" and "labels" in tensors:
            return tensors["labels"].numel()
        if "input_ids" in tensors:
            return tensors["input_ids"].numel()
        return next((value.shape[0] for value in tensors.values() if value.dim()), 1)


def example_inputs(
    module: nn.Module,
    config: Any,
    batch: int,
    seq: int | None,
    device: str,
    seed: int,
    *,
    ragged: bool = False,
    default_seq: int | None = None,
) -> Example:
    """One batch for `module`; `config` is its transformers configuration, or None for a module with `example_inputs`.

    `seq` None takes `default_seq` (1024 if that is None too), or what the model has positions for where that is less.
    With `ragged`, token labels end in -100, from a different place in each row, so that a mean per rank differs from
    the mean over all tokens. Integers depend on `seed` only.
    """
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    draw = Draw.seeded(device, dtype, seed)
    if config is None:
        make = getattr(module, "example_inputs", None)
        if not callable(make):
            name = type(module).__name__
            raise UsageError(f"{name} does not say what it takes; return (module, example_inputs) from the function")
        example = Example(make(draw, batch, seq), getattr(module, "labels_kind", None))
    else:
        example = _Batch(module, config, draw, batch, _checked_seq(module, config, seq, default_seq or DEFAULT_SEQ)).example()
    return _with_ragged_labels(example) if ragged else example


def _with_ragged_labels(example: Example) -> Example:
    labels = example.kwargs.get("labels")
    if example.labels_kind != "token" or not isinstance(labels, Tensor):
        return example
    rows, length = labels.shape[0], labels.shape[1]
    # Row r loses r+1 parts of its second half; on one row that leaves half, and never less than one label.
    ends = [length - (r + 1) * (length // 2) // rows for r in range(rows)]
    ends_of_rows = torch.tensor(ends, device=labels.device).unsqueeze(1)
    columns = torch.arange(length, device=labels.device)
    ended = labels.masked_fill(columns >= ends_of_rows, IGNORED)
    return Example({**example.kwargs, "labels": ended}, example.labels_kind)


def _checked_seq(module: nn.Module, config: Any, seq: int | None, default: int) -> int:
    limit = position_limit(module, config)
    if seq is None:
        declared = getattr(config.get_text_config(), "max_position_embeddings", None)
        return min(default, limit or default, declared if isinstance(declared, int) and declared > 0 else default)
    if limit is not None and seq > limit:
        name = type(module).__name__
        raise UsageError(f"seq {seq} is longer than the {limit} learned positions of {name}; use --seq {limit} or less")
    return seq


def position_limit(module: nn.Module, config: Any) -> int | None:
    """Tokens that the smallest learned position table has rows for; None where positions are computed or relative."""
    declared = set()
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        for field in ("max_position_embeddings", "max_source_positions", "max_target_positions", "n_positions"):
            declared.add(getattr(part, field, None))
    limits = []
    for path, table in module.named_modules():
        leaf = path.rpartition(".")[2].lower()
        if not isinstance(table, nn.Embedding) or not ("position" in leaf or leaf == "wpe"):
            continue
        rows = table.num_embeddings
        spare = [rows - size for size in declared if isinstance(size, int) and 0 <= rows - size <= SPARE_POSITIONS]
        if spare:  # RoBERTa counts positions from behind the padding index, OPT and BART from behind their spare rows
            limits.append(rows - max(*spare, 0 if table.padding_idx is None else table.padding_idx + 1))
    return min(limits, default=None)


@dataclass(frozen=True)
class _Batch:
    """The arguments of one transformers forward, read from its signature, its class name and its configuration."""

    module: nn.Module
    config: Any
    draw: Draw
    batch: int
    seq: int

    def example(self) -> Example:
        kwargs: Kwargs = {}
        if "input_ids" in self.names and (self.main == "input_ids" or self.contrastive):
            kwargs |= self.text()
        if "pixel_values" in self.names and (self.main == "pixel_values" or self.contrastive or self.always_sees):
            kwargs["pixel_values"] = self.pixels()
        for name, make in (("input_values", self.waveform), ("input_features", self.spectrum)):
            if self.main == name and name in self.names:
                kwargs[name] = make()
        labels, kind = self.labels(kwargs)
        if self.config.is_encoder_decoder and "decoder_input_ids" in self.names and "labels" not in labels:
            kwargs["decoder_input_ids"] = self.tokens(self.batch, self.seq)
        return Example(kwargs | labels, kind)

    @property
    def names(self) -> Collection[str]:
        return inspect.signature(self.module.forward).parameters

    @property
    def main(self) -> str:
        return self.module.main_input_name

    @property
    def contrastive(self) -> bool:
        """Two towers compared with each other, as in CLIP."""
        return "return_loss" in self.names

    @property
    def always_sees(self) -> bool:
        """A text model whose forward needs the image too, as in ViLT; one with image tokens can be given text alone."""
        part = getattr(self.config, "vision_config", None)
        return part is None and hasattr(self.config, "image_size") and hasattr(self.config, "patch_size")

    def tokens(self, *shape: int) -> Tensor:
        text = self.config.get_text_config(decoder=True)
        special: set[int] = set()
        for part in (self.config, text):
            for name, value in vars(part).items():
                if name.endswith("_token_id"):
                    special |= {one for one in (value if isinstance(value, list) else [value]) if isinstance(one, int)}
        return self.draw.tokens(text.vocab_size, special, *shape)

    def text(self) -> Kwargs:
        choices = (2,) if type(self.module).__name__.endswith("ForMultipleChoice") else ()
        shape = (self.batch, *choices, self.seq)
        made: Kwargs = {"input_ids": self.tokens(*shape)}
        if "bbox" in self.names:  # left, top below half the page, right, bottom above
            half = getattr(self.config, "max_2d_position_embeddings", 1000) // 2
            corners = [self.draw.integers(half, *shape, 2), self.draw.integers(half, *shape, 2) + half]
            made["bbox"] = torch.cat(corners, dim=-1)
        return made

    def pixels(self) -> Tensor:
        part = getattr(self.config, "vision_config", None) or getattr(self.config, "encoder", None) or self.config
        frames = (part.num_frames,) if hasattr(part, "num_frames") else ()
        channels = getattr(part, "num_channels", None) or getattr(part, "in_chans", None) or 3
        return self.draw.normal(self.batch, *frames, channels, *_image_size(part))

    def waveform(self) -> Tensor:
        if hasattr(self.config, "num_mel_bins") and hasattr(self.config, "max_length"):  # a spectrogram in patches
            return self.draw.normal(self.batch, self.config.max_length, self.config.num_mel_bins)
        samples = self.seq  # the number that the strided convolutions turn into `seq` frames exactly
        for kernel, stride in reversed(list(zip(getattr(self.config, "conv_kernel", ()), getattr(self.config, "conv_stride", ())))):
            samples = (samples - 1) * stride + kernel
        return self.draw.normal(self.batch, samples)

    def spectrum(self) -> Tensor:
        config = self.config
        if hasattr(config, "num_mel_bins") and hasattr(config, "max_source_positions"):  # Whisper: a fixed window, halved by a convolution
            return self.draw.normal(self.batch, config.num_mel_bins, 2 * config.max_source_positions)
        for name in ("input_feat_per_channel", "feature_projection_input_dim", "num_mel_bins"):
            if hasattr(config, name):
                return self.draw.normal(self.batch, self.seq, getattr(config, name))
        raise UsageError(
            f"{type(self.module).__name__}: the width of its input_features is not in its configuration; use package.module:function"
        )

    def labels(self, inputs: Kwargs) -> tuple[Kwargs, str | None]:
        """Label arguments and their kind; ({}, None) for a model without a loss or with labels that are not tensors."""
        if self.contrastive:
            return {"return_loss": True}, "contrastive"
        task = type(self.module).__name__
        if "bool_masked_pos" in self.names and "ForMaskedImageModeling" in task:
            sides = (side // self.config.patch_size for side in _image_size(self.config))
            return {"bool_masked_pos": self.draw.integers(2, self.batch, math.prod(sides)).bool()}, "pixel"
        if {"start_positions", "end_positions"} <= set(self.names):
            return {name: self.draw.integers(self.seq, self.batch) for name in ("start_positions", "end_positions")}, "span"
        if "labels" not in self.names:
            return {}, None
        for ending, make in self.tasks.items():
            if task.endswith(ending):
                return make()
        if self.main not in ("input_ids", "pixel_values", "input_features") or task.endswith(("Detection", "Segmentation", "Matching")):
            return {}, None
        decodes = self.config.is_encoder_decoder or "input_ids" not in inputs
        if (decodes or "Masked" in task or "PreTraining" in task) and getattr(
            self.config.get_text_config(decoder=True), "vocab_size", None
        ):
            return {"labels": self.tokens(self.batch, self.seq)}, "token"
        return ({"labels": inputs["input_ids"].clone()}, "token") if "input_ids" in inputs else ({}, None)

    @property
    def tasks(self) -> dict[str, Callable[[], tuple[Kwargs, str]]]:
        """Label makers by the ending of the class name; what is not here is a language model."""

        def classes() -> tuple[Kwargs, str]:
            count, problem = self.config.num_labels, self.config.problem_type
            if problem == "regression" or (problem is None and count == 1):
                return {"labels": self.draw.normal(*((self.batch,) if count == 1 else (self.batch, count)))}, "regression"
            if problem == "multi_label_classification":
                return yes_or_no()
            return {"labels": self.draw.integers(count, self.batch)}, "class"

        def yes_or_no() -> tuple[Kwargs, str]:
            return {"labels": self.draw.integers(2, self.batch, self.config.num_labels).to(self.draw.dtype)}, "binary"

        def two_ways() -> tuple[Kwargs, str]:
            return {"labels": self.draw.integers(2, self.batch)}, "class"

        def words() -> tuple[Kwargs, str]:
            return {"labels": self.draw.integers(self.config.num_labels, self.batch, self.seq)}, "token"

        def pixels() -> tuple[Kwargs, str]:
            return {"labels": self.draw.integers(self.config.num_labels, self.batch, *_image_size(self.config))}, "pixel"

        def characters() -> tuple[Kwargs, str]:
            return {"labels": self.tokens(self.batch, max(1, self.seq // 4))}, "ctc"

        def pretraining() -> tuple[Kwargs, str]:
            second = next((name for name in ("next_sentence_label", "sentence_order_label") if name in self.names), None)
            if second is None:  # real or replaced, word by word
                return {"labels": self.draw.integers(2, self.batch, self.seq)}, "binary"
            return {"labels": self.tokens(self.batch, self.seq), second: self.draw.integers(2, self.batch)}, "token"

        by_sample = ("ForSequenceClassification", "ForImageClassification", "ForAudioClassification", "ForVideoClassification")
        return dict.fromkeys(by_sample, classes) | {
            "ForTokenClassification": words,
            "ForQuestionAnswering": yes_or_no,  # about images; answers in a text are the spans above
            "ForSemanticSegmentation": pixels,
            "ForMultipleChoice": two_ways,
            "ForNextSentencePrediction": two_ways,
            "ForPreTraining": pretraining,
            "ForCTC": characters,
        }


def _image_size(part: Any) -> tuple[int, int]:
    size = getattr(part, "image_size", None) or DEFAULT_IMAGE
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
