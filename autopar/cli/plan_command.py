"""`autopar plan`: the best layout found, why it can be believed, and what to type next."""

import json as json_text
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    checked_share,
    default_dtype,
    global_batch,
)
from autopar.cli.searching import checked_budget, search
from autopar.core.collector import collector_paused
from autopar.core.mixed import Machines, parse_machines
from autopar.core.objective import Objective
from autopar.core.parts import NAMED
from autopar.core.plan import Plan
from autopar.core.units import DURATION, parse_quantity
from autopar.errors import UsageError
from autopar.models.load import check_name

if TYPE_CHECKING:
    from autopar.choice import Chosen
    from autopar.models.load import LoadedModel

BUDGET_ENDED = 4
VERIFIED_DTYPES = ("float32", "bfloat16")

Budget = Annotated[float | None, typer.Option("--budget", help="Seconds that the joint search may take, or that of one mesh. [default: 30, which the joint search has behind its first plan]")]
MaxMemory = Annotated[float, typer.Option("--max-memory", help="Share of a device's memory that the plan may use.")]
OutFile = Annotated[Path | None, typer.Option("--out", "-o", help="Write the plan to this file.")]
Best = Annotated[str, typer.Option("--objective", help="time, memory (of the fullest device), devices (the fewest) or cost (device-seconds a step).")]
Within = Annotated[str | None, typer.Option("--within", metavar="DURATION", help="The longest a step may take, such as '2 s' or '300 ms'.")]
FewerDevices = Annotated[bool, typer.Option("--fewer-devices", help="Look at parts of the cluster too, as objectives devices and cost always do.")]
AllowGap = Annotated[bool, typer.Option("--allow-gap", help="Exit 0, not 4, when the time was over before the search was.")]


def plan(
    model: ModelName, cluster: ClusterName, batch: Batch = None, seq: Seq = None, dtype: DType = None, pin: PinTexts = None,
    micro_batches: MicroBatches = None, offload: Offload = False, pipelines: Pipelines = False, joint: Joint = None, objective: Best = "time", within: Within = None,
    fewer_devices: FewerDevices = False, budget: Budget = None, max_memory: MaxMemory = 0.9, out: OutFile = None, allow_gap: AllowGap = False, json: Json = False, debug: Debug = False,
) -> int:  # fmt: skip
    """Find the best layout of MODEL on a cluster. Needs no device, no weights and no network."""
    machines = parse_machines(cluster)
    check_name(model)
    asked = Asked(pins=checked_pins(pin, machines), micro_batches=micro_batches, offload=offload, pipelines=pipelines, dtype=dtype or default_dtype(machines), joint=joint)
    limits = checked_budget(budget)
    checked_share("--max-memory", max_memory, 1.0)
    _check_writable(out)
    goal = Objective(objective, math.inf if within is None else _longest(within), fewer_devices)
    with collector_paused(), working("loading torch") as progress:
        from autopar.models.load import load_model

        size = global_batch(batch, machines, micro_batches)
        loaded = load_model(model, batch=size, seq=seq, device="meta", dtype=asked.dtype)
        chosen, seconds = search(loaded, machines, asked, goal, limits=limits, max_memory=max_memory, progress=progress)
    found, part = chosen.plan, chosen.best.cluster
    if out is not None:
        _save(found, out)
    if json:
        print_json(_content(chosen, goal, seconds))
    else:
        from autopar.cli.plan_page import print_looked, print_plan

        given = _Given(model, cluster, batch, seq, asked, out)
        if part is not machines and out is None:
            given = given.on(part, size)
        if len(chosen.looked) > 1:
            print_looked(output(), chosen)
        print_plan(output(), found, part, tokens=_counts_tokens(loaded), next_command=given.next_command(loaded))
    return BUDGET_ENDED if found.proof.status.startswith("budget") and not allow_gap else 0


def _longest(text: str) -> float:
    """Seconds of `--within`."""
    try:
        return parse_quantity(text, DURATION)
    except UsageError as error:
        raise UsageError(f"--within: {error}") from None


def _counts_tokens(loaded: "LoadedModel") -> bool:
    return loaded.labels_kind == "token" or "input_ids" in loaded.kwargs


@dataclass(frozen=True)
class _Given:
    """The command line as it was given, to say how it goes on."""

    model: str
    cluster: str
    batch: int | None
    seq: int | None
    asked: Asked
    out: Path | None

    def on(self, part: Machines, batch: int) -> "_Given":
        """The same for a part of the cluster, where that has a name of its own."""
        return replace(self, cluster=part.name, batch=batch) if NAMED.fullmatch(part.name) else self

    def next_command(self, loaded: "LoadedModel") -> str:
        """Prove the plan where this machine can; else keep it, or prove the smallest model of its kind."""
        from autopar.cli.verify_command import too_large

        options: list[tuple[str, object]] = [("--cluster", self.cluster), ("--batch", self.batch), ("--seq", self.seq)]
        shape = [f"{name} {value}" for name, value in options if value is not None]
        elements = sum(p.numel() for p in loaded.module.parameters())
        if not too_large(elements, num_ranks=1):
            plan = [f"--plan {self.out}"] if self.out and self.asked.dtype in VERIFIED_DTYPES else self.asked.options()
            return " ".join(["autopar verify", self.model, *shape, *plan])
        if self.out is None:
            return " ".join(["autopar plan", self.model, *shape, *self.asked.options(), "-o plan.json"])
        return f"autopar verify {_tiny_relative(self.model)} --cluster local:4"


def _tiny_relative(model: str) -> str:
    """The small preset of the same family, or of the commonest."""
    from autopar.models.catalog import presets

    families = {p.family for p in presets() if p.name == model} or {"llama"}
    return next((p.name for p in presets() if p.is_tiny and p.family in families), "gpt2-tiny")


def _check_writable(path: Path | None) -> None:
    """Refuse before the search what could not be written after it."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise UsageError(f"-o {path}: {'is a folder' if path.is_dir() else 'its folder does not exist'}; give the path of a file to write")


def _save(found: Plan, path: Path) -> None:
    try:
        found.save(path)
    except OSError as error:
        raise UsageError(f"-o {path}: cannot be written ({error.strerror}); choose another path") from error


def _content(chosen: "Chosen", objective: Objective, seconds: dict[str, float]) -> dict[str, Any]:
    found = chosen.plan
    return {
        "model": found.model,
        "cluster": found.cluster,
        "layout": found.summary(),
        "predicted": asdict(found.predicted),
        "proof": asdict(found.proof),
        "objective": {"best": objective.best, "within_s": None if objective.within_s == math.inf else objective.within_s, "looked": [looked.content() for looked in chosen.looked]},
        "seconds": seconds,
        "notes": list(found.notes),
        "plan": json_text.loads(found.to_json()),
    }
