"""`autopar run`: a short training on processes of this machine, beside the same training in one process."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autopar.cli.console import output, print_json, working
from autopar.cli.options import (
    Asked,
    Batch,
    ClusterName,
    Debug,
    Json,
    MicroBatches,
    ModelName,
    Offload,
    PinTexts,
    Pipelines,
    PlanFile,
    Seed,
    Seq,
    Steps,
    asked_for,
    checked_pins,
    checked_share,
    global_batch,
    read_plan,
)
from autopar.core.mixed import parse_machines
from autopar.core.plan import Plan
from autopar.errors import PlanMismatchError, UsageError, VerificationError
from autopar.models.load import check_name

if TYPE_CHECKING:
    from autopar.cli.training import Job

MAX_TEXT_BYTES = 16 << 20
LOSS_TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2}
"""Relative. float32 with Adam is near 1e-6 after a few steps; a gradient that is wrong shows far above this. A bfloat16 carries 8 bits."""

LearningRate = Annotated[float, typer.Option("--lr", help="Of AdamW.")]
TextFile = Annotated[Path | None, typer.Option("--text", help="File whose bytes are the tokens. [default: the manual that Python brings along]")]
DType = Annotated[str | None, typer.Option("--dtype", help="float32 or bfloat16 (with float32 master weights). [default: the plan's, else float32]")]
Compare = Annotated[bool, typer.Option("--compare/--no-compare", help="Train in one process too, and show both losses.")]


def run(
    model: ModelName, cluster: ClusterName, plan: PlanFile = None, pin: PinTexts = None, micro_batches: MicroBatches = None, offload: Offload = False, pipelines: Pipelines = False,
    batch: Batch = None, seq: Seq = None, dtype: DType = None, steps: Steps = 10, lr: LearningRate = 1e-3, text: TextFile = None, compare: Compare = True, seed: Seed = 0, json: Json = False, debug: Debug = False,
) -> int:  # fmt: skip
    """Train MODEL on the processes of local:N, by a plan, with real gloo communication. Exit 5 if the losses are not those of one process."""
    machines = parse_machines(cluster)
    if not machines.name.startswith("local:"):
        raise UsageError(f"--cluster {cluster}: run starts processes on this machine; use local:N, or torchrun with autopar.parallelize elsewhere")
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        raise UsageError("run starts its processes itself; call it without torchrun")
    check_name(model)
    checked_share("--lr", lr, 1e6)
    if dtype not in (None, *LOSS_TOLERANCE):
        raise UsageError(f"--dtype {dtype}: run trains in {' or '.join(LOSS_TOLERANCE)}")
    asked = Asked(pins=checked_pins(pin, machines), micro_batches=micro_batches, offload=offload, pipelines=pipelines)
    given = None if plan is None else read_plan(plan, machines, asked)
    kind = asked_for(given, dtype, "float32")
    corpus = None if text is None else _read(text)
    with working("loading torch") as progress:
        from autopar.cli.searching import search
        from autopar.cli.training import Job, draws_random_numbers, on_one_process, token_input
        from autopar.models.load import load_model

        size = global_batch(batch, machines, given.residency.micro_batches if given else micro_batches)
        shapes = load_model(model, batch=size, seq=seq, dtype=kind)
        reads = token_input(shapes) is not None
        if corpus is not None and not reads:
            raise UsageError(f"--text {text}: {model} does not read text; leave it out to train on random numbers")
        dice_off = compare and draws_random_numbers(shapes.module)
        shapes.module.train(not dice_off)
        found = given or search(shapes, machines, asked, progress=progress)[0].plan
        job = Job(
            model=model, cluster=cluster, plan=found.to_json(), batch=size, seq=seq, dtype=kind, steps=steps, lr=lr, seed=seed,
            train=not dice_off, text=None if not reads else _manual() if corpus is None else corpus,
        )  # fmt: skip
        next(job.batches(shapes))  # a text that is too short is refused before anything is trained
        expected = on_one_process(job, progress) if compare else None
        if json:
            progress("starting processes")
            losses = _train(job, found, lambda step, loss: progress(f"step {step} of {steps}, loss {loss:.4f}"))
    if not json:
        losses = _print_training(job, found, expected)
    worst = _worst(losses, expected)
    if json:
        print_json(
            {"model": model, "cluster": machines.name, "layout": found.summary(), "losses": losses, "one_process": expected, "max_difference": worst}
        )
    return VerificationError.exit_code if worst is not None and worst > LOSS_TOLERANCE[kind] else 0


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            return stream.read(MAX_TEXT_BYTES)
    except OSError as error:
        raise UsageError(f"--text {path}: cannot be read ({error.strerror}); give the path of a text file") from error


def _manual() -> bytes:
    """Half a megabyte of English that every Python has: its own manual."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics)).encode()


def _train(job: "Job", plan: Plan, show: Callable[[int, float], None]) -> list[float]:
    """The losses of the parallel run; `show(step, loss)` as each arrives."""
    from autopar.cli.training import PRELOAD, on_rank
    from autopar.runtime.launch import launch

    losses: list[float] = []

    def arrived(loss: float) -> None:
        losses.append(loss)
        show(len(losses), loss)

    try:
        launch(on_rank, plan.num_ranks, job, on_message=arrived, preload=PRELOAD)
    except PlanMismatchError as error:
        raise PlanMismatchError(f"{error}; for run a plan is made with --dtype float32 or bfloat16, and if the model has dropout run with --no-compare") from error
    return losses


def _print_training(job: "Job", plan: Plan, expected: list[float] | None) -> list[float]:
    """The losses, printed as they come; nothing before the first, so that a run that cannot start leaves stdout empty."""
    from autopar.cli.training import difference

    page = output()
    ranks = plan.num_ranks
    data = "random numbers" if job.text is None else f"a text of {len(job.text)} bytes"

    def head() -> None:
        page.print(f"{job.model} as {plan.summary()} on {ranks} processes, batch {job.batch} of {data}, AdamW {job.lr:g}", style="bold")
        if not job.train:
            page.print("note: dropout is off, so that both runs can be compared; --no-compare trains with it")
        names = f"{ranks} process{'es' * (ranks > 1)}"
        page.print(f"{'step':>5}  {names:>12}" + (f"  {'one process':>12}  {'difference':>10}" if expected else ""))

    def row(step: int, loss: float) -> None:
        if step == 1:
            head()
        beside = f"  {expected[step - 1]:12.6f}  {difference(loss, expected[step - 1]):10.1e}" if expected else ""
        page.print(f"{step:5d}  {loss:12.6f}{beside}")

    losses = _train(job, plan, row)
    worst = _worst(losses, expected)
    if worst is not None:
        page.print(f"largest difference {worst:.1e} of the loss: {'the same training' if worst <= LOSS_TOLERANCE[job.dtype] else 'NOT the same training'}")
    return losses


def _worst(losses: list[float], expected: list[float] | None) -> float | None:
    from autopar.cli.training import difference

    return max((difference(a, b) for a, b in zip(losses, expected, strict=True)), default=0.0) if expected is not None else None
