"""What stays on a rank between uses, and in which dtype: the decisions of a plan about time rather than place."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from autopar.core.graph import DTYPE_BYTES
from autopar.core.zero import Zero
from autopar.errors import UsageError

GATHER = "+gather"
RECOMPUTE = ("none", "none" + GATHER, "selective", "selective" + GATHER, "full", "full" + GATHER)
"""What a block keeps for its backward: everything that it reads; of what making that again takes, its inputs and the results of contractions with weights
and of collectives; only its inputs and the results of collectives. What is not kept is computed again (`again.py`). With `+gather` the results of
all-gathers are not kept but gathered again, as Megatron-LM does under sequence parallelism (Korthikanti et al. 2022, section 4.2.2); no other collective
is repeated."""

MODES = tuple(mode for mode in RECOMPUTE if not mode.endswith(GATHER))
"""Those that a table over operators tells apart: what a mode that gathers again costs depends on both ends of every edge (`planner/problem.py`, `Gathers`), and
is known of a program."""


def computes_again(mode: str) -> bool:
    """Whether operators of a block are done a second time."""
    return not mode.startswith("none")


def keeps_contractions(mode: str) -> bool:
    """Whether results of contractions with weights are kept of a block that is computed again."""
    return mode.startswith("selective")


def gathers_again(mode: str) -> bool:
    return mode.endswith(GATHER)


Key = TypeVar("Key")


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """Dtypes beside that of the computation. `master`: what the optimizer updates (None: the parameters themselves);
    `reduction`: what gradients are summed in over ranks (None: as they come)."""

    master: str | None = None
    reduction: str | None = None

    def __post_init__(self) -> None:
        for dtype in (self.master, self.reduction):
            if dtype is not None and dtype not in ("float64", "float32", "bfloat16", "float16"):
                raise UsageError(f"precision {dtype!r}: use float64, float32, bfloat16 or float16")

    def stored(self, dtype: str) -> str:
        """The dtype in which a parameter computed in `dtype` is kept by the optimizer; only floats narrower than the master are widened."""
        narrow = self.master is not None and dtype in ("bfloat16", "float16", "float32") and DTYPE_BYTES[self.master] > DTYPE_BYTES[dtype]
        return self.master if narrow and self.master is not None else dtype

    def reduced(self, dtype: str) -> str:
        return self.reduction if self.reduction is not None and dtype in ("bfloat16", "float16", "float32") else dtype


@dataclass(frozen=True, kw_only=True)
class Residency(Generic[Key]):
    """`zero`: parameters (by value number, or by name in a plan) that are sharded between uses. `recompute`: mode of every block
    that does not keep everything, by module path. A step is `micro_batches` passes; `offload`: optimizer state lives on the host."""

    zero: Mapping[Key, Zero] = field(default_factory=dict)
    recompute: Mapping[str, str] = field(default_factory=dict)
    micro_batches: int = 1
    precision: Precision = Precision()
    offload: bool = False

    def __post_init__(self) -> None:
        for block, mode in self.recompute.items():
            if mode not in RECOMPUTE:
                raise UsageError(f"recompute {mode!r} of block {block!r}: use {', '.join(RECOMPUTE)}")
        if self.micro_batches < 1:
            raise UsageError(f"{self.micro_batches} microbatches; a step has at least one")

    def stage(self, key: Key) -> int:
        return self.zero[key].stage if key in self.zero else 0
