"""`autopar compare`: plans side by side, term by term."""

from typing import Annotated

import typer

from autopar.cli.console import output, print_json, working
from autopar.cli.options import (
    Asked,
    Batch,
    ClusterName,
    Debug,
    DType,
    Joint,
    Json,
    MicroBatches,
    ModelName,
    Offload,
    PinTexts,
    Pipelines,
    Seq,
    checked_pins,
    default_dtype,
    global_batch,
)
from autopar.cli.points import SEARCHED, pins_of, point, print_points
from autopar.core.collector import collector_paused
from autopar.core.mixed import parse_machines
from autopar.core.plan import Plan
from autopar.models.load import check_name

Names = Annotated[
    list[str] | None,
    typer.Argument(metavar="[PLAN]...", help="searched, ddp, zero1, zero2, zero3 or fsdp, tp, megatron:tp8,pp4, pins such as dp=2,tp=2, or a plan file. [default: searched ddp fsdp tp]"),
]
DEFAULT = (SEARCHED, "ddp", "fsdp", "tp")


def compare(
    model: ModelName, cluster: ClusterName, names: Names = None, batch: Batch = None, seq: Seq = None, dtype: DType = None, pin: PinTexts = None,
    micro_batches: MicroBatches = None, offload: Offload = False, pipelines: Pipelines = False, joint: Joint = None, json: Json = False, debug: Debug = False,
) -> int:  # fmt: skip
    """Price plans of MODEL side by side: the searched one, named baselines, pins, plan files. All by the same costs."""
    machines = parse_machines(cluster)
    check_name(model)
    wanted = tuple(names or DEFAULT)
    for name in wanted:
        if name.endswith(".json"):
            Plan.load(name)
        else:
            checked_pins((*(pin or ()), *pins_of(name, machines)), machines)
    asked = Asked(pins=tuple(pin or ()), micro_batches=micro_batches, offload=offload, pipelines=pipelines, dtype=dtype or default_dtype(machines), joint=joint)
    with collector_paused(), working("loading torch") as progress:
        from autopar.models.load import load_model
        from autopar.request import Request

        loaded = load_model(model, batch=global_batch(batch, machines, micro_batches), seq=seq, device="meta", dtype=asked.dtype)
        request = Request(loaded.module, loaded.kwargs)
        points = [point(request, name, machines, asked, tokens=loaded.tokens_per_batch, progress=progress) for name in wanted]
    if json:
        print_json({"model": loaded.name, "cluster": machines.name, "plans": [p.content() for p in points]})
    else:
        print_points(output(), points, machines)
    return 0
