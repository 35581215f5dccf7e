"""A small language model with everything that goes wrong in practice, under a fixed handful of plans; mistakes hook in here."""

import random
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Graph, Node

from autopar.program import Program
from autopar.rewrite.emit import Emitted
from autopar.runtime.moves import PAIR_OF
from tests.harness import Outcome, mesh_of
from tests.whole import ModelCase

PLANS = tuple((mesh_of(*sizes), seed) for sizes in ((2,), (3,), (2, 2)) for seed in (0, 1, 2, 7))

transform: Callable[[Program], Program] = lambda program: program
edit = ""


class Small(nn.Module):
    """Tied embedding, fused attention with dropout, a norm, a gated block, and a mean over unevenly ignored targets."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 24)
        self.norm = nn.LayerNorm(24)
        self.qkv = nn.Linear(24, 72)
        self.up, self.down = nn.Linear(24, 48), nn.Linear(24, 24)
        self.head = nn.Linear(24, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        b, s, h = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, s, 3, 4, 6).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.2).transpose(1, 2).reshape(b, s, h)
        gate, value = self.up(self.norm(x)).chunk(2, -1)
        x = x + self.down(F.gelu(gate) * value) + x.mean(1, keepdim=True)
        return F.cross_entropy(self.head(F.dropout(x, 0.1)).flatten(0, 1), labels.flatten())


@lru_cache(maxsize=1)
def small() -> tuple[ModelCase, tuple[Program, ...]]:
    gen = torch.Generator().manual_seed(0)
    ids, labels = (torch.randint(0, 12, (12, 6), generator=gen) for _ in range(2))
    labels[:4] = -100
    labels[:, -1] = -100
    with torch.device("meta"):
        model = Small()
    case = ModelCase(model, {"ids": ids, "labels": labels})
    return case, tuple(case.random_program(mesh, random.Random(seed)) for mesh, seed in PLANS)


def model_outcome() -> Outcome:
    """The worst of all plans."""
    case, programs = small()
    worst = Outcome()
    with pytest.MonkeyPatch.context() as mp:
        if edit:
            _edit_emitted(mp, EDITS[edit])
        for program in programs:
            worst = worst.worse(case.run(transform(program)))
    return worst


def _edit_emitted(mp: pytest.MonkeyPatch, change: Callable[[Graph], None]) -> None:
    """Change the emitted graph before it is run; the static check would refuse most changes, so it is left out."""
    from autopar.rewrite import build as module

    right = module.emit

    def edited(*args: Any) -> Emitted:
        emitted = right(*args)
        change(emitted.graph)
        emitted.graph.lint()
        return emitted

    mp.setattr(module, "emit", edited)
    mp.setattr(module, "check_emitted", lambda program, graph: None)


def _detach_second_use(graph: Graph) -> None:
    weight = next(n for n in graph.nodes if n.op == "placeholder" and "embed" in n.name)
    uses = _uses(weight)
    if len(uses) > 1:
        with graph.inserting_before(uses[-1]):
            stopped = graph.call_function(torch.ops.aten.detach.default, (weight,))
        stopped.meta = dict(uses[-1].meta)
        uses[-1].replace_input_with(weight, stopped)


def _uses(node: Node) -> list[Node]:
    """Users of a node behind moves that have one user each."""
    while len(node.users) == 1 and next(iter(node.users)).target in PAIR_OF:
        node = next(iter(node.users))
    return list(node.users)


def _share_across_gradients(graph: Graph) -> None:
    """A move whose forward another move of the same value does too is dropped, whatever the two do backward."""
    seen: dict[tuple, Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in PAIR_OF:
            continue
        key = (node.args, PAIR_OF[node.target][0], tuple(sorted(node.kwargs.items())))
        if key in seen:
            node.replace_all_uses_with(seen[key])
            graph.erase_node(node)
        else:
            seen[key] = node


def scaled_count(count: torch.Tensor, mine: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """The count of all targets if every rank ignored as many as this one."""
    return count * (whole.numel() // mine.numel())


def _mean_of_local_means(graph: Graph) -> None:
    """Every rank divides by its own number of targets, and the ranks' means are averaged."""
    rows = next(n for n in graph.nodes if n.op == "call_function" and n.name.startswith(("token_cross_entropy", "cross_entropy_rows")))
    kept = next(n for n in graph.nodes if n.target is torch.ops.aten.ne.Scalar)
    count, whole, mine = next(iter(kept.users)), kept.args[0], rows.args[1]
    kept.replace_input_with(whole, mine)
    for node in (kept, count):
        rows.append(node)
    with graph.inserting_after(count):
        scaled = graph.call_function(scaled_count, (count, mine, whole))
    scaled.meta = dict(count.meta)
    count.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)
    rows.append(count)
    rows.append(kept)


EDITS: dict[str, Callable[[Graph], None]] = {
    "detach a second use": _detach_second_use,
    "share across gradients": _share_across_gradients,
    "mean of local means": _mean_of_local_means,
}
