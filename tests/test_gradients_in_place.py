"""Gradients that are added where others lie: of tables that are looked up and used whole, and of weights that a split backward puts off."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import autopar
from autopar.core.cluster import Cluster
from autopar.core.mesh import Mesh
from autopar.models.load import load_model
from autopar.planner.plan import plan_graph
from autopar.rewrite.build import build
from autopar.runtime.rank import Rank
from autopar.runtime.reducer import Reducer
from autopar.runtime.split import weight_gradient
from autopar.trace.capture import trace


@pytest.mark.parametrize("name,tables", [("gpt2-tiny", 1), ("llama-tiny", 0), ("t5-tiny", 2)])
@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
def test_rows_are_asked_for_where_a_table_is_tied(name: str, tables: int, split: bool) -> None:
    loaded = load_model(name, batch=4, device="meta")
    traced = trace(loaded.module, (), loaded.kwargs)
    built = build(plan_graph(traced.graph, Cluster.local(1)).program, traced, split_backward=split)
    nodes = [n for part in (built.module, *built.module.children()) for n in part.graph.nodes]
    assert sum(n.op == "call_function" and n.target in (torch.embedding, F.embedding) and n.args[-1] is True for n in nodes) == (0 if split else tables)


def test_a_backward_of_the_rows_alone_leaves_a_dense_gradient() -> None:
    mesh, found = Mesh.of(dp=1), {}
    table = torch.randn(8, 3, requires_grad=True)
    reducer = Reducer([], {0: table}, Rank(mesh, 0, torch.device("cpu")), found.__setitem__)
    (F.embedding(torch.tensor([1, 2, 1]), table, sparse=True).sum() * 2).backward()
    want = torch.zeros(8, 3)
    want[1], want[2] = 4, 2
    assert reducer.leaves[0].grad is None and found[0].layout == torch.strided
    torch.testing.assert_close(found[0], want)


class Tied(nn.Module):
    """Some rows are looked up more often than others; `options`: of the look-up."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 4, **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.table(x) @ self.table.weight.t()).square().mean()


@pytest.mark.parametrize("options", [{}, {"padding_idx": 1}, {"scale_grad_by_freq": True}, {"padding_idx": 1, "scale_grad_by_freq": True}], ids=str)
def test_what_else_a_look_up_asks_for_is_kept(options: dict[str, Any]) -> None:
    model, batch = Tied(**options), (torch.tensor([[1, 2, 1, 5], [3, 1, 2, 2]]),)
    plan = autopar.plan(model, Cluster.local(1), batch)
    assert autopar.verify(model, plan, batch).equal


def test_gradients_put_off_keep_no_graph() -> None:
    """Microbatches after the first add to a gradient in place, outside of any backward."""
    weight, x = torch.randn(3, 4, requires_grad=True), torch.randn(2, 4, requires_grad=True) * 2
    weight.grad = torch.ones(3, 4)
    assert weight_gradient(weight, x, torch.ones(2, 3), transposed=True) is None
    assert not weight.grad.requires_grad
    torch.testing.assert_close(weight.grad, 1 + x.detach().sum(0).expand(3, 4))
