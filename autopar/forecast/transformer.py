"""Decoder transformers by their dimensions: the `OpGraph` that tracing such a model gives, made without torch or a model.

    pre-norm block:  x += o(attention(q(n), k(n), v(n))), n = norm(x);   x += down(act(up(n))), n = norm(x)

tokens [b, s] -> scalar mean loss. The operators are those that `torch.export` leaves of the same model written with `nn.Linear`,
`nn.LayerNorm` or `nn.RMSNorm` and `scaled_dot_product_attention`; tests hold the two graphs against each other, operator for operator.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from autopar.core.graph import Op, Operand, OpGraph, TensorMeta, Value
from autopar.errors import UsageError

Norm = Literal["layer", "rms"]
Activation = Literal["gelu", "swiglu", "squared_relu"]
Positions = Literal["learned", "rotary", "alibi", "none"]


@dataclass(frozen=True, slots=True)
class Experts:
    """A mixture in place of the MLP: of `count` experts `chosen` for every token, each of width `inner`, and one of width `shared` for all."""

    count: int
    chosen: int
    inner: int
    shared: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Dims:
    """A decoder transformer. `kv_heads` below `heads`: grouped-query attention; `inner`: width of the MLP.

    `fused_attention` False: scores and probabilities are written to memory, as before flash attention. `tied`: the head uses the
    weight of the token embedding. `fused_norm` False: an RMS norm of elementary operators in float32, as models write it out. `wide_loss`: the loss is
    computed in float32. `dropout`: of embeddings, probabilities and both residual branches. `packed`: attention's result lies as its projection reads it.
    `head_width`: of a head where it is not the share of `hidden`.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    inner: int
    vocab: int
    seq: int
    norm: Norm = "layer"
    activation: Activation = "gelu"
    positions: Positions = "learned"
    biases: bool = True
    tied: bool = False
    dropout: float = 0.0
    fused_attention: bool = True
    fused_norm: bool = True
    wide_loss: bool = False
    packed: bool = False
    head_width: int = 0
    experts: Experts | None = None

    def __post_init__(self) -> None:
        counts = (self.layers, self.hidden, self.heads, self.kv_heads, self.inner, self.vocab, self.seq)
        if min(counts) < 1 or (not self.head_width and self.hidden % self.heads) or self.heads % self.kv_heads:
            raise UsageError(
                f"no transformer of {self.layers} layers of width {self.hidden}, {self.heads} heads over {self.kv_heads}, inner {self.inner}: "
                "give positive numbers, heads that divide the width and key heads that divide the heads"
            )
        if self.experts is not None and self.experts.count % self.experts.chosen:
            raise UsageError(f"{self.experts.count} experts of which {self.experts.chosen} are chosen: give a number that divides theirs")

    @property
    def head_dim(self) -> int:
        return self.head_width or self.hidden // self.heads

    def with_layers(self, layers: int) -> "Dims":
        return replace(self, layers=layers)


def transformer_graph(dims: Dims, batch: int, dtype: str = "bfloat16", *, cut_rows: bool = False, inners: Sequence[int] = ()) -> OpGraph:
    """The graph of one pass over `batch` sequences; floats are `dtype`. `cut_rows`: its attention may be cut along the sequence. `inners`: widths of the MLPs
    of blocks, which take turns, where they are not all `dims.inner`."""
    return _Builder(dims, batch, dtype, cut_rows, inners or (dims.inner,)).graph()


@dataclass
class _Builder:
    dims: Dims
    batch: int
    dtype: str
    cut_rows: bool
    inners: Sequence[int]
    values: list[Value] = field(default_factory=list)
    ops: list[Op] = field(default_factory=list)
    path: str = ""

    def value(self, name: str, shape: Sequence[int], dtype: str, role: str, *, grad: bool) -> int:
        self.values.append(Value(name, TensorMeta(tuple(shape), dtype, grad), role, (name,) if role != "op" else ()))
        return len(self.values) - 1

    def param(self, name: str, *shape: int) -> int:
        return self.value(f"{self.path}.{name}" if self.path else name, shape, self.dtype, "param", grad=True)

    def shape(self, v: int) -> tuple[int, ...]:
        return self.values[v].meta.shape

    def op(self, kind: str, operands: Sequence[int], shape: Sequence[int], args: dict[str, Any], *, at: str = "", dtype: str = "", label: str = "") -> int:
        """Append an operator with one result; `at`: the submodule that it belongs to, `label`: what to call it. `args` may hold `Operand`s."""
        path = ".".join(part for part in (self.path, at) if part)
        name = f"{path or 'top'}.{label or kind.split('.')[1]}.{len(self.ops)}"
        grad = any(self.values[v].meta.requires_grad for v in operands)
        result = self.value(name, shape, dtype or self.dtype, "op", grad=grad)
        self.ops.append(Op(name, kind, tuple(operands), (result,), tuple(args.items()), path))
        return result

    # --- layers --------------------------------------------------------------------------------------------------------

    def linear(self, x: int, name: str, out: int, *, bias: bool | None = None, weight: int | None = None) -> int:
        biased = self.dims.biases if bias is None else bias
        if weight is None:
            weight = self.param(f"{name}.weight", out, self.shape(x)[-1])
        given = [x, weight, *([self.param(f"{name}.bias", out)] if biased else [])]
        args = {"input": Operand(0), "weight": Operand(1), "bias": Operand(2) if biased else None}
        return self.op("aten.linear.default", given, (*self.shape(x)[:-1], out), args, at=name)

    def norm(self, x: int, name: str) -> int:
        width = self.shape(x)[-1]
        weight = self.param(f"{name}.weight", width)
        if self.dims.norm == "rms" and not self.dims.fused_norm:
            return self.written_out_norm(x, weight, name)
        if self.dims.norm == "rms":
            args: dict[str, Any] = {"input": Operand(0), "normalized_shape": (width,), "weight": Operand(1), "eps": None}
            return self.op("aten.rms_norm.default", [x, weight], self.shape(x), args, at=name)
        bias = self.param(f"{name}.bias", width)
        args = {"input": Operand(0), "normalized_shape": (width,), "weight": Operand(1), "bias": Operand(2), "eps": 1e-05, "cudnn_enable": False}
        return self.op("aten.layer_norm.default", [x, weight, bias], self.shape(x), args, at=name)

    def written_out_norm(self, x: int, weight: int, name: str) -> int:
        shape, rows = self.shape(x), (*self.shape(x)[:-1], 1)

        def step(kind: str, operands: Sequence[int], shape: Sequence[int], dtype: str = "float32", **args: Any) -> int:
            given = {"self": Operand(0), **({"other": Operand(1)} if len(operands) > 1 else {}), **args}
            return self.op(kind, operands, shape, given, at=name, dtype=dtype)

        wide = step("aten._to_copy.default", [x], shape, non_blocking=False)
        squares = step("aten.pow.Tensor_Scalar", [wide], shape, exponent=2)
        mean = step("aten.mean.dim", [squares], rows, dim=(-1,), keepdim=True)
        scale = step("aten.rsqrt.default", [step("aten.add.Tensor", [mean], rows, other=1e-05, alpha=1)], rows)
        narrow = step("aten._to_copy.default", [step("aten.mul.Tensor", [wide, scale], shape)], shape, self.dtype, non_blocking=False)
        return step("aten.mul.Tensor", [weight, narrow], shape, self.dtype)

    def embedding(self, indices: int, name: str, rows: int) -> int:
        weight = self.param(f"{name}.weight", rows, self.dims.hidden)
        args = {"weight": Operand(0), "indices": Operand(1), "padding_idx": -1, "scale_grad_by_freq": False, "sparse": False}
        return self.op("aten.embedding.default", [weight, indices], (*self.shape(indices), self.dims.hidden), args, at=name)

    def unary(self, kind: str, x: int, **args: Any) -> int:
        return self.op(kind, [x], self.shape(x), {"self": Operand(0), **args})

    def binary(self, kind: str, a: int, b: int, **args: Any) -> int:
        return self.op(kind, [a, b], self.shape(a), {"self": Operand(0), "other": Operand(1), **args})

    def add(self, a: int, b: int, label: str = "") -> int:
        args = {"self": Operand(0), "other": Operand(1), "alpha": 1}
        return self.op("aten.add.Tensor", [a, b], self.shape(a), args, label=label)

    def drop(self, x: int) -> int:
        if not self.dims.dropout:
            return x
        return self.op("autopar.dropout.default", [x], self.shape(x), {"input": Operand(0), "p": self.dims.dropout, "site": len(self.ops)}, label="residual")

    # --- the model -----------------------------------------------------------------------------------------------------

    def heads_first(self, x: int, heads: int) -> int:
        """[b, s, heads * d] -> [b, heads, s, d]."""
        b, s, width = self.shape(x)
        shape = b, s, heads, width // heads
        x = self.op("aten.reshape.default", [x], shape, {"self": Operand(0), "shape": shape})
        return self.transposed(x)

    def transposed(self, x: int) -> int:
        a, b, c, d = self.shape(x)
        return self.op("aten.transpose.int", [x], (a, c, b, d), {"self": Operand(0), "dim0": 1, "dim1": 2})

    def rotated(self, x: int, tables: tuple[int, int]) -> int:
        """x cos + rotate_half(x) sin, for x [b, heads, s, d] and tables [s, d]."""
        *lead, width = self.shape(x)
        halves = [self.op("aten.slice.Tensor", [x], (*lead, width // 2), {"self": Operand(0), "dim": 3, "start": a, "end": b, "step": 1})
                  for a, b in ((0, width // 2), (width // 2, 9223372036854775807))]  # fmt: skip
        turned = self.op("aten.cat.default", [self.unary("aten.neg.default", halves[1]), halves[0]], self.shape(x), {"tensors": (Operand(0), Operand(1)), "dim": -1})
        return self.add(self.binary("aten.mul.Tensor", x, tables[0]), self.binary("aten.mul.Tensor", turned, tables[1]))

    def queries_keys_values(self, x: int, beside: dict[str, int]) -> tuple[int, int, int]:
        """Each [b, heads, s, width]."""
        dims = self.dims
        width, kv_width = dims.heads * dims.head_dim, dims.kv_heads * dims.head_dim
        widths = (("q", width, dims.heads), ("k", kv_width, dims.kv_heads), ("v", kv_width, dims.kv_heads))
        q, k, v = (self.heads_first(self.linear(x, name, size), heads) for name, size, heads in widths)
        if dims.positions == "rotary":
            tables = beside["cos"], beside["sin"]
            q, k = self.rotated(q, tables), self.rotated(k, tables)
        return q, k, v

    def attention(self, x: int, beside: dict[str, int]) -> int:
        dims = self.dims
        q, k, v = self.queries_keys_values(x, beside)
        args: dict[str, Any] = {"query": Operand(0), "key": Operand(1), "value": Operand(2)}
        args |= {"attn_mask": Operand(3) if "alibi" in beside else None, "dropout_p": dims.dropout, "is_causal": "alibi" not in beside}
        args |= {"scale": None, "enable_gqa": dims.kv_heads != dims.heads}
        written_out = not dims.fused_attention or dims.dropout > 0
        if self.cut_rows and (written_out or "alibi" in beside):
            raise UsageError("context parallelism of an attention that is written out or has a bias: only a fused causal one is cut along the sequence")
        if self.cut_rows:
            args = {name: args[name] for name in ("query", "key", "value", "is_causal", "scale", "enable_gqa")}
        kind = "autopar.attention.default" if written_out else "autopar.context_attention.default" if self.cut_rows else "aten.scaled_dot_product_attention.default"
        given = [q, k, v, *([beside["alibi"]] if "alibi" in beside else [])]
        mixed = self.op(kind, given, (*self.shape(q)[:3], dims.head_dim), args | ({"site": len(self.ops)} if written_out else {}), at="attention")
        mixed = self.transposed(mixed)
        if written_out and not dims.packed:
            mixed = self.unary("aten.clone.default", mixed)
        shape = self.batch, dims.seq, dims.heads * dims.head_dim
        return self.linear(self.op("aten.reshape.default", [mixed], shape, {"self": Operand(0), "shape": shape}), "o", dims.hidden)

    def mixture(self, x: int, experts: Experts) -> int:
        """Every token goes to `chosen` experts and the same number of tokens to each, as runs that force a balance do; the slots of an expert that
        E / chosen neighbouring tokens fill are [E, slots, h]."""
        tokens, width = self.batch * self.dims.seq, self.dims.hidden
        shape = tokens, width
        rows = self.op("aten.reshape.default", [x], shape, {"self": Operand(0), "shape": shape}, label="rows")
        routed = self.linear(rows, "router", experts.count, bias=False)
        scores = self.op("aten.softmax.int", [routed], (tokens, experts.count), {"self": Operand(0), "dim": -1, "dtype": None})
        weights = self.op("aten.slice.Tensor", [scores], (tokens, experts.chosen), {"self": Operand(0), "dim": 1, "start": 0, "end": experts.chosen, "step": 1})
        slots = tokens * experts.chosen // experts.count
        sent = self.op("autopar.dispatch.default", [rows], (experts.count, slots, width), {"input": Operand(0), "experts": experts.count, "chosen": experts.chosen})
        gate = self.unary("aten.silu.default", self.of_experts(sent, "gate", experts.inner))
        made = self.of_experts(self.binary("aten.mul.Tensor", gate, self.of_experts(sent, "up", experts.inner)), "down", width)
        back = self.op("autopar.combine.default", [made, weights], shape, {"input": Operand(0), "weights": Operand(1)})
        mixed = self.op("aten.reshape.default", [back], self.shape(x), {"self": Operand(0), "shape": self.shape(x)}, label="whole")
        return self.add(mixed, self.gated(x, "shared_", experts.shared), "residual") if experts.shared else mixed

    def of_experts(self, x: int, name: str, out: int) -> int:
        """A product for every expert: [E, slots, i] x [E, i, o]."""
        count, slots, width = self.shape(x)
        weight = self.param(f"experts.{name}.weight", count, width, out)
        return self.op("aten.bmm.default", [x, weight], (count, slots, out), {"self": Operand(0), "mat2": Operand(1)}, at=f"experts.{name}")

    def gated(self, x: int, prefix: str, inner: int) -> int:
        gate = self.unary("aten.silu.default", self.linear(x, f"{prefix}gate", inner))
        return self.linear(self.binary("aten.mul.Tensor", gate, self.linear(x, f"{prefix}up", inner)), f"{prefix}down", self.dims.hidden)

    def mlp(self, x: int, inner: int) -> int:
        dims = self.dims
        if dims.experts is not None:
            return self.mixture(x, dims.experts)
        if dims.activation == "swiglu":
            return self.gated(x, "", inner)
        up = self.linear(x, "up", inner)
        if dims.activation == "gelu":
            return self.linear(self.unary("aten.gelu.default", up, approximate="none"), "down", dims.hidden)
        return self.linear(self.unary("aten.square.default", self.unary("aten.relu.default", up)), "down", dims.hidden)

    def block(self, x: int, beside: dict[str, int], inner: int) -> int:
        x = self.add(x, self.drop(self.attention(self.norm(x, "norm1"), beside)), "residual")
        return self.add(x, self.drop(self.mlp(self.norm(x, "norm2"), inner)), "residual")

    def beside(self) -> dict[str, int]:
        """What positions are made of, the same for all blocks: buffers."""
        dims = self.dims
        if dims.positions == "rotary":
            return {name: self.value(name, (dims.seq, dims.head_dim), self.dtype, "buffer", grad=False) for name in ("cos", "sin")}
        if dims.positions == "alibi":
            return {"alibi": self.value("alibi", (1, dims.heads, 1, dims.seq), self.dtype, "buffer", grad=False)}
        return {}

    def embedded(self, tokens: int) -> int:
        dims = self.dims
        x = self.embedding(tokens, "token", dims.vocab)
        if dims.positions == "learned":
            args = {"end": dims.seq, "dtype": None}
            place = self.op("aten.arange.default", [], (dims.seq,), args, dtype="int64")
            x = self.add(x, self.embedding(place, "position", dims.seq), "residual")
        return self.drop(x)

    def loss(self, logits: int, labels: int) -> int:
        rows, classes = self.batch * self.dims.seq, self.dims.vocab
        wide = "float32" if self.dims.wide_loss else self.dtype
        if self.dims.wide_loss:
            args: dict[str, Any] = {"self": Operand(0), "dtype": "float32", "non_blocking": False}
            logits = self.op("aten._to_copy.default", [logits], self.shape(logits), args, dtype=wide)
        flat = self.op("aten.reshape.default", [logits], (rows, classes), {"self": Operand(0), "shape": (rows, classes)}, dtype=wide)
        target = self.op("aten.reshape.default", [labels], (rows,), {"self": Operand(0), "shape": (rows,)}, dtype="int64")
        args = {"input": Operand(0), "target": Operand(1), "ignore_index": -100, "label_smoothing": 0.0}
        each = self.op("autopar.token_cross_entropy.default", [flat, target], (rows,), args, dtype=wide)
        total = self.op("aten.sum.default", [each], (), {"self": Operand(0), "dtype": None}, dtype=wide)
        counted = self.op("aten.ne.Scalar", [target], (rows,), {"self": Operand(0), "other": -100}, dtype="bool")
        count = self.op("aten.sum.default", [counted], (), {"self": Operand(0), "dtype": None}, dtype="int64")
        return self.op("aten.div.Tensor", [total, count], (), {"self": Operand(0), "other": Operand(1)}, dtype=wide)

    def graph(self) -> OpGraph:
        dims = self.dims
        tokens, labels = (self.value(name, (self.batch, dims.seq), "int64", "input", grad=False) for name in ("inputs", "labels"))
        beside = self.beside()
        x = self.embedded(tokens)
        token = next(v for v, value in enumerate(self.values) if value.source == ("token.weight",))
        for n in range(dims.layers):
            self.path = f"blocks.{n}"
            x = self.block(x, beside, self.inners[n % len(self.inners)])
        self.path = ""
        logits = self.linear(self.norm(x, "norm"), "head", dims.vocab, bias=False, weight=token if dims.tied else None)
        loss = self.loss(logits, labels)
        return OpGraph(tuple(self.values), tuple(self.ops), (loss,), name="transformer")
