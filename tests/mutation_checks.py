"""The fixed checks that must see every mistake: a few routes, a few operators, and a small model under a few plans."""

from functools import cache

import torch

from autopar.core.graph import TensorMeta
from autopar.core.layout import I, Layout, P, R, S
from autopar.core.mesh import Mesh
from tests.harness import Outcome, check_route, mesh_of
from tests.mutation_model import model_outcome
from tests.rules.call import OpCase, Sample
from tests.rules.draws import INT, TARGET, X, call

ROUTES: dict[str, tuple[Mesh, tuple[Layout, ...]]] = {
    "R from I": (mesh_of(2), ((I,), (R,))),
    "R from S": (mesh_of(3), ((S(0),), (R,))),
    "S from S": (mesh_of(2), ((S(0),), (S(1),))),
    "S from I": (mesh_of(3), ((I,), (S(0),))),
    "S from P": (mesh_of(3), ((P,), (S(1),))),
    "P from S": (mesh_of(2), ((S(0),), (P,))),
    "P from I": (mesh_of(2), ((I,), (P,))),
    "I from P": (mesh_of(2), ((P,), (I,))),
    "strided": (mesh_of(2), ((I,), (S(0, 3),))),
    "two axes": (mesh_of(2, 3), ((S(0), S(0)), (S(0), S(1)), (S(0), R))),
}

SAMPLES: dict[str, Sample] = {
    "linear": call("linear", X(4, 12), X(12, 12), X(12)),
    "layer norm": call("layer_norm", X(4, 12, 6), [6], X(6), X(6)),
    "batch norm": call("autopar.batch_norm", X(12, 6), X(6), X(6), 1e-5),
    "mean": call("mean.dim", X(4, 12), [1]),
    "embedding": call("embedding", X(12, 4), INT(12, 24), 3),
    "dropout": call("autopar.dropout", X(4, 12), 0.4, 1),
    "cross entropy": call("autopar.token_cross_entropy", X(4, 12), TARGET(12, 4), -100, 0.1),
    "gelu": call("gelu", X(4, 12)),
    "attention": call("autopar.attention", X(4, 4, 6, 3), X(4, 4, 6, 3), X(4, 4, 6, 3), None, 0.3, False, None, False, 3),
}


@cache
def case_of(name: str) -> OpCase:
    case = OpCase(SAMPLES[name])
    assert case.reference
    return case


def op_outcome(case: OpCase) -> Outcome:
    worst = Outcome()
    for mesh in (mesh_of(2), mesh_of(2, 2)):
        for strategy in case.strategies(mesh):
            worst = worst.worse(case.check(mesh, strategy))
    return worst


def outcome_of(check: str) -> Outcome:
    if check in ROUTES:
        mesh, route = ROUTES[check]
        return check_route(route, TensorMeta((12, 12), "float64", True), mesh, torch.Generator().manual_seed(5))
    return model_outcome() if check == "model" else op_outcome(case_of(check))
