"""What published software does not keep of what a traced program keeps from the forward of a microbatch to its backward."""

from autopar.core.again import KEPT
from autopar.core.graph import DTYPE_BYTES
from autopar.core.moves import COLLECTIVES
from autopar.cost_models.kernels import Kernels
from autopar.planner.work import WITH_WEIGHTS, fused_values
from autopar.program import Program

PRODUCT_BYTES = {"float8_e4m3fn": 1.0, "float4_e2m1fn": 0.5}


def spared_bytes(program: Program, kernels: Kernels) -> int:
    """Of one microbatch, in all blocks."""
    again = _communicated_bytes(program) if kernels.repeats_collectives else 0
    return again + _unmade_bytes(program, kernels)


def _communicated_bytes(program: Program) -> int:
    """Software that communicates again for its backward keeps what was sent, not what came: the difference; all that is kept of it where blocks are computed
    again."""
    modes, total = set(program.residency.recompute.values()), 0
    for (value, route), move in program.move_of.items():
        if move.live and move.step.forward in COLLECTIVES and program.graph.values[value].role == "op":
            before, after = program.local_bytes(value, move.src), program.local_bytes(value, route[-1])
            total += after * (program.becomes.get((value, route)) == KEPT) if "full" in modes else max(0, after - before)
    return total


def _unmade_bytes(program: Program, kernels: Kernels) -> int:
    """Links of fused chains, which the backward makes again, and of what only products in a narrower dtype read, which is kept in that, the rest."""
    graph, total = program.graph, 0.0
    if "full" in program.residency.recompute.values():
        return 0
    links = fused_values(program) if kernels.fused else frozenset()
    blocks = {i for segment in graph.segments if segment.block for i in segment.ops}
    for v in graph.differentiated:
        keepers = [i for i, k in graph.consumers[v] if _keeps(program, i, k)]
        if graph.values[v].role != "op" or not keepers:
            continue
        size, width = program.local_bytes(v, program.produced[v]), DTYPE_BYTES[graph.values[v].meta.dtype]
        if v in links:
            total += size
        elif all(i in blocks and graph.ops[i].kind in WITH_WEIGHTS for i in keepers):
            total += size * (1 - PRODUCT_BYTES.get(kernels.product_dtype or "", width) / width)
    return round(total)


def _keeps(program: Program, i: int, k: int) -> bool:
    """Whether the backward of operator i reads its operand k."""
    wanting = [j for j, v in enumerate(program.graph.ops[i].operands) if v in program.graph.differentiated]
    return program.rules[i].keeps_operand(k, wanting)
