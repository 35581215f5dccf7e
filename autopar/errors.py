"""Every error a user can cause: one line that says what, where and what to do."""


class AutoparError(Exception):
    """Base of all errors that autopar raises on purpose; `exit_code` is what the command line returns."""

    exit_code = 2


class UsageError(AutoparError):
    """An argument, pin or file that cannot be used as given."""


class FileFormatError(AutoparError):
    """A plan, cluster or config file that does not follow its schema."""


class TraceError(AutoparError):
    """The model could not be turned into a graph."""


class NoFamilyError(AutoparError):
    """The graph of a model does not follow from its batch and depth in a way that can be read off short traces; says why."""


class LayoutError(AutoparError):
    """A layout that does not fit a tensor or a mesh."""


class PlanMismatchError(AutoparError):
    """A plan that was made for another model, mesh or version."""


class CheckpointError(AutoparError):
    """A checkpoint or weights that cannot be written, or that are not those of this model."""


class PinConflictError(UsageError):
    """Pins that no plan can satisfy together; the message names both."""


class InfeasibleError(AutoparError):
    """No plan fits the memory of the devices."""

    exit_code = 3


class ScheduleError(AutoparError):
    """A pipeline schedule that is incomplete, out of order or stuck; says which rank and which of its actions."""

    def __init__(self, schedule: str, rank: int | None, action: str | None, reason: str) -> None:
        place = "" if rank is None else f", rank {rank}" + ("" if action is None else f", {action}")
        super().__init__(f"schedule {schedule}{place}: {reason}")
        self.rank, self.action, self.reason = rank, action, reason


class VerificationError(AutoparError):
    """The emitted program is malformed or does not compute what the model computes."""

    exit_code = 5
