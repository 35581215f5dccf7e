"""Where rules are registered and found, and the small language they are written in.

    @rule("aten.mm.default")
    def mm(call):
        return call.rule({"self": ["m", "k"], "mat2": ["k", "n"]}, [["m", "n"]], cost="contract")

Every dimension of every tensor is a factor name, a tuple of names (merged dimensions, outermost first; all but one
size given in `sizes`), or None where nothing may cut it (size-1 dimensions that broadcast, for instance).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from autopar.core.graph import Op, Operand, OpGraph, TensorMeta
from autopar.core.rule import DimFactors, InnerCollective, Kept, OpRule, replicated_rule
from autopar.errors import LayoutError

DimSpec = Sequence[str | tuple[str, ...] | None]


class NoRule(Exception):
    """Raised by a rule that does not cover the arguments at hand: the operator is then computed replicated."""


FUNCTIONS = dict.fromkeys((
    "exp", "exp2", "expm1", "sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "asinh", "acosh", "atanh", "erfc", "erfinv", "log_sigmoid", "logit",
    "softplus", "mish", "elu", "selu", "celu", "softmax", "_softmax", "log_softmax", "_log_softmax", "glu",
), 1.0) | {"tanh": 4.0, "erf": 2.0, "log": 1.5, "log1p": 1.5, "log2": 1.5, "log10": 1.5, "gelu": 0.6, "sigmoid": 0.25, "silu": 0.25}  # fmt: skip
"""What operators evaluate for every element, in exponentials: on a CPU that takes longer than reading it. Source: measured, torch 2.13 with AVX-512, to about
a quarter; those of 1 were not."""

TANH_GELU = 2.0
"""The same of a GELU by a hyperbolic tangent."""


@dataclass(frozen=True)
class Call:
    """An operator call as a rule sees it."""

    op: Op
    metas: tuple[TensorMeta, ...]
    outs: tuple[TensorMeta, ...]
    args: Mapping[str, Any]

    def has(self, name: str) -> bool:
        return isinstance(self.args.get(name), Operand)

    def meta(self, name: str) -> TensorMeta:
        value = self.args[name]
        if not isinstance(value, Operand):
            raise NoRule
        return self.metas[value]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.meta(name).shape

    def dim(self, name: str, rank: int) -> int:
        return int(self.args[name]) % max(rank, 1)

    def rule(
        self,
        operands: Mapping[str, DimSpec | Sequence[DimSpec]],
        results: Sequence[DimSpec],
        *,
        sizes: Mapping[str, int] | None = None,
        whole: Sequence[str] = (),
        additive: Sequence[str] = (),
        linear: Sequence[Sequence[str]] = (),
        cost: str = "pointwise",
        saves: Sequence[str] = (),
        saves_results: Sequence[int] = (),
        keeps: Sequence[tuple[DimSpec, str]] = (),
        inner: Sequence[tuple[str, str, DimSpec, int, int]] = (),
        flops: float | None = None,
        tail_flops: float = 0.0,
        kernel: str = "",
        kind: str = "",
        masked: float = 1.0,
        functions: float | None = None,
    ) -> OpRule:
        """Assemble the rule. `linear` lists sets of operand names in which the operator is jointly linear.

        Sets with a bool operand are left out: addends of a truth value do not sum.
        The k-th tensor of a list argument is called `name.k`. A contraction's flops are 2 x all factors unless given, `functions` those of FUNCTIONS
        for each element of the results.
        """
        specs = self._by_operand(operands)
        names, numbers = self._number((*specs, *results), (*self.metas, *self.outs), sizes or {})
        position = self._positions()
        coded = [_code(spec, names) for spec in (*specs, *results)]
        n = len(self.metas)
        carries = [frozenset(k for a in group for k in position.get(a, ())) for group in linear]
        if flops is None:
            flops = 2.0 * math.prod(numbers) if cost == "contract" else float(sum(m.numel for m in self.outs))
        return OpRule(
            factors=tuple(names),
            sizes=tuple(numbers),
            operands=tuple(coded[:n]),
            results=tuple(coded[n:]),
            whole=frozenset(names.index(w) for w in whole if w in names),
            additive=frozenset(k for a in additive for k in position.get(a, ())),
            carries=tuple(c for c in carries if c and all(self.metas[k].dtype != "bool" for k in c)),
            cost=cost,
            flops=0.0 if cost == "view" else flops,
            saved_operands=tuple(k for a in saves for k in position.get(a, ())),
            saved_results=tuple(saves_results),
            tail_flops=tail_flops,
            kernel=kernel,
            kind=kind,
            masked=masked,
            functions=self._exponentials * sum(m.numel for m in self.outs) if functions is None else functions,
            kept=tuple(Kept(_code(dims, names), dtype) for dims, dtype in keeps),
            inner=tuple(InnerCollective(names.index(f), prim, _code(dims, names), fwd, bwd) for f, prim, dims, fwd, bwd in inner if f in names),
        )

    @property
    def _exponentials(self) -> float:
        """For every element of the results."""
        return TANH_GELU if self.args.get("approximate") == "tanh" else FUNCTIONS.get(self.op.kind.split(".")[1], 0.0)

    def _positions(self) -> dict[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {}
        for name, value in self.args.items():
            items = value if isinstance(value, tuple) else (value,)
            found[name] = tuple(int(v) for v in items if isinstance(v, Operand))
            if isinstance(value, tuple):
                found.update({f"{name}.{j}": (int(v),) for j, v in enumerate(items) if isinstance(v, Operand)})
        return found

    def _by_operand(self, operands: Mapping[str, Any]) -> list[DimSpec]:
        specs: list[DimSpec | None] = [None] * len(self.metas)
        for name, given in operands.items():
            positions = self._positions().get(name, ())
            several = isinstance(self.args.get(name), tuple)
            for j, k in enumerate(positions):
                specs[k] = given[j] if several else given
        return [spec if spec is not None else [None] * len(meta.shape) for spec, meta in zip(specs, self.metas)]

    def _number(self, specs: Sequence[DimSpec], metas: Sequence[TensorMeta], given: Mapping[str, int]) -> tuple[list[str], list[int]]:
        sizes: dict[str, int] = dict(given)
        order: list[str] = []
        for spec, meta in zip(specs, metas):
            if len(spec) != len(meta.shape):
                raise LayoutError(f"rule of {self.op.kind}: {list(spec)} does not fit shape {meta.shape}")
            for entry, size in zip(spec, meta.shape):
                if isinstance(entry, str) and sizes.setdefault(entry, size) != size:
                    raise LayoutError(f"rule of {self.op.kind}: factor {entry} is {sizes[entry]} and {size}")
                for name in (entry,) if isinstance(entry, str) else entry or ():
                    if name not in order:
                        order.append(name)
        for spec, meta in zip(specs, metas):
            for entry, size in zip(spec, meta.shape):
                if isinstance(entry, tuple) and math.prod(sizes[name] for name in entry) != size:
                    raise LayoutError(f"rule of {self.op.kind}: merged {entry} does not make {size}")
        return order, [sizes[name] for name in order]


def _code(spec: DimSpec, names: Sequence[str]) -> DimFactors:
    return tuple(() if e is None else tuple(names.index(n) for n in ((e,) if isinstance(e, str) else e)) for e in spec)


Rule = Callable[[Call], OpRule]
_RULES: dict[str, Rule] = {}


def rule(*kinds: str) -> Callable[[Rule], Rule]:
    """Register a rule for operators; a second rule for the same operator is refused."""

    def register(function: Rule) -> Rule:
        for kind in kinds:
            if kind in _RULES:
                raise ValueError(f"two rules for {kind}")
            _RULES[kind] = function
        return function

    return register


def registered() -> tuple[str, ...]:
    return tuple(sorted(_RULES))


def rule_of(op: Op, graph: OpGraph) -> OpRule:
    """The factor rule of an operator call; the replicated rule (`known=False`) where none covers it."""
    metas = tuple(graph.values[v].meta for v in op.operands)
    outs = tuple(graph.values[v].meta for v in op.results)
    function = _RULES.get(op.kind)
    if function is not None:
        try:
            return function(Call(op, metas, outs, dict(op.args)))
        except NoRule:
            pass
    return replicated_rule([len(m.shape) for m in metas], [len(m.shape) for m in outs])
