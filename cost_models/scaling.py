"""How long a training takes, and how far more devices can help.

    seconds = work / rate,   rate = rate of a device x devices x parallel efficiency

Fixed work, a share f of it serial (Amdahl 1967):       speed-up <= 1 / (f + (1 - f) / n)
Work that grows with the devices (Gustafson 1988):      speed-up <= n - f (n - 1)
"""

from dataclasses import dataclass

from autopar.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingTime:
    """The four factors of a training's time; `seconds` is made of them and of nothing else."""

    work_flops: float
    device_flops_per_s: float
    num_devices: int
    efficiency: float

    def __post_init__(self) -> None:
        if min(self.work_flops, self.device_flops_per_s, self.num_devices) <= 0 or not 0 < self.efficiency <= 1:
            raise UsageError(f"no time of {self}: work, rate and devices are positive, the efficiency is a share")

    @property
    def rate_flops_per_s(self) -> float:
        return self.device_flops_per_s * self.num_devices * self.efficiency

    @property
    def seconds(self) -> float:
        return self.work_flops / self.rate_flops_per_s


def amdahl(serial: float, n: int) -> float:
    """The most that n devices can speed up fixed work of which a share `serial` is not divided."""
    _check(serial, n)
    return 1 / (serial + (1 - serial) / n)


def gustafson(serial: float, n: int) -> float:
    """The most that n devices can do of work that grows with them, in units of what one does in the same time; `serial`: share of that time."""
    _check(serial, n)
    return n - serial * (n - 1)


def _check(serial: float, n: int) -> None:
    if not 0 <= serial <= 1 or n < 1:
        raise UsageError(f"a serial share of {serial} on {n} devices; give a share from 0 to 1 and at least one device")
