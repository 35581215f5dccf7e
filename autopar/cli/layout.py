"""A plan in few lines: what each mesh axis cuts, and where the parameters lie, layers of one kind counted together."""

import re
from collections import Counter
from dataclasses import dataclass

from autopar.core.layout import format_layout
from autopar.core.mixed import Machines, MixedCluster
from autopar.core.pipeline import PP
from autopar.core.plan import Plan

LAYER_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)|(?<=\.)\d+$")
OVERLOAD_AND_NUMBER = re.compile(r"(_(default|tensor|scalar|int|dim|self))?(_\d+)?$")
WORKING = re.compile(r"mm$|matmul|linear|conv|einsum|attention|embedding|cross_entropy|norm|loss")
"""Kinds of operators that a reader wants to see: those that compute, not those that only rename dimensions."""


@dataclass(frozen=True)
class Group:
    """Parameters that differ only in the number of their layer and lie the same way."""

    pattern: str
    layout: str
    count: int
    whole: bool


@dataclass(frozen=True)
class AxisUse:
    """One mesh axis: how many ranks, over which links they talk, and which loop of which operators it cuts."""

    name: str
    size: int
    link: str
    cuts: str


def parameter_groups(plan: Plan) -> tuple[Group, ...]:
    """In the order of the model; a pattern appears twice where layers of one kind lie differently."""
    counted: Counter[tuple[str, str, bool]] = Counter()
    for name, layout in plan.params:
        whole = all(placement.kind == "I" for placement in layout)
        words = " ".join(word for word in format_layout(layout, plan.mesh).split(",") if not word.endswith("=I"))
        counted[LAYER_NUMBER.sub("*", name), words or "whole", whole] += 1
    return tuple(Group(pattern, words, count, whole) for (pattern, words, whole), count in counted.items())


def axis_uses(plan: Plan, cluster: Machines) -> tuple[AxisUse, ...]:
    """Mesh axes, outermost first."""
    kinds = {name: OVERLOAD_AND_NUMBER.sub("", name) for name, _ in plan.ops}
    words = {name: dict(item.partition(":")[::2] for item in strategy.split(",") if item) for name, strategy in plan.ops}
    uses = []
    inner = plan.num_ranks
    for axis in plan.whole_mesh.axes:
        inner //= axis.size
        link = _link(plan, cluster, axis.name, inner * axis.size)
        if plan.pipeline is not None and axis.name == PP:
            what = "nothing: copies share out the microbatches" if plan.pipeline.shares else f"the model into {plan.pipeline.num_stages} stages, schedule {plan.pipeline.schedule}"
            uses.append(AxisUse(axis.name, axis.size, link, what))
            continue
        cuts: dict[str, Counter[str]] = {}
        for name, kind in kinds.items():
            word = words[name].get(axis.name, "I")
            if WORKING.search(kind) and word not in ("I", "R"):
                cuts.setdefault(kind, Counter())[word] += 1
        uses.append(AxisUse(axis.name, axis.size, link, "; ".join(_words(kind, counts) for kind, counts in cuts.items()) or "nothing"))
    return tuple(uses)


def _link(plan: Plan, cluster: Machines, axis: str, spanned: int) -> str:
    """What the ranks of an axis, which spans so many devices, talk over: on groups of different devices the links of each."""
    if plan.pipeline is not None and axis == PP and isinstance(cluster, MixedCluster):
        return cluster.between.name
    links = [group.intra_node if spanned <= group.devices_per_node else group.inter_node for group in cluster.groups]
    return " / ".join(dict.fromkeys(link.name for link in links))


def _words(kind: str, counts: Counter[str]) -> str:
    return f"{kind} " + ", ".join(f"{word} x{count}" if count > 1 else word for word, count in counts.most_common())
