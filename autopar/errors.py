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


class LayoutError(AutoparError):
    """A layout that does not fit a tensor or a mesh."""


class PlanMismatchError(AutoparError):
    """A plan that was made for another model, mesh or version."""


class PinConflictError(UsageError):
    """Pins that no plan can satisfy together; the message names both."""


class InfeasibleError(AutoparError):
    """No plan fits the memory of the devices."""

    exit_code = 3


class VerificationError(AutoparError):
    """The emitted program is malformed or does not compute what the model computes."""

    exit_code = 5
