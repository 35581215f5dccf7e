"""An operator under the name users call it by: the same call, bit for bit."""

import copy

import pytest
import torch
import torch.utils._pytree as pytree

from autopar.rewrite.spelling import spell, spelled
from tests.rules.call import OpCase, Sample
from tests.rules.test_rules import SAMPLES

RESPELLED = tuple(s for s in SAMPLES if spelled(s.target) is not s.target)


def test_most_operators_have_a_name() -> None:
    assert {"aten.linear.default", "aten.reshape.default", "aten.layer_norm.default", "aten.sum.dim_IntList"} <= {s.kind for s in RESPELLED}
    assert len(RESPELLED) > len(SAMPLES) / 2


@pytest.mark.parametrize("sample", RESPELLED, ids=str)
def test_spelling_keeps_the_bits(sample: Sample) -> None:
    one = OpCase(sample)
    renamed = copy.deepcopy(one.gm)
    spell(renamed.graph)
    renamed.recompile()
    assert renamed.code != one.gm.code
    wanted, found = (pytree.tree_leaves(gm(*one.inputs)) for gm in (one.gm, renamed))
    assert len(wanted) == len(found)
    for a, b in zip(wanted, found):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
        assert not sample.exact or torch.equal(a.nan_to_num(), b.nan_to_num())
