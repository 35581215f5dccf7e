"""`package.module:function`: code of the user, imported and called only because the user named it."""

import importlib
import inspect
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from autopar.errors import UsageError
from autopar.models.config_file import shown
from autopar.models.foreign import ForeignCode


def call(spec: str, offered: Mapping[str, Any]) -> tuple[nn.Module, Any]:
    """The module that the function returns, and its example inputs or None.

    The function is called with those `offered` values that its signature names.
    """
    module_name, _, function_name = spec.partition(":")
    with _current_folder_importable():
        with ForeignCode(UsageError, f"model {spec}: cannot import {module_name}; correct the name or run from its folder"):
            function = getattr(importlib.import_module(module_name), function_name, None)
        if not callable(function):
            raise UsageError(f"model {spec}: {module_name} has no function {function_name}; correct the name after the colon")
        with ForeignCode(UsageError, f"model {spec}: the function failed; correct it there"):
            wanted = inspect.signature(function).parameters
            made = function(**{name: value for name, value in offered.items() if name in wanted})
    module, given = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(module, nn.Module):
        raise UsageError(f"model {spec}: returned {type(made).__name__}; return an nn.Module or (nn.Module, example_inputs)")
    return module, given


def as_kwargs(spec: str, module: nn.Module, given: Any, device: str) -> dict[str, Tensor | bool]:
    """Example inputs (a tensor, a sequence or a mapping of them; None: the module's `dummy_inputs`) by argument name."""
    given = getattr(module, "dummy_inputs", None) if given is None else given
    if given is None:
        raise UsageError(f"model {spec}: what {type(module).__name__} takes is not known; return (module, example_inputs)")
    if isinstance(given, Mapping):
        named = dict(given)
    else:
        values = list(given) if isinstance(given, (tuple, list)) else [given]
        parameters = inspect.signature(module.forward).parameters.values()
        names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        if len(values) > len(names):
            raise UsageError(f"model {spec}: {len(values)} example inputs for {len(names)} arguments of forward; give a dict of them")
        named = dict(zip(names, values))
    for name, value in named.items():
        if not isinstance(value, (Tensor, bool)) or not isinstance(name, str):
            raise UsageError(f"model {spec}: example input {shown(name)} is a {type(value).__name__}; give tensors by argument name")
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in named.items()}


@contextmanager
def _current_folder_importable() -> Iterator[None]:
    """As `python -m` does, which a console script does not."""
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
