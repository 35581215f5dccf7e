"""Make a problem smaller without losing its optimum.

Two steps. `canonical` gives equal tables one object and adds parallel edges up. `shrink` drops states that can never
be needed: state s of node i is replaced by state t when, whatever the neighbours choose, t is at least as good:

    c[t] - c[s] + sum over edges (i, j) of max over states r of j of (E[t, r] - E[s, r])  <=  0

(dead-end elimination, Goldstein's criterion; a state dominated entry by entry is the special case where every term is
<= 0). In sharding problems it removes the states whose own cost exceeds the price of resharding to a better one.
With several prices the test must hold for each of them, so that seconds *and* bytes do not rise.

Everything is memoised on the identity of the tables, so that a repeated block is looked at once.
"""

from collections.abc import Sequence, Set
from dataclasses import dataclass, replace

import numpy as np

from autopar.core.columns import Edges, Nodes, Numbering, first_seen
from autopar.core.problem import Edge, Node, SearchProblem
from autopar.errors import InfeasibleError

NUM_ROUNDS = 4  # a dropped state can make a neighbour's state useless; gains after a few rounds were nil
NUM_PROBES = 8  # columns of each table that are tried before a pair of states is compared in full
NUM_RIVALS = 4  # how many of the most promising replacements of a state are compared in full


@dataclass(frozen=True, slots=True)
class Price:
    """Turns seconds and bytes into one number: `second` * cost_s + `byte` * memory_bytes."""

    second: float = 1.0
    byte: float = 0.0

    def of_plan(self, cost_s: float, memory_bytes: float, base_memory_bytes: float) -> float:
        """The number for a plan; its base memory, which no choice changes, is left out."""
        return self.second * cost_s + self.byte * (memory_bytes - base_memory_bytes)


SECONDS = Price(1.0, 0.0)
BYTES = Price(0.0, 1.0)


def holds(memory_bytes: np.ndarray | None) -> bool:
    """Whether anything is held, so that a table depends on the price of a byte."""
    return memory_bytes is not None and bool(memory_bytes.any())


class PriceList:
    """Tables of nodes and edges under one price; tables that share arrays come out as one array."""

    def __init__(self, price: Price) -> None:
        self.price = price
        self._made: dict[tuple[int, int], np.ndarray] = {}

    def of(self, item: Node | Edge) -> np.ndarray:
        """The table of a node or an edge."""
        return self.of_tables(item.cost_s, item.memory_bytes)

    def of_tables(self, cost_s: np.ndarray, memory_bytes: np.ndarray | None) -> np.ndarray:
        """Shape of `cost_s`; forbidden pairs are inf under every price."""
        key = id(cost_s), id(memory_bytes)
        if key not in self._made:
            self._made[key] = self._priced(cost_s, memory_bytes)
        return self._made[key]

    def _priced(self, cost_s: np.ndarray, memory_bytes: np.ndarray | None) -> np.ndarray:
        if self.price.second == 1:
            table = cost_s
        elif self.price.second == 0:
            table = np.where(np.isinf(cost_s), np.inf, 0.0)  # 0 * inf would be nan
        else:
            table = cost_s * self.price.second
        if self.price.byte != 0 and memory_bytes is not None and holds(memory_bytes):
            table = table + memory_bytes * self.price.byte
        return table


@dataclass(frozen=True)
class Shrunk:
    """A smaller problem and, per node, the original numbers of the states that it kept (ascending)."""

    problem: SearchProblem
    kept: tuple[np.ndarray, ...]

    def restore(self, choices: Sequence[int]) -> tuple[int, ...]:
        """Choices of the smaller problem in the numbering of the original."""
        return tuple(int(states[choice]) for states, choice in zip(self.kept, choices, strict=True))


def whole(problem: SearchProblem) -> Shrunk:
    """A problem from which nothing was dropped."""
    sizes = problem.node_columns.sizes.tolist()
    states = {size: np.arange(size) for size in set(sizes)}
    return Shrunk(problem, tuple([states[size] for size in sizes]))


def canonical(problem: SearchProblem) -> SearchProblem:
    """The same problem with one object per distinct table (float64, contiguous) and one edge u < v per pair of nodes."""
    unique, at_nodes, at_edges = _UniqueTables(), Numbering(), Numbering()
    nodes, edges = problem.node_columns, problem.edge_columns
    seen = np.array([at_nodes.of(unique.table(cost_s), unique.table(held)) for cost_s, held in nodes.tables], dtype=int)
    low, high = np.minimum(edges.u, edges.v), np.maximum(edges.u, edges.v)
    order = np.lexsort((high, low))
    ends = np.stack([low, high])[:, order]
    starts = np.flatnonzero(np.append(True, (np.diff(ends) != 0).any(axis=0))) if len(order) else order
    turned = (2 * edges.number + (edges.u > edges.v))[order]  # tables and which way round, by which edges that stand alone are told apart
    kind, stops, bundles = turned[starts], np.append(starts[1:], len(order)), dict[bytes, int]()
    for n in np.flatnonzero(stops - starts > 1).tolist():
        kind[n] = bundles.setdefault(turned[starts[n] : stops[n]].tobytes(), 2 * len(edges.tables) + len(bundles))
    kind, first = first_seen(kind)
    merged = []
    for n in first.tolist():
        parts = [(*edges.tables[code // 2], bool(code % 2)) for code in turned[starts[n] : stops[n]].tolist()]
        merged.append(at_edges.of(*unique.merged(parts)))
    number = np.array(merged, dtype=int)[kind]
    found = Nodes(nodes.names, seen[nodes.number], at_nodes.tables), Edges(ends[0, starts], ends[1, starts], number, at_edges.tables)
    return problem.derived(*found, problem.copies)


class _UniqueTables:
    """Gives equal content one array object."""

    def __init__(self) -> None:
        self._by_content: dict[tuple[tuple[int, ...], bytes], np.ndarray] = {}
        self._by_source: dict[tuple[int, ...], tuple[object, np.ndarray]] = {}

    def table(self, source: np.ndarray, flip: bool = False) -> np.ndarray:
        key = id(source), int(flip)
        if key not in self._by_source:
            array = np.ascontiguousarray(source.T if flip else source, dtype=np.float64)
            # the source is kept beside the result: an id is only a name while its object lives
            self._by_source[key] = source, self._by_content.setdefault((array.shape, array.tobytes()), array)
        return self._by_source[key][1]

    def merged(self, parts: Sequence[tuple[np.ndarray, np.ndarray | None, bool]]) -> tuple[np.ndarray, np.ndarray | None]:
        """Seconds and bytes of all edges between two nodes, each with whether it leads from the higher to the lower."""
        memories = [self.table(memory, flip) for _, memory, flip in parts if memory is not None]
        return self.total([self.table(cost_s, flip) for cost_s, _, flip in parts]), self.total(memories) if memories else None

    def total(self, tables: list[np.ndarray]) -> np.ndarray:
        if len(tables) == 1:
            return tables[0]
        ordered = sorted(tables, key=id)
        key = tuple(id(t) for t in ordered) + (-1,)
        if key not in self._by_source:
            self._by_source[key] = ordered, self.table(sum(tables[1:], start=tables[0]))
        return self._by_source[key][1]


def node_classes(problem: SearchProblem) -> list[int]:
    """A number per node, equal for nodes with the same tables on themselves and on their edges; numbered as they appear."""
    nodes, edges = problem.node_columns, problem.edge_columns
    ends = np.stack([edges.u, edges.v], axis=1).ravel()
    tables = np.stack([2 * edges.number, 2 * edges.number + 1], axis=1).ravel()
    text = tables[np.argsort(ends, kind="stable")].tobytes()
    bounds = (tables.itemsize * np.append(0, np.bincount(ends, minlength=len(nodes)).cumsum())).tolist()
    known: dict[tuple[int, bytes], int] = {}
    return [known.setdefault((number, text[a:b]), len(known)) for number, a, b in zip(nodes.number.tolist(), bounds, bounds[1:])]


def shrink(problem: SearchProblem, prices: tuple[Price, ...], spared: Set[int] = frozenset()) -> Shrunk:
    """Drop states that some other state replaces at no loss under every one of `prices`, but of nodes that are `spared`; `problem` is canonical.

    Of states that replace each other the lowest number stays. Raises InfeasibleError where forbidden pairs leave a
    node without states.
    """
    masks = _Masks(problem, prices)
    todo = [node for node in range(len(problem.nodes)) if node not in spared]
    for _ in range(NUM_ROUNDS):
        touched: set[int] = set()
        for node in todo:
            if masks.tighten(node):
                touched.update(masks.others[node])
        if not touched:
            break
        todo = sorted(touched - spared)
    return masks.cut()


class _Masks:
    """The states each node still has; equal masks share one number, equal situations one answer."""

    def __init__(self, problem: SearchProblem, prices: tuple[Price, ...]) -> None:
        self.problem = problem
        self.lists = [PriceList(price) for price in prices]
        self.classes = node_classes(problem)
        self.others: list[list[int]] = [[] for _ in problem.nodes]
        self.incident: list[list[tuple[Edge, int]]] = [[] for _ in problem.nodes]
        for edge in problem.edges:
            for axis, (node, other) in enumerate(((edge.u, edge.v), (edge.v, edge.u))):
                self.incident[node].append((edge, axis))
                self.others[node].append(other)
        self.states: list[np.ndarray] = []  # by mask number
        self.number: dict[bytes, int] = {}
        self.answers: dict[tuple[int, ...], int] = {}
        full: dict[int, int] = {}
        for size in (item.num_states for item in problem.nodes):
            if size not in full:
                full[size] = self._number_of(np.arange(size))
        self.mask = [full[item.num_states] for item in problem.nodes]

    def _number_of(self, states: np.ndarray) -> int:
        number = self.number.setdefault(states.tobytes(), len(self.states))
        if number == len(self.states):
            self.states.append(states)
        return number

    def tighten(self, node: int) -> bool:
        """Drop what can be dropped from one node; True if that was anything."""
        mask = self.mask
        old = mask[node]
        key = (self.classes[node], old, *[mask[other] for other in self.others[node]])
        new = self.answers.get(key)
        if new is None:
            own = self.states[old]
            at_node = np.stack([prices.of(self.problem.nodes[node])[own] for prices in self.lists])
            ends = zip(self.incident[node], self.others[node], strict=True)
            at_edges = [self._rows(edge, axis, own, self.states[mask[other]]) for (edge, axis), other in ends]
            with np.errstate(invalid="ignore"):  # inf - inf of two forbidden pairs; each use says what becomes of the nan
                keep = irreplaceable(at_node, at_edges)
            if not keep.any():
                raise InfeasibleError(f"node {self.problem.nodes[node].name!r}: every state meets only forbidden pairs on some edge")
            new = self.answers[key] = self._number_of(own[keep])
        mask[node] = new
        return new != old

    def _rows(self, edge: Edge, axis: int, own: np.ndarray, other: np.ndarray) -> np.ndarray:
        rows = []
        for prices in self.lists:
            table = prices.of(edge)
            rows.append((table.T if axis else table)[np.ix_(own, other)])
        return np.stack(rows)

    def cut(self) -> Shrunk:
        """The problem over the states that are left; tables shared before are shared after."""
        made: dict[tuple[int, ...], np.ndarray] = {}

        def part(table: np.ndarray, *masks: int) -> np.ndarray:
            key = (id(table), *masks)
            if key not in made:
                states = [self.states[m] for m in masks]
                whole = all(len(s) == n for s, n in zip(states, table.shape, strict=True))
                made[key] = table if whole else np.ascontiguousarray(table[np.ix_(*states)])
            return made[key]

        mask = self.mask
        nodes = tuple(Node(n.name, part(n.cost_s, m), part(n.memory_bytes, m)) for n, m in zip(self.problem.nodes, mask, strict=True))
        edges = []
        for e in self.problem.edges:
            ends = mask[e.u], mask[e.v]
            edges.append(Edge(e.u, e.v, part(e.cost_s, *ends), None if e.memory_bytes is None else part(e.memory_bytes, *ends)))
        return Shrunk(replace(self.problem, nodes=nodes, edges=tuple(edges)), tuple(self.states[m] for m in mask))


def irreplaceable(at_node: np.ndarray, at_edges: Sequence[np.ndarray]) -> np.ndarray:
    """Mask [k] of the states to keep, given node tables [prices, k] and edge tables [prices, k, k_j].

    States that an edge forbids with every partner go first. Then the criterion above is tested on a few columns,
    which can only understate it, and in full for the most promising replacements.
    """
    alive = np.ones(at_node.shape[1], dtype=bool)
    for table in at_edges:
        alive &= np.isfinite(table[0]).any(axis=1)
    states = np.flatnonzero(alive)
    if len(states) > 1:
        if len(states) < len(alive):
            at_node, at_edges = at_node[:, states], [table[:, states] for table in at_edges]
        alive[states] = _unreplaced(_replacement(at_node, at_edges))
    return alive


def _replacement(at_node: np.ndarray, at_edges: Sequence[np.ndarray]) -> np.ndarray:
    """For each state the number of one that replaces it at no loss, or -1."""
    k = at_node.shape[1]
    loss = at_node[:, :, None] - at_node[:, None, :]  # [prices, t, s]
    for table in at_edges:
        loss += _probed_rise(table)
    open_pairs = (loss <= 0).all(axis=0)
    np.fill_diagonal(open_pairs, False)
    found = np.full(k, -1)
    states = np.arange(k)
    score = np.where(open_pairs, loss.sum(axis=0), np.inf)
    for _ in range(NUM_RIVALS):
        rival = score.argmin(axis=0)
        worth = (score[rival, states] < np.inf) & (found < 0)
        if not worth.any():
            break
        s, t = states[worth], rival[worth]
        full = at_node[:, t] - at_node[:, s]
        for table in at_edges:
            full += _worst_rise(table[:, t], table[:, s])
        replaced = (full <= 0).all(axis=0)
        found[s[replaced]] = t[replaced]
        score[rival, states] = np.inf
    return found


def _probed_rise(table: np.ndarray) -> np.ndarray:
    """[prices, t, s]: max of E[t, r] - E[s, r] over a few columns r, an understatement of the max over all columns."""
    columns = np.flatnonzero(np.isfinite(table[0]).all(axis=0))
    if not len(columns):
        return np.full((len(table), table.shape[1], table.shape[1]), -np.inf)
    columns = columns[:: max(1, len(columns) // NUM_PROBES)]
    probes = np.ascontiguousarray(table[:, :, columns].transpose(2, 0, 1))
    rise: np.ndarray = probes[0][:, :, None] - probes[0][:, None, :]
    buffer = np.empty_like(rise)
    for column in probes[1:]:
        np.subtract(column[:, :, None], column[:, None, :], out=buffer)
        np.maximum(rise, buffer, out=rise)
    return rise


def _worst_rise(to: np.ndarray, of: np.ndarray) -> np.ndarray:
    """max over the last axis of (to - of); a partner that `of` forbids does not count, one that only `to` forbids is inf."""
    rise: np.ndarray = np.where(np.isinf(of), -np.inf, to - of)
    worst: np.ndarray = rise.max(axis=-1)
    return worst


def _unreplaced(replacement: np.ndarray) -> np.ndarray:
    """Mask of the states to keep: follows replacements of replacements, and keeps the lowest number of a ring."""
    parent = list(range(len(replacement)))
    for state in range(len(parent) - 1, -1, -1):
        root = int(replacement[state])
        if root < 0:
            continue
        while parent[root] != root:
            root = parent[root]
        if root != state:
            parent[state] = root
    return np.array([parent[s] == s for s in range(len(parent))])
