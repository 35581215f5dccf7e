"""Tensors read from safetensors files, only the elements that are wanted."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open

from autopar.checkpoint.held import Held
from autopar.checkpoint.manifest import TensorEntry
from autopar.checkpoint.part import Part, num_elements, overlaps, part_shape, whole
from autopar.errors import FileFormatError

DTYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8, torch.bool,
    )
}  # fmt: skip
"""What both torch and safetensors can store, by name."""


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Reader:
    """The tensors of a folder; files are mapped into memory when first used and closed with the context."""

    def __init__(self, folder: Path, tensors: Mapping[str, TensorEntry]) -> None:
        self._folder, self.tensors = folder, tensors
        self._files: dict[str, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, cause: BaseException | None, trace: TracebackType | None) -> None:
        self._files.clear()
        self._stack.close()

    def entry(self, key: str) -> TensorEntry:
        if key not in self.tensors:
            raise FileFormatError(f"{self._folder}: there is no tensor {key[:200]!r}")
        return self.tensors[key]

    def dtype(self, key: str) -> torch.dtype:
        name = self.entry(key).dtype
        if name not in DTYPES:
            raise FileFormatError(f"{self._folder}: {key[:200]} is of the unknown dtype {name!r}")
        return DTYPES[name]

    def read(self, key: str) -> torch.Tensor:
        """A whole tensor."""
        shape = self.entry(key).shape
        local = torch.empty(shape, dtype=self.dtype(key))
        self.read_into(key, local, whole(shape))
        return local

    def read_held(self, key: str, held: Held) -> None:
        """Overwrite this rank's part of a tensor."""
        self.read_into(key, held.local, held.part)

    @torch.no_grad()
    def read_into(self, key: str, local: torch.Tensor, part: Part) -> None:
        """Overwrite `local`, which is `part` of the tensor, converting to its dtype."""
        missing = num_elements(part)
        for file, stored in self.entry(key).parts:
            for source, target in overlaps(stored, part):
                piece = self._slice(file, key, stored, source)
                local[target].copy_(piece)
                missing -= piece.numel()
        if missing:
            raise FileFormatError(f"{self._folder}: {missing} of {num_elements(part)} elements of {key[:200]} are missing")

    def _slice(self, file: str, key: str, stored: Part, source: tuple[slice, ...]) -> torch.Tensor:
        path = self._folder / file
        try:
            if file not in self._files:
                self._files[file] = self._stack.enter_context(safe_open(path, "pt"))
            view = self._files[file].get_slice(key)
            if tuple(view.get_shape()) != part_shape(stored):
                raise FileFormatError(f"{path}: {key[:200]} has shape {view.get_shape()}, the index says {part_shape(stored)}")
            return view[source]
        except (OSError, RuntimeError, SafetensorError) as error:  # RuntimeError: larger than can be mapped
            raise FileFormatError(f"{path}: {str(error)[:200]}") from error
