"""What is asked: a model, one global batch, and what is fixed of the plan. Traces each size of microbatch once."""

import math
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import torch
from torch import nn

from autopar.core.cluster import Cluster
from autopar.core.collector import collector_paused
from autopar.core.family import Family
from autopar.core.forked import found_of_row, most_processes
from autopar.core.graph import OpGraph
from autopar.core.mesh import Mesh
from autopar.core.mixed import Machines, MixedCluster
from autopar.core.plan import Plan
from autopar.core.residency import Precision
from autopar.errors import InfeasibleError, NoFamilyError, UsageError
from autopar.joint.front import Part, front_of, parted, state_bytes
from autopar.joint.known import Known, binds
from autopar.joint.plan import check_in_space, is_row, joint_search, planned_jointly
from autopar.planner.appraisal import Appraisal, appraise
from autopar.planner.groups import best_on_groups, over_groups
from autopar.planner.pins import parse_pins
from autopar.planner.plan import Planned, plan_graph
from autopar.planner.search import MEMORY_SHARE, Options
from autopar.runtime.microbatches import batch_size, resized, split_batch
from autopar.trace.capture import Traced, trace
from autopar.trace.family import early_family, num_rows
from autopar.verification import as_call

Progress = Callable[[str], None]


def quiet(text: str) -> None:
    """The default progress: none."""


@dataclass
class Request:
    """`model` with `example_inputs`, one global batch of it: a dict of keyword arguments or a tuple, by default the model's own `dummy_inputs`."""

    model: nn.Module
    example_inputs: Any = None
    _traced: dict[int, Traced] = field(default_factory=dict)
    _family: Family | None = None
    _known: Known = field(default_factory=Known)
    trace_s: float = 0.0

    def __post_init__(self) -> None:
        inputs = self.example_inputs if self.example_inputs is not None else getattr(self.model, "dummy_inputs", None)
        if inputs is None:
            raise UsageError(f"{type(self.model).__name__} offers no dummy_inputs; pass example_inputs (a dict of keyword arguments or a tuple)")
        self.args, self.kwargs = as_call(inputs)

    @property
    def batch_size(self) -> int:
        return batch_size(self.kwargs or self.args)

    def with_batch(self, samples: int) -> "Request":
        """The same for so many samples of a batch. What was found out of the model is shared, but no whole trace."""
        inputs: Any = resized(self.kwargs or self.args, samples)
        return Request(self.model, inputs, _family=self._family, _known=self._known)

    def traced(self, micro_batches: int = 1) -> Traced:
        """One microbatch, traced."""
        if micro_batches not in self._traced:
            start = time.perf_counter()
            piece = split_batch(self.kwargs or self.args, micro_batches)[0]
            self._traced[micro_batches] = trace(self.model, () if self.kwargs else piece, piece if self.kwargs else {})
            self.trace_s += time.perf_counter() - start
        return self._traced[micro_batches]

    def graph(self, micro_batches: int) -> OpGraph | None:
        """The graph of one of a number of microbatches; None where the batch does not divide into as many."""
        return self.traced(micro_batches).graph if self.batch_size % micro_batches == 0 else None

    def options(
        self, *, pins: Sequence[str] = (), mesh: Mesh | None = None, tokens: int = 0, time_limit_s: float = 30.0, max_memory: float = MEMORY_SHARE,
        micro_batches: int | None = None, precision: Precision | None = None, offload: bool = False, pipelines: bool = False,
        joint: bool | None = None, budget_s: float = math.inf, budget_points: int | None = None,
        row: tuple[Hashable, ...] | None = None, descends: bool = False,
    ) -> Options:  # fmt: skip
        """What is fixed of the plan; the keywords of `autopar.plan`, and `row` (see `Options`)."""
        number = self._micro_batches(pins, micro_batches)
        return Options(
            pins=tuple(pins), mesh=mesh, memory_share=max_memory, time_limit_s=time_limit_s, tokens=tokens, offload=offload, pipelines=pipelines, joint=joint,
            micro_batches=number or 1, free_micro_batches=number is None, precision=precision or default_precision(self.model),
            budget_s=budget_s, budget_points=budget_points, row=row, descends=descends,
        )  # fmt: skip

    def _micro_batches(self, pins: Sequence[str], given: int | None) -> int | None:
        """The number of microbatches: as given, or from the pinned number of samples per data-parallel rank and microbatch; None: any."""
        parsed = parse_pins(pins)
        if parsed.micro_batch is None:
            return given
        per_pass = parsed.micro_batch * dict(parsed.degrees).get("dp", 1)
        if self.batch_size % per_pass:
            raise UsageError(f"pin micro_batch={parsed.micro_batch}: {per_pass} samples a pass over all data-parallel ranks do not divide the batch of {self.batch_size}")
        return self.batch_size // per_pass

    def planned(self, cluster: Machines, *, progress: Progress = quiet, **given: Any) -> Planned:
        """The best plan on a cluster. Raises InfeasibleError where none fits."""
        options = self.options(**given)
        if isinstance(cluster, MixedCluster):
            return self._on_groups(cluster, options, progress, **given)
        if (found := self._jointly(cluster, options, progress)) is not None:
            return found
        if self._weighs_both(cluster, options):
            return self._fitting(cluster, options, progress)
        return self._of_meshes(cluster, options, progress)

    def _on_groups(self, mixed: MixedCluster, options: Options, progress: Progress, **given: Any) -> Planned:
        def on_one(part: Cluster) -> Planned:
            return self.planned(part, progress=lambda text: progress(f"{part.name}: {text}"), **given)

        short = not mixed.is_local and self._may_join(options)  # the graphs of a deep model follow from short traces

        def graph(micro_batches: int) -> OpGraph | None:
            if not short or self.batch_size % micro_batches:
                return self.graph(micro_batches)
            return self.family.graph(self.batch_size // micro_batches)

        first = graph(options.micro_batches)
        if first is None:
            raise UsageError(f"a batch of {self.batch_size} does not divide into {options.micro_batches} microbatches; change the batch or micro_batches")
        return best_on_groups(mixed, on_one, over_groups(first, mixed, options, progress, graph))

    def _of_meshes(self, cluster: Cluster, options: Options, progress: Progress) -> Planned:
        progress("tracing")
        return plan_graph(self.traced(options.micro_batches).graph, cluster, options, progress, self.graph)

    def _weighs_both(self, cluster: Cluster, options: Options) -> bool:
        """Whether memory decides which search is better: for accelerators of one node, where neither is asked for and both can answer."""
        free = options.joint is None and not parse_pins(options.pins).wants_pipeline and self.batch_size % options.micro_batches == 0
        return free and not cluster.is_local and self._may_join(options)

    def _fitting(self, cluster: Cluster, options: Options, progress: Progress) -> Planned:
        """The best of the meshes where it fits as it is. Where memory is short, or pipelines are asked for, the joint search weighs those, microbatches and
        what is kept against each other, and the better plan of both is taken."""
        graph = self.family.graph(self.batch_size // options.micro_batches)
        try:
            whole = plan_graph(graph, cluster, replace(options, pins=(*options.pins, "pp=1")), progress)
        except InfeasibleError:
            whole = None
        if whole is not None and whole.candidates[0].problem.memory_limit_bytes is None and not options.pipelines:
            return whole
        try:
            found = self._jointly(cluster, replace(options, joint=True), progress)
        except InfeasibleError:
            if whole is None:
                raise
            return whole
        assert found is not None, "the model was found to be one row of blocks"
        return min(found, whole or found, key=lambda p: p.plan.predicted.step_time_s)

    @collector_paused()
    def front(self, cluster: Machines, *, budget_s: float = math.inf, within_s: float = math.inf, progress: Progress = quiet, **given: Any) -> Sequence[Plan]:
        """The front of time against memory, see `joint.front`: the fastest plan first, the leanest last, or the first that takes longer than `within_s`. `given`: of
        `planned`, `max_memory` where the front begins. `budget_s`: for looking at other points than those of the plans before, by the joint search: so many for each
        plan that a front which is made in time is the same everywhere. When it is over, no more of them are looked at."""
        if isinstance(cluster, MixedCluster):
            raise UsageError(f"the front of time against memory on {cluster.name}: devices of groups have memory of their own; ask for one group")
        memory_bytes = cluster.device.memory_bytes
        limit_bytes = given.pop("max_memory", MEMORY_SHARE) * memory_bytes
        if given.get("joint") is None and cluster.num_nodes == 1:
            given["joint"] = False  # dozens of plans, nearly all of which are short of memory
        ends, processes = [(limit_bytes, 0.0)], 0
        if apart := self.trace_ahead([cluster], **given):
            options = self.options(**given)
            state = state_bytes(self.family.graph(1), options.precision, offload=options.offload)
            ends, processes = parted(limit_bytes, state / cluster.num_devices), most_processes()

        def find(n: int, _: object, say: Progress) -> list[Plan]:
            request = replace(self, _known=Known()) if apart else self
            part = Part(*ends[n], budget_s, within_s)
            return part.plans(lambda limit, points: request.planned(cluster, max_memory=limit / memory_bytes, budget_points=points, descends=points is not None, progress=say, **given).plan)

        return front_of(chain.from_iterable(found_of_row(find, len(ends), processes, progress, lambda _: None)))

    def _jointly(self, cluster: Cluster, options: Options, progress: Progress) -> Planned | None:
        """By the joint search, where it is asked for or the cluster has several nodes, and the model is one row of equal blocks. Of one node `_fitting` decides. It begins
        before all is traced."""
        pins = parse_pins(options.pins)
        wanted = cluster.num_nodes > 1 if options.joint is None else options.joint
        if not wanted:
            return None
        try:
            check_in_space(options, pins)
            progress("tracing three blocks")
            with self._early_family() as family:
                search = joint_search(family, self.batch_size, cluster, options, pins, progress, self._known)
                return planned_jointly(search, family.graph, options.tokens)
        except NoFamilyError as error:
            if options.joint:
                raise UsageError(f"no joint search: {error}; leave --joint out") from None
            return None

    def searches_jointly(self, **given: Any) -> bool:
        """Whether the joint search takes the model and what is fixed of the plan."""
        return self._may_join(self.options(**given))

    def trace_ahead(self, clusters: Sequence[Machines], **given: Any) -> bool:
        """Whether all plans on these clusters are made from a few short traces. If so they are there when this returns, and torch is not needed any more."""
        options = self.options(**given)
        short = all(isinstance(c, Cluster) and (options.joint or self._weighs_both(c, options) or (options.joint is None and c.num_nodes > 1)) for c in clusters)
        if found := short and self._may_join(options):
            self.family.graph(1)  # traced by itself
        return found

    @staticmethod
    def knows_more(one: Machines, other: Machines) -> bool:
        """Whether bounds of plans on one machine hold on the other rather than the other way round: which of a row is better planned first."""
        return isinstance(one, Cluster) and isinstance(other, Cluster) and binds(one, other)

    def _may_join(self, options: Options) -> bool:
        try:
            check_in_space(options, parse_pins(options.pins))
            return num_rows(self.model) == 1 and is_row(self.family)
        except NoFamilyError:
            return False

    @property
    def family(self) -> Family:
        """The model's graphs, of short traces. Raises NoFamilyError."""
        with self._early_family(busy=False) as family:
            family.confirm()
        return family

    @contextmanager
    def _early_family(self, *, busy: bool = True) -> Iterator[Family]:
        """To begin with before it is confirmed, as it is when this is left; else nothing of it is kept."""
        if self._family is not None:
            yield self._family
            return
        start, early = time.perf_counter(), None
        try:
            with early_family(self.model, self.kwargs or self.args, busy=busy) as early:
                self.trace_s += time.perf_counter() - start
                try:
                    yield early
                finally:
                    start = time.perf_counter()
        finally:
            self.trace_s += time.perf_counter() - start
            if early is not None and early.is_confirmed:
                self._family = early
            else:
                self._known = Known()

    def appraised(self, plan: Plan, cluster: Machines) -> Appraisal:
        """What a plan costs on a cluster, term by term. Raises PlanMismatchError where it is for another model or batch."""
        number = plan.residency.micro_batches
        short = self._family is not None  # where the plan comes from short traces, so does its graph
        return appraise(plan, self.family.graph(self.batch_size // number) if short else self.traced(number).graph, cluster)


def default_precision(model: nn.Module) -> Precision:
    """A half-precision model is updated through a float32 master copy."""
    half = any(p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters())
    return Precision(master="float32") if half else Precision()
