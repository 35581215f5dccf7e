"""The lists that run the stages of a plan."""

from autopar.core.schedule import Kind, Schedule
from autopar.errors import UsageError
from autopar.schedules.check import check
from autopar.schedules.lower import lower, make_schedule
from autopar.schedules.orders import share_order
from autopar.stages import Stages


def schedule_of(stages: Stages, name: str | None = None, num_microbatches: int | None = None) -> Schedule:
    """The checked schedule of a pipeline: the one the plan names, unless `name` is given ("forward": inference).

    Raises UsageError for a split backward with ZeRO 2 or 3: each half would reduce-scatter the gradients of every microbatch.
    """
    pipeline = stages.pipeline
    if (name or pipeline.schedule) == "zero-bubble" and any(zero.stage > 1 for zero in stages.whole.residency.zero.values()):
        raise UsageError("schedule zero-bubble reduce-scatters gradients twice per microbatch under ZeRO 2 and 3; use ZeRO 1, or schedule 1f1b")
    number = num_microbatches or stages.whole.residency.micro_batches
    if pipeline.shares:
        shared = lower(share_order(pipeline.shares, training=name != "forward"), (), stages.tied)
        check(shared)
        return shared
    schedule = make_schedule(name or pipeline.schedule, pipeline.num_ranks, number, pipeline.virtual_stages, edges=stages.edges, tied=stages.tied)
    check(schedule)
    return schedule


def own_schedule(schedule: Schedule, stages: Stages) -> Schedule:
    """A list of the user's, if it runs these stages; raises UsageError where it is for others, ScheduleError where it cannot run."""
    wanted = (stages.whole.residency.micro_batches, stages.placement, stages.edges, stages.tied, True, stages.pipeline.shares)
    given = (schedule.num_microbatches, schedule.placement, schedule.edges, schedule.tied, schedule.training, schedule.shares)
    names = ("microbatches", "placement", "edges", "tied stages", "training", "shares")
    for name, a, b in zip(names, given, wanted):
        if a != b:
            raise UsageError(f"schedule {schedule.name}: {name} {a}, those of the plan are {b}; start from schedule_of(stages) and change the order")
    check(schedule)
    return schedule


def splits_backward(schedule: Schedule) -> bool:
    """Whether gradients of weights are put off."""
    return any(action.kind is Kind.W for actions in schedule.ranks for action in actions)
