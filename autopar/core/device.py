"""Devices and links: the numbers that every price is made of, each with its source."""

import math
from collections.abc import Collection
from dataclasses import dataclass, replace

from autopar.core.graph import DTYPE_BYTES
from autopar.core.kernel_rate import KernelRate, kernel_values, read_kernels
from autopar.core.toml_file import Table
from autopar.core.units import BANDWIDTH, COMPUTE, DURATION, MEMORY, format_quantity, shown
from autopar.errors import UsageError

STATUSES = ("measured", "derived", "assumed")
"""measured: observed on such hardware. derived: from a published specification or by a stated formula. assumed: neither."""

PEAK_DTYPES = (*DTYPE_BYTES, "tf32", "float4_e2m1fn")

MAX_MULTIPROCESSORS = 100_000

MEASURED_COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send")

DEVICE_NUMBERS = {
    "memory": 'memory = "80 GB"',
    "memory_bandwidth": 'memory_bandwidth = "3.35 TB/s"',
    "peak": '[device.peak] with float32 = "67 TFLOP/s" and other dtypes below it',
    "matmul_efficiency": "matmul_efficiency = 0.8",
    "memory_efficiency": "memory_efficiency = 0.9",
    "kernel_launch": 'kernel_launch = "5 us"',
}
OPTIONAL_NUMBERS = {
    "multiprocessors": "multiprocessors = 132",
    "attention_efficiency": "attention_efficiency = 0.6",
    "sustained_rate": "sustained_rate = 0.9",
    "previous_rate": "previous_rate = 0.6",
    "efficiency": "[device.efficiency] with float8_e4m3fn = 0.7",
    "function": 'function = "2 ns"',
    "loads_ahead": "loads_ahead = false",
    "kernels": '[device.kernels.attention] with call = "20 us", compute = 0.5, memory = 0.8, backward = 2.5',
}
"""Numbers that a file may leave out: products then reach their efficiency at any shape, attention that of products, every dtype the same,
exponentials take no longer than the memory they are read from, products go on while operands are loaded, and no kind of kernel has rates of its own."""

LINK_NUMBERS = {
    "latency": 'latency = "3 us"',
    "bandwidth": 'bandwidth = "450 GB/s" (per device and direction)',
    "efficiency": "efficiency = 0.8",
}
"""Numbers of a device and of a link as a file names them, with the line to write where one is missing."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where a number comes from: one of `STATUSES` and a sentence that lets a reader check it."""

    status: str
    text: str

    def __post_init__(self) -> None:
        if self.status not in STATUSES or not self.text.strip():
            raise UsageError(
                f"{shown(str(self).strip(' :'))} is not a source; write 'measured: ...', 'derived: ...' or 'assumed: ...' and say from what"
            )

    @classmethod
    def parse(cls, text: str) -> "Source":
        """Source.parse("derived: vendor data sheet")."""
        status, _, rest = text.partition(":")
        return cls(status.strip(), rest.strip())

    def __str__(self) -> str:
        return f"{self.status}: {self.text}"


Sources = tuple[tuple[str, Source], ...]
"""(name of a number, its source); the entry "default" speaks for every number that has none of its own."""


def sources(default: str = "assumed: no source given", **numbers: str) -> Sources:
    """sources("derived: data sheet", latency="assumed: as its predecessor")."""
    return tuple((name, Source.parse(text)) for name, text in {"default": default, **numbers}.items())


UNSOURCED = sources()


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One accelerator, or one process's share of a CPU.

    `peak_flops_per_s` are dense matrix peaks, pairs (dtype, flops per second), float32 always among them and without
    TF32, which is its own entry. `memory_bytes` is what a process can allocate, not the number on the box.
    The efficiencies are the shares of peak and of memory bandwidth that large operators reach; `efficiencies` are those of dtypes whose share
    of their peak is another than `matmul_efficiency`. `num_multiprocessors` 0 and `attention_efficiency` 0 stand for unknown.
    `sustained_rate`: the share of the rate of a short benchmark that products keep in steps of seconds, where power limits the clock.
    `previous_rate`: the share of its rate that kernels written for the generation before reach, whose instructions it still has.
    `function_s`: what evaluating an exponential, or its like, takes beside reading and writing.
    `loads_ahead`: products go on while the next operands come from memory; the core of a processor does one after the other.
    `kernels`: what was measured of kinds of kernels, in place of the general numbers.
    """

    name: str
    memory_bytes: int
    memory_bytes_per_s: float
    peak_flops_per_s: tuple[tuple[str, float], ...]
    matmul_efficiency: float = 1.0
    memory_efficiency: float = 1.0
    kernel_launch_s: float = 0.0
    num_multiprocessors: int = 0
    attention_efficiency: float = 0.0
    sustained_rate: float = 1.0
    previous_rate: float = 1.0
    efficiencies: tuple[tuple[str, float], ...] = ()
    function_s: float = 0.0
    loads_ahead: bool = True
    kernels: tuple[KernelRate, ...] = ()
    source: Sources = UNSOURCED

    def __post_init__(self) -> None:
        for dtype, value in self.peak_flops_per_s:
            if dtype not in PEAK_DTYPES:
                raise UsageError(f"device {self.name!r}: peak of unknown dtype {dtype!r}; known are {', '.join(PEAK_DTYPES)}")
            _check_number(self.name, f"peak of {dtype}", value)
        if "float32" not in dict(self.peak_flops_per_s):
            raise UsageError(f"device {self.name!r}: no float32 peak; add it, pointwise operators are priced by it")
        _check_number(self.name, "memory_bytes", self.memory_bytes)
        _check_number(self.name, "memory_bytes_per_s", self.memory_bytes_per_s)
        _check_number(self.name, "matmul_efficiency", self.matmul_efficiency, largest=1.0)
        _check_number(self.name, "memory_efficiency", self.memory_efficiency, largest=1.0)
        _check_number(self.name, "kernel_launch_s", self.kernel_launch_s, zero=True)
        _check_number(self.name, "num_multiprocessors", self.num_multiprocessors, zero=True)
        _check_number(self.name, "attention_efficiency", self.attention_efficiency, zero=True, largest=1.0)
        _check_number(self.name, "sustained_rate", self.sustained_rate, largest=1.0)
        _check_number(self.name, "previous_rate", self.previous_rate, largest=1.0)
        _check_number(self.name, "function_s", self.function_s, zero=True)
        for dtype, share in self.efficiencies:
            _check_number(self.name, f"efficiency of {dtype}", share, largest=1.0)

    def efficiency(self, dtype: str) -> float:
        """The share of the peak of a dtype that large matrix products reach."""
        return next((share for name, share in self.efficiencies if name == dtype), self.matmul_efficiency)

    def kernel(self, kind: str) -> KernelRate | None:
        """What was measured of this kind of kernel."""
        return next((rate for rate in self.kernels if rate.kind == kind), None)

    def peak(self, dtype: str) -> float:
        """Dense peak in flops per second for matrix products of this dtype."""
        for name, value in self.peak_flops_per_s:
            if name == dtype:
                return value
        listed = ", ".join(name for name, _ in self.peak_flops_per_s)
        raise UsageError(f"device {self.name!r} has no {dtype} peak (it has {listed}); use one of these or add {dtype} to [device.peak]")

    def source_of(self, number: str) -> Source:
        """Source of one of `DEVICE_NUMBERS` or `OPTIONAL_NUMBERS`."""
        return source_in(self.source, number, {**DEVICE_NUMBERS, **OPTIONAL_NUMBERS})


@dataclass(frozen=True, slots=True)
class Measured:
    """What one collective makes of a link: seconds to start it, latency of a hop, bandwidth it reaches."""

    primitive: str
    start_s: float
    latency_s: float
    bandwidth_bytes_per_s: float

    def __post_init__(self) -> None:
        if self.primitive not in MEASURED_COLLECTIVES:
            raise UsageError(f"a link has no numbers for collective {shown(self.primitive)}; known are {', '.join(MEASURED_COLLECTIVES)}")
        _check_number(self.primitive, "start_s", self.start_s, zero=True)
        _check_number(self.primitive, "latency_s", self.latency_s, zero=True)
        _check_number(self.primitive, "bandwidth_bytes_per_s", self.bandwidth_bytes_per_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """One tier of the network: latency of a hop, bandwidth per device and direction, share of it that messages reach.

    `collectives`: numbers of their own for collectives that a library runs at very different rates.
    """

    name: str
    latency_s: float
    bandwidth_bytes_per_s: float
    efficiency: float = 1.0
    source: Sources = UNSOURCED
    collectives: "tuple[Measured, ...]" = ()

    def __post_init__(self) -> None:
        _check_number(self.name, "latency_s", self.latency_s, zero=True)
        _check_number(self.name, "bandwidth_bytes_per_s", self.bandwidth_bytes_per_s)
        _check_number(self.name, "efficiency", self.efficiency, largest=1.0)

    def of(self, primitive: str) -> "Link":
        """The link as this collective sees it: with its own numbers where it has some."""
        found = next((own for own in self.collectives if own.primitive == primitive), None)
        return self if found is None else replace(self, latency_s=found.latency_s, bandwidth_bytes_per_s=found.bandwidth_bytes_per_s, efficiency=1.0)

    def start_s(self, primitive: str) -> float:
        """Seconds that a collective takes before its first hop, beside the launch."""
        return next((own.start_s for own in self.collectives if own.primitive == primitive), 0.0)

    @property
    def rate_bytes_per_s(self) -> float:
        """Bytes per second that a large message reaches."""
        return self.bandwidth_bytes_per_s * self.efficiency

    def seconds(self, num_bytes: float) -> float:
        """Seconds of one message of `num_bytes`."""
        return self.latency_s + num_bytes / self.rate_bytes_per_s

    def source_of(self, number: str) -> Source:
        """Source of one of `LINK_NUMBERS`."""
        return source_in(self.source, number, LINK_NUMBERS)


def read_device(table: Table) -> Device:
    """The device that the `[device]` table of a file describes."""
    table.check_keys({"name": 'name = "NVIDIA H100"', **DEVICE_NUMBERS}, (*OPTIONAL_NUMBERS, "source"))
    peak = table.table("peak")
    peak.check_keys({"float32": 'float32 = "67 TFLOP/s"; pointwise operators are priced by it'}, PEAK_DTYPES)
    memory = table.quantity("memory", MEMORY)
    if memory < 1:
        table.fail("memory", f"{shown(table.values['memory'])} is less than a byte; write a memory size such as '80 GB'")
    return Device(
        name=table.text("name"),
        memory_bytes=round(memory),
        memory_bytes_per_s=table.quantity("memory_bandwidth", BANDWIDTH),
        peak_flops_per_s=tuple((dtype, peak.quantity(dtype, COMPUTE)) for dtype in peak.values),
        matmul_efficiency=table.share("matmul_efficiency"),
        memory_efficiency=table.share("memory_efficiency"),
        kernel_launch_s=table.quantity("kernel_launch", DURATION, zero=True),
        num_multiprocessors=table.count("multiprocessors", MAX_MULTIPROCESSORS) if "multiprocessors" in table.values else 0,
        attention_efficiency=table.share("attention_efficiency") if "attention_efficiency" in table.values else 0.0,
        sustained_rate=table.share("sustained_rate") if "sustained_rate" in table.values else 1.0,
        previous_rate=table.share("previous_rate") if "previous_rate" in table.values else 1.0,
        efficiencies=_efficiencies(table),
        function_s=table.quantity("function", DURATION, zero=True) if "function" in table.values else 0.0,
        loads_ahead=table.flag("loads_ahead") if "loads_ahead" in table.values else True,
        kernels=read_kernels(table.table("kernels")) if "kernels" in table.values else (),
        source=read_sources(table, (*DEVICE_NUMBERS, *OPTIONAL_NUMBERS)),
    )


def _efficiencies(table: Table) -> tuple[tuple[str, float], ...]:
    if "efficiency" not in table.values:
        return ()
    given = table.table("efficiency")
    given.check_keys({}, PEAK_DTYPES)
    return tuple((dtype, given.share(dtype)) for dtype in given.values)


def read_link(table: Table) -> Link:
    """The link that an `[intra_node]` or `[inter_node]` table describes."""
    needed = {key: LINK_NUMBERS[key] for key in ("latency", "bandwidth")}
    table.check_keys({"name": 'name = "NVLink"', **needed}, ("efficiency", "source", "collectives"))
    return Link(
        name=table.text("name"),
        latency_s=table.quantity("latency", DURATION, zero=True),
        bandwidth_bytes_per_s=table.quantity("bandwidth", BANDWIDTH),
        efficiency=table.share("efficiency") if "efficiency" in table.values else 1.0,
        source=read_sources(table, LINK_NUMBERS),
        collectives=_read_collectives(table.table("collectives")) if "collectives" in table.values else (),
    )


def _read_collectives(table: Table) -> tuple[Measured, ...]:
    table.check_keys({}, MEASURED_COLLECTIVES)
    found = []
    for primitive in table.values:
        own = table.table(primitive)
        own.check_keys({"start": 'start = "1 ms"', "latency": 'latency = "0.2 ms"', "bandwidth": 'bandwidth = "1 GB/s"'})
        found.append(Measured(primitive, own.quantity("start", DURATION, zero=True), own.quantity("latency", DURATION, zero=True), own.quantity("bandwidth", BANDWIDTH)))
    return tuple(found)


def read_sources(table: Table, numbers: Collection[str]) -> Sources:
    """`source` is one text for the whole table, or a table with a text per number and a `default`."""
    if "source" not in table.values:
        return UNSOURCED
    if isinstance(table.values["source"], str):
        return (("default", _source(table, "source")),)
    given = table.table("source")
    given.check_keys({}, ("default", *numbers))
    own = tuple((key, _source(given, key)) for key in given.values)
    return own if "default" in given.values else (*UNSOURCED, *own)


def _source(table: Table, key: str) -> Source:
    text = table.text(key)
    try:
        return Source.parse(text)
    except UsageError as error:
        table.fail(key, str(error))


def device_values(device: Device) -> dict[str, object]:
    """The table that `read_device` reads back."""
    return {
        "name": device.name,
        "memory": format_quantity(device.memory_bytes, MEMORY),
        "memory_bandwidth": format_quantity(device.memory_bytes_per_s, BANDWIDTH),
        "matmul_efficiency": device.matmul_efficiency,
        "memory_efficiency": device.memory_efficiency,
        "kernel_launch": format_quantity(device.kernel_launch_s, DURATION),
        **({"multiprocessors": device.num_multiprocessors} if device.num_multiprocessors else {}),
        **({"attention_efficiency": device.attention_efficiency} if device.attention_efficiency else {}),
        **({"sustained_rate": device.sustained_rate} if device.sustained_rate != 1 else {}),
        **({"previous_rate": device.previous_rate} if device.previous_rate != 1 else {}),
        **({} if device.loads_ahead else {"loads_ahead": False}),
        "peak": {dtype: format_quantity(value, COMPUTE) for dtype, value in device.peak_flops_per_s},
        **({"efficiency": dict(device.efficiencies)} if device.efficiencies else {}),
        **({"function": format_quantity(device.function_s, DURATION)} if device.function_s else {}),
        **({"kernels": kernel_values(device.kernels)} if device.kernels else {}),
        "source": {name: str(source) for name, source in device.source},
    }


def link_values(link: Link) -> dict[str, object]:
    """The table that `read_link` reads back."""
    return {
        "name": link.name,
        "latency": format_quantity(link.latency_s, DURATION),
        "bandwidth": format_quantity(link.bandwidth_bytes_per_s, BANDWIDTH),
        "efficiency": link.efficiency,
        "source": {name: str(source) for name, source in link.source},
        **({"collectives": {own.primitive: _collective_values(own) for own in link.collectives}} if link.collectives else {}),
    }


def _collective_values(own: Measured) -> dict[str, str]:
    return {
        "start": format_quantity(own.start_s, DURATION),
        "latency": format_quantity(own.latency_s, DURATION),
        "bandwidth": format_quantity(own.bandwidth_bytes_per_s, BANDWIDTH),
    }


def _check_number(owner: str, name: str, value: float, *, zero: bool = False, largest: float = math.inf) -> None:
    if not (math.isfinite(value) and value <= largest and (value > 0 or (zero and value == 0))):
        raise UsageError(
            f"{owner!r}: {name} is {value}; give a finite number {'of at least' if zero else 'above'} 0{'' if largest == math.inf else f' and up to {largest}'}"
        )


def source_in(given: Sources, number: str, numbers: Collection[str]) -> Source:
    """The source of one of the `numbers` of a table, or what speaks for those without one."""
    if number not in numbers:
        raise UsageError(f"unknown number {number!r}; known are {', '.join(numbers)}")
    found = dict(given)
    return found.get(number, found["default"])
