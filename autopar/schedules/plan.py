"""The lists that run the stages of a plan."""

from autopar.core.schedule import Schedule
from autopar.errors import UsageError
from autopar.schedules.check import check
from autopar.schedules.lower import make_schedule
from autopar.stages import Stages


def schedule_of(stages: Stages, name: str | None = None, num_microbatches: int | None = None) -> Schedule:
    """The checked schedule of a pipeline: the one the plan names, unless `name` is given ("forward": inference).

    Raises UsageError for a split backward with ZeRO 2 or 3: each half would reduce-scatter the gradients of every microbatch.
    """
    pipeline = stages.pipeline
    if (name or pipeline.schedule) == "zero-bubble" and any(zero.stage > 1 for zero in stages.whole.residency.zero.values()):
        raise UsageError("schedule zero-bubble reduce-scatters gradients twice per microbatch under ZeRO 2 and 3; use ZeRO 1, or schedule 1f1b")
    number = num_microbatches or stages.whole.residency.micro_batches
    schedule = make_schedule(name or pipeline.schedule, pipeline.num_ranks, number, pipeline.virtual_stages, edges=stages.edges, tied=stages.tied)
    check(schedule)
    return schedule
