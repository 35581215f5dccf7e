"""Finds the blocks that a model repeats, and watches them at work.

Two things are watched, so that a short trace may speak for a deep model. `Chain` sees every call of a block while the model is traced, most of the
blocks replaced by stand-ins: all are called once, in order, in one way, each fed by the one before it. `check_alike` runs each real block
by itself on meta tensors and compares what they ask of torch, call by call.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree  # the public alias lacks tree_leaves in torch 2.11
from torch import nn
from torch.overrides import TorchFunctionMode

from autopar.core.unroll import Run
from autopar.errors import NoFamilyError

MIN_DEPTH = 4
"""Blocks from which on a run is traced short; three are kept."""

PLAIN = (int, float, complex, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


def runs_of(model: nn.Module) -> tuple[Run, ...]:
    """The rows of blocks of one make that end a list of modules; the outermost where they are nested."""
    found: list[Run] = []
    for path, module in model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or any(path.startswith(f"{run.path}.") for run in found):
            continue
        makes = [_make(block) for block in module]
        same = next((n for n, make in enumerate(reversed(makes)) if make != makes[-1]), len(makes))
        if same >= MIN_DEPTH and len({id(block) for block in module}) == len(module):
            found.append(Run(path, len(module) - same, same))
    return tuple(found)


def _make(block: nn.Module) -> tuple[Any, ...]:
    """Types, names, shapes and dtypes of all that a block is made of."""
    modules = tuple([(name, type(module), module.training) for name, module in block.named_modules()])
    params = tuple([(name, p.shape, p.dtype, p.requires_grad) for name, p in block.named_parameters()])
    return modules, params, tuple([(name, b.shape, b.dtype) for name, b in block.named_buffers()])


class Chain:
    """The calls of the blocks of a run, in order. `call` refuses one that is not like the one before it."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.count = 0
        self.refusal = ""
        self.output: Any = None
        self.second: tuple[tuple, dict[str, Any]] = ((), {})
        self._leaves: list[Any] = []
        self._spec: Any = None
        self._joints: list[int | None] = []

    def call(self, k: int, args: tuple, kwargs: dict[str, Any]) -> None:
        """Block k is called. Raises NoFamilyError where the calls are not those of a chain."""
        if k == 0:
            self.count = 0
        leaves, spec = pytree.tree_flatten((args, kwargs))
        modes = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")
        if k != self.count:
            self._refuse(f"block {self.run.block(k)} is called as number {self.count + 1}")
        if k and spec != self._spec:
            self._refuse(f"block {self.run.block(k)} is called with other arguments than the one before")
        if k:
            joints = [self._joint(k, new, old) for new, old in zip((*leaves, *modes), self._leaves)]
            if k > 1 and joints != self._joints:
                self._refuse(f"block {self.run.block(k)} is not joined to the one before it as the others are")
            self._joints = joints
        if k == 1:
            self.second = pytree.tree_map_only(torch.Tensor, _meta_like, (args, kwargs))
        self._leaves, self._spec = [*leaves, *modes], spec
        self.count += 1

    def _joint(self, k: int, new: Any, old: Any) -> int | None:
        """Which result of the block before `new` is; None where both take the same."""
        if isinstance(new, torch.Tensor):
            for n, made in enumerate(pytree.tree_leaves(self.output)):
                if made is new:
                    return n
        if not (new is old or (isinstance(new, PLAIN) and type(new) is type(old) and new == old)):
            self._refuse(f"block {self.run.block(k)} takes {type(new).__name__} that is neither the last one's result nor what the last one took")
        return None

    def _refuse(self, reason: str) -> None:
        self.refusal = reason
        raise NoFamilyError(reason)

    def check_complete(self) -> None:
        """Raise NoFamilyError unless every block was called."""
        if self.refusal or self.count != self.run.depth:
            raise NoFamilyError(self.refusal or f"{self.count} of the {self.run.depth} blocks of {self.run.path} are called")


class _StandIn(nn.Module):
    """In the place of a block that is not traced: gives on what the last traced one gave."""

    def __init__(self, block: nn.Module, chain: Chain, k: int) -> None:
        super().__init__()
        self.__dict__.update(chain=chain, k=k, behind=(block,))  # the block is no submodule: its parameters are not traced

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["behind"][0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.chain.call(self.k, args, kwargs)
        return self.chain.output


def shortened(model: nn.Module, runs: Sequence[Run], kept: int) -> tuple[nn.Module, list[Chain]]:
    """A copy on the meta device in which of every run the first block is real, or with `kept` 3 the first, the second and the last; and what
    watches the runs. `model` stays as it is."""
    memo = meta_tensors(model)
    chains = [Chain(run) for run in runs]
    for chain in chains:
        for k in _replaced(chain.run, kept):
            block = model.get_submodule(chain.run.block(k))
            memo[id(block)] = _StandIn(block, chain, k)
    short = copy.deepcopy(model, memo)
    for chain in chains:
        for k in set(range(chain.run.depth)).difference(_replaced(chain.run, kept)):
            _watch(short.get_submodule(chain.run.block(k)), chain, k)
    return short, chains


def _replaced(run: Run, kept: int) -> range:
    return range(2, run.depth - 1) if kept == len(run.kept) else range(1, run.depth)


def _watch(block: nn.Module, chain: Chain, k: int) -> None:
    def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        chain.call(k, args, kwargs)

    def after(module: nn.Module, args: tuple, output: Any) -> None:
        chain.output = output

    block.register_forward_pre_hook(before, with_kwargs=True)
    block.register_forward_hook(after)


def meta_tensors(module: nn.Module) -> dict[int, Any]:
    """For `copy.deepcopy`: what stands for each parameter and buffer."""
    found: dict[int, Any] = {}
    for t in (*module.parameters(), *module.buffers()):
        empty = t if t.is_meta else torch.empty_like(t, device="meta")
        found[id(t)] = nn.Parameter(empty, t.requires_grad) if isinstance(t, nn.Parameter) and not t.is_meta else empty
    return found


def _meta_like(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def check_alike(model: nn.Module, chain: Chain) -> None:
    """Raise NoFamilyError unless all blocks of a run, called like the second, make the same calls of torch."""
    first: list[Any] = []
    for k in range(chain.run.depth):
        name = chain.run.block(k)
        block = model.get_submodule(name)
        if not all(t.is_meta for t in (*block.parameters(), *block.buffers())):
            block = copy.deepcopy(block, meta_tensors(block))
        try:
            calls = _calls(block, *chain.second)
        except (RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError) as error:
            raise NoFamilyError(f"block {name} does not run by itself: {error}") from error
        if k and calls != first:
            here = next((a for a, b in zip(calls, first) if a != b), ("", "its end"))
            raise NoFamilyError(f"block {name} does not compute what {chain.run.block(0)} does, at {here[1]}")
        first = calls


def _calls(block: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> list[Any]:
    """What a block asks of torch, in order; the last entry is what it returns."""
    log = _Log((("parameter", name), x) for name, x in (*block.named_parameters(), *block.named_buffers()))
    for p, x in enumerate(pytree.tree_leaves((args, kwargs))):
        if isinstance(x, torch.Tensor):
            log.name(("argument", p), x)
    with log:
        output = block(*args, **kwargs)
    return [*log.calls, ("return", *log.encoded(output))]


class _Log(TorchFunctionMode):
    """Writes down every call of torch's functions, tensors by where they come from."""

    def __init__(self, known: Iterable[tuple[Any, torch.Tensor]]) -> None:
        super().__init__()
        self.calls: list[Any] = []
        self.names: dict[int, Any] = {}
        self.alive: list[torch.Tensor] = []  # an id names a tensor only as long as that lives
        for name, x in known:
            self.name(name, x)

    def name(self, name: Any, x: torch.Tensor) -> None:
        self.names.setdefault(id(x), name)
        self.alive.append(x)

    def encoded(self, tree: Any) -> tuple[Any, ...]:
        leaves, spec = pytree.tree_flatten(tree)
        return (spec, *(self._leaf(x) for x in leaves))

    def _leaf(self, x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            return self.names.get(id(x), id(x))
        return (type(x), x) if isinstance(x, PLAIN) else repr(x)

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        self.calls.append((func, *self.encoded((args, kwargs or {}))))
        result = func(*args, **(kwargs or {}))
        for n, x in enumerate(pytree.tree_leaves(result)):
            if isinstance(x, torch.Tensor):
                self.name((len(self.calls), n), x)
        return result
