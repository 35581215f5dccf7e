"""Every rule, every strategy: the operator cut on a simulated mesh against the whole operator, forward and backward."""

from functools import cache

import pytest

from autopar.core.rule import replicated_rule
from autopar.rules.registry import registered
from tests.harness import Outcome
from tests.rules import samples_contraction, samples_pointwise, samples_reduction, samples_shape
from tests.rules.call import ONE_AXIS, TWO_AXES, OpCase, Sample, combinations, with_frozen

SAMPLES: tuple[Sample, ...] = (*samples_pointwise.SAMPLES, *samples_shape.SAMPLES, *samples_reduction.SAMPLES, *samples_contraction.SAMPLES)
FEWEST = 10_000

each_sample = pytest.mark.parametrize("sample", SAMPLES, ids=str)


@cache
def case_of(sample_number: int) -> OpCase:
    return OpCase(SAMPLES[sample_number])


def case(sample: Sample) -> OpCase:
    return case_of(SAMPLES.index(sample))


def test_every_rule_has_a_sample() -> None:
    sampled = {sample.kind for sample in SAMPLES if sample.known}
    assert sorted(set(registered()) - sampled) == [], "registered without a sample"
    assert sorted(sampled - set(registered())) == [], "sampled without a rule"


def test_sample_names_are_distinct() -> None:
    names = [str(sample) for sample in SAMPLES]
    assert len(set(names)) == len(names), sorted(n for n in set(names) if names.count(n) > 1)


def test_enough_combinations() -> None:
    """How many (sample, mesh, strategy) the test below runs."""
    assert sum(len(combinations(case(sample))) for sample in SAMPLES) >= FEWEST


@each_sample
def test_every_strategy_equals_the_whole(sample: Sample, long: bool) -> None:
    """All strategies on meshes (2), (3) and (4); on (2, 2) and (2, 3) a sample, or all with --long."""
    one = case(sample)
    worst, failed = Outcome(), []
    for mesh, strategy in combinations(one, sampled=None if long else 12):
        outcome = one.check(mesh, strategy)
        worst = worst.worse(outcome)
        if not outcome.equal:
            failed.append(f"{mesh}: {one.rule.describe(strategy, mesh)}: {outcome}")
    assert not failed, "\n".join(failed[:10])
    assert worst.equal


@each_sample
def test_frozen_operands_take_no_gradient(sample: Sample) -> None:
    """With some operands frozen the others still get their whole gradients, and no bytes move for those that are."""
    for partly in with_frozen(sample):
        one = OpCase(partly)
        assert one.gradient_marks_agree()
        for strategy in one.strategies(ONE_AXIS[0]):
            outcome = one.check(ONE_AXIS[0], strategy)
            assert outcome.equal, f"{partly}: {one.rule.describe(strategy, ONE_AXIS[0])}: {outcome}"


@each_sample
def test_rules_cover_what_they_should(sample: Sample) -> None:
    """A rule that gives up where it should not, or cuts where it must not, is found here."""
    one = case(sample)
    assert one.rule.known == sample.known
    assert one.gradient_marks_agree()
    if not sample.known:
        op = one.graph.ops[0]
        ranks = ([len(one.graph.values[v].meta.shape) for v in vs] for vs in (op.operands, op.results))
        assert one.rule == replicated_rule(*ranks)


@each_sample
def test_strategies_survive_text(sample: Sample) -> None:
    """A strategy that is written and read again gives the same layouts."""
    rule = case(sample).rule
    for mesh in (*ONE_AXIS, *TWO_AXES):
        for strategy in case(sample).strategies(mesh):
            again = rule.parse(rule.describe(strategy, mesh), mesh)
            assert rule.legal(again, mesh)
            for k in range(len(rule.operands)):
                assert rule.operand_layout(k, again, mesh) == rule.operand_layout(k, strategy, mesh)
            for j in range(len(rule.results)):
                assert rule.result_layout(j, again, mesh) == rule.result_layout(j, strategy, mesh)


def test_contractions_can_be_cut_every_way() -> None:
    """A linear layer has the data-, column- and row-parallel cuts, and the cuts of its fused projections' heads."""
    linear = case(next(s for s in SAMPLES if s.kind == "aten.linear.default"))
    words = {linear.rule.describe(s, ONE_AXIS[0]) for s in linear.strategies(ONE_AXIS[0])}
    assert words == {"a:I", "a:R", "a:b0", "a:b1", "a:i", "a:o", "a:0+2~", "a:1+2~"}
    fused = case(next(s for s in SAMPLES if s.note == "fused projection"))
    layouts = {str(fused.rule.operand_layout(0, s, ONE_AXIS[1])) for s in fused.strategies(ONE_AXIS[1])}
    assert "(S1/3,)" in layouts
