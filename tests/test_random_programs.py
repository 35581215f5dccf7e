"""Random models x random meshes x random plans in float64: loss, outputs, buffers, every gradient, replicas and bytes.

A plan is a random state at every node of the search, so it uses cuts that no search would ever choose.
"""

import random

import pytest

from autopar.core.mesh import Mesh
from tests.harness import mesh_of
from tests.programs import STEPS, RandomModel
from tests.whole import ModelCase

PLANS_PER_MODEL = 5
MESHES: tuple[Mesh, ...] = tuple(mesh_of(*sizes) for sizes in ((2,), (3,), (4,), (2, 2), (2, 3), (3, 2), (2, 2, 2)))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "model_seed" in metafunc.fixturenames:
        count = -(-metafunc.config.getoption("--programs") // PLANS_PER_MODEL)
        metafunc.parametrize("model_seed", range(count))


def test_random_plans_equal_one_process(model_seed: int) -> None:
    model = RandomModel(model_seed)
    case = ModelCase(model, model.inputs(model_seed), model_seed)
    for number in range(PLANS_PER_MODEL):
        rng = random.Random(f"{model_seed}/{number}")
        mesh = rng.choice(MESHES)
        outcome = case.run(case.random_program(mesh, rng))
        assert outcome.equal, f"model {model_seed}, plan {number} on {mesh}: {outcome}\n{model.describe()}"


def test_models_use_every_step() -> None:
    """The models of a short run reach all steps, and so all kinds of operators."""
    used = {name for seed in range(100) for name, _ in RandomModel(seed).plan}
    assert used == set(STEPS)
    assert len(STEPS) >= 20
