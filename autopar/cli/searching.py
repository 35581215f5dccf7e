"""The search that every command makes which is not given a plan."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from autopar.cli.options import Asked, checked_share
from autopar.core.mixed import Machines
from autopar.core.objective import Objective

if TYPE_CHECKING:
    from autopar.choice import Chosen
    from autopar.models.load import LoadedModel

LONGEST_BUDGET_S = 7 * 24 * 3600.0


def search(
    loaded: "LoadedModel", cluster: Machines, asked: Asked, objective: Objective = Objective(), *, limits: Mapping[str, float] = MappingProxyType({}), max_memory: float = 0.9, progress: Any
) -> tuple["Chosen", dict[str, float]]:
    """The plan with what it was chosen from, and the seconds of tracing and searching."""
    from autopar.api import plan_timed

    found, seconds = plan_timed(
        loaded.module, cluster, loaded.kwargs, pins=asked.pins, micro_batches=asked.micro_batches, offload=asked.offload, pipelines=asked.pipelines, tokens=loaded.tokens_per_batch,
        objective=objective, **limits, max_memory=max_memory, joint=asked.joint, progress=progress,
    )  # fmt: skip
    return found.named(loaded.name), seconds


def checked_budget(seconds: float | None) -> dict[str, float]:
    """What `--budget` asks of a search."""
    return {} if seconds is None else dict.fromkeys(("time_limit_s", "budget_s"), checked_share("--budget", seconds, LONGEST_BUDGET_S))
