"""Between a `Program` and the `Plan` that names its decisions; both ways."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from autopar.core.graph import OpGraph
from autopar.core.layout import I, Layout, R
from autopar.core.mesh import Mesh
from autopar.core.moves import legal_step
from autopar.core.plan import Plan
from autopar.core.residency import Residency
from autopar.core.rule import OpRule
from autopar.errors import LayoutError, PlanMismatchError
from autopar.planner.rulebook import rules_of
from autopar.program import Program, Route, route_steps, without_r


def shardable(program: Program, v: int) -> tuple[int, ...]:
    """Mesh axes over which a parameter's state can be cut by ZeRO: those on which it is stored whole."""
    return tuple(a for a, p in enumerate(program.storage[v]) if p == I and program.mesh.sizes[a] > 1)


def named(residency: Residency[int], graph: OpGraph) -> Residency[str]:
    """With parameters by name."""
    return replace(residency, zero={graph.values[v].source[0]: z for v, z in residency.zero.items()})


def decisions(program: Program, mesh: Mesh) -> dict[str, Any]:
    """The decision fields of a plan; `mesh` gives the axes their final names."""
    graph = program.graph
    looks = [*zip(map(id, program.rules), map(id, program.strategies))]  # a search gives equal operators the same objects
    words = {look: rule.describe(strategy, mesh) for look, (rule, strategy) in dict(zip(looks, zip(program.rules, program.strategies))).items()}
    ops = tuple(zip([op.name for op in graph.ops], [words[look] for look in looks]))
    params = tuple((graph.values[v].source[0], program.storage[v]) for v in graph.params)
    relays = tuple((graph.values[v].name, route) for v, route in sorted(program.relay.items()))
    routes = [(f"{graph.ops[i].name}.{k}", route) for (i, k), route in program.routes.items() if len(route) > 1]
    routes += [(f"output.{n}", route) for n, route in enumerate(program.output_routes) if len(route) > 1]
    routes += [(f"update.{n}", route) for n, route in enumerate(program.update_routes) if len(route) > 1]
    return {"residency": named(program.residency, graph), "ops": ops, "params": params, "relays": relays, "routes": tuple(routes)}


class _Binder:
    def __init__(self, graph: OpGraph, plan: Plan) -> None:
        self.graph, self.plan, self.mesh = graph, plan, plan.mesh
        self.rules: Sequence[OpRule] = rules_of(graph)
        self.routes = dict(plan.routes)
        self.relays = dict(plan.relays)
        self.ops = dict(plan.ops)
        self.params = dict(plan.params)

    def program(self) -> Program:
        strategies = tuple(self._strategy(i) for i in range(len(self.graph.ops)))
        whole: Layout = tuple(I for _ in self.mesh.axes)
        produced: list[Layout] = [whole] * len(self.graph.values)
        for i, op in enumerate(self.graph.ops):
            for j, v in enumerate(op.results):
                layout = self.rules[i].result_layout(j, strategies[i], self.mesh)
                produced[v] = layout if self.graph.values[v].meta.requires_grad else without_r(layout)
        storage = {v: self._storage(v) for v in self.graph.params}
        draft = Program(self.graph, self.mesh, tuple(self.rules), strategies, storage, {}, tuple(produced), {}, {}, (), ())
        deferred = {v: self._deferred(v, draft) for v in self.graph.params}
        for v, axes in deferred.items():
            produced[v] = tuple(R if a in axes else p for a, p in enumerate(storage[v]))
        names = {value.name: v for v, value in enumerate(self.graph.values)}
        relay = {names[name]: self._checked(route, produced[names[name]], None, names[name], name) for name, route in self.relays.items() if name in names}
        start = [relay[v][-1] if v in relay else produced[v] for v in range(len(produced))]
        routes = {
            (i, k): self._route(f"{op.name}.{k}", v, start[v], draft.needed(i, k)) for i, op in enumerate(self.graph.ops) for k, v in enumerate(op.operands)
        }
        outputs = tuple(self._route(f"output.{n}", v, start[v], None) for n, v in enumerate(self.graph.outputs))
        updates = tuple(self._route(f"update.{n}", v, start[v], whole) for n, (_, v) in enumerate(self.graph.updates))
        draft = Program(self.graph, self.mesh, tuple(self.rules), strategies, storage, deferred, tuple(produced), relay, routes, outputs, updates)
        return replace(draft, residency=self._residency(draft))

    def _residency(self, draft: Program) -> Residency[int]:
        """The plan's, with parameters by value number; refuses what the program cannot do."""
        known, given = {self.graph.values[v].source[0]: v for v in self.graph.params}, self.plan.residency
        zero = {}
        for name, z in given.zero.items():
            if name not in known:
                raise PlanMismatchError(f"the plan shards parameter {name}, which the model does not have; plan again")
            if not set(z.axes) <= set(shardable(draft, known[name])) or (z.stage == 3 and known[name] in self.graph.outputs):
                raise PlanMismatchError(f"parameter {name} cannot be sharded by ZeRO stage {z.stage} over axes {z.axes} of {self.mesh}; plan again")
            zero[known[name]] = z
        return replace(given, zero=zero)

    def _strategy(self, i: int):  # noqa: ANN202
        op, rule = self.graph.ops[i], self.rules[i]
        if op.name not in self.ops:
            raise PlanMismatchError(f"the plan has no strategy for operator {op.name}; plan again")
        strategy = rule.parse(self.ops[op.name], self.mesh)
        if not rule.legal(strategy, self.mesh):
            raise PlanMismatchError(f"operator {op.name} ({op.kind}) cannot be cut as {self.ops[op.name]!r} on mesh {self.mesh}; plan again")
        return strategy

    def _storage(self, v: int) -> Layout:
        name = self.graph.values[v].source[0]
        if name not in self.params:
            raise PlanMismatchError(f"the plan has no layout for parameter {name}; plan again")
        layout = self.params[name]
        if any(p.kind not in "SI" for p in layout):
            raise PlanMismatchError(f"parameter {name} is stored as {layout}; storage is S or I; plan again")
        return layout

    def _deferred(self, v: int, draft: Program) -> tuple[int, ...]:
        """Axes on which the parameter enters the program as R though it is stored whole."""
        value = self.graph.values[v]
        if not value.meta.requires_grad:
            return ()
        if value.name in self.relays:
            first = self.relays[value.name][0]
        elif self.graph.consumers[v]:
            i, k = self.graph.consumers[v][0]
            first = self.routes.get(f"{self.graph.ops[i].name}.{k}", (draft.needed(i, k),))[0]
        else:
            return ()
        return tuple(a for a, (s, p) in enumerate(zip(draft.storage[v], first)) if s == I and p == R)

    def _route(self, name: str, v: int, src: Layout, dst: Layout | None) -> Route:
        return self._checked(self.routes.get(name, (src,)), src, dst, v, name)

    def _checked(self, route: Route, src: Layout, dst: Layout | None, v: int, name: str) -> Route:
        """A route must start and end where the strategies say, in legal steps that fit the tensor."""
        if route[0] != src or (dst is not None and route[-1] != dst):
            raise PlanMismatchError(f"route {name} leads from {route[0]} to {route[-1]}, the strategies need {src} to {dst or route[-1]}; plan again")
        shape = self.graph.values[v].meta.shape
        for here, there in zip(route, route[1:]):
            if sum(a != b for a, b in zip(here, there)) != 1 or not legal_step(here, route_steps((here, there))[0]):
                raise PlanMismatchError(f"route {name}: no single step leads from {here} to {there}; plan again")
        for layout in route:
            if any(p.kind == "S" and p.dim >= len(shape) for p in layout):
                raise PlanMismatchError(f"route {name}: {layout} cuts a dimension that shape {shape} does not have; plan again")
        return route


def bind(plan: Plan, graph: OpGraph) -> Program:
    """The program of a plan on its graph; raises PlanMismatchError where they do not fit."""
    plan.check_graph(graph.digest, graph.name)
    try:
        return _Binder(graph, plan).program()
    except LayoutError as error:
        raise PlanMismatchError(f"{error}; plan again") from error


