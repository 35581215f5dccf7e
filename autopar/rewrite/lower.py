"""How an operator is written over local shards. Most are themselves; the ones here need another size, offset or form."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from autopar.core.graph import Op
from autopar.core.rule import OpRule, Strategy
from autopar.program import Program
from autopar.runtime import kernels
from autopar.runtime.moves import MOVES, all_reduce_max

aten = torch.ops.aten


@dataclass(frozen=True)
class Site:
    """One operator about to be written: its arguments by schema name, operands already local nodes."""

    graph: Graph
    program: Program
    index: int
    target: Any
    args: dict[str, Any]
    mesh: Node
    device: torch.device

    @property
    def op(self) -> Op:
        return self.program.graph.ops[self.index]

    @property
    def rule(self) -> OpRule:
        return self.program.rules[self.index]

    @property
    def strategy(self) -> Strategy:
        return self.program.strategies[self.index]

    def axes_cutting(self, factor: str) -> list[str]:
        """Names of the mesh axes that cut a factor, in mesh order."""
        names, mesh = self.rule.factors, self.program.mesh
        return [mesh.names[a] for a, c in enumerate(self.strategy) if c.kind == "cut" and names[c.index] == factor and mesh.sizes[a] > 1]

    def local_result(self, j: int = 0) -> list[int]:
        layout = self.rule.result_layout(j, self.strategy, self.program.mesh)
        return list(self.program.local_shape(self.op.results[j], layout))

    def result_text(self, j: int = 0) -> tuple[list[int], str]:
        """Global shape and layout of a result, as emitted code carries them."""
        layout = self.rule.result_layout(j, self.strategy, self.program.mesh)
        return list(self.program.graph.values[self.op.results[j]].meta.shape), ",".join(map(str, layout))

    def call(self, function: Callable, *args: Any, **kwargs: Any) -> Node:
        return self.graph.call_function(function, args, kwargs)

    def itself(self, **changed: Any) -> Node:
        """The operator on local operands, with some arguments changed; defaults are left out."""
        values = {**self.args, **changed}
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        positional = True
        for spec in self.target._schema.arguments:
            value = values[spec.name]
            if spec.name == "device" and value is not None:
                value = self.device
            default = spec.has_default_value() and (value is None if spec.default_value is None else _same(value, spec.default_value))
            if spec.name == "pin_memory" or default:
                positional = False
            elif positional and not spec.kwarg_only:
                args.append(value)
            else:
                kwargs[spec.name] = value
        return self.graph.call_function(self.target, tuple(args), kwargs)


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and not isinstance(a, Node) and a == b


Lowering = Callable[[Site], Node | Sequence[Node]]
LOWERINGS: dict[str, Lowering] = {}


def lowering(*kinds: str) -> Callable[[Lowering], Lowering]:
    def register(function: Lowering) -> Lowering:
        LOWERINGS.update(dict.fromkeys(kinds, function))
        return function

    return register


def lower(site: Site) -> Node | Sequence[Node]:
    """Write one operator; returns its result node, or a list of them."""
    function = LOWERINGS.get(site.op.kind)
    cut = any(c.kind == "cut" and size > 1 for c, size in zip(site.strategy, site.program.mesh.sizes))
    always = site.op.kind.startswith("autopar.") or site.op.kind in STEPWISE
    return function(site) if function is not None and (cut or always) else site.itself()


STEPWISE = ("aten.sign.default", "aten.floor.default", "aten.ceil.default", "aten.round.default")
"""Torch sends zeros back through these; the graph says that no gradient passes, so none is moved."""


@lowering(*STEPWISE)
def stepwise(site: Site) -> Node:
    return site.call(aten.detach.default, site.itself())


@lowering("aten.view.default", "aten.reshape.default", "aten._unsafe_view.default", "aten.squeeze.default", "aten.squeeze.dim", "aten.squeeze.dims",
          "aten.unsqueeze.default", "aten.flatten.using_ints", "aten.unflatten.int", "aten.view_copy.default", "aten._reshape_copy.default")  # fmt: skip
def reshape(site: Site) -> Node:
    return site.call(aten.reshape.default, site.args["self"], site.local_result())


@lowering("aten.expand.default", "aten.broadcast_to.default")
def expand(site: Site) -> Node:
    return site.itself(size=site.local_result())


@lowering("aten.expand_as.default")
def expand_as(site: Site) -> Node:
    return site.call(aten.expand.default, site.args["self"], site.local_result())


@lowering("aten.full.default", "aten.zeros.default", "aten.ones.default", "aten.empty.memory_format", "aten.new_zeros.default", "aten.new_ones.default",
          "aten.new_full.default", "aten.new_empty.default")  # fmt: skip
def constant(site: Site) -> Node:
    return site.itself(size=site.local_result())


@lowering("aten.split.Tensor")
def split(site: Site) -> Node:
    return site.itself(split_size=site.local_result()[int(site.args["dim"])])


@lowering("aten.split_with_sizes.default", "aten.split.sizes")
def split_sizes(site: Site) -> Node:
    name = "split_sizes" if "split_sizes" in site.args else "split_size"
    d = int(site.args["dim"])
    return site.itself(**{name: [site.local_result(j)[d] for j in range(len(site.op.results))]})


@lowering("aten.group_norm.default")
def group_norm(site: Site) -> Node:
    groups = site.args["num_groups"]
    for axis in site.axes_cutting("g"):
        groups //= site.program.mesh.sizes[site.program.mesh.names.index(axis)]
    return site.itself(num_groups=groups)


@lowering("aten.narrow.default")
def narrow(site: Site) -> Node:
    return site.itself(length=site.local_result()[int(site.args["dim"])])


@lowering("aten.mean.dim", "aten.mean.default")
def mean(site: Site) -> Node:
    """The addends of a mean over a cut dimension are local means over the number of parts."""
    parts = 1
    for axis, choice in enumerate(site.strategy):
        if choice.kind == "cut" and site.rule.summed(choice.index, 0):
            parts *= site.program.mesh.sizes[axis]
    result = site.itself()
    return result if parts == 1 else site.call(aten.mul.Tensor, result, 1.0 / parts)


@lowering("aten.embedding.default")
def embedding(site: Site) -> Node:
    axes = site.axes_cutting("v")
    if not axes:
        return site.itself()
    return site.call(kernels.embedding_rows, site.args["weight"], site.args["indices"], site.mesh, axes, site.args["padding_idx"])


@lowering("autopar.dropout.default")
def dropout(site: Site) -> Node:
    shape, layout = site.result_text()
    return site.call(kernels.dropout, site.args["input"], site.mesh, site.args["p"], site.args["site"], shape, layout)


@lowering("autopar.attention.default")
def attention(site: Site) -> Node:
    a = site.args
    shape, text = site.result_text()
    layout = ",".join("I" if word.startswith("S3") else word for word in text.split(","))  # probabilities have no value dimension
    keys = site.program.graph.values[site.op.operands[1]].meta.shape[2]
    return site.call(kernels.attention, a["query"], a["key"], a["value"], a["attn_mask"], site.mesh, a["dropout_p"], a["is_causal"], a["scale"], a["site"],
                     [*shape[:3], keys], layout)  # fmt: skip


@lowering("autopar.context_attention.default")
def context_attention(site: Site) -> Node:
    axes, a = site.axes_cutting("q"), site.args
    if not axes:
        return site.itself()
    return site.call(kernels.rows_of_attention, a["query"], a["key"], a["value"], site.mesh, axes, a["is_causal"], a["scale"], a["enable_gqa"])


@lowering("autopar.dispatch.default")
def dispatch(site: Site) -> Node:
    axes, a = site.axes_cutting("e"), site.args
    if not axes:
        return site.itself()
    return site.call(kernels.slots_of_experts, a["input"], site.mesh, axes, site.local_result()[0], a["experts"], a["chosen"])


@lowering("autopar.combine.default")
def combine(site: Site) -> Node:
    axes, a = site.axes_cutting("e"), site.args
    if not axes:
        return site.itself()
    experts = site.program.graph.values[site.op.operands[0]].meta.shape[0]
    return site.call(kernels.sum_of_experts, a["input"], a["weights"], site.mesh, axes, experts)


@lowering("autopar.token_cross_entropy.default")
def token_cross_entropy(site: Site) -> Node:
    """Three numbers a row cross the group, never the logits."""
    axes, a = site.axes_cutting("v"), site.args
    if not axes:
        return site.itself()
    smoothing = a["label_smoothing"]
    largest = site.call(kernels.row_max, a["input"])
    for axis in axes:
        largest = site.call(all_reduce_max, largest, site.mesh, axis)
    parts = site.call(kernels.cross_entropy_parts, a["input"], a["target"], largest, site.mesh, axes, smoothing)
    for axis in axes:
        parts = site.call(MOVES["all_reduce", "identity"], parts, site.mesh, axis)
    num_classes = site.program.graph.values[site.op.operands[0]].meta.shape[1]
    return site.call(kernels.cross_entropy_rows, parts, a["target"], a["ignore_index"], smoothing, num_classes)


@lowering("autopar.batch_norm.default")
def batch_norm(site: Site) -> Node | list[Node]:
    """The batch cut: mean and variance are summed over the group, forward and backward."""
    axes, a = site.axes_cutting("n"), site.args
    if not axes:
        return site.itself()
    shape = site.program.graph.values[site.op.operands[0]].meta.shape
    count = shape[0]
    for n in shape[2:]:
        count *= n
    mean = site.call(kernels.channel_mean, a["input"], count)
    for axis in axes:
        mean = site.call(MOVES["all_reduce", "all_reduce"], mean, site.mesh, axis)
    var = site.call(kernels.channel_variance, a["input"], mean, count)
    for axis in axes:
        var = site.call(MOVES["all_reduce", "all_reduce"], var, site.mesh, axis)
    y = site.call(kernels.normalise_channels, a["input"], mean, var, a["weight"], a["bias"], a["eps"])
    return [y, site.call(aten.detach.default, mean), site.call(aten.detach.default, var)]
