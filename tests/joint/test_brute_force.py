"""The joint search against all plans of small random instances: no plan is under its bound, it prices no plan that there is not, and it finds the best one."""

from random import Random

import pytest

from autopar.errors import InfeasibleError
from tests.joint.brute_force import BruteForce, drawn

PROBLEMS, SOME = 250, 12
"""Each under four limits of memory: 1,000 instances, and those of a short run."""

ROUNDING = 1e-9


def limits(forced: BruteForce, seed: int) -> list[int]:
    """That of the fullest plan, which all fit, and three that leave fewer and fewer."""
    random, held = Random(seed), sorted(plan.memory_bytes for plan in forced.plans)
    return [held[-1], *(held[int(len(held) * random.uniform(0, share))] for share in (1.0, 0.5, 0.2))]


def test_all_plans_of_small_problems(long: bool) -> None:
    for seed in range(PROBLEMS if long else SOME):
        instance = drawn(seed)
        forced = BruteForce(instance)
        for limit in limits(forced, seed):
            best_s = forced.best_s(limit)
            joint = instance.search(limit).search()
            assert joint.bound_s <= best_s * (1 + ROUNDING), f"the bound of {instance} within {limit} bytes is above a plan"
            assert joint.best.memory.high_bytes <= limit
            assert best_s <= joint.best.step_s * (1 + ROUNDING), f"{instance} within {limit} bytes: there is no such plan"
            assert joint.best.step_s <= best_s * (1 + ROUNDING), f"{instance} within {limit} bytes: there is a better plan"


@pytest.mark.parametrize("seed", (347, 348, 433))
def test_of_what_is_alike_in_the_linear_model_the_best_that_fits_is_found(seed: int) -> None:
    """Shardings that hold the same by the linear model differ in what is held beside it, and of these only some that are not the fastest fit. Or they differ in
    what a step takes, and the gap is no wide one."""
    instance = drawn(seed)
    forced = BruteForce(instance)
    limit = limits(forced, seed)[-1]
    assert instance.search(limit).search().best.step_s == pytest.approx(forced.best_s(limit), rel=ROUNDING)


@pytest.mark.parametrize("seed", range(4))
def test_what_no_plan_fits_is_refused(seed: int) -> None:
    instance = drawn(seed)
    least = min(plan.memory_bytes for plan in BruteForce(instance).plans)
    with pytest.raises(InfeasibleError, match="none of"):
        instance.search(least - 1).search()
