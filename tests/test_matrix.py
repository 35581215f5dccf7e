"""Every model on every mesh with every kind of plan, in both dtypes, with and without dropout. Runs with --long (half an hour)."""

import functools
import itertools

import pytest

import autopar
import autopar.request
import autopar.verification
from autopar.core.mesh import Mesh
from tests.test_end_to_end import DROPOUT_FIELDS, MODELS, compute_bound, load, prove

FORCED = ("dp=2", "tp=2", "dp=4", "tp=4", "dp=2,tp=2", "dp=8", "tp=8", "dp=4,tp=2", "dp=2,tp=4", "dp=3", "tp=3", "dp=2,tp=3", "dp=3,tp=2")
SEARCHED = ((2,), (4,), (2, 2), (2, 2, 2), (3,), (2, 3))
CASES = [
    (name, plan, dtype, dropout)
    for name, plan, dtype, dropout in itertools.product(MODELS, (*FORCED, *SEARCHED), ("float64", "float32"), (False, True))
    if not dropout or name in DROPOUT_FIELDS
]


@pytest.fixture(scope="module", autouse=True)
def _trace_once(long: bool):  # noqa: ANN202
    """A traced model is a value: the same one serves all its plans."""
    if not long:
        pytest.skip("the whole matrix runs with --long")
    known: dict = {}
    real = autopar.request.trace

    def remembered(model, args, kwargs, *, name="", float64=False):  # noqa: ANN001, ANN202
        key = (id(model), float64)
        if key not in known:
            known[key] = (real(model, args, kwargs, name=name, float64=float64), model)  # holds the model, so that its id stays its own
        return known[key][0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(autopar.request, "trace", remembered)
        patch.setattr(autopar.verification, "trace", remembered)
        yield


loaded_once = functools.lru_cache(maxsize=4)(load)


@pytest.mark.parametrize("name,plan,dtype,dropout", CASES, ids=str)
def test_equal(name: str, plan: str | tuple[int, ...], dtype: str, dropout: bool) -> None:
    loaded = loaded_once(name, dropout=dropout)
    if isinstance(plan, str):
        ranks = Mesh.of(**{k: int(v) for k, v in (pin.split("=") for pin in plan.split(","))}).num_ranks
        found = autopar.plan(loaded.module, autopar.Cluster.local(ranks), loaded.kwargs, pins=[plan])
    else:
        mesh = Mesh.of(**{f"x{i}": n for i, n in enumerate(plan)})
        found = autopar.plan(loaded.module, compute_bound(mesh.num_ranks), loaded.kwargs, mesh=mesh)
    prove(loaded, found, dtype)
