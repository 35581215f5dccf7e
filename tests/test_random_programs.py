"""Random models x random meshes x random plans in float64: loss, outputs, buffers, every gradient, replicas and bytes.

A plan is a random state at every node of the search, so it uses cuts that no search would ever choose.
"""

import random

import pytest

from autopar.core.mesh import Mesh
from autopar.core.plan import Plan
from autopar.planner.bind import bind
from autopar.program import Program
from tests.harness import mesh_of
from tests.programs import RandomModel
from tests.steps import STEPS
from tests.whole import ModelCase, plan_of

PLANS_PER_MODEL = 6
MESHES: tuple[Mesh, ...] = tuple(mesh_of(*sizes) for sizes in ((2,), (3,), (4,), (2, 2), (2, 3), (3, 2), (2, 2, 2)))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "model_seed" in metafunc.fixturenames:
        count = -(-metafunc.config.getoption("--programs") // PLANS_PER_MODEL)
        metafunc.parametrize("model_seed", range(count))


def same_program(a: Program, b: Program) -> bool:
    """Whether two programs move and compute the same; a strategy may have two names for the same layouts."""
    layouts = ([[p.needed(i, k) for k in range(len(op.operands))] for i, op in enumerate(p.graph.ops)] for p in (a, b))
    parts = ((p.mesh, p.storage, p.deferred, p.produced, p.relay, p.routes, p.output_routes, p.update_routes, p.ledger) for p in (a, b))
    return next(layouts) == next(layouts) and next(parts) == next(parts)


def test_random_plans_equal_one_process(model_seed: int) -> None:
    """The first plan of every model is also written, read and bound again: it must be the same program."""
    model = RandomModel(model_seed)
    case = ModelCase(model, model.inputs(model_seed), model_seed)
    meshes = random.Random(model_seed).sample(MESHES, 2)
    for number in range(PLANS_PER_MODEL):
        mesh = meshes[number % 2]
        program = case.random_program(mesh, random.Random(f"{model_seed}/{number}"))
        outcome = case.run(program)
        assert outcome.equal, f"model {model_seed}, plan {number} on {mesh}: {outcome}\n{model.describe()}"
        if number == 0:
            again = bind(Plan.from_json(plan_of(program).to_json()), case.graph)
            assert same_program(program, again), f"model {model_seed} on {mesh}: {model.describe()}"


def test_models_use_every_step() -> None:
    """The models of a short run reach all steps, and so all kinds of operators."""
    used = {name for seed in range(50) for name, _ in RandomModel(seed).plan}
    assert used == set(STEPS)
    assert len(STEPS) >= 20
