"""The only reader of fx nodes: an exported program to an `OpGraph`."""

import operator
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import Node

from autopar.core.graph import Op, Operand, OpGraph, TensorMeta, Value, named
from autopar.trace.canonical import bound

NOT_DIFFERENTIABLE = frozenset((
    "detach", "argmax", "argmin", "sign", "floor", "ceil", "round", "ones_like", "zeros_like", "full_like", "empty_like",
    "new_zeros", "new_ones", "new_full", "new_empty", "one_hot", "eq", "ne", "lt", "le", "gt", "ge",
))  # fmt: skip
"""ATen operators with floating results that no gradient passes through."""

RESULT_PER_OPERAND = frozenset(("broadcast_tensors", "meshgrid", "type_as", "expand_as"))
"""ATen operators whose k-th result is made of the k-th operand alone, and carries a gradient if that does."""


PLACEMENT_ARGUMENTS = ("device", "pin_memory", "layout", "memory_format")
"""Arguments that say where or how a tensor lies in memory, not what it is."""


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class _Builder:
    """Collects values and ops in program order."""

    def __init__(self, program: ExportedProgram, model: nn.Module) -> None:
        self.program = program
        self.values: list[Value] = []
        self.ops: list[Op] = []
        self.names: list[str] = []
        self.id_of: dict[str, int] = {}
        self.sources = _tied_names(model)
        self.requires_grad = {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}

    def add_value(self, node_name: str, meta: TensorMeta, role: str = "op", source: tuple[str, ...] = (), made_by: str = "") -> int:
        self.id_of[node_name] = len(self.values)
        attribute = role in ("param", "buffer")
        self.values.append(Value(f"self.{source[0]}" if attribute else node_name, meta, role, source))
        self.names.append(made_by or node_name)
        return self.id_of[node_name]

    def add_inputs(self) -> None:
        placeholders = {n.name: n for n in self.program.graph.nodes if n.op == "placeholder"}
        for spec in self.program.graph_signature.input_specs:
            node = placeholders.get(spec.arg.name)
            if node is None:
                continue  # a flag, dropped from the graph
            val = node.meta["val"]
            if spec.kind is InputKind.PARAMETER:
                names = self.sources[spec.target.removeprefix("model.")]
                grad = self.requires_grad[names[0]]
                self.add_value(node.name, _meta(val, grad), "param", names)
            elif spec.kind is InputKind.BUFFER:
                self.add_value(node.name, _meta(val), "buffer", (spec.target.removeprefix("model."),))
            elif spec.kind in (InputKind.CONSTANT_TENSOR, InputKind.CUSTOM_OBJ):
                self.add_value(node.name, _meta(val), "constant", (spec.target,))
            else:
                self.add_value(node.name, _meta(val), "input", (node.name,))

    def add_op(self, node: Node) -> None:
        operands: list[int] = []

        def encode(value: Any) -> Any:
            if isinstance(value, Node):
                operands.append(self.id_of[value.name])
                return Operand(len(operands) - 1)
            if isinstance(value, (tuple, list)):
                return tuple(encode(v) for v in value)
            if value is None or isinstance(value, (bool, int, float, str)):
                return value
            return str(value).removeprefix("torch.")

        args = tuple((name, encode(value)) for name, value in bound(node).items() if name not in PLACEMENT_ARGUMENTS)
        kind = str(node.target)
        grad = any(self.values[v].meta.requires_grad for v in operands) and kind.split(".")[1] not in NOT_DIFFERENTIABLE
        per_operand = kind.split(".")[1] in RESULT_PER_OPERAND
        results = self._results(node, [self.values[v].meta.requires_grad for v in operands] if per_operand else grad)
        module_path, source = _origin(node)
        self.ops.append(Op(node.name, kind, tuple(operands), results, args, module_path, source))

    def _results(self, node: Node, grads: bool | list[bool]) -> tuple[int, ...]:
        val = node.meta["val"]
        if isinstance(val, torch.Tensor):
            first = grads[0] if isinstance(grads, list) else grads
            return (self.add_value(node.name, _meta(val, first and val.is_floating_point())),)
        found = []
        users = {u.args[1]: u.name for u in node.users if u.target is operator.getitem}
        for k, item in enumerate(val):
            if isinstance(item, torch.Tensor):
                stats = "batch_norm" in str(node.target) and k > 0
                grad = grads[k] if isinstance(grads, list) else grads
                meta = _meta(item, grad and item.is_floating_point() and not stats)
                found.append(self.add_value(users.get(k, f"{node.name}.{k}"), meta, made_by=node.name))
        return tuple(found)


def _meta(val: torch.Tensor, grad: bool = False) -> TensorMeta:
    return TensorMeta(tuple(int(n) for n in val.shape), dtype_name(val.dtype), grad)


def _tied_names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Every name of a parameter -> all names of the same tensor, first name first."""
    groups: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(p), []).append(name)
    return {name: tuple(names) for names in groups.values() for name in names}


def _origin(node: Node) -> tuple[str, str]:
    stack = node.meta.get("nn_module_stack") or {}
    path = list(stack.values())[-1][0] if stack else ""
    path = path.removeprefix("model").removeprefix(".")
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines()]
    frames = [line for line in lines if line.startswith("File ") and not line.startswith('File "<')]  # code that torch wrote has no file
    source = ""
    if frames:
        file, line = frames[-1].split(", line ")[:2]
        source = f"{file.removeprefix('File ').strip(chr(34))}:{line.split(',')[0]}"
    return path, source


def merge_tied(program: ExportedProgram, model: nn.Module) -> None:
    """One placeholder for a parameter with several names: export makes one per name."""
    names = _tied_names(model)
    graph = program.graph
    placeholders = {n.name: n for n in graph.nodes if n.op == "placeholder"}
    first: dict[str, Node] = {}
    for spec in program.graph_signature.input_specs:
        if spec.kind is not InputKind.PARAMETER:
            continue
        node, group = placeholders[spec.arg.name], names[spec.target.removeprefix("model.")][0]
        if group in first:
            node.replace_all_uses_with(first[group])
            graph.erase_node(node)
        else:
            first[group] = node
    program.graph_module.recompile()


def to_op_graph(program: ExportedProgram, model: nn.Module, name: str) -> tuple[OpGraph, tuple[str, ...]]:
    """The torch-free graph of a canonical exported program, and for every value the name of the fx node that makes it."""
    builder = _Builder(program, model)
    builder.add_inputs()
    for node in program.graph.nodes:
        if node.op == "call_function" and node.target is not operator.getitem:
            builder.add_op(node)
    outputs, updates = [], []
    result = next(n for n in program.graph.nodes if n.op == "output")
    buffers = {v.source[0]: i for i, v in enumerate(builder.values) if v.role == "buffer"}
    for spec, node in zip(program.graph_signature.output_specs, result.args[0]):
        if not isinstance(node, Node):
            continue
        if spec.kind is OutputKind.BUFFER_MUTATION:
            updates.append((buffers[spec.target.removeprefix("model.")], builder.id_of[node.name]))
        elif spec.kind is OutputKind.USER_OUTPUT:
            outputs.append(builder.id_of[node.name])
    graph = OpGraph(*named(builder.values, builder.ops), tuple(outputs), tuple(updates), name)
    return graph, tuple(builder.names)
