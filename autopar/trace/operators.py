"""autopar's own operators: what a traced graph says where ATen's operator cannot be cut or is not reproducible.

They have schemas and plain single-process meanings; the rewriter replaces them by local forms.
"""

import torch
import torch.nn.functional as F

LIBRARY = torch.library.Library("autopar", "DEF")
LIBRARY.define("dropout(Tensor input, float p, int site) -> Tensor")
LIBRARY.define("attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, float dropout_p, bool is_causal, float? scale, bool enable_gqa, int site) -> Tensor")
LIBRARY.define("context_attention(Tensor query, Tensor key, Tensor value, bool is_causal, float? scale, bool enable_gqa) -> Tensor")
LIBRARY.define("dispatch(Tensor input, int experts, int chosen) -> Tensor")
LIBRARY.define("combine(Tensor input, Tensor weights) -> Tensor")
LIBRARY.define("token_cross_entropy(Tensor input, Tensor target, int ignore_index, float label_smoothing) -> Tensor")
LIBRARY.define("batch_norm(Tensor input, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor)")


def token_cross_entropy(input: torch.Tensor, target: torch.Tensor, ignore_index: int, label_smoothing: float) -> torch.Tensor:
    """Cross-entropy of every row: input [n, v], target [n] -> [n], zero where the target is ignored."""
    return F.cross_entropy(input, target, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none")


def context_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_causal: bool, scale: float | None, enable_gqa: bool) -> torch.Tensor:
    """Attention whose rows may be cut in spite of a causal mask."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa)


def dispatch(input: torch.Tensor, experts: int, chosen: int) -> torch.Tensor:
    """input [n, h] -> [experts, slots, h]: slot c of expert e holds token e // chosen of the c-th of the groups of experts / chosen tokens."""
    groups = input.unflatten(0, (-1, experts // chosen))
    return groups[:, torch.arange(experts, device=input.device) // chosen].transpose(0, 1)


def combine(input: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """input [experts, slots, h], weights [n, chosen] -> [n, h]: of every token the sum of what its experts made, each times its weight."""
    made = input.unflatten(0, (-1, weights.shape[1]))  # [tokens of a group, chosen, slots, h]
    return (made * weights.unflatten(0, (-1, made.shape[0])).permute(1, 2, 0).unsqueeze(-1)).sum(1).transpose(0, 1).flatten(0, 1)


def batch_norm(input: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Training-mode batch normalisation: (output, batch mean, biased batch variance)."""
    dims = [d for d in range(input.dim()) if d != 1]
    with torch.no_grad():
        var, mean = torch.var_mean(input, dims, correction=0)
    return F.batch_norm(input, None, None, weight, bias, True, 0.0, eps), mean, var


def _dropout_meta(input: torch.Tensor, p: float, site: int) -> torch.Tensor:
    return torch.empty_like(input)


def _attention_meta(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, site):  # noqa: ANN001, ANN202 - mirrors the schema
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


LIBRARY.impl("token_cross_entropy", token_cross_entropy, "CompositeImplicitAutograd")
LIBRARY.impl("context_attention", context_attention, "CompositeImplicitAutograd")
LIBRARY.impl("dispatch", dispatch, "CompositeImplicitAutograd")
LIBRARY.impl("combine", combine, "CompositeImplicitAutograd")
LIBRARY.impl("batch_norm", batch_norm, "CompositeImplicitAutograd")
LIBRARY.impl("dropout", _dropout_meta, "Meta")
LIBRARY.impl("attention", _attention_meta, "Meta")
OPS = torch.ops.autopar
