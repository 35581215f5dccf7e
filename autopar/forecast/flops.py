"""Parameters and flops of a decoder transformer in closed form: the independent counter, and the conventions in which others print flops."""

from autopar.forecast.transformer import Dims


def block_weights(dims: Dims, *, used: bool = False) -> int:
    """Elements of the matrices of one block; `used`: those that a token meets."""
    made, kv = dims.heads * dims.head_dim, dims.kv_heads * dims.head_dim
    return dims.hidden * (2 * made + 2 * kv) + _inner_weights(dims, used=used)


def _inner_weights(dims: Dims, *, used: bool) -> int:
    if dims.experts is None:
        return (3 if dims.activation == "swiglu" else 2) * dims.hidden * dims.inner
    e = dims.experts
    return dims.hidden * (3 * ((e.chosen if used else e.count) * e.inner + e.shared) + e.count)


def model_flops(dims: Dims, tokens: int, convention: str = "") -> float:
    """Flops of a training step on `tokens`, forward and twice that backward, a multiply-add counted as 2.

    `convention`, as sources word it: "hardware, incl. full recompute" counts the forward of the blocks twice; "causal-halved" counts
    only scores that a causal mask leaves; else every score counts.
    """
    masked = 0.5 if "causal-halved" in convention and "non" not in convention else 1.0
    blocks = dims.layers * (2 * block_weights(dims, used=True) + masked * 4 * dims.seq * dims.heads * dims.head_dim)
    head = 2 * dims.hidden * dims.vocab
    passes = 4 if convention.startswith("hardware") else 3
    return float(tokens) * (passes * blocks + 3 * head)


def num_parameters(dims: Dims) -> int:
    """Of all weights, biases, gains and embeddings."""
    h, kv = dims.hidden, dims.kv_heads * dims.head_dim
    norms = (2 * dims.layers + 1) * h * (2 if dims.norm == "layer" else 1)
    biases = dims.layers * (2 * h + 2 * kv + dims.inner * (2 if dims.activation == "swiglu" else 1) + h) if dims.biases else 0
    tables = dims.vocab * h * (1 if dims.tied else 2) + (dims.seq * h if dims.positions == "learned" else 0)
    return dims.layers * block_weights(dims) + norms + biases + tables
