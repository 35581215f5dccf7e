"""Operators that make tensors out of nothing: constants may be cut anywhere, sequences are made whole."""

from autopar.core.rule import OpRule
from autopar.rules.registry import Call, rule


@rule("aten.full.default", "aten.zeros.default", "aten.ones.default", "aten.empty.memory_format", "aten.new_zeros.default", "aten.new_ones.default",
      "aten.new_full.default", "aten.new_empty.default")  # fmt: skip
def constant(call: Call) -> OpRule:
    names = [f"d{i}" if n > 1 else None for i, n in enumerate(call.outs[0].shape)]
    return call.rule({}, [names])


@rule("aten.arange.default", "aten.arange.start", "aten.arange.start_step", "aten.scalar_tensor.default", "aten.eye.default", "aten.eye.m",
      "aten.linspace.default", "aten.tril_indices.default", "aten.triu_indices.default")  # fmt: skip
def sequence(call: Call) -> OpRule:
    return call.rule({}, [[None] * len(out.shape) for out in call.outs])
