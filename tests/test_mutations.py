"""Mistakes that real systems shipped, injected one at a time: the checks of this suite must report each of them.

A mistake is a patch; `check` is the small fixed set of runs that must see it, and `sees` what they must find unequal.
Most of the list are silent wrong gradients: training would run, and the loss would look plausible.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from autopar.core.layout import I, P, R
from autopar.core.rule import OpRule
from autopar.errors import VerificationError
from autopar.program import Program
from autopar.rewrite import lower
from autopar.rewrite.check import check_emitted
from autopar.rewrite.emit import emit
from autopar.runtime import kernels, moves, simulate
from autopar.runtime.rank import Rank
from tests.harness import CPU, TOLERANCE, Outcome
from tests.mutation_checks import ROUTES, SAMPLES, op_outcome, outcome_of
from tests.mutation_model import EDITS, small
from tests.rules.call import OpCase
from tests.rules.draws import X, call

Patch = Callable[[pytest.MonkeyPatch], None]


@dataclasses.dataclass(frozen=True)
class Mistake:
    """`row`: the class of the mistake in the catalogue of silent wrong gradients it stands for (0: none, but as bad)."""

    name: str
    row: int
    check: str
    sees: str
    patch: Patch


MISTAKES: list[Mistake] = []


def mistake(row: int, check: str, sees: str) -> Callable[[Patch], Patch]:
    def register(patch: Patch) -> Patch:
        MISTAKES.append(Mistake(patch.__name__, row, check, sees, patch))
        return patch

    return register


@pytest.mark.parametrize("check", [*ROUTES, *SAMPLES, "model"])
def test_without_a_mistake_all_is_equal(check: str) -> None:
    assert outcome_of(check).equal


def is_wrong(outcome: Outcome, what: str) -> bool:
    found = getattr(outcome, what)
    return not found if isinstance(found, bool) else math.isnan(found) or found > 1e3 * TOLERANCE


# --- moves -----------------------------------------------------------------------------------------------------------


def _backward(monkeypatch: pytest.MonkeyPatch, pair: tuple[str, str], instead: str) -> None:
    right = moves.backward_of

    def wrong(move: moves.Move) -> moves.Move:
        back = right(move)
        return dataclasses.replace(back, forward=instead) if (move.forward, move.backward) == pair else back

    monkeypatch.setattr(simulate, "backward_of", wrong)


def _exchange(monkeypatch: pytest.MonkeyPatch, primitive: str, change: Callable[[list[Any], list[Any]], list[Any]]) -> None:
    right = simulate._exchange
    monkeypatch.setattr(
        simulate, "_exchange", lambda prim, sent, op: change(right(prim, sent, op), sent) if prim == primitive else right(prim, sent, op)
    )


def _local(monkeypatch: pytest.MonkeyPatch, primitive: str, change: Callable[..., torch.Tensor]) -> None:
    right = moves.local
    monkeypatch.setattr(
        simulate, "local", lambda move, x, size, index: (change if move.forward == primitive else right)(move, x, size, index)
    )


@mistake(1, "R from I", "gradient")
def replicated_gradient_not_reduced(mp: pytest.MonkeyPatch) -> None:
    _backward(mp, ("identity", "all_reduce"), "identity")


@mistake(9, "R from S", "gradient")
def gathered_gradient_cut_but_not_summed(mp: pytest.MonkeyPatch) -> None:
    _backward(mp, ("all_gather", "reduce_scatter"), "slice")


@mistake(4, "R from I", "gradient")
def gradient_averaged(mp: pytest.MonkeyPatch) -> None:
    _exchange(mp, "all_reduce", lambda got, sent: [x / len(got) for x in got])


@mistake(4, "I from P", "value")
def reduction_doubled(mp: pytest.MonkeyPatch) -> None:
    _exchange(mp, "all_reduce", lambda got, sent: [2 * x for x in got])


@mistake(9, "S from P", "value")
def scattered_to_the_neighbour(mp: pytest.MonkeyPatch) -> None:
    _exchange(mp, "reduce_scatter", lambda got, sent: got[1:] + got[:1])


@mistake(9, "S from S", "value")
def all_to_all_out_of_order(mp: pytest.MonkeyPatch) -> None:
    _exchange(mp, "all_to_all", lambda got, sent: [list(reversed(pieces)) for pieces in got])


@mistake(9, "S from S", "value")
def all_to_all_dims_swapped(mp: pytest.MonkeyPatch) -> None:
    def swapped(move: moves.Move) -> moves.Move:
        return dataclasses.replace(move, dim=move.to_dim, to_dim=move.dim)

    mp.setattr(simulate, "before", lambda move, x, size: moves.before(swapped(move), x, size))
    mp.setattr(simulate, "after", lambda move, got: moves.after(swapped(move), got))


@mistake(0, "S from I", "value")
def slice_of_the_neighbour(mp: pytest.MonkeyPatch) -> None:
    right = moves.local
    _local(mp, "slice", lambda move, x, size, index: right(move, x, size, (index + 1) % size))


@mistake(0, "P from S", "value")
def embedded_at_the_wrong_place(mp: pytest.MonkeyPatch) -> None:
    right = moves.local
    _local(mp, "embed", lambda move, x, size, index: right(move, x, size, 0))


@mistake(0, "P from I", "value")
def every_rank_adds_the_whole(mp: pytest.MonkeyPatch) -> None:
    _local(mp, "mask", lambda move, x, size, index: x.clone())


@mistake(8, "strided", "value")
def outer_blocks_ignored(mp: pytest.MonkeyPatch) -> None:
    right = moves.cut
    mp.setattr(moves, "cut", lambda x, dim, outer, parts: right(x, dim, 1, parts))


@mistake(13, "S from I", "value")
def uneven_pieces(mp: pytest.MonkeyPatch) -> None:
    def uneven(x: torch.Tensor, dim: int, outer: int, parts: int) -> list[torch.Tensor]:
        n = x.shape[dim] // parts
        return list(x.split([n + 1, *[n] * (parts - 2), n - 1], dim))

    mp.setattr(moves, "cut", uneven)


@mistake(0, "S from S", "ledger")
def all_to_all_not_counted(mp: pytest.MonkeyPatch) -> None:
    right = Rank.count
    mp.setattr(Rank, "count", lambda self, primitive, axis, x: None if primitive == "all_to_all" else right(self, primitive, axis, x))


@mistake(0, "R from S", "ledger")
def backward_bytes_predicted_from_the_forward(mp: pytest.MonkeyPatch) -> None:
    mp.setattr("autopar.program.step_input_bytes", lambda primitive, step, mesh, src_bytes, backward: src_bytes)


# --- rules and local forms -------------------------------------------------------------------------------------------


def _placement(mp: pytest.MonkeyPatch, change: Callable[[OpRule, int, Any, Any], Any]) -> None:
    right = OpRule.operand_placement
    mp.setattr(OpRule, "operand_placement", lambda self, k, choice: change(self, k, choice, right(self, k, choice)))


@mistake(1, "layer norm", "replicas")
def shared_weight_taken_as_whole(mp: pytest.MonkeyPatch) -> None:
    """A weight that cut activations use is said to have its whole gradient on every rank."""
    _placement(mp, lambda rule, k, choice, p: I if choice.kind == "cut" and p == R else p)


@mistake(0, "linear", "value")
def bias_added_by_every_rank(mp: pytest.MonkeyPatch) -> None:
    _placement(mp, lambda rule, k, choice, p: R if k in rule.additive and p == P and choice.kind == "cut" else p)


@mistake(8, "mean", "value")
def mean_of_local_means_not_scaled(mp: pytest.MonkeyPatch) -> None:
    mp.delitem(lower.LOWERINGS, "aten.mean.dim")


@mistake(8, "embedding", "value")
def embedding_offset_off_by_one(mp: pytest.MonkeyPatch) -> None:
    right = kernels.shard_start
    mp.setattr(kernels, "shard_start", lambda mesh, axes, part: right(mesh, axes, part) + 1)


@mistake(8, "embedding", "value")
def foreign_rows_not_masked(mp: pytest.MonkeyPatch) -> None:
    def rows(weight: torch.Tensor, indices: torch.Tensor, mesh: Rank, axes: list[str], padding_idx: int) -> torch.Tensor:
        here = indices - kernels.shard_start(mesh, axes, weight.shape[0])
        return weight[here.clamp(0, weight.shape[0] - 1)]

    mp.setattr(kernels, "embedding_rows", _named(rows))


@mistake(8, "embedding", "gradient")
def padding_row_trained(mp: pytest.MonkeyPatch) -> None:
    right = kernels.embedding_rows
    mp.setattr(kernels, "embedding_rows", _named(lambda weight, indices, mesh, axes, padding_idx: right(weight, indices, mesh, axes, -1)))


def _named(function: Callable) -> Callable:
    """Emitted code calls functions by name."""
    function.__name__ = function.__qualname__ = "mistaken"
    function.__module__ = __name__
    globals()["mistaken"] = function
    return function


@mistake(10, "dropout", "value")
def dropout_by_local_index(mp: pytest.MonkeyPatch) -> None:
    right = kernels.global_index
    mp.setattr(kernels, "global_index", lambda mesh, shape, layout: [torch.arange(len(ids)) for ids in right(mesh, shape, layout)])


@mistake(10, "attention", "value")
def attention_dropout_by_local_index(mp: pytest.MonkeyPatch) -> None:
    dropout_by_local_index(mp)


@mistake(8, "cross entropy", "value")
def largest_logit_not_reduced(mp: pytest.MonkeyPatch) -> None:
    mp.setattr(lower, "all_reduce_max", _named(lambda x, mesh, axis: x.detach()))


@mistake(8, "cross entropy", "value")
def target_logit_not_masked(mp: pytest.MonkeyPatch) -> None:
    right = kernels.cross_entropy_parts

    def parts(
        logits: torch.Tensor, target: torch.Tensor, largest: torch.Tensor, mesh: Rank, axes: list[str], smoothing: float
    ) -> torch.Tensor:
        found = right(logits, target, largest, mesh, axes, smoothing)
        here = (target - kernels.shard_start(mesh, axes, logits.shape[-1])).clamp(0, logits.shape[-1] - 1)
        picked = (logits - largest.unsqueeze(-1)).gather(-1, here.unsqueeze(-1)).squeeze(-1)
        return torch.stack([found[0], picked, *found[2:]])

    mp.setattr(kernels, "cross_entropy_parts", _named(parts))


@mistake(9, "cross entropy", "value")
def sum_of_exponentials_not_reduced(mp: pytest.MonkeyPatch) -> None:
    mp.setattr(lower, "MOVES", {**lower.MOVES, ("all_reduce", "identity"): _named(lambda x, mesh, axis: x)})


@mistake(8, "cross entropy", "value")
def smoothing_over_local_classes(mp: pytest.MonkeyPatch) -> None:
    right = kernels.cross_entropy_rows
    wrong = _named(lambda parts, target, ignore, smoothing, classes: right(parts, target, ignore, smoothing, classes // 2))
    mp.setattr(kernels, "cross_entropy_rows", wrong)


@mistake(0, "cross entropy", "ledger")
def inner_collectives_not_predicted(mp: pytest.MonkeyPatch) -> None:
    mp.setattr(Program, "_inner_entries", lambda self, live: iter(()))


@mistake(8, "batch norm", "value")
def statistics_of_the_local_batch(mp: pytest.MonkeyPatch) -> None:
    mp.delitem(lower.LOWERINGS, "autopar.batch_norm.default")


# --- whole programs --------------------------------------------------------------------------------------------------


@mistake(2, "model", "gradient")
def tokens_counted_per_rank(mp: pytest.MonkeyPatch) -> None:
    mp.setattr("tests.mutation_model.edit", "mean of local means")


@mistake(9, "model", "gradient")
def deferred_reduction_dropped(mp: pytest.MonkeyPatch) -> None:
    mp.setattr("tests.mutation_model.transform", lambda program: dataclasses.replace(program, deferred=dict.fromkeys(program.deferred, ())))


@mistake(5, "model", "gradient")
def deferred_reduction_over_the_wrong_axis(mp: pytest.MonkeyPatch) -> None:
    def wrong(program: Program) -> Program:
        n = len(program.mesh.axes)
        return dataclasses.replace(program, deferred={v: tuple((a + 1) % n for a in axes) for v, axes in program.deferred.items()})

    mp.setattr("tests.mutation_model.transform", wrong)


@mistake(11, "model", "gradient")
def tied_gradient_counted_once(mp: pytest.MonkeyPatch) -> None:
    mp.setattr("tests.mutation_model.edit", "detach a second use")


@mistake(9, "model", "gradient")
def stale_move_shared(mp: pytest.MonkeyPatch) -> None:
    mp.setattr("tests.mutation_model.edit", "share across gradients")


@pytest.mark.parametrize("wrong", MISTAKES, ids=lambda m: m.name)
def test_mistake_is_seen(wrong: Mistake, monkeypatch: pytest.MonkeyPatch) -> None:
    assert outcome_of(wrong.check).equal
    wrong.patch(monkeypatch)
    outcome = outcome_of(wrong.check)
    assert not outcome.equal
    assert is_wrong(outcome, wrong.sees), outcome


def test_a_partial_sum_through_a_curve_is_seen() -> None:
    case = OpCase(SAMPLES["gelu"])
    case.rule = dataclasses.replace(case.rule, carries=(frozenset({0}),))
    assert is_wrong(op_outcome(case), "value")


def test_a_cut_along_a_normalised_dimension_is_seen() -> None:
    case = OpCase(call("softmax.int", X(4, 12), 1))
    case.rule = dataclasses.replace(case.rule, factors=("a", "b"), sizes=(4, 12), operands=(((0,), (1,)),), results=(((0,), (1,)),))
    assert is_wrong(op_outcome(case), "value")


def test_the_static_check_refuses_shared_moves() -> None:
    """A program that lost a move is refused before it runs."""
    case, programs = small()
    refused = 0
    for program in programs:
        emitted = emit(program, case.traced.gm, case.traced.node_of, CPU)
        check_emitted(program, emitted.graph)
        before = len(emitted.graph.nodes)
        EDITS["share across gradients"](emitted.graph)
        if len(emitted.graph.nodes) < before:
            with pytest.raises(VerificationError, match="move"):
                check_emitted(program, emitted.graph)
            refused += 1
    assert refused


def test_there_are_enough_mistakes() -> None:
    assert len(MISTAKES) >= 15
    assert {m.row for m in MISTAKES} >= {1, 2, 4, 5, 8, 9, 10, 11, 13}
