"""Tells collectives, and products with weights, of blocks of which not everything is kept what becomes of their results."""

from collections.abc import Callable

from autopar.core.again import AGAIN, KEPT
from autopar.core.residency import computes_again
from autopar.program import Program, Tensor
from autopar.rewrite.emit import Emitted
from autopar.runtime.moves import PAIR_OF
from autopar.runtime.tape import product


def mark_results(emitted: Emitted, program: Program) -> None:
    """As `Program.replays` has it; where nothing is said a collective's result is kept and a product is made again."""
    products, known = _products(program), dict[tuple[Callable, str], Callable]()
    mesh = next(n for n in emitted.graph.nodes if n.op == "placeholder")
    for node in emitted.graph.nodes if program.replays else ():
        if node.op != "call_function":
            continue
        if node.target in PAIR_OF and "route" in node.meta:
            becomes = program.becomes.get(node.meta["route"], KEPT)
            node.kwargs = node.kwargs if becomes == KEPT else {**node.kwargs, "becomes": becomes}
        elif node.meta.get("made") in products:
            key = node.target, products[node.meta["made"]]
            node.target = known.setdefault(key, product(*key))
            node.args = (mesh, *node.args)


def _products(program: Program) -> dict[Tensor, str]:
    """Products with weights that are not simply made again."""
    found = {}
    for s in (s for s in program.replays if computes_again(program.mode(s))):
        for part, becomes in zip(program.parts(s), program.replays[s], strict=True):
            if part.contraction and becomes != AGAIN:
                found[part.makes[0]] = becomes
    return found
