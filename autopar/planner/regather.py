"""Where the backward of a block that is not computed again gathers again, and how long it holds what came."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from autopar.core.again import AGAIN
from autopar.planner.steps import Script


@dataclass(frozen=True, slots=True)
class Regathered:
    """The result of an all-gather, of local number `owner`, as the backward of one step reads it. `gather`: the step that makes it; `first`: nothing has
    read it before, `last`: nothing does later."""

    owner: int
    gather: int
    num_bytes: int
    workspace_bytes: int
    first: bool
    last: bool


def gathers(script: Script, replay: Sequence[str]) -> Mapping[int, int]:
    """What is gathered again, by its number, and the step that makes it."""
    return {step.results[0]: i for i, (step, what) in enumerate(zip(script.steps, replay)) if step.collective and what == AGAIN}


def regathered(script: Script, replay: Sequence[str]) -> Mapping[int, Sequence[Regathered]]:
    """By step, of those whose backward reads what is gathered again."""
    made = gathers(script, replay)
    readers: dict[int, list[int]] = {}
    for i, step in enumerate(script.steps):
        for n in step.saved if step.live else ():
            if n in made:
                readers.setdefault(n, []).append(i)
    found: dict[int, list[Regathered]] = {}
    for n, steps in readers.items():
        move = script.steps[made[n]]
        for i in steps:
            what = Regathered(n, made[n], sum(size for _, size in move.made), move.workspace_bytes, i == steps[-1], i == steps[0])
            found.setdefault(i, []).append(what)
    return found
