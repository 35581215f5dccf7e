"""Where to cut a chain of blocks into pipeline stages, and how many devices each stage gets, of which kind: exact dynamic programming.

Blocks 0..L-1 in order; a stage is a run of blocks [first, end) on some number of devices. What a stage costs there comes from
`options`, which the planner passes: `StageOption`s, each seconds per microbatch (forward and backward), seconds per step (reducing
gradients) and bytes. One device per stage is a plain pipeline. Several devices are a replicated stage, as in PipeDream's planner
(Narayanan et al. 2019, 3.1), or any other way of using them, as in Alpa (Zheng et al. 2022, 5.2). Devices may differ: they stand in a row of
`Devices`, each so many of a kind, and stages take them in the order of the row. A stage lies within one entry of it.

    minimise    fill and drain + (M - 1) * slowest stage + longest reduction
                = sum_i p_i  +  (M - 1) * max_i p_i  +  max_i r_i,     p_i = time_s of stage i + cut_s of the cut behind it
    subject to  devices of all stages <= num_devices
                state_bytes_i + min(M, stages from i to the last) * activation_bytes_i <= memory limit of its devices

M microbatches under 1F1B, which keeps S - i of them in flight on stage i. A cut's seconds are charged to the stage before it:
of the round trips i -> j -> i that bound 1F1B's period, ((t_i + ... + t_j) + (c_i + ... + c_{j-1})) / (j - i + 1) is the longest, and none
is longer than max_i p_i. Fewer stages and fewer devices are within the space, so "do not cut" wins where it should.

From the last stage to the first: what a suffix of blocks costs is three numbers (sum, slowest, longest reduction), and the goal rises with
each of them. A suffix that is worse in all three than another with as many stages, no more devices and its first stage on the same entry of the row is never needed; of the rest
(the Pareto front) those are never needed whose lower bound is no less than a plan already known, which a first pass over narrow
fronts has found. Lower bound of a suffix: the blocks before it take at least the least sum of p over any cut of them, and their
slowest stage at least their least device-seconds over the devices that are left, on whichever of these is best at it. Nothing else is dropped, so the result is the
optimum of the formula; the simulated lists take no more but for rare cases, by up to half a percent (tests/search/test_stages.py measures how closely).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from autopar.errors import InfeasibleError, UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class StageOption:
    """A way to run a stage on `num_devices` devices. Bytes are per device; `activation_bytes` and `time_s` per microbatch."""

    num_devices: int
    time_s: float
    reduce_s: float = 0.0
    state_bytes: float = 0.0
    activation_bytes: float = 0.0

    def __post_init__(self) -> None:
        if self.num_devices < 1 or not all(0 <= x < float("inf") for x in (self.time_s, self.reduce_s, self.state_bytes, self.activation_bytes)):
            raise UsageError(f"{self}: give at least one device, and finite numbers of at least 0")


NARROW = 4
"""Suffixes per front in the first pass: enough that the plan it finds is rarely improved."""

Options = Callable[[int, int], Iterable[StageOption]]
"""(first block, end block) -> the ways to run this run of blocks as one stage."""


@dataclass(frozen=True)
class Devices:
    """So many devices of a kind, side by side in the row, with what each can hold; `options` on them."""

    number: int
    options: Options
    memory_limit_bytes: float = float("inf")


Crossing = Callable[[int, int, int], float]
"""(n, entry of the row, entry of the row) -> seconds per microbatch, both ways, of a cut between blocks n and n + 1 from devices of the first entry to
those of the second."""


@dataclass(frozen=True)
class StagePlan:
    """Stage i runs blocks starts[i] to starts[i + 1] (the last one: to the end) with `options[i]`."""

    starts: tuple[int, ...]
    options: tuple[StageOption, ...]
    step_time_s: float

    @property
    def num_stages(self) -> int:
        return len(self.starts)

    @property
    def num_devices(self) -> int:
        return sum(option.num_devices for option in self.options)


def step_time_s(times_s: Sequence[float], reduces_s: Sequence[float], num_microbatches: int) -> float:
    """Seconds of a step, from the p_i and r_i of the module's formula."""
    return sum(times_s) + (num_microbatches - 1) * max(times_s) + max(reduces_s)


class _Suffix(NamedTuple):
    """The blocks from some first one to the last, cut into stages: three costs, the first stage and what comes after it."""

    total_s: float
    slowest_s: float
    reduce_s: float
    start: int
    option: StageOption | None
    rest: "_Suffix | None"

    def goal_s(self, num_microbatches: int) -> float:
        return self.total_s + (num_microbatches - 1) * self.slowest_s + self.reduce_s


def cut_into_stages(
    cut_s: Sequence[float],
    options: Options,
    *,
    num_microbatches: int,
    num_devices: int,
    memory_limit_bytes: float = float("inf"),
    num_stages: int | None = None,
) -> StagePlan:
    """The fastest plan for len(cut_s) + 1 blocks on devices of one kind; `cut_s[i]`: seconds per microbatch, both ways, of a cut between blocks i and i + 1.

    `num_stages` fixes the number of stages. Same numbers, same plan. Raises InfeasibleError where no plan fits.
    """
    if not all(0 <= x < float("inf") for x in cut_s):
        raise UsageError("seconds of cuts: give finite numbers of at least 0")
    row = (Devices(num_devices, options, memory_limit_bytes),)
    return cut_along(len(cut_s) + 1, lambda cut, before, after: cut_s[cut], row, num_microbatches=num_microbatches, num_stages=num_stages)


def cut_along(num_blocks: int, crossing_s: Crossing, row: Sequence[Devices], *, num_microbatches: int, num_stages: int | None = None) -> StagePlan:
    """The fastest plan for so many blocks on a row of devices, in whose order stages take them; otherwise as `cut_into_stages`."""
    num_devices = sum(devices.number for devices in row)
    if min(num_microbatches, num_stages or 1, *(devices.number for devices in row)) < 1 or (num_stages or 1) > min(num_blocks, num_devices):
        raise UsageError(
            f"{num_blocks} blocks, {num_stages or 'any number of'} stages, {num_devices} devices, {num_microbatches} microbatches: "
            "give at least one of each, and no more stages than blocks or devices"
        )
    search = _Search(num_blocks, crossing_s, row, num_microbatches, num_stages)
    known = search.best(width=NARROW, known=None)
    best = search.best(width=None, known=known)
    if best is None:
        raise InfeasibleError(_why_infeasible(num_blocks, search))
    return _plan_of(best, num_microbatches)


Fronts = list[dict[int, list[_Suffix]]]
"""[first block][devices of the row, from its end, that are taken or passed over] -> suffixes, all with the same number of stages."""


class _Search:
    """The dynamic programme over suffixes, one more stage at a time. `passed[n]`: devices behind entry n of the row; `entry_of[d]`: the entry in which the
    d-th device from the end of the row lies."""

    def __init__(self, num_blocks: int, crossing_s: Crossing, row: Sequence[Devices], num_microbatches: int, num_stages: int | None) -> None:
        self.num_blocks, self.crossing_s, self.row = num_blocks, lru_cache(maxsize=None)(crossing_s), row
        self.num_microbatches, self.num_stages = num_microbatches, num_stages
        self.num_devices = sum(devices.number for devices in row)
        self.passed = [sum(devices.number for devices in row[n + 1 :]) for n in range(len(row))]
        self.entry_of = [min((n for n, passed in enumerate(self.passed) if passed < taken), default=len(row) - 1) for taken in range(self.num_devices + 1)]
        alike = [next(m for m in range(n + 1) if row[m].options is row[n].options) for n in range(len(row))]
        most = [max(row[m].number for m in range(len(row)) if alike[m] == alike[n]) for n in range(len(row))]
        listed = lru_cache(maxsize=None)(lambda first, end, n: tuple(o for o in row[n].options(first, end) if o.num_devices <= most[n]))
        self.ways: Callable[[int, int, int], tuple[StageOption, ...]] = lambda first, end, n: listed(first, end, alike[n])
        self.kinds = [tuple(sorted(set(alike[: n + 1]))) for n in range(len(row))]
        self.least_s = self._least(alike, lambda option, behind_s: option.time_s + behind_s)
        self.least_device_s = self._least(alike, lambda option, behind_s: (option.time_s + behind_s) * option.num_devices)

    def _least(self, alike: Sequence[int], weight: Callable[[StageOption, float], float]) -> list[list[float]]:
        """[entry of the row][number of first blocks]: the least sum of weights over all cuts of them on devices of the kinds up to that entry, memory and
        their number ignored. `alike[n]`: the first entry of the same kind."""
        found: dict[tuple[int, ...], list[float]] = {}
        for kinds in self.kinds:
            if kinds in found:
                continue
            least = [0.0]
            for end in range(1, self.num_blocks + 1):
                behind = {k: min(self._behind_s(end, n, after) for n in range(len(self.row)) if alike[n] == k for after in range(n, len(self.row))) for k in kinds}
                weights = (least[first] + weight(option, behind[k]) for k in kinds for first in range(end) for option in self.ways(first, end, k))
                least.append(min(weights, default=float("inf")))
            found[kinds] = least
        return [found[kinds] for kinds in self.kinds]

    def _behind_s(self, end: int, n: int, after: int) -> float:
        """Seconds of the cut behind the blocks before `end`, from one entry of the row to another."""
        return self.crossing_s(end - 1, n, after) if end < self.num_blocks else 0.0

    def bound_s(self, suffix: _Suffix, taken: int) -> float:
        """No plan that ends in this suffix, on so many devices, takes less."""
        left = self.num_devices - taken
        if suffix.start and not left:
            return float("inf")
        entry = self.entry_of[taken]
        slowest = max(suffix.slowest_s, self.least_device_s[entry][suffix.start] / left) if suffix.start else suffix.slowest_s
        return suffix.total_s + self.least_s[entry][suffix.start] + (self.num_microbatches - 1) * slowest + suffix.reduce_s

    def best(self, width: int | None, known: _Suffix | None) -> _Suffix | None:
        """The best plan, or `known` where none is better; at most `width` suffixes are kept per front if it is given."""
        best = known
        fronts: Fronts = [{} for _ in range(self.num_blocks)]
        fronts.append({0: [_Suffix(0.0, 0.0, 0.0, self.num_blocks, None, None)]})
        for stages in range(1, min(self.num_blocks, self.num_devices, self.num_stages or self.num_blocks) + 1):
            limit_s = best.goal_s(self.num_microbatches) if best is not None else float("inf")
            longer = [self._front(fronts, start, stages, limit_s, width) for start in range(self.num_blocks)]
            fronts = [*longer, {}]
            if self.num_stages in (None, stages):
                for found in (suffix for devices in sorted(fronts[0]) for suffix in fronts[0][devices]):
                    if best is None or found.goal_s(self.num_microbatches) < best.goal_s(self.num_microbatches):
                        best = found
        return best

    def _front(self, fronts: Fronts, start: int, stages: int, limit_s: float, width: int | None) -> dict[int, list[_Suffix]]:
        """The suffixes of so many stages from block `start` that can still lead to a plan below `limit_s`."""
        in_flight = min(self.num_microbatches, stages)
        most = self.num_devices - max(0, (self.num_stages or 0) - stages)  # a device for each stage that is to come
        front: dict[int, list[_Suffix]] = {}
        for n, devices in enumerate(self.row):
            grown: dict[int, list[_Suffix]] = {}
            for end in range(start + 1, self.num_blocks + 1):
                for option in self.ways(start, end, n) if fronts[end] else ():
                    if option.state_bytes + in_flight * option.activation_bytes > devices.memory_limit_bytes:
                        continue
                    for taken, rests in fronts[end].items():
                        used = max(taken, self.passed[n]) + option.num_devices
                        if used <= min(self.passed[n] + devices.number, most):
                            behind_s = self._behind_s(end, n, self.entry_of[taken])
                            longer = (_before(option, start, behind_s, rest) for rest in rests)
                            grown.setdefault(used, []).extend(suffix for suffix in longer if self.bound_s(suffix, used) < limit_s)
            front |= _pareto(grown)
        if width is None:
            return front
        return {taken: sorted(front[taken], key=lambda s: self.bound_s(s, taken))[:width] for taken in front}


def _before(option: StageOption, start: int, behind_s: float, rest: _Suffix) -> _Suffix:
    """`rest` with one more stage in front of it."""
    time_s = option.time_s + behind_s
    return _Suffix(rest.total_s + time_s, max(rest.slowest_s, time_s), max(rest.reduce_s, option.reduce_s), start, option, rest)


def _pareto(by_devices: dict[int, list[_Suffix]]) -> dict[int, list[_Suffix]]:
    """Per number of devices the suffixes that none with as few devices beats or equals in all three costs."""
    kept: dict[int, list[_Suffix]] = {}
    front: list[_Suffix] = []
    for devices in sorted(by_devices):
        for suffix in sorted(by_devices[devices], key=lambda s: s[:3]):
            if not any(all(a <= b for a, b in zip(other[:3], suffix[:3], strict=True)) for other in front):
                front.append(suffix)
                kept.setdefault(devices, []).append(suffix)
    return kept


def _plan_of(suffix: _Suffix, num_microbatches: int) -> StagePlan:
    starts, options, rest = [], [], suffix
    while rest.option is not None and rest.rest is not None:
        starts.append(rest.start)
        options.append(rest.option)
        rest = rest.rest
    return StagePlan(tuple(starts), tuple(options), suffix.goal_s(num_microbatches))


def _why_infeasible(num_blocks: int, search: _Search) -> str:
    """The block that no device can hold, if there is one."""
    row, num_devices = search.row, search.num_devices
    limit = max(devices.memory_limit_bytes for devices in row)
    for block in range(num_blocks):
        over = [(o.state_bytes + o.activation_bytes) - d.memory_limit_bytes for n, d in enumerate(row) for o in search.ways(block, block + 1, n)]
        needs = [o.state_bytes + o.activation_bytes for n in range(len(row)) for o in search.ways(block, block + 1, n)]
        if not needs:
            return f"block {block} has no way to run on {num_devices} devices"
        if min(over) > 0:
            return f"block {block} alone needs {min(needs) / 1e9:.2f} GB per device with one microbatch in flight, the limit is {limit / 1e9:.2f} GB"
    return f"no cut into stages fits {num_devices} devices with {limit / 1e9:.2f} GB each; add devices, or use smaller microbatches"
