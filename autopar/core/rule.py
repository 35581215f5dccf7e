"""Sharding rules by factors: how an operator may be cut, and everything that follows from it.

A *factor* is a loop dimension of the operator, as in einsum: ``linear: b s i, o i -> b s o``. A rule says which
factors every dimension of every operand and result is made of (several, outermost first, where dimensions are
merged). A *strategy* picks one `Choice` per mesh axis, and from that follow the layouts of all operands and results:

* ``cut f``    operands and results that have f are ``S``; an operand that lacks f is ``R`` (its gradient is a partial
               sum: the one law from which every backward follows); a result that lacks f (f is summed) is ``P``; an
               *additive* operand (a bias) that lacks a summed f is ``P``, so that it is added once.
* ``I``        computed by every rank alike, gradients whole.
* ``R``        computed by every rank alike, gradients partial sums (a backward is linear, so any operator allows it).
* ``carry c``  the operands in the set c, in which the operator is jointly linear, are ``P``, and so are the results.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from autopar.core.graph import DTYPE_BYTES
from autopar.core.layout import I, Layout, P, Placement, R, S
from autopar.core.mesh import Mesh
from autopar.errors import LayoutError

DimFactors = tuple[tuple[int, ...], ...]
"""For every dimension of a tensor the factors it is made of, outermost first; () where no factor may cut it."""

MAX_OUTER = 8
"""A cut behind more than this many outer blocks is never proposed: fused projections have 2 to 4 parts."""


class Choice(NamedTuple):
    """What an operator does on one mesh axis: `kind` is cut, I, R or carry; `index` the factor or carry set."""

    kind: str
    index: int = -1


REPLICATE_INVARIANT = Choice("I")
REPLICATE_PARTIAL_GRAD = Choice("R")

Strategy = tuple[Choice, ...]


class InnerCollective(NamedTuple):
    """Collectives inside an operator when `factor` is cut, each over a tensor made of `dims` (in result 0's dtype)."""

    factor: int
    primitive: str
    dims: DimFactors
    forward: int = 0
    backward: int = 0


class Kept(NamedTuple):
    """A tensor made of `dims` that an operator makes for its backward alone; its elements are `dtype`."""

    dims: DimFactors
    dtype: str


@dataclass(frozen=True)
class OpRule:
    """The factor rule of one operator call. Sizes are global; `flops` counts the whole forward.

    `saved_operands`/`saved_results`: what the backward reads again, `kept`: what it keeps beside that (see `keeps_operand`);
    `tail_flops`: those done after all of `kept` is there.
    `inner`: the collectives the operator issues itself when a factor is cut. `kernel`: "attention" or "scores" (written out) where a
    contraction is more than one product; `kind`: of `KERNEL_KINDS`, where that is not what `cost` and `kernel` say; `masked`: the share of an attention's scores that its mask leaves. `functions`: exponentials that
    the forward evaluates, others in as many exponentials as they take.
    """

    factors: tuple[str, ...]
    sizes: tuple[int, ...]
    operands: tuple[DimFactors, ...]
    results: tuple[DimFactors, ...]
    whole: frozenset[int] = frozenset()
    additive: frozenset[int] = frozenset()
    carries: tuple[frozenset[int], ...] = ()
    cost: str = "pointwise"
    flops: float = 0.0
    saved_operands: tuple[int, ...] = ()
    saved_results: tuple[int, ...] = ()
    kept: tuple[Kept, ...] = ()
    tail_flops: float = 0.0
    inner: tuple[InnerCollective, ...] = ()
    known: bool = True
    kernel: str = ""
    kind: str = ""
    masked: float = 1.0
    functions: float = 0.0

    def __post_init__(self) -> None:
        for dims in (*self.operands, *self.results):
            used = [f for dim in dims for f in dim]
            if len(set(used)) != len(used):
                raise LayoutError(f"a tensor uses a factor twice: {[self.factors[f] for f in used]}")

    def summed(self, factor: int, result: int) -> bool:
        return not any(factor in dim for dim in self.results[result])

    def keeps_operand(self, k: int, differentiated: Iterable[int]) -> bool:
        """Whether the backward reads operand k when the operands `differentiated` have gradients.

        A derivative with respect to a member of a linear set reads no member of the set: of a product only the other
        factor, and nothing where that one is frozen.
        """
        return k in self.saved_operands and any(not any({j, k} <= carried for carried in self.carries) for j in differentiated)

    @cached_property
    def product(self) -> tuple[tuple[int, ...], ...] | None:
        """Factors of (batch, rows, columns, sum) of a contraction of two operands; of an attention those of its scores."""
        if self.cost != "contract" or len(self.saved_operands) < 2:
            return None
        a, b = (frozenset(f for dim in self.operands[k] for f in dim) for k in self.saved_operands[:2])
        made = frozenset(f for dim in self.results[0] for f in dim)
        if self.kernel:
            return tuple(tuple(sorted(part)) for part in (a & made & b | (a & made) - b - {self.operands[0][2][0]}, frozenset(self.operands[0][2]), b - a, a - made))
        return tuple(tuple(sorted(part)) for part in (a & b & made, (a - b) & made, (b - a) & made, (a & b) - made))

    def product_shape(self, strategy: Strategy, mesh: Mesh) -> tuple[int, int, int, int] | None:
        """The sizes of `product` on one rank."""
        if self.product is None:
            return None
        cut = _parts(strategy, mesh)
        batch, rows, columns, summed = [math.prod([self.sizes[f] // cut.get(f, 1) for f in part]) for part in self.product]
        return batch, rows, columns, summed

    @property
    def share_until_kept(self) -> float:
        """The part of a forward after which all that the backward needs is there."""
        if self.saved_results or not self.known:
            return 1.0
        return 1.0 - self.tail_flops / self.flops if self.kept and self.flops else 0.0

    def kept_bytes(self, strategy: Strategy, mesh: Mesh) -> int:
        """Bytes of `kept` on one rank."""
        return sum(self.local_numel(kept.dims, strategy, mesh) * DTYPE_BYTES[kept.dtype] for kept in self.kept)

    def reduces_itself(self, factor: int) -> bool:
        """Whether the operator issues the collectives for this factor, so that results without it are whole."""
        return any(inner.factor == factor for inner in self.inner)

    def choices(self, *, differentiable: bool) -> tuple[Choice, ...]:
        """All choices on one axis, before any size is looked at."""
        cuts = [Choice("cut", f) for f in range(len(self.factors)) if f not in self.whole]
        carries = [Choice("carry", c) for c in range(len(self.carries))]
        replicate = [REPLICATE_INVARIANT]
        if differentiable and self.known:
            replicate.append(REPLICATE_PARTIAL_GRAD)
        return (*replicate, *cuts, *carries)

    def operand_placement(self, k: int, choice: Choice) -> Placement:
        if choice.kind == "cut":
            placement = self._cut(self.operands[k], choice.index)
            if placement is not None:
                return placement
            is_addend = k in self.additive and self.summed(choice.index, 0)
            return P if is_addend else R
        if choice.kind == "carry":
            return P if k in self.carries[choice.index] else R
        return I if choice.kind == "I" else R

    def result_placement(self, k: int, choice: Choice) -> Placement:
        if choice.kind == "cut":
            return self._cut(self.results[k], choice.index) or (I if self.reduces_itself(choice.index) else P)
        if choice.kind == "carry":
            return P
        return I if choice.kind == "I" else R

    def _cut(self, dims: DimFactors, factor: int) -> Placement | None:
        for d, parts in enumerate(dims):
            if factor in parts:
                return S(d, math.prod(self.sizes[f] for f in parts[: parts.index(factor)]))
        return None

    def operand_layout(self, k: int, strategy: Strategy, mesh: Mesh) -> Layout:
        return nest(tuple(self.operand_placement(k, choice) for choice in strategy), mesh)

    def result_layout(self, k: int, strategy: Strategy, mesh: Mesh) -> Layout:
        return nest(tuple(self.result_placement(k, choice) for choice in strategy), mesh)

    def degree(self, strategy: Strategy, mesh: Mesh) -> int:
        """In how many parts the work is cut: ranks that choose I, R or carry repeat it."""
        return math.prod([size for size, choice in zip(mesh.sizes, strategy) if choice.kind == "cut"])

    def local_numel(self, dims: DimFactors, strategy: Strategy, mesh: Mesh) -> int:
        return math.prod(self.sizes[f] // self.cut_by(f, strategy, mesh) for dim in dims for f in dim)

    def cut_by(self, factor: int, strategy: Strategy, mesh: Mesh) -> int:
        return math.prod(axis.size for axis, c in zip(mesh.axes, strategy) if c == ("cut", factor))

    def legal(self, strategy: Strategy, mesh: Mesh) -> bool:
        """Whether every cut divides and every cut digit can be reached."""
        parts = _parts(strategy, mesh)
        for f, n in parts.items():
            if n > 1 and (f in self.whole or self.sizes[f] % n):
                return False
        return all([self._reachable(dim, parts) for dim in self._merged])

    def form(self, sizes: Sequence[int]) -> tuple:
        """What its strategies on a mesh of these sizes and their layouts depend on: of most factors no more than what divides them, and not their names."""
        merged = {f for dim in self._merged for f in dim}
        factors = tuple([size if f in merged else _divisible(size, sizes) for f, size in enumerate(self.sizes)])
        inner = tuple([collective.factor for collective in self.inner])
        return factors, self.operands, self.results, self.whole, self.additive, self.carries, self.cost == "contract", self.known, inner

    @cached_property
    def _merged(self) -> tuple[tuple[int, ...], ...]:
        """Dimensions of several factors."""
        return tuple(dict.fromkeys(dim for dims in (*self.operands, *self.results) for dim in dims if len(dim) > 1))

    def _reachable(self, dim: tuple[int, ...], parts: Mapping[int, int]) -> bool:
        outer = 1
        for f in dim:
            n = parts.get(f, 1)
            if outer > MAX_OUTER and n > 1:
                return False
            outer *= self.sizes[f] // n
        return True

    def describe(self, strategy: Strategy, mesh: Mesh) -> str:
        """`dp:b,tp:o`: per axis the factor that is cut, or I, R, or carry with the operands it carries."""
        words = []
        for axis, choice in zip(mesh.axes, strategy):
            if choice.kind == "cut":
                word = self.factors[choice.index]
            elif choice.kind == "carry":
                word = "+".join(str(k) for k in sorted(self.carries[choice.index])) + "~"
            else:
                word = choice.kind
            words.append(f"{axis.name}:{word}")
        return ",".join(words)

    def parse(self, text: str, mesh: Mesh) -> Strategy:
        """Inverse of `describe`; raises LayoutError naming the axis where the text does not fit the rule."""
        found: dict[str, Choice] = {}
        for item in text.split(",") if text else []:
            axis, _, word = item.partition(":")
            found[axis] = self._parse_word(word, item)
        if set(found) != set(mesh.names):
            raise LayoutError(f"strategy {text!r} names axes {sorted(found)}, the mesh has {list(mesh.names)}")
        return tuple(found[name] for name in mesh.names)

    def _parse_word(self, word: str, item: str) -> Choice:
        if word in ("I", "R"):
            return Choice(word)
        if word.endswith("~"):
            wanted = frozenset(int(k) for k in word[:-1].split("+") if k.isdigit())
            if wanted in self.carries:
                return Choice("carry", self.carries.index(wanted))
        elif word in self.factors:
            return Choice("cut", self.factors.index(word))
        raise LayoutError(f"{item!r} names no factor of this operator; it has {', '.join(self.factors) or 'none'}")


def _divisible(size: int, sizes: Sequence[int]) -> tuple[bool, ...]:
    """By which products of `sizes`."""
    return tuple([size % math.prod(chosen) == 0 for n in range(1, len(sizes) + 1) for chosen in itertools.combinations(sizes, n)])


def _parts(strategy: Strategy, mesh: Mesh) -> dict[int, int]:
    """In how many parts every factor is cut."""
    found: dict[int, int] = {}
    for size, choice in zip(mesh.sizes, strategy):
        if choice.kind == "cut":
            found[choice.index] = found.get(choice.index, 1) * size
    return found


def nest(layout: Layout, mesh: Mesh) -> Layout:
    """Canonical form: a cut just behind a digit that earlier axes cut completely is the same as nesting in it."""
    if not any(p.outer > 1 for p in layout):
        return layout
    result = list(layout)
    for digit in sorted({p for p in layout if p.kind == "S" and p.outer > 1}, key=lambda p: (p.dim, p.outer)):
        members = [i for i, p in enumerate(layout) if p == digit]
        before = [j for j in range(members[0]) if result[j].kind == "S" and result[j].dim == digit.dim and result[j].outer < digit.outer]
        for outer in sorted({result[j].outer for j in before}):
            cut = math.prod(mesh.axes[j].size for j in before if result[j].outer == outer)
            if outer * cut == digit.outer:
                for i in members:
                    result[i] = S(digit.dim, outer)
                break
    return tuple(result)


def replicated_rule(operand_ranks: Sequence[int], result_ranks: Sequence[int]) -> OpRule:
    """The fallback that is never wrong: no factor may be cut, every rank computes the whole operator."""
    return OpRule(
        factors=(),
        sizes=(),
        operands=tuple(((),) * rank for rank in operand_ranks),
        results=tuple(((),) * rank for rank in result_ranks),
        known=False,
    )


def strategies(rule: OpRule, mesh: Mesh, *, differentiable: bool) -> Iterator[Strategy]:
    """Every legal strategy of an operator on a mesh, in a fixed order, one for each distinct set of layouts."""
    per_axis = [rule.choices(differentiable=differentiable) if axis.size > 1 else (REPLICATE_INVARIANT,) for axis in mesh.axes]
    for strategy in itertools.product(*per_axis):
        if rule.legal(strategy, mesh):
            yield strategy
