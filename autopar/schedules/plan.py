"""The lists that run the stages of a plan."""

from autopar.core.schedule import Schedule
from autopar.schedules.check import check
from autopar.schedules.lower import make_schedule
from autopar.stages import Stages


def schedule_of(stages: Stages, name: str | None = None, num_microbatches: int | None = None) -> Schedule:
    """The checked schedule of a pipeline: the one the plan names, unless `name` is given ("forward": inference)."""
    pipeline = stages.pipeline
    number = num_microbatches or stages.whole.residency.micro_batches
    schedule = make_schedule(name or pipeline.schedule, pipeline.num_ranks, number, pipeline.virtual_stages, edges=stages.edges, tied=stages.tied)
    check(schedule)
    return schedule
