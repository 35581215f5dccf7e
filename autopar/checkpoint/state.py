"""Everything a training run has to remember, as one tree, and the way back into a module and an optimizer.

    parameters, buffers, gradients    {name: tensor}; tied names share one tensor
    addends      {name: [tensor]}: in an accumulation, what the ranks have still to sum
    optimizer    {groups, group_of: {name: number}, like_parameter: {name: {key: tensor}}, other: {name: {key: value}}}
    stream       the random stream of the emitted program: seed, step, microbatch
    state        what the caller adds
"""

from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from autopar.checkpoint.held import Held, Place, hold, hold_addend, place
from autopar.checkpoint.part import Run
from autopar.checkpoint.peers import Peers
from autopar.checkpoint.reader import Reader, dtype_name
from autopar.checkpoint.tree import Encoder, Ref, decode
from autopar.core.pipeline import PP
from autopar.errors import CheckpointError, FileFormatError
from autopar.runtime.module import ParallelModule

Tree = Mapping[str, Any]


class TrainingState:
    """A view of a module and its optimizer; nothing is copied."""

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer | None, peers: Peers) -> None:
        self._module, self._optimizer, self._peers = module, optimizer, peers
        self._everyone = ranks_of(module, peers)
        self._elsewhere = not_written(module)
        self._parameters = dict(module.named_parameters(remove_duplicate=False))
        self._buffers = dict(module.named_buffers(remove_duplicate=False))
        self._names: dict[torch.Tensor, list[str]] = {}
        for name, parameter in self._parameters.items():
            self._names.setdefault(parameter, []).append(name)
        named = {x: names[0] for x, names in self._names.items()} | {x: name for name, x in self._buffers.items()}
        self._held = {x: self._hold(x, name) for x, name in named.items()}

    def _hold(self, x: torch.Tensor, name: str) -> Held:
        """A parameter or buffer, or what belongs to one."""
        return replace(hold(x, self._everyone), elsewhere=name in self._elsewhere)

    def encode(self, state: Any) -> tuple[Tree, dict[str, Held]]:
        """(JSON, tensors by key) of this rank. `state` is the same on all ranks; rank 0's is kept."""
        encoder = Encoder(lambda x: hold(x.detach().clone(), Place(self._peers.rank, self._peers.num_ranks)))
        tree = {
            "parameters": {name: self._held[x] for name, x in self._parameters.items()},
            "buffers": {name: self._held[x] for name, x in self._buffers.items()},
            "gradients": {names[0]: self._hold(x.grad, names[0]) for x, names in self._names.items() if x.grad is not None},
            "addends": self._addends(),
            "stream": asdict(self._module.stream) if isinstance(self._module, ParallelModule) else {},
            "optimizer": self._optimizer_tree(self._optimizer) if self._optimizer else {},
        }
        values = {key: encoder.encode(item, key) for key, item in tree.items()}
        return values | {"state": encoder.encode(state, "state")}, encoder.tensors

    def _optimizer_tree(self, optimizer: torch.optim.Optimizer) -> Tree:
        like: dict[str, Any] = {}
        other: dict[str, Any] = {}
        for parameter, entries in optimizer.state.items():
            name = self._name(parameter)
            like[name], other[name] = {}, {}
            for key, value in entries.items():
                if _is_like(key, value, parameter):
                    like[name][key] = self._hold(value, name)
                elif isinstance(value, DTensor):
                    raise CheckpointError(f"{key} of {name} has shape {tuple(value.shape)}, unlike its parameter; only plain tensors may, use another optimizer")
                else:
                    other[name][key] = self._hold(value.clone(), name) if isinstance(value, torch.Tensor) else value
        groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        group_of = {self._name(p): n for n, group in enumerate(optimizer.param_groups) for p in group["params"]}
        return {"groups": groups, "group_of": group_of, "like_parameter": like, "other": other}

    def _name(self, parameter: torch.Tensor) -> str:
        if parameter not in self._names:
            raise CheckpointError("the optimizer has a parameter that is not the module's; make it from module.parameters()")
        return self._names[parameter][0]

    def _addends(self) -> dict[str, list[Held]]:
        """What the backwards of an unfinished step have left on this rank, by parameter."""
        found: dict[str, list[Held]] = {}
        if isinstance(self._module, ParallelModule):
            for parameter, layout, axes, x in self._module.addends():
                found.setdefault(self._name(parameter), []).append(hold_addend(x, parameter.shape, layout, self._module.device_mesh, axes))
        return found

    # --- the way back ----------------------------------------------------------------------------------------------------

    def check(self, values: Tree, reader: Reader) -> None:
        """Raise CheckpointError unless what was saved is a state of this module and optimizer; nothing is changed."""
        addends = decode(values.get("addends"))
        of_tensors = isinstance(addends, dict) and all(isinstance(refs, list) and all(isinstance(ref, Ref) for ref in refs) for refs in addends.values())
        if not isinstance(values.get("stream"), dict) or not of_tensors or "state" not in values:
            raise FileFormatError("the checkpoint lacks the random stream, the addends or the state of the run")
        saved = _refs(values, "parameters")
        for name, x in self._parameters.items():
            if name not in saved:
                raise CheckpointError(f"the checkpoint has no parameter {name}; load it into the model it was saved from")
            self._check_tensor(name, saved[name], x, reader)
        for name, ref in _refs(values, "buffers").items():
            if name in self._buffers:
                self._check_tensor(name, ref, self._buffers[name], reader)
        if self._optimizer is not None:
            self._check_groups(self._optimizer, values.get("optimizer"))

    def unused(self, values: Tree) -> set[str]:
        """Parameters that were saved and that this rank does not have."""
        return set(_refs(values, "parameters")) - set(self._parameters)

    def _check_tensor(self, name: str, ref: Ref, x: torch.Tensor, reader: Reader) -> None:
        entry = reader.entry(ref.key)
        if (entry.shape, entry.dtype) != (tuple(x.shape), dtype_name(x.dtype)):
            raise CheckpointError(f"{name} was saved as {entry.dtype}{list(entry.shape)} and is {dtype_name(x.dtype)}{list(x.shape)} here; load it into the model it was saved from")

    def _check_groups(self, optimizer: torch.optim.Optimizer, saved: Any) -> None:
        if not saved:
            raise CheckpointError("the checkpoint has no optimizer state; load it without an optimizer, or save it with one")
        if not isinstance(saved, dict) or not isinstance(saved.get("groups"), list) or not isinstance(saved.get("group_of"), dict):
            raise FileFormatError("the optimizer in the checkpoint has no groups")
        if len(saved["groups"]) != len(optimizer.param_groups):
            raise CheckpointError(f"the optimizer was saved with {len(saved['groups'])} parameter groups and has {len(optimizer.param_groups)}; make it as before")
        for number, group in enumerate(optimizer.param_groups):
            for parameter in group["params"]:
                before = _by_any_name(saved["group_of"], self._names[parameter]) if parameter in self._names else None
                if before != number:
                    raise CheckpointError(f"{self._name(parameter)} was saved in parameter group {before} and is in {number}; make the optimizer as before")

    def restore(self, values: Tree, reader: Reader) -> Any:
        """Overwrite module and optimizer with what was saved, each rank its part; returns the caller's state, tensors whole."""
        for name, ref in _refs(values, "parameters").items():
            if name in self._parameters:
                reader.read_held(ref.key, self._held[self._parameters[name]])
        for name, ref in _refs(values, "buffers").items():
            if name in self._buffers:
                reader.read_held(ref.key, self._held[self._buffers[name]])
        gradients = _refs(values, "gradients")
        for parameter, names in self._names.items():
            ref = _by_any_name(gradients, names)
            parameter.grad = None if ref is None else self._read_like(parameter, ref, reader)
        if isinstance(self._module, ParallelModule):
            self._restore_addends(self._module, decode(values["addends"]), reader)
            for field in fields(self._module.stream):
                setattr(self._module.stream, field.name, int(values["stream"].get(field.name, 0)))
        if self._optimizer is not None:
            self._restore_optimizer(self._optimizer, values["optimizer"], reader)
        return decode(values["state"], lambda ref: reader.read(ref.key))

    def _read_like(self, parameter: torch.Tensor, ref: Ref, reader: Reader) -> torch.Tensor:
        """A tensor that lies as the parameter does."""
        x = torch.empty_like(parameter.detach(), dtype=reader.dtype(ref.key))
        reader.read_held(ref.key, hold(x, self._everyone))
        return x

    def _restore_addends(self, module: ParallelModule, saved: Mapping[str, list[Ref]], reader: Reader) -> None:
        """On another plan, where there are others, the first gets the sum of all that were saved."""
        begun = {parameter: refs for name, refs in saved.items() if (parameter := self._parameters.get(name)) is not None}
        module.restart(begun)
        addends = self._addends()
        for parameter, refs in begun.items():
            targets = addends[self._name(parameter)]
            alike = len(refs) == len(targets) and all(reader.entry(ref.key).shape == held.shape for ref, held in zip(refs, targets))
            if alike:
                for ref, held in zip(refs, targets):
                    reader.read_held(ref.key, held)
            elif targets[0].part[0][0].start == 0:
                for ref in refs:
                    _add_all(ref.key, targets[0], reader)

    def _restore_optimizer(self, optimizer: torch.optim.Optimizer, saved: Tree, reader: Reader) -> None:
        for group, values in zip(optimizer.param_groups, saved["groups"], strict=True):
            group.update(decode(values, lambda ref: reader.read(ref.key)))
        optimizer.state.clear()
        for group in optimizer.param_groups:
            on_device = group.get("capturable") or group.get("fused")  # where torch keeps a step count
            for parameter in group["params"]:
                names = self._names[parameter]
                like, other = _by_any_name(saved["like_parameter"], names), _by_any_name(saved["other"], names)
                if like is None or other is None:
                    continue
                device = parameter.device if on_device else torch.device("cpu")
                entries = decode(other, partial(_read_whole, reader, device))
                entries |= {key: self._read_like(parameter, ref, reader) for key, ref in decode(like).items()}
                optimizer.state[parameter] = entries


def ranks_of(module: nn.Module, peers: Peers) -> Place:
    """This rank among those that hold the module's plain tensors: all, or those of its stage."""
    if isinstance(module, ParallelModule):
        names = module.device_mesh.mesh_dim_names or ()
        return place(module.device_mesh, [a for a in range(module.device_mesh.ndim) if names[a] != PP])
    return Place(peers.rank, peers.num_ranks)


def not_written(module: nn.Module) -> frozenset[str]:
    """Parameters and buffers that another stage of a pipeline has too and writes."""
    return module.duplicates if isinstance(module, ParallelModule) else frozenset()


def _is_like(key: str, value: Any, parameter: torch.Tensor) -> bool:
    """Whether a tensor of an optimizer is laid out like its parameter. `step` never is, not even beside a parameter without dimensions."""
    return isinstance(value, torch.Tensor) and key != "step" and value.shape == parameter.shape


def _add_all(key: str, held: Held, reader: Reader) -> None:
    """Add the sum of all saved addends to an addend."""
    for n in range(reader.entry(key).shape[0]):
        addend = torch.empty_like(held.local)
        reader.read_into(key, addend, ((Run(n, 1),), *held.part[1:]))
        held.local.add_(addend)


def _read_whole(reader: Reader, device: torch.device, ref: Ref) -> torch.Tensor:
    return reader.read(ref.key).to(device)


def _refs(values: Tree, key: str) -> dict[str, Ref]:
    found = decode(values.get(key))
    if not isinstance(found, dict) or not all(isinstance(ref, Ref) for ref in found.values()):
        raise FileFormatError(f"{key} in the checkpoint are not tensors by name")
    return found


def _by_any_name(table: Mapping[str, Any], names: list[str]) -> Any:
    """The entry of a tensor that may have been saved under another of its tied names; None if there is none."""
    return next((table[name] for name in names if name in table), None)
