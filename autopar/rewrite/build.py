"""Program to runnable modules: emit, check, spell, split."""

from typing import Any

import torch

from autopar.program import Program
from autopar.rewrite.again import mark_results
from autopar.rewrite.blocks import split_into_blocks
from autopar.rewrite.check import check_emitted, check_program
from autopar.rewrite.emit import emit
from autopar.rewrite.last import sum_at_last
from autopar.rewrite.spelling import spell
from autopar.rewrite.split import put_off_weight_gradients
from autopar.rewrite.tied import add_rows_where_tied
from autopar.runtime.built import Built


def build(program: Program, traced: Any, device: torch.device | None = None, *, split_backward: bool = False) -> Built:
    """Emit a program for a device; raises VerificationError if what came out is not what the plan says. `split_backward`: gradients of
    weights can be put off."""
    check_program(program)
    device = device or torch.device("cpu")
    emitted = emit(program, traced.gm, traced.node_of, device)
    check_emitted(program, emitted.graph)
    sum_at_last(emitted, program)
    if split_backward:
        put_off_weight_gradients(emitted, program)
    else:
        add_rows_where_tied(emitted, program, device)
    spell(emitted.graph)
    mark_results(emitted, program)
    return split_into_blocks(emitted, program)
