"""Named plans that people know, as pins: priced by the same code as what the search finds."""

import re
from collections.abc import Callable

from autopar.core.mixed import Machines
from autopar.errors import UsageError

DATA_PARALLEL = {"ddp": 0, "zero1": 1, "zero2": 2, "zero3": 3, "fsdp": 3}
"""Every device has its own samples; the ZeRO stage that shards the state over them."""

DEGREE = re.compile(r"(dp|tp|pp|vpp)([0-9]{1,6})")
EXAMPLE = "megatron:tp8,pp4"


def _data_parallel(stage: int) -> Callable[[Machines], tuple[str, ...]]:
    return lambda cluster: (f"dp={cluster.num_devices}", "tp=1", f"zero={stage}")


NAMED: dict[str, Callable[[Machines], tuple[str, ...]]] = {
    **{name: _data_parallel(stage) for name, stage in DATA_PARALLEL.items()},
    "tp": lambda cluster: ("dp=1", f"tp={cluster.num_devices}"),
}


def baseline_pins(name: str, cluster: Machines) -> tuple[str, ...] | None:
    """The pins that a name stands for on a cluster; None where it is no baseline.

    `ddp`, `zero1`, `zero2`, `zero3` = `fsdp`, `tp`, and `megatron:tp8,pp4`: tensor parallelism inside pipeline stages, what is left of the
    devices data parallel with the optimizer sharded over it (ZeRO 1); `vpp2` for two virtual stages on each rank.
    """
    if name in NAMED:
        return NAMED[name](cluster)
    family, colon, text = name.partition(":")
    return _megatron(name, text, cluster) if family == "megatron" and colon else None


def _megatron(name: str, text: str, cluster: Machines) -> tuple[str, ...]:
    matches = [DEGREE.fullmatch(word.strip()) for word in text.split(",")]
    given = {match[1]: int(match[2]) for match in matches if match}
    if None in matches or len(given) != len(matches) or 0 in given.values():
        raise UsageError(f"baseline {name!r}: write its degrees as in {EXAMPLE}, each once; known are tp, pp, dp and vpp")
    tp, pp = given.get("tp", 1), given.get("pp", 1)
    rest = cluster.num_devices // (tp * pp)
    dp = given.get("dp", rest)
    if tp * pp * dp != cluster.num_devices:
        raise UsageError(f"baseline {name!r} makes tp {tp} x pp {pp} x dp {dp} = {tp * pp * dp} devices, {cluster.name} has {cluster.num_devices}")
    pipeline = (f"pp={pp}", *((f"virtual={given['vpp']}", "schedule=interleaved") if given.get("vpp", 1) > 1 else ("schedule=1f1b",))) if pp > 1 else ()
    return (f"dp={dp}", f"tp={tp}", *pipeline, *(("zero=1",) if dp > 1 else ()))
