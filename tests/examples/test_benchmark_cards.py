"""The cards, on one so small that it is searched in a second: the two ways to force a plan, and the terms that a step is taken apart into."""

import importlib
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("benchmark_cards")


def small(cards: ModuleType, memory_bytes: int) -> object:
    """A card of four layers on one node, whose plan and terms another planner might have given."""
    dims = cards.Dims(layers=4, hidden=1024, heads=8, kv_heads=8, inner=4096, vocab=1024, seq=4096)
    cluster = cards.a100(8)
    plan = replace(cards.CARDS["c175-1024a"].calculon, tp=2, pp=2, dp=2, virtual=2, micro_batch=1)
    return cards.Card(dims=dims, cluster=replace(cluster, device=replace(cluster.device, memory_bytes=memory_bytes)), samples=4, calculon=plan)


def test_a_forced_plan_costs_the_same_both_ways_and_is_taken_apart_without_rest(cards: ModuleType) -> None:
    card = small(cards, 80 * cards.GIB)
    found = cards.outcome(card, seconds=0.0)
    forced = found.as_it_is.predicted
    assert found.as_it_is.mesh.sizes == (2, 2) and found.as_it_is.pipeline.num_ranks == 2 and found.as_it_is.residency.micro_batches == 2
    assert found.step_s == pytest.approx(forced.step_time_s, rel=0.03), "but for the optimizer"
    assert sum(found.terms.values()) == pytest.approx(forced.step_time_s, rel=1e-9)
    assert sum(cards.apart(found).values()) == pytest.approx(forced.step_time_s - card.calculon.step_s, rel=1e-9)
    assert all(found.terms[term] > 0 for term in cards.TERMS if term not in ("computed again", "optimizer"))
    assert found.fits and found.holds and found.searched.predicted.step_time_s < forced.step_time_s


def test_what_does_not_fit_is_made_to_fit_and_takes_longer(cards: ModuleType) -> None:
    card = small(cards, 80 * cards.GIB)
    free = cards.as_it_is(card).predicted
    limit = free.peak_memory_bytes * 4 // 5
    narrow = small(cards, limit)
    assert cards.as_it_is(narrow).predicted == free
    fitted = cards.made_to_fit(narrow)
    assert fitted.predicted.peak_memory_bytes <= limit and fitted.predicted.step_time_s > free.step_time_s
    assert fitted.residency.recompute and not cards.as_it_is(narrow).residency.recompute
    assert cards.made_to_fit(small(cards, limit // 10)) is None


@pytest.mark.parametrize(("name", "step_s", "share"), [
    ("c175-64a", 223.4, 0.757), ("c175-1024a", 14.21, 0.744), ("c175-1024h", 5.41, 0.610), ("c70-64a", 153.6, 0.683), ("c70-1024h", 8.05, 0.509), ("c405", 11.51, 0.271),
])  # fmt: skip
def test_calculons_terms_are_those_of_its_published_step_and_share_of_the_peak(cards: ModuleType, name: str, step_s: float, share: float) -> None:
    card = cards.CARDS[name]
    plan = card.calculon
    assert plan.step_s == pytest.approx(step_s, rel=1e-3) and plan.ideal_s / plan.step_s == pytest.approx(share, abs=1e-3)
    assert plan.tp * plan.pp * plan.dp == card.cluster.num_devices and card.samples % (plan.dp * plan.micro_batch) == 0
