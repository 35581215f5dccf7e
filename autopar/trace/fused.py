"""Formulas that a model writes out operator by operator, as the one operator of ATen that computes them.

A GELU that is written out is five to nine operators, each with a pass over memory, and keeps three to seven tensors of its size for the backward
(`torch.autograd.graph.saved_tensors_hooks` shows them, torch 2.13); the operator keeps one. The results are equal to rounding, of which the operator
does less in 16 bits.
"""

import math
from collections.abc import Callable

import torch
from torch.fx import Graph, GraphModule, Proxy
from torch.fx.proxy import GraphAppendingTracer
from torch.fx.subgraph_rewriter import replace_pattern_with_filters

aten = torch.ops.aten
Formula = Callable[[Proxy], Proxy]


def gelu_by_cube(x: Proxy) -> Proxy:
    """0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) (Hendrycks and Gimpel 2016), the `gelu_new` of transformers."""
    inner = aten.add.Tensor(x, aten.mul.Tensor(aten.pow.Tensor_Scalar(x, 3.0), 0.044715))
    return aten.mul.Tensor(aten.mul.Tensor(x, 0.5), aten.add.Tensor(aten.tanh.default(aten.mul.Tensor(inner, math.sqrt(2.0 / math.pi))), 1.0))


def gelu_by_square(x: Proxy) -> Proxy:
    """0.5 x (1 + tanh(0.7978845608 x (1 + 0.044715 x x))), its `gelu_fast`."""
    inner = aten.mul.Tensor(aten.mul.Tensor(x, 0.7978845608), aten.add.Tensor(aten.mul.Tensor(aten.mul.Tensor(x, 0.044715), x), 1.0))
    return aten.mul.Tensor(aten.mul.Tensor(x, 0.5), aten.add.Tensor(aten.tanh.default(inner), 1.0))


def gelu_by_erf(x: Proxy) -> Proxy:
    """0.5 x (1 + erf(x / sqrt(2))), its `gelu_python`."""
    return aten.mul.Tensor(aten.mul.Tensor(x, 0.5), aten.add.Tensor(aten.erf.default(aten.div.Tensor(x, math.sqrt(2.0))), 1.0))


def tanh_gelu(x: Proxy) -> Proxy:
    return aten.gelu.default(x, approximate="tanh")


FORMULAS: tuple[tuple[Formula, Formula], ...] = ((gelu_by_cube, tanh_gelu), (gelu_by_square, tanh_gelu), (gelu_by_erf, aten.gelu.default))
"""(as models write it, as one operator)."""


def _graph(formula: Formula) -> Graph:
    graph = Graph()
    graph.output(formula(Proxy(graph.placeholder("x"), GraphAppendingTracer(graph))).node)
    return graph


def fuse_formulas(gm: GraphModule) -> None:
    """Put one operator for every formula of which nothing but its result is read."""
    for formula, operator in FORMULAS:
        for match in replace_pattern_with_filters(gm, _graph(formula), _graph(operator)):
            for node in match.replacements:
                node.meta = dict(match.nodes_map[match.anchor].meta)
