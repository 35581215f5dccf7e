"""Cost tables that are computed once: interned by content, and their eliminations by the tables that go in.

A table is an n-d array of costs over the states of n nodes. Eliminating node x adds up the tables that mention x and
takes the minimum over its states; what comes out is a table over the neighbours of x. Two eliminations are the same
when the same tables meet in the same roles (x is role 0, its neighbours 1, 2, ... in ascending order of node number),
so the interior of the 2nd to 32nd identical block costs a look-up. Results are shifted to minimum 0 and interned by
content as well: a message that travels through a row of identical blocks soon stops changing, and then it, too, is
only looked up.
"""

import math
import zlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import chain, combinations
from typing import NamedTuple

import numpy as np

Operand = tuple[int, tuple[int, ...]]  # table number, role of each of its axes
Key = tuple[Operand, ...]
Content = tuple[tuple[int, ...], int, int]  # shape of a table, bytes of an entry, and a checksum of all

TILE_ENTRIES = 32_768  # of one partial result: 256 KiB, so that a tile and its buffer stay in the second-level cache

SUM_ENTRIES = 131_072  # that are added up at once before their least is taken: 1 MiB, which is faster than a call for every state

PRODUCT_ENTRIES, PRODUCTS_ENTRIES = 128, 8_192  # of sums of every row of one table with every row of another, and of all of them: from so many on a product is faster,
# measured on float32 and float64 tables of 7 to 128 states: about as fast to twice as fast; below it takes up to 1.7 times as long


class TableStore:
    """Append-only: tables by number, the eliminations done with them, and the best states looked up so far. `shared`: eliminations of several stores."""

    def __init__(self, shared: "Eliminated | None" = None) -> None:
        self.arrays: list[np.ndarray] = []
        self._shared = shared
        self._contents: list[Content] = []
        self._by_content: dict[Content, list[int]] = {}
        self._by_source: dict[int, int] = {}
        self._sources: list[np.ndarray] = []
        self._reduced: dict[Key, tuple[int, float]] = {}
        self._best: dict[tuple[Key, tuple[int, ...]], int] = {}

    def copy(self) -> "TableStore":
        """Another that knows what this one does, and shares nothing."""
        other = TableStore()
        other.arrays, other._sources, other._contents = list(self.arrays), list(self._sources), list(self._contents)
        other._by_content = {content: list(numbers) for content, numbers in self._by_content.items()}
        other._by_source, other._reduced, other._best = dict(self._by_source), dict(self._reduced), dict(self._best)
        return other

    @property
    def num_eliminations(self) -> int:
        """How many eliminations were computed rather than looked up."""
        return len(self._reduced)

    def add(self, array: np.ndarray) -> int:
        """Number of a table with this content; the caller no longer changes the array."""
        number = self._by_source.get(id(array))
        if number is None:
            number = self._by_source[id(array)] = self._intern(array)
            self._sources.append(array)  # keeps the id from being given to another array
        return number

    def _intern(self, array: np.ndarray) -> int:
        array = np.asarray(array, order="C")  # ascontiguousarray would make a scalar 1-d
        content = array.shape, array.itemsize, zlib.crc32(array.data)
        twins = self._by_content.setdefault(content, [])
        for number in twins:
            if np.array_equal(self.arrays[number], array):
                return number
        twins.append(len(self.arrays))
        self.arrays.append(array)
        self._contents.append(content)
        return twins[-1]

    def eliminate(self, key: Key) -> tuple[int, float]:
        """(table over roles 1.., its minimum, which was subtracted from it); the minimum is inf if nothing is allowed."""
        found = self._reduced.get(key)
        if found is None:
            operands = [(self.arrays[number], roles) for number, roles in key]
            if self._shared is None:
                result, lowest = _eliminated(operands)
            else:
                result, lowest = self._shared.of(tuple([(self._contents[number], roles) for number, roles in key]), operands)
            found = self._reduced[key] = self._intern(result), lowest
        return found

    def best_state(self, key: Key, around: tuple[int, ...]) -> int:
        """The cheapest state of role 0, the lowest of equals, where role r = 1.. has the state `around[r - 1]`."""
        found = self._best.get((key, around))
        if found is None:
            rows = [self.arrays[number][tuple(slice(None) if r == 0 else around[r - 1] for r in roles)] for number, roles in key]
            found = self._best[key, around] = int(sum(rows[1:], start=rows[0]).argmin())
        return found


class Eliminated:
    """Eliminations by the contents that meet, in their order: for problems that have tables in common. It holds what goes in and what comes out."""

    def __init__(self) -> None:
        self._found: dict[tuple, list[tuple[list[np.ndarray], tuple[np.ndarray, float]]]] = {}

    def of(self, alike: tuple, operands: Sequence[tuple[np.ndarray, tuple[int, ...]]]) -> tuple[np.ndarray, float]:
        """`alike`: the same for equal operands, and hardly ever for others."""
        arrays, twins = [array for array, _ in operands], self._found.setdefault(alike, [])
        for known, found in twins:
            if all(map(np.array_equal, known, arrays)):
                return found
        twins.append((arrays, _eliminated(operands)))
        return twins[-1][1]


def _eliminated(operands: Sequence[tuple[np.ndarray, tuple[int, ...]]]) -> tuple[np.ndarray, float]:
    result = sum_and_minimise(operands)
    lowest = float(result.min())
    if math.isfinite(lowest):
        result -= lowest
    return result, lowest


def sum_and_minimise(operands: Sequence[tuple[np.ndarray, tuple[int, ...]]]) -> np.ndarray:
    """min over role 0 of the sum of the tables, an array over roles 1, 2, ...; every table has role 0 among its axes.

    Works tile by tile, so that what is held besides the result is two tiles.
    """
    way = _way(tuple([(roles, table.shape) for table, roles in operands]))
    parts = [table for table, _ in operands]
    for one, other in way.sums:
        parts.append(parts[one.number].transpose(one.axes)[one.index] + parts[other.number].transpose(other.axes)[other.index])
    views = [parts[view.number].transpose(view.axes)[view.index] for view in way.views]
    result = np.empty(way.shape, dtype=parts[0].dtype)
    if len(views) == 1:
        np.min(views[0], axis=0, out=result)
    elif way.folded is not None:
        _minimise_products(*views, result.reshape(way.folded))
    else:
        views = list(map(np.ascontiguousarray, views))
        for tile in _tiles(way.shape):
            _minimise_tile(np.add, [view[(slice(None), *_clip(tile, view.shape[1:]))] for view in views], result[tile])
    return np.asarray(result.transpose(way.back), order="C")


class _View(NamedTuple):
    """A table turned, with axes of length 1 where it has none of the others."""

    number: int
    axes: tuple[int, ...]
    index: tuple[slice | None, ...]


class _Way(NamedTuple):
    """How tables of some roles and shapes are added up: `sums` of two each, which make a further one, and `views` of what is left, which has no small sums. `shape`: of
    the result, `back`: its axes in the order of roles; `folded`: its shape where two views are added up as products."""

    sums: tuple[tuple[_View, _View], ...]
    views: tuple[_View, ...]
    shape: tuple[int, ...]
    back: tuple[int, ...]
    folded: tuple[int, ...] | None


@lru_cache(maxsize=1 << 12)
def _way(operands: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]) -> _Way:
    """`operands`: roles and shape of each."""
    sizes = {role: size for roles, shape in operands for role, size in zip(roles, shape, strict=True)}
    roles, left, sums = [roles for roles, _ in operands], list(range(len(operands))), []

    def entries(pair: tuple[int, int]) -> int:
        return math.prod([sizes[role] for role in {*roles[pair[0]], *roles[pair[1]]}])

    def contains(pair: tuple[int, int]) -> bool:
        return len({*roles[pair[0]], *roles[pair[1]]}) == max(len(roles[pair[0]]), len(roles[pair[1]]))

    while len(left) > 1:
        small = [pair for pair in combinations(left, 2) if contains(pair) or (len(left) > 2 and entries(pair) < math.prod(sizes.values()))]
        if not small:
            break
        one, other = min(small, key=lambda pair: (entries(pair), pair))
        roles.append(tuple(sorted({*roles[one], *roles[other]}, key=lambda role: (sizes[role], role))))
        sums.append((_view(one, roles[one], roles[-1]), _view(other, roles[other], roles[-1])))
        left = [n for n in left if n not in (one, other)] + [len(roles) - 1]
    groups = _axes([roles[n] for n in left], sizes)
    outer, folded = [*chain.from_iterable(groups)], tuple([math.prod([sizes[role] for role in group]) for group in groups])
    products = len(groups) == 3 and math.prod(folded[1:]) >= PRODUCT_ENTRIES and sizes[0] * math.prod(folded) >= PRODUCTS_ENTRIES
    if products and set(groups[1]).isdisjoint(roles[left[0]]):
        left.reverse()  # what has the rows comes first
    shape, back = tuple([sizes[role] for role in outer]), tuple(np.argsort(outer).tolist())
    return _Way(tuple(sums), tuple([_view(n, roles[n], (0, *outer)) for n in left]), shape, back, folded if products else None)


def _axes(views: Sequence[tuple[int, ...]], sizes: Mapping[int, int]) -> list[list[int]]:
    """The roles but 0, the longest innermost, where numpy is fast. Of two views those of both, then those of one and of the other alone."""
    outer = sorted(set(sizes) - {0}, key=lambda role: (sizes[role], role))
    if len(views) != 2:
        return [outer]
    shorter, longer = sorted([[role for role in outer if role not in view] for view in views], key=lambda alone: (math.prod([sizes[role] for role in alone]), alone))
    return [[role for role in outer if role not in (*shorter, *longer)], shorter, longer]


def _view(number: int, roles: tuple[int, ...], wanted: Sequence[int]) -> _View:
    return _View(number, tuple([roles.index(role) for role in wanted if role in roles]), tuple([slice(None) if role in roles else None for role in wanted]))


@lru_cache(maxsize=1 << 12)
def _tiles(shape: tuple[int, ...]) -> tuple[tuple[slice, ...], ...]:
    """Cuts an array into boxes of at most about TILE_ENTRIES entries, whole in the inner axes."""
    inner, axis = 1, len(shape)
    while axis > 0 and inner * shape[axis - 1] <= TILE_ENTRIES:
        axis -= 1
        inner *= shape[axis]
    if axis == 0:
        return ((),)
    rows = max(1, TILE_ENTRIES // inner)
    leading = [tuple(slice(i, i + 1) for i in index) for index in np.ndindex(*shape[: axis - 1])]
    return tuple([(*index, slice(row, row + rows)) for index in leading for row in range(0, shape[axis - 1], rows)])


def _clip(tile: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[slice, ...]:
    """The tile in a view whose absent axes have length 1; a tile leaves out the axes that it has whole."""
    return tuple(slice(None) if size == 1 else part for part, size in zip(tile, shape, strict=False))


def _minimise_tile(add: np.ufunc, views: list[np.ndarray], out: np.ndarray) -> None:
    """out = min over axis 0 of the sum of the views, of some states at a time; `add`: how the first two are added up."""
    num_states = views[0].shape[0]
    some = max(1, SUM_ENTRIES // out.size)
    buffer = np.empty((min(some, num_states), *out.shape), dtype=out.dtype)
    for first in range(0, num_states, some):
        part = views if some >= num_states else [view[first : first + some] for view in views]
        total = add(part[0], part[1], out=buffer[: len(part[0])])
        for view in part[2:]:
            total += view
        if first == 0:
            total.min(axis=0, out=out)
        else:
            np.minimum(out, total.min(axis=0), out=out)


def _minimise_products(one: np.ndarray, other: np.ndarray, out: np.ndarray) -> None:
    """out[a, i, j] = min over states s of one[s, a, i] + other[s, a, j], whatever axes these are of views that can be added up.

    The sums for a state are the product of [one, 1] and [1, other], which is exact, and takes half as long as adding a number to each row.
    """
    (common, rows, columns), states = out.shape, len(one)
    left, right = np.ones((states, common, rows, 2), out.dtype), np.ones((states, common, 2, columns), out.dtype)
    left[..., 0], right[..., 1, :] = one.reshape(states, common, rows), other.reshape(states, common, columns)
    with np.errstate(invalid="ignore"):  # of what is forbidden times what a product fills its registers with
        for tile in _tiles(out.shape):
            a, i, j = (*tile, *[slice(None)] * (3 - len(tile)))
            _minimise_tile(np.matmul, [left[:, a, i], right[:, a, :, j]], out[tile])
