"""Parameters and flops of a decoder transformer in closed form: the independent counter, and the conventions in which others print flops."""

from autopar.forecast.transformer import Dims


def block_weights(dims: Dims, *, used: bool = False) -> int:
    """Elements of the matrices of one block; `used`: those that a token meets."""
    return _attention_weights(dims) + _inner_weights(dims, used=used)


def _attention_weights(dims: Dims) -> int:
    h, made, kv = dims.hidden, dims.heads * dims.head_dim, dims.kv_heads * dims.head_dim
    if dims.latent is None:
        return h * (2 * made + 2 * kv)
    of_queries, of_keys, width = dims.latent.query, dims.latent.key_value, dims.heads * dims.latent.key_width
    return of_queries * (h + width) + of_keys * (h + width + made) + made * h


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
    widths = dims.heads * ((dims.latent.key_width if dims.latent else dims.head_dim) + dims.head_dim)
    blocks = dims.layers * (2 * block_weights(dims, used=True) + masked * 2 * dims.seq * widths)
    head = 2 * dims.hidden * dims.vocab
    passes = 4 if convention.startswith("hardware") else 3
    return float(tokens) * (passes * blocks + 3 * head)


def num_parameters(dims: Dims) -> int:
    """Of all weights, biases, gains and embeddings."""
    h, kv = dims.hidden, dims.kv_heads * dims.head_dim
    latents = dims.latent.query + dims.latent.key_value if dims.latent else 0
    norms = ((2 * dims.layers + 1) * h + dims.layers * latents) * (2 if dims.norm == "layer" else 1)
    biases = dims.layers * (2 * h + 2 * kv + dims.inner * (2 if dims.activation == "swiglu" else 1) + h) if dims.biases else 0
    tables = dims.vocab * h * (1 if dims.tied else 2) + (dims.seq * h if dims.positions == "learned" else 0)
    return dims.layers * block_weights(dims) + norms + biases + tables
