"""Finds the blocks that a model repeats, and watches them at work.

Two things are watched, so that a short trace may speak for a deep model. `Chain` sees every call of a block while the model is traced, most of the
blocks replaced by stand-ins: all are called once, in order, in one way, each fed by the one before it. `check_alike` runs each real block
by itself on meta tensors and compares what they ask of torch, call by call.
"""

import copy
from collections.abc import Sequence
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
            self.second = pytree.tree_map_only(torch.Tensor, _Blank.of, (args, kwargs))
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


@dataclass(frozen=True)
class _Blank:
    """What is to be known of a tensor of the trace to make one like it."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, x: torch.Tensor) -> "_Blank":
        return cls(tuple(x.shape), x.stride(), x.dtype)

    def tensor(self) -> torch.Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")


def check_alike(model: nn.Module, chain: Chain) -> None:
    """Raise NoFamilyError unless all blocks of a run, called like the second, make the same calls of torch."""
    args, kwargs = pytree.tree_map_only(_Blank, _Blank.tensor, chain.second)
    first: _Log | None = None
    for k in range(chain.run.depth):
        name = chain.run.block(k)
        block = model.get_submodule(name)
        if not all(t.is_meta for t in (*block.parameters(), *block.buffers())):
            block = copy.deepcopy(block, meta_tensors(block))
        log = _Log(block, (args, kwargs), first)
        try:
            with log:
                output = block(*args, **kwargs)
            log.close(output)
        except NoFamilyError as error:
            raise NoFamilyError(f"block {name} does not compute what the first of its run does: {error}") from error
        except (RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError) as error:
            raise NoFamilyError(f"block {name} does not run by itself: {error}") from error
        first = first or log


class _Log(TorchFunctionMode):
    """Writes down every call of torch's functions, tensors by where they come from: parameters by name, arguments and results by
    number. With a log to `follow` nothing is computed: a call that is not the one written there is refused, its results are those there."""

    def __init__(self, block: nn.Module, arguments: Any, follow: "_Log | None") -> None:
        super().__init__()
        self.follow = follow
        self.calls: list[tuple[Any, ...]] = []
        self.results: list[Any] = []
        self.names: dict[int, Any] = dict(follow.names) if follow else {}
        self.alive: list[torch.Tensor] = []  # an id names a tensor only as long as that lives
        for n, x in enumerate(pytree.tree_leaves(arguments)):
            self._name(("argument", n), x)
        for name, x in (*block.named_parameters(), *block.named_buffers()):
            self._name(("own", name), x)

    def _name(self, name: Any, x: Any) -> None:
        if isinstance(x, torch.Tensor):
            self.names.setdefault(id(x), name)
            self.alive.append(x)

    def _write(self, what: Any, tree: Any) -> None:
        leaves, spec = pytree.tree_flatten(tree)
        self.calls.append((what, spec, [self._leaf(x) for x in leaves]))
        n = len(self.calls) - 1
        if self.follow and (len(self.follow.calls) <= n or self.follow.calls[n] != self.calls[n]):
            name = getattr(what, "__name__", what)
            raise NoFamilyError(f"its call {n} of torch, {name}, is not what the first block calls there")

    def _leaf(self, x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            return self.names.get(id(x), id(x))
        return (type(x), x) if isinstance(x, PLAIN) else repr(x)

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        n = len(self.calls)
        self._write(func, (args, kwargs or {}))
        if self.follow:
            return self.follow.results[n]
        result = func(*args, **(kwargs or {}))
        self.results.append(result)
        for m, x in enumerate(pytree.tree_leaves(result)):
            self._name((n, m), x)
        return result

    def close(self, output: Any) -> None:
        """The last entry: what the block returns."""
        self._write("return", output)
