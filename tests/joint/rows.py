"""The smallest models that have a row of equal blocks: a few products, whose plans can be counted."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from autopar.core.graph import Op, Operand, OpGraph, TensorMeta, Value

PATH = "blocks"


@dataclass(frozen=True)
class Row:
    """inputs [b, s, width] -> `linears` products a block, ReLU between them, a residual sum where asked -> `head`: a product behind the row -> mean. `negated`: a
    block begins with the negative of what it is given, and so its backward does not read that."""

    width: int
    inner: int
    seq: int
    linears: int = 1
    residual: bool = False
    head: bool = False
    dtype: str = "bfloat16"
    negated: bool = False

    def graphs(self, layers: int) -> Callable[[int], OpGraph]:
        return lambda samples: _Builder(self.dtype).graph(self, layers, samples)


@dataclass
class _Builder:
    dtype: str
    values: list[Value] = field(default_factory=list)
    ops: list[Op] = field(default_factory=list)

    def value(self, name: str, shape: Sequence[int], role: str, *, grad: bool) -> int:
        self.values.append(Value(name, TensorMeta(tuple(shape), self.dtype, grad), role, (name,) if role != "op" else ()))
        return len(self.values) - 1

    def op(self, kind: str, operands: Sequence[int], names: Sequence[str], shape: Sequence[int], path: str, **args: object) -> int:
        name = f"{path or 'top'}.{kind.split('.')[1]}.{len(self.ops)}"
        grad = any(self.values[v].meta.requires_grad for v in operands)
        result = self.value(name, shape, "op", grad=grad)
        given = {n: Operand(k) for k, n in enumerate(names)}
        self.ops.append(Op(name, kind, tuple(operands), (result,), tuple({**given, **args}.items()), path))
        return result

    def linear(self, x: int, out: int, path: str, name: str) -> int:
        *rows, width = self.values[x].meta.shape
        weight = self.value(f"{path}.{name}.weight".lstrip("."), (out, width), "param", grad=True)
        return self.op("aten.linear.default", (x, weight), ("input", "weight"), (*rows, out), path, bias=None)

    def block(self, row: Row, x: int, path: str) -> int:
        shape, made = self.values[x].meta.shape, x
        if row.negated:
            made = self.op("aten.neg.default", (x,), ("self",), shape, path)
        for n in range(row.linears):
            made = self.linear(made, row.inner if n + 1 < row.linears else row.width, path, f"linear{n}")
            if n + 1 < row.linears:
                made = self.op("aten.relu.default", (made,), ("self",), self.values[made].meta.shape, path)
        return self.op("aten.add.Tensor", (x, made), ("self", "other"), shape, path, alpha=1) if row.residual else made

    def graph(self, row: Row, layers: int, samples: int) -> OpGraph:
        x = self.value("inputs", (samples, row.seq, row.width), "input", grad=False)
        for n in range(layers):
            x = self.block(row, x, f"{PATH}.{n}")
        if row.head:
            x = self.linear(x, row.inner, "", "head")
        loss = self.op("aten.mean.default", (x,), ("self",), (), "", dtype=None)
        return OpGraph(tuple(self.values), tuple(self.ops), (loss,), name="row")
