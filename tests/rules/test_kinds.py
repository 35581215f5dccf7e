"""Which kind of kernel a rule names, for what is measured of it."""

import pytest
import torch
import torch.nn.functional as F

from autopar.core.cluster import Cluster
from autopar.core.kernel_rate import KERNEL_KINDS
from autopar.planner.plan import plan_graph
from autopar.planner.states import work_of
from autopar.trace.capture import trace

CASES = {
    "product": lambda x: x @ x,
    "pointwise": lambda x: x * x,
    "scalar": lambda x: x[0, 0] / 2,
    "normalisation": lambda x: F.layer_norm(x, x.shape[-1:]),
    "softmax": lambda x: x.softmax(-1),
    "mean": lambda x: x.mean(-1),
    "reduction": lambda x: x.sum(),
    "gather": lambda x: F.embedding(torch.zeros(3, dtype=torch.long, device=x.device), x),
    "copy": lambda x: torch.cat([x, x]),
    "loss": lambda x: F.cross_entropy(x, torch.zeros(8, dtype=torch.long, device=x.device), reduction="none"),
    "convolution": lambda x: F.conv2d(x.view(1, 1, 8, 8), x[:3, :3].reshape(1, 1, 3, 3)),
    "attention": lambda x: F.scaled_dot_product_attention(*(x.view(1, 2, 4, 8),) * 3),
    "causal_attention": lambda x: F.scaled_dot_product_attention(*(x.view(1, 2, 4, 8),) * 3, is_causal=True),
    "max_pooling": lambda x: F.max_pool2d(x.view(1, 1, 8, 8), 3, 2),
    "average_pooling": lambda x: F.avg_pool2d(x.view(1, 1, 8, 8), (3, 3), 2),
}


class Of(torch.nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function, self.x = function, torch.nn.Parameter(torch.zeros(8, 8, device="meta"))

    def forward(self) -> torch.Tensor:
        return self.function(self.x)


@pytest.mark.parametrize("kind", KERNEL_KINDS)
def test_operators_say_what_kernel_they_are(kind: str) -> None:
    program = plan_graph(trace(Of(CASES[kind]), (), {}).graph, Cluster.local(1)).program
    works = [work_of(rule, strategy, program.mesh, rule.flops, 0.0, "float32") for rule, strategy in zip(program.rules, program.strategies)]
    computed = [work for op, work in zip(program.graph.ops, works) if work.kernel != "view" and op.operands]
    assert kind in {work.kind for work in computed}, [work.kind for work in works]
    if "pooling" in kind:
        assert [work.flops for work in computed if work.kind == kind] == [9.0 * 9]  # 3 x 3 windows of 3 x 3 elements
