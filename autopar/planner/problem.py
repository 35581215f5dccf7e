"""From a graph on one mesh to a table of numbers for the search: nodes are decisions, edges are redistributions."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from autopar.core.again import computed_again, kept_by_selective, read_again
from autopar.core.columns import Edges, Nodes, Numbering
from autopar.core.graph import OpGraph, TensorMeta
from autopar.core.layout import I, Layout
from autopar.core.mesh import Mesh
from autopar.core.problem import SearchProblem
from autopar.core.redistribute import layout_space
from autopar.core.residency import computes_again
from autopar.core.rule import OpRule
from autopar.errors import PinConflictError
from autopar.planner.between import Between
from autopar.planner.keeping import Keeping, Sharding, Use, recompute_tables, uses
from autopar.planner.roles import Constraints
from autopar.planner.saved import Gathers, moved_bytes, saved_values, wanting
from autopar.planner.states import Pricing, States, layout_states, op_states
from autopar.program import without_r

STATE_AXES = ("dp", "cp", "ep")
"""Axes of a forced mesh along which ZeRO may cut the state: those on which parameters are whole."""


@dataclass(frozen=True)
class Ports:
    """Where the search nodes of values and ops are: node number -> meaning. `once_s`: by edge of a parameter, the part of its seconds that is before or
    after all microbatches of a step; `gathers`: by edge, of values that the backward of a block reads."""

    op_node: dict[int, int]
    param_node: dict[int, int]
    relay_node: dict[int, int]
    output_node: dict[int, int]
    block_node: dict[str, int]
    states: tuple[States, ...]
    once_s: dict[int, np.ndarray]
    gathers: dict[int, Gathers]


Hub = tuple[States | None, list[tuple[int | None, int | None, int, Gathers | None]]]
"""What joins a value to its users within a segment: the states of its relay, and (node, node, number of the tables, what it gathers) of every edge."""


class Copied(NamedTuple):
    """What copies of a segment share: the ops that are searched, their states and the numbers of their tables, and a name for each value that stays inside,
    by local number."""

    ops: list[int]
    states: list[States]
    numbers: list[int]
    inside: list[tuple[int, tuple[int, int]]]


@dataclass
class ProblemBuilder:
    """Builds the `SearchProblem` of one graph on one mesh. Arrays of equal operators and edges are shared objects."""

    graph: OpGraph
    rules: Sequence[OpRule]
    batch: Sequence[frozenset[int]]
    pricing: Pricing
    constraints: Constraints
    keeping: Keeping = Keeping()

    def __post_init__(self) -> None:
        self.mesh: Mesh = self.pricing.mesh
        self.names: list[str] = []
        self.states: list[States] = []
        self.numbers: list[int] = []
        self.edges: list[tuple[int, int, int]] = []
        self._node_tables, self._edge_tables = Numbering(), Numbering()
        self._op_cache: dict[tuple, States] = {}
        self._edge_cache: dict[tuple, int] = {}
        self._mode_cache: dict[tuple, tuple[np.ndarray, np.ndarray] | None] = {}
        self._copied_modes: dict[tuple, tuple[np.ndarray, np.ndarray] | None] = {}
        self._role: dict[int, tuple[int, int]] = {}
        self._gathers_cache: dict[tuple, Gathers] = {}
        self.gathers: dict[int, Gathers] = {}
        self._once_cache: dict[tuple, np.ndarray] = {}
        self.once_s: dict[int, np.ndarray] = {}
        self._layout_cache: dict[tuple, States] = {}
        self._between = self.pricing.kept(Between, lambda: Between(self.pricing))
        self._cuts_cache: dict[tuple[int, ...], frozenset[tuple[int, int]]] = {}
        self._meta = self.graph.metas
        self._copies: dict[tuple, Copied] = {}
        self._copy_of: list[Copied] = []
        self._inside: dict[int, tuple[tuple[int, int], int]] = {}
        self._hubs: dict[tuple[int, int] | None, Hub] = {}
        self.ops: dict[int, int] = {}
        self.op_of: dict[int, int] = {}
        self.saved = saved_values(self.graph, self.rules)
        self.uses = uses(self.graph)
        names = self.mesh.names
        self.sharding = Sharding(self.pricing, self.keeping, tuple(a for a, name in enumerate(names) if name in STATE_AXES) if self.constraints.strict else None)
        repeatable = self.graph.segments if self.keeping.recompute != ("none",) else ()
        self.block_of = {i: segment.block for segment in repeatable for i in segment.ops if segment.block}
        self.again = computed_again(self.graph, self.rules) if self.block_of else {}
        self.read_again = read_again(self.graph, self.rules) if self.block_of else frozenset()

    def build(self, memory_limit_bytes: float | None) -> tuple[SearchProblem, Ports]:
        searched, finals = self.graph.searched, self.graph.finals
        for s in range(len(self.graph.segments)):
            self._add_segment(s)
        ops = self.ops
        outputs = {n: self._add_output(n, v) for n, v in enumerate(finals) if v in searched}
        ends: dict[int, list[tuple[int, int]]] = {}
        for n, node in outputs.items():
            ends.setdefault(finals[n], []).append((node, 0))
        params = {v: self._add_param(v) for v in self.graph.params}
        relays: dict[int, int] = {}
        for v in sorted(searched):
            name, first = self._inside.get(v, (None, 0))
            hub = self._hubs.get(name)
            if hub is None:
                first_edge = len(self.edges)
                self._join(v, params.get(v), ends.get(v, []), relays)
                if name is not None:
                    self._hubs[name] = self._hub(first_edge, relays.get(v), first)
            else:
                self._join_alike(v, hub, first, relays)
        blocks = self._add_modes()
        nodes = Nodes(self.names, np.array(self.numbers, dtype=int), self._node_tables.tables)
        edges = Edges(*np.array(self.edges, dtype=int).reshape(-1, 3).T, self._edge_tables.tables)
        problem = SearchProblem(nodes, edges, memory_limit_bytes, copies=self._repeated(params, relays))
        return problem, Ports(ops, params, relays, outputs, blocks, tuple(self.states), self.once_s, self.gathers)

    def _join(self, v: int, param: int | None, ends: Sequence[tuple[int, int]], relays: dict[int, int]) -> None:
        """A value with its users, through a relay where there are several."""
        users = [(self.ops[i], k) for i, k in self.graph.consumers[v]] + list(ends)
        if not users:
            return
        from_param = param is not None
        source, port = (param, 0) if param is not None else (self.ops[self.graph.producer[v][0]], self.graph.producer[v][1])
        if len(users) > 1:
            relays[v] = self._add_relay(v, users, source, port)
            kept = not from_param and v in self.graph.differentiated and any(self._saves(*user) for user in users)
            self._connect(v, source, port, relays[v], 0, from_param=from_param, kept=kept, reader=self.op_of.get(users[0][0]))
            source, port, from_param = relays[v], 0, False
        for node, k in users:
            self._connect(v, source, port, node, k, from_param=from_param, reader=self.op_of.get(node))

    def _hub(self, first_edge: int, relay: int | None, first: int) -> Hub:
        """What was made around a value from the `first_edge` on, with nodes as distances from the `first` of the segment, None for the relay."""
        made = enumerate(self.edges[first_edge:], start=first_edge)
        near = [(None if u == relay else u - first, None if w == relay else w - first, tables, self.gathers.get(n)) for n, (u, w, tables) in made]
        return (None if relay is None else self.states[relay]), near

    def _join_alike(self, v: int, hub: Hub, first: int, relays: dict[int, int]) -> None:
        """As a copy of a value that was joined before."""
        states, edges = hub
        relay = -1
        if states is not None:
            relay = relays[v] = self._add(f"{self.graph.values[v].name}.relay", states)
        self.gathers.update((n, gathers) for n, (*_, gathers) in enumerate(edges, start=len(self.edges)) if gathers is not None)
        self.edges += [(relay if u is None else first + u, relay if w is None else first + w, tables) for u, w, tables, _ in edges]

    def _add_segment(self, s: int) -> None:
        """Nodes of the searched operators. Copies of a segment have the same states, and the same edges between them."""
        graph, segment, wiring = self.graph, self.graph.segments[s], self.graph.wirings[s]
        first, searched, named = len(self.states), graph.searched, bool(self.constraints.pins.named)
        kept = segment.ops.start not in self.block_of
        leaving = () if kept else tuple([self._leaves_block(graph.producer[wiring.values[n]][0], wiring.values[n]) for n in wiring.crossing])
        flags = tuple([(v in searched, v in graph.differentiated, v in self.saved) for v in wiring.values])
        batch = self.batch[segment.ops.start : segment.ops.stop] if self.constraints.strict else ()
        key = (wiring.form, wiring.crossing, flags, kept, leaving, batch, s if named else -1)  # a pin may name a single operator
        if key not in self._copies:
            mine = [i for i in segment.ops if not searched.isdisjoint(graph.ops[i].operands)]
            local = (n for n in range(len(wiring.entries), len(flags)) if n not in wiring.crossing)
            inside = [(n, (len(self._copies), n)) for n in local]
            states = [self._op_states(i) for i in mine]
            self._copies[key] = Copied([i - segment.ops.start for i in mine], states, [self._number(s) for s in states], inside)
        copied, values = self._copies[key], wiring.values
        self._copy_of.append(copied)
        ops, nodes = [segment.ops.start + offset for offset in copied.ops], range(first, first + len(copied.ops))
        self.ops.update(zip(ops, nodes))
        self.op_of.update(zip(nodes, ops))
        self._role.update([(i, (id(copied), offset)) for i, offset in zip(ops, copied.ops)])
        self.names += [graph.ops[i].name for i in ops]
        self.states += copied.states
        self.numbers += copied.numbers
        self._inside.update([(values[n], (name, first)) for n, name in copied.inside])

    def _repeated(self, params: Mapping[int, int], relays: Mapping[int, int]) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """The nodes of copies of a segment: its operators, the parameters that only it uses, the relays of values that stay inside."""
        users = self.graph.consumers
        groups: dict[tuple, list[tuple[int, ...]]] = {}
        for s, (segment, wiring) in enumerate(zip(self.graph.segments, self.graph.wirings)):
            copied = self._copy_of[s]
            mine = [n for n, v in enumerate(wiring.values[: len(wiring.entries)]) if v in params and all(i in segment.ops for i, _ in users[v])]
            inside = [n for n, _ in copied.inside if wiring.values[n] in relays]
            nodes = [self.ops[segment.ops.start + offset] for offset in copied.ops]
            nodes += [params[wiring.values[n]] for n in mine] + [relays[wiring.values[n]] for n in inside]
            groups.setdefault((id(copied), *mine, -1, *inside), []).append(tuple(nodes))
        return tuple([tuple(group) for group in groups.values() if len(group) > 1])

    def _add(self, name: str, states: States) -> int:
        self.names.append(name)
        self.states.append(states)
        self.numbers.append(self._number(states))
        return len(self.states) - 1

    def _number(self, states: States) -> int:
        return self._node_tables.of(states.seconds, states.memory_bytes)

    def _op_states(self, i: int) -> States:
        op, rule = self.graph.ops[i], self.rules[i]
        saved = tuple([j for j, v in enumerate(op.results) if (v in self.saved if i not in self.block_of else self._stays(i, v))])
        allowed, prefer, words = self.constraints.allowed(op, rule, self.batch[i])
        color = self.batch[i] if self.constraints.strict else frozenset()
        key = (id(rule), saved, words, color, i in self.block_of)  # operators of one rule object are of one kind and size
        if key not in self._op_cache:
            operands, results = (tuple(self.graph.values[v].meta for v in values) for values in (op.operands, op.results))
            self._op_cache[key] = op_states(
                rule, operands, results, self.pricing, allowed, prefer, named=(self.constraints.strict, words, rule.factors if words[1] else (), color), saved=frozenset(saved),
                keeps=i not in self.block_of, times=self.keeping.micro_batches,
            )  # fmt: skip
        states = self._op_cache[key]
        if not states.strategies:
            pins = [p.text for _, found in self.constraints.for_op(op, rule, self.batch[i]).values() for p in found]
            raise PinConflictError(f"no strategy of operator {op.name} ({op.kind}) satisfies pins {' and '.join(map(repr, pins))} on mesh {self.mesh}")
        return states

    def _add_param(self, v: int) -> int:
        value = self.graph.values[v]
        cuts, use = self._consumer_cuts(v), self.uses[v]
        key = ("param", self._meta[v], cuts, use, value.source if self.constraints.pins.named else ())
        if key not in self._layout_cache:
            about = ("param", *key[1:], self.constraints, replace(self.keeping, micro_batches=1))
            self._layout_cache[key] = self.pricing.kept(about, lambda: self._param_states(v, cuts, use))
        return self._add(value.source[0], self._layout_cache[key])

    def _param_states(self, v: int, cuts: frozenset[tuple[int, int]], use: Use) -> States:
        value = self.graph.values[v]
        space = layout_space(value.meta.shape, self.mesh, sorted(cuts), grad=False, partial=False)
        space = tuple(x for x in space if all(self._storage_allowed(a, p) for a, p in enumerate(x)))
        options = self.sharding.options(value.meta, self.constraints.for_param(value.source, space), use)
        memory = np.array([self.sharding.memory_bytes(value.meta, x, zero, use.live) for x, zero in options])
        return States((), (), (tuple(x for x, _ in options),), np.zeros(len(options)), memory, zeros=tuple(zero for _, zero in options))

    def _storage_allowed(self, axis: int, placement) -> bool:  # noqa: ANN001
        return not (self.constraints.strict and self.mesh.names[axis] in ("dp", "cp") and placement.kind == "S")

    def _consumer_cuts(self, v: int) -> frozenset[tuple[int, int]]:
        layouts = [self.states[self.ops[i]].operand_layouts[k] for i, k in self.graph.consumers[v]]
        key = tuple(map(id, layouts))
        if key not in self._cuts_cache:
            self._cuts_cache[key] = frozenset((p.dim, p.outer) for found in layouts for layout in found for p in layout if p.kind == "S")
        return self._cuts_cache[key]

    def _add_output(self, n: int, v: int) -> int:
        """A scalar or an update is wanted whole; other outputs may stay cut where a scalar loss exists."""
        value = self.graph.values[v]
        is_update = n >= len(self.graph.outputs)
        has_loss = any(self.graph.values[o].meta.shape == () for o in self.graph.outputs)
        whole = tuple(I for _ in self.mesh.axes)
        layouts: tuple[Layout, ...] = (whole,)
        if value.meta.shape and has_loss and not is_update:
            produced = self._produced_layouts(v)
            layouts = tuple(dict.fromkeys((whole, *(x for x in produced if all(p.kind in "SI" for p in x)))))
        key = ("output", layouts)
        if key not in self._layout_cache:
            self._layout_cache[key] = self.pricing.kept(key, lambda: layout_states(layouts))
        return self._add(f"output.{n}", self._layout_cache[key])

    def _produced_layouts(self, v: int) -> tuple[Layout, ...]:
        if v in self.graph.producer:
            i, j = self.graph.producer[v]
            return tuple(dict.fromkeys(self.states[self.ops[i]].result_layouts[j]))
        return ()

    def _add_relay(self, v: int, uses: Sequence[tuple[int, int]], source: int, port: int) -> int:
        """Where a value is handed to several users: any layout that it is produced or used in."""
        around = [self.states[source].result_layouts[port], *(self.states[node].operand_layouts[k] for node, k in uses)]
        key = ("relay", *map(id, around))
        if key not in self._layout_cache:
            found = tuple(dict.fromkeys(layout for layouts in around for layout in layouts))
            self._layout_cache[key] = self.pricing.kept(("relay", found), lambda: layout_states(found))
        return self._add(f"{self.graph.values[v].name}.relay", self._layout_cache[key])

    def _connect(self, v: int, u: int, port: int, w: int, k: int, *, from_param: bool, kept: bool = False, reader: int | None = None) -> None:
        """`kept`: the backward reads what users of a relay are given; `reader`: the operator that its moves are made for first."""
        src, dst = self.states[u].result_layouts[port], self.states[w].operand_layouts[k]
        grad = v in self.graph.differentiated
        saves = grad and self._saves(w, k)
        use = self.uses[v] if from_param else None
        key = (id(src), id(dst), self._meta[v], grad, saves, kept, use)
        if key not in self._edge_cache:
            meta = self.graph.values[v].meta
            if use is not None:
                seconds, self._once_cache[key] = self._param_edge(meta, self.states[u], dst, use)
            else:
                seconds = self.keeping.micro_batches * self._between.seconds(meta, src, dst)
            held = moved_bytes(meta, src, dst, self.mesh, instead=kept, addends=bool(self.block_of)) if saves or kept else None
            self._edge_cache[key] = self._edge_tables.of(seconds, None if kept and self.keeping.gathers_again else held)
            if held is not None:
                # where a parameter is stored whole and used with partial gradients nothing moves in the passes
                self._gathers_cache[key] = self._gathers(meta, src, dst if use is None else list(map(without_r, dst)), instead=use is None)
        if key in self._once_cache:
            self.once_s[len(self.edges)] = self._once_cache[key]
        if key in self._gathers_cache and (reader in self.block_of or not self.block_of):
            self.gathers[len(self.edges)] = self._gathers_cache[key]
        self.edges.append((u, w, self._edge_cache[key]))

    def _saves(self, node: int, k: int) -> bool:
        i = self.op_of.get(node)
        return i is not None and k in self.rules[i].saved_operands and self.rules[i].keeps_operand(k, wanting(self.graph, i))

    def _gathers(self, meta: TensorMeta, src: Sequence[Layout], dst: Sequence[Layout], *, instead: bool) -> Gathers:
        """Of an edge whose moves keep what they make, `instead` of what they are given."""
        held = moved_bytes(meta, src, dst, self.mesh, instead=instead, addends=bool(self.block_of))
        if not self.keeping.gathers_again:
            return Gathers(held, lambda: (np.zeros_like(held), held))
        return self._between.gathers(meta, src, dst, held, self.keeping.micro_batches, instead=instead)

    def _param_edge(self, meta: TensorMeta, source: States, dst: Sequence[Layout], use: Use) -> tuple[np.ndarray, np.ndarray]:
        """Seconds, and the part of them that is once a step."""
        times, about = self.keeping.micro_batches, ("param edge", meta, source.result_layouts, source.zeros, dst, use, self.sharding.about)
        moves, passes, once = self.pricing.kept(about, lambda: self.sharding.edge_seconds(meta, source.result_layouts[0], source.zeros, dst, use))
        return times * moves + times * passes + once, once

    def _leaves_block(self, i: int, v: int) -> bool:
        """Whether a result is used outside the block that makes it."""
        return v in self.graph.finals or any(self.block_of.get(j) != self.block_of[i] for j, _ in self.graph.consumers[v])

    def _stays(self, i: int, v: int) -> bool:
        """Whether a result of a block's operator is kept, whatever blocks recompute: others that recompute begin with what leaves it, those that do not read it
        in their backwards or not."""
        return self._leaves_block(i, v) and (v in self.saved or v in self.graph.finals)

    def _add_modes(self) -> dict[str, int]:
        """A node per block for its mode of recomputation, joined to every operator that it makes cheaper to keep or dearer to run."""
        modes = self.keeping.recompute
        found: dict[str, int] = {}
        states = States((), (), (), np.zeros(len(modes)), np.zeros(len(modes)), modes=modes)
        live = self.graph.differentiated
        for i, block in self.block_of.items():
            if i not in self.ops or live.isdisjoint(self.graph.ops[i].results):
                continue
            if block not in found:
                found[block] = self._add(block, states)
            tables = self._mode_tables_of_copies(i)
            if tables is not None:
                self.edges.append((found[block], self.ops[i], self._edge_tables.of(*tables)))
        return found

    def _addends(self, states: States) -> np.ndarray:
        """Over how many ranks the result of each state is still to be summed: kept is a part of the sum, not an addend."""
        sizes = self.mesh.sizes
        return np.array([math.prod(sizes[a] for a, p in enumerate(layout) if p.kind == "P") for layout in states.result_layouts[0]])

    def _mode_tables_of_copies(self, i: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Of an operator, found once for its copies."""
        key = self._role[i], self.again.get(i), tuple([v in self.read_again for v in self.graph.ops[i].results])
        if key not in self._copied_modes:
            self._copied_modes[key] = self._mode_tables(i)
        return self._copied_modes[key]

    def _mode_tables(self, i: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Seconds and bytes of an operator by the mode of its block and its own state; None where they are nothing."""
        op, states = self.graph.ops[i], self.states[self.ops[i]]
        metas = [self.graph.values[v].meta for v in op.operands]
        inner = tuple(j for j, v in enumerate(op.results) if not self._leaves_block(i, v))
        saved = tuple(j for j in inner if op.results[j] in self.saved)
        begun = tuple(j for j, v in enumerate(op.results) if j not in inner and not self._stays(i, v))
        kept = kept_by_selective(op, metas)
        read = tuple(j for j in inner if op.results[j] in self.read_again)
        key = (id(states), read, saved, begun, kept, self.again.get(i, 0.0))
        if key not in self._mode_cache:
            assert states.forward_s is not None and states.kept_bytes is not None and states.result_bytes is not None
            held, made = (states.result_bytes[list(which)].sum(axis=0).astype(float) for which in (saved, read))
            addends = self._addends(states)
            again = states.forward_s * self.again.get(i, 0.0) * (addends == 1 if kept else 1)
            keeps, watch_s = states.kept_bytes + held / addends, self.pricing.cluster.host.watch_s
            seconds, memory = recompute_tables(self.keeping.recompute, again, keeps, made / addends, kept=kept, times=self.keeping.micro_batches, watch_s=watch_s, summed=addends > 1)
            memory += np.outer([computes_again(mode) for mode in self.keeping.recompute], states.result_bytes[list(begun)].sum(axis=0))
            self._mode_cache[key] = (seconds, memory) if seconds.any() or memory.any() else None
        return self._mode_cache[key]
