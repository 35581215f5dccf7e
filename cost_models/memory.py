"""Bytes of training state per parameter element: parameter, gradient and what the optimizer keeps, from their dtypes.

    Adam in float32:                     4 + 4 + (4 + 4)     = 16 bytes an element
    Adam in bfloat16, float32 master:    2 + 2 + (4 + 4 + 4) = 16      (Rajbhandari et al. 2020, section 3.1)

The two are equal by chance. How ZeRO divides the three parts over ranks is not decided here: the caller gives each
part the number of elements that the rank holds of it.
"""

from dataclasses import dataclass
from typing import Any

from autopar.core.graph import DTYPE_BYTES
from autopar.errors import UsageError

TRAINED_DTYPES = ("float64", "float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "complex64", "complex128")


@dataclass(frozen=True, slots=True, kw_only=True)
class StatePolicy:
    """The dtypes a parameter is kept in. `gradient` is None for what is not trained; `optimizer`: one dtype per copy."""

    parameter: str
    gradient: str | None
    optimizer: tuple[str, ...]

    def __post_init__(self) -> None:
        for dtype in (self.parameter, *self.optimizer, *([self.gradient] if self.gradient else [])):
            if dtype not in DTYPE_BYTES:
                raise UsageError(f"state of unknown dtype {dtype!r}; use one of {', '.join(DTYPE_BYTES)}")

    @property
    def parameter_bytes(self) -> int:
        """Bytes per element of the parameter itself."""
        return DTYPE_BYTES[self.parameter]

    @property
    def gradient_bytes(self) -> int:
        return DTYPE_BYTES[self.gradient] if self.gradient else 0

    @property
    def optimizer_bytes(self) -> int:
        """Bytes per element of moments and master copy."""
        return sum(DTYPE_BYTES[dtype] for dtype in self.optimizer)

    @property
    def total_bytes(self) -> int:
        return self.parameter_bytes + self.gradient_bytes + self.optimizer_bytes


def adam(dtype: str = "float32", *, master: str | None = "float32", gradient: str | None = None) -> StatePolicy:
    """Adam or AdamW on a parameter of `dtype`: two moments in the dtype the update is computed in.

    A parameter narrower than `master` is updated through a master copy of that dtype; `master=None`: in place, moments
    like the parameter. Gradients are like the parameter unless `gradient` says otherwise (Megatron keeps float32).
    A dtype that cannot be trained (integers) has neither gradient nor moments.
    """
    if dtype not in TRAINED_DTYPES:
        return StatePolicy(parameter=dtype, gradient=None, optimizer=())
    if master is not None and master not in TRAINED_DTYPES:
        raise UsageError(f"master copy of dtype {master!r}; use one of {', '.join(TRAINED_DTYPES)}")
    if master is not None and DTYPE_BYTES[master] > DTYPE_BYTES[dtype]:
        return StatePolicy(parameter=dtype, gradient=gradient or dtype, optimizer=(master, master, master))
    return StatePolicy(parameter=dtype, gradient=gradient or dtype, optimizer=(dtype, dtype))


def state_bytes(numel_local: Any, policy: StatePolicy | str = "float32") -> Any:
    """Bytes of parameter, gradient and optimizer state for `numel_local` elements on this rank (number or array).

    `policy` may be the name of the parameter's dtype, which stands for `adam(dtype)`.
    """
    return numel_local * (adam(policy) if isinstance(policy, str) else policy).total_bytes


def zero_state_bytes(numel: Any, num_ranks: int, stage: int, policy: StatePolicy | str = "float32") -> Any:
    """Bytes per rank when `num_ranks` data-parallel ranks divide the state as ZeRO `stage` does, `numel` before division.

    0: nothing is divided; 1: optimizer state; 2: gradients too; 3: parameters too. Padding is not counted.
    """
    if stage not in range(4) or num_ranks < 1:
        raise UsageError(f"ZeRO stage {stage} on {num_ranks} ranks; give a stage from 0 to 3 and at least one rank")
    kept = adam(policy) if isinstance(policy, str) else policy
    parts = (kept.optimizer_bytes, kept.gradient_bytes, kept.parameter_bytes)
    per_element = sum(part / num_ranks if stage > i else part for i, part in enumerate(parts))
    return numel * per_element
