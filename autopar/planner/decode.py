"""From the states a search chose to a `Program`: operators outside the search follow what the searched ones ask for."""

from collections.abc import Sequence
from functools import cached_property
from itertools import chain

from autopar.core.graph import OpGraph, TensorMeta
from autopar.core.layout import I, Layout
from autopar.core.residency import Residency
from autopar.core.rule import Choice, OpRule, Strategy
from autopar.planner.keeping import Keeping, deferred_axes, lift
from autopar.planner.problem import Ports
from autopar.planner.states import Pricing
from autopar.program import Program, Route, without_r


class _Decoder:
    def __init__(self, graph: OpGraph, rules: Sequence[OpRule], pricing: Pricing, ports: Ports, choices: Sequence[int], keeping: Keeping) -> None:
        self.graph, self.rules, self.pricing, self.ports, self.choices = graph, rules, pricing, ports, choices
        self.keeping = keeping
        self.mesh = pricing.mesh
        self.routes: dict[tuple[TensorMeta | Layout | int, ...], Route] = {}
        self.whole: Layout = tuple(I for _ in self.mesh.axes)
        self.strategies: list[Strategy] = [tuple(Choice("I") for _ in self.mesh.axes)] * len(graph.ops)
        for i, node in ports.op_node.items():
            self.strategies[i] = ports.states[node].strategies[choices[node]]

    def layout_at(self, node: int) -> Layout:
        return self.ports.states[node].result_layouts[0][self.choices[node]]

    def needed(self, i: int, k: int) -> Layout:
        if i in self.ports.op_node:
            node = self.ports.op_node[i]
            return self.ports.states[node].operand_layouts[k][self.choices[node]]
        layout = self.rules[i].operand_layout(k, self.strategies[i], self.mesh)
        return layout if self.graph.values[self.graph.ops[i].operands[k]].meta.requires_grad else without_r(layout)

    def follow_demand(self) -> None:
        """An operator that no parameter reaches makes what all its users want, where one strategy does; else the whole.

        Its inputs are on every rank already, so cutting it costs nothing.
        """
        finals = set(self.graph.finals)
        for i in sorted(set(range(len(self.graph.ops))).difference(self.ports.op_node), reverse=True):
            demands = [{self.needed(j, k) for j, k in self.graph.consumers[v]} for v in self.graph.ops[i].results]
            for v, wanted in zip(self.graph.ops[i].results, demands, strict=True):
                wanted.update((self.whole,) if v in finals else ())
            self.strategies[i] = self._free_strategy(i, demands)

    def _free_strategy(self, i: int, demands: list[set[Layout]]) -> Strategy:
        rule, default = self.rules[i], tuple(Choice("I") for _ in self.mesh.axes)
        targets = {j: next(iter(d)) for j, d in enumerate(demands) if len(d) == 1}
        if not rule.known or any(len(d) > 1 for d in demands) or not targets:
            return default
        j, target = next(iter(targets.items()))
        options = [[c for c in rule.choices(differentiable=False) if c.kind in ("I", "cut")] for _ in self.mesh.axes]
        picked: list[Choice] = []
        for axis, choices in enumerate(options):
            fits = [c for c in choices if self._same_cut(rule, j, c, target, axis)]
            if not fits:
                return default
            picked.append(fits[0])
        strategy = tuple(picked)
        if not rule.legal(strategy, self.mesh) or any(rule.result_layout(n, strategy, self.mesh) != t for n, t in targets.items()):
            return default
        return strategy

    def _same_cut(self, rule: OpRule, j: int, choice: Choice, target: Layout, axis: int) -> bool:
        made, want = rule.result_placement(j, choice), target[axis]
        return made.kind == want.kind and made.dim == want.dim

    @cached_property
    def looks(self) -> list[int]:
        """A number per segment, the same for copies whose operators are in the same states or have the same strategies: they are decoded once."""
        nodes, states, choices, strategies = self.ports.op_node, self.ports.states, self.choices, self.strategies
        of_op = [strategies[i] if (n := nodes.get(i)) is None else (id(states[n]), choices[n]) for i in range(len(strategies))]
        known: dict[tuple, int] = {}
        forms = zip(self.graph.segments, self.graph.wirings, strict=True)
        return [known.setdefault((wiring.form, tuple(of_op[s.ops.start : s.ops.stop])), len(known)) for s, wiring in forms]

    def produced(self) -> list[Layout]:
        layouts = [self.whole] * len(self.graph.values)
        known: dict[int, list[Layout]] = {}
        for segment, wiring, look in zip(self.graph.segments, self.graph.wirings, self.looks, strict=True):
            if look not in known:
                known[look] = [self._made(i, j, v) for i in segment.ops for j, v in enumerate(self.graph.ops[i].results)]
            for v, layout in zip(wiring.results, known[look], strict=True):
                layouts[v] = layout
        return layouts

    def _made(self, i: int, j: int, v: int) -> Layout:
        """The layout of a result of an operator."""
        if i in self.ports.op_node:
            node = self.ports.op_node[i]
            return self.ports.states[node].result_layouts[j][self.choices[node]]
        layout = self.rules[i].result_layout(j, self.strategies[i], self.mesh)
        return layout if self.graph.values[v].meta.requires_grad else without_r(layout)

    def route(self, v: int, src: Layout, dst: Layout, node: int | None, k: int = 0, *, relayed: bool = True) -> Route:
        """The cheapest route to port k of a node, among all the layouts that the search had for it: what it priced is what is run."""
        if src == dst:
            return (src,)
        meta = self.graph.values[v].meta
        ends = (self._source(v, relayed=relayed), self.ports.states[node].operand_layouts[k]) if node is not None else ()
        key = meta, src, dst, *map(id, ends)
        if key not in self.routes:
            red = self.pricing.redistribution(meta, (src, dst, *chain(*ends)), grad=meta.requires_grad)
            route = [src]
            for step in red.path(src, dst):
                route.append(step.apply(route[-1]))
            self.routes[key] = tuple(route)
        return self.routes[key]

    def _source(self, v: int, *, relayed: bool) -> tuple[Layout, ...]:
        """The layouts that a value had to choose from where it comes from: its relay, its parameter or its operator."""
        ports = self.ports
        if relayed and v in ports.relay_node:
            return ports.states[ports.relay_node[v]].result_layouts[0]
        if v in ports.param_node:
            return ports.states[ports.param_node[v]].result_layouts[0]
        i, j = self.graph.producer.get(v, (-1, 0))
        return ports.states[ports.op_node[i]].result_layouts[j] if i in ports.op_node else ()

    def program(self) -> Program:
        self.follow_demand()
        produced = self.produced()
        storage: dict[int, Layout] = {}
        deferred: dict[int, tuple[int, ...]] = {}
        relay: dict[int, Route] = {}
        lifted: dict[tuple[Layout, Layout, bool], tuple[tuple[int, ...], Layout]] = {}
        for v in self.graph.params:
            storage[v] = self.layout_at(self.ports.param_node[v])
            look = storage[v], self._first_use(v), self.graph.values[v].meta.requires_grad
            if look not in lifted:
                axes = deferred_axes(*look[:2]) if look[2] else ()
                lifted[look] = axes, lift(storage[v], axes)
            deferred[v], produced[v] = lifted[look]
        for v, node in self.ports.relay_node.items():
            there = self.layout_at(node)
            if there != produced[v]:
                relay[v] = self.route(v, produced[v], there, node, relayed=False)
        start = [relay[v][-1] if v in relay else produced[v] for v in range(len(self.graph.values))]
        routes: dict[tuple[int, int], Route] = {}
        known: dict[tuple, list[Route]] = {}
        for s in range(len(self.graph.segments)):
            self._add_routes(s, start, routes, known)
        nodes = self.ports.output_node
        ends = [self.layout_at(nodes[n]) if n in nodes else self.whole for n in range(len(self.graph.finals))]
        final = tuple(self.route(v, start[v], end, nodes.get(n)) for n, (v, end) in enumerate(zip(self.graph.finals, ends)))
        n = len(self.graph.outputs)
        return Program(
            self.graph, self.mesh, tuple(self.rules), tuple(self.strategies), storage, deferred, tuple(produced), relay,
            routes, final[:n], final[n:], self.residency()
        )  # fmt: skip

    def _add_routes(self, s: int, start: Sequence[Layout], routes: dict[tuple[int, int], Route], known: dict[tuple, list[Route]]) -> None:
        """Routes to the operands of a segment; copies in the same states that are given the same have the same ones."""
        wiring, relays = self.graph.wirings[s], self.ports.relay_node
        places = self.graph.places[s]
        ends = [(n, v) for n, v in enumerate(wiring.values) if n < len(wiring.entries) or v in relays]
        key = (self.looks[s], tuple([(n, start[v], id(self._source(v, relayed=True))) for n, v in ends]))
        found = known.get(key)
        if found is None:
            operands = [self.graph.ops[i].operands[k] for i, k in places]
            found = known[key] = [self.route(v, start[v], self.needed(i, k), self.ports.op_node.get(i), k) for v, (i, k) in zip(operands, places, strict=True)]
        routes.update(zip(places, found))

    def residency(self) -> Residency[int]:
        zero, recompute = {}, {}
        for v, node in self.ports.param_node.items():
            chosen = self.ports.states[node].zeros[self.choices[node]]
            if chosen is not None:
                zero[v] = chosen
        for block, node in self.ports.block_node.items():
            mode = self.ports.states[node].modes[self.choices[node]]
            if mode != "none":
                recompute[block] = mode
        given = self.keeping
        return Residency(zero=zero, recompute=recompute, micro_batches=given.micro_batches, precision=given.precision, offload=given.offload)

    def _first_use(self, v: int) -> Layout:
        if v in self.ports.relay_node:
            return self.layout_at(self.ports.relay_node[v])
        if self.graph.consumers[v]:
            i, k = self.graph.consumers[v][0]
            return self.needed(i, k)
        return self.whole


def decode(graph: OpGraph, rules: Sequence[OpRule], pricing: Pricing, ports: Ports, choices: Sequence[int], keeping: Keeping) -> Program:
    """The program that the chosen states stand for."""
    return _Decoder(graph, rules, pricing, ports, choices, keeping).program()
