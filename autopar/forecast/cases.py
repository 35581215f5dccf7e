"""From a published row to what can be priced: model, cluster, plan, and seconds of a step as measured."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from autopar.core.cluster import Cluster
from autopar.core.residency import Precision
from autopar.cost_models.kernels import Kernels
from autopar.forecast.flops import model_flops
from autopar.forecast.forced import Layout3D
from autopar.forecast.machines import HOST_BYTES_PER_S, machine
from autopar.forecast.runs import Row, Unpriced
from autopar.forecast.software import Software, software_of
from autopar.forecast.step import StepPlan, fewest_layers
from autopar.forecast.transformer import Dims, Experts

DENSE = ("gpt", "llama", "nemotron", "qwen3-dense", "transformer")
DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp8": "bfloat16", "mxfp8": "bfloat16", "nvfp4": "bfloat16", "": "bfloat16"}
FLOAT8 = ("fp8", "mxfp8")
BLOCK_SCALED_SHARE = 0.93
"""Of the rate of float8 products with one scale for a whole operand, where every block of 32 has its own. Source: assumed, set by hand from rows that
differ in nothing else: steps are 4 to 5 % longer on B200 and on GB200 (Megatron Bridge, container 25.11, 8 billion parameters)."""

HEAD_WIDTHS = {"qwen3": 128, "gpt-oss": 64, "gpt oss": 64}
"""Of models whose heads are not the share of their width. Source: their published configurations."""

RECOMPUTE = ("none", "selective", "full")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One run. `recompute`: the modes that it may have used, lightest first (`offload`: none, with activations on the host); one where it is published; `others`: plans that it may have run too."""

    row: Row
    dims: Dims
    cluster: Cluster
    gpu: str
    plan: StepPlan
    software: Software
    recompute: tuple[str, ...]
    dtype: str
    precision: Precision
    product_dtype: str
    measured_s: float | None
    others: tuple[StepPlan, ...] = ()

    @property
    def plans(self) -> tuple[StepPlan, ...]:
        """What may have been run: where a source prints none of microbatch, interleaving and recomputation, the one that is fastest is taken."""
        return (self.plan, *self.others)

    @property
    def kernels(self) -> Kernels:
        product = None if self.product_dtype == self.dtype else self.product_dtype
        share = BLOCK_SCALED_SHARE if self.row.text("precision") == "mxfp8" else 1.0
        return replace(self.software.kernels, product_dtype=product, product_share=share, exchange_share=self._exchange_share)

    @property
    def _exchange_share(self) -> float:
        """Nodes that a token goes to over experts that it goes to, on average, where it is sent once to each node."""
        experts, layout = self.dims.experts, self.plan.layout
        nodes = max(1, layout.ep * layout.tp // self.cluster.devices_per_node)
        if experts is None or not self.software.sends_once or nodes == 1:
            return 1.0
        return nodes * (1 - (1 - 1 / nodes) ** experts.chosen) / experts.chosen

    @property
    def tokens(self) -> int:
        return self.plan.layout.dp * self.plan.layout.micro_batch * self.plan.num_microbatches * self.dims.seq


def case_of(row: Row) -> Case:
    """Raises Unpriced where a row says too little, or what no graph here computes."""
    _refuse(row)
    software = software_of(row)
    gpu, cluster = machine(row.text("gpu"), row.needed("num_gpus"), row.number("gpus_per_node"), row.source, row.notes)
    dims = _dims(row, software)
    plan = _plan(row, dims, software)
    precision = row.text("precision")
    dtype = "float16" if not precision and software.half else DTYPES.get(precision, "")
    if not dtype:
        raise Unpriced(f"precision {precision[:20]}")
    if dtype == "bfloat16" and "bfloat16" not in dict(cluster.device.peak_flops_per_s):
        dtype = "float16"
    product = "float8_e4m3fn" if precision in FLOAT8 else "float4_e2m1fn" if precision == "nvfp4" else dtype
    return Case(
        row=row, dims=dims, cluster=cluster, gpu=gpu, plan=plan, software=software, dtype=dtype, product_dtype=product,
        recompute=_recompute(row, software, dims, offloads=gpu in HOST_BYTES_PER_S and plan.pp == 1), precision=Precision(master="float32", reduction=software.sums_in(dtype)),
        measured_s=_measured_s(row, dims, plan, cluster) if row.text("kind") == "run" else None,
        others=tuple(_others(row, plan, dims)),
    )  # fmt: skip


def _others(row: Row, plan: StepPlan, dims: Dims) -> Iterator[StepPlan]:
    """Plans with other interleavings, for a row that prints neither that nor a recomputation, and with other microbatches where it prints none."""
    if any(row.text(name) for name in ("vpp", "recompute")) or "interleaved schedule" in row.notes or (plan.pp == 1 and row.text("micro_batch")):
        return
    layout, samples = plan.layout, plan.layout.micro_batch * plan.num_microbatches
    for micro in (layout.micro_batch,) if row.text("micro_batch") else (m for m in (1, 2, 4) if samples % m == 0 and (m == 1 or layout.cp == 1)):
        for vpp in range(1, dims.layers // plan.pp + 1) if plan.pp > 1 else (1,):
            if dims.layers % (plan.pp * vpp) == 0:
                yield replace(plan, layout=replace(layout, micro_batch=micro), vpp=vpp, num_microbatches=samples // micro)


def _refuse(row: Row) -> None:
    if row.text("model_family") not in (*DENSE, "moe"):
        raise Unpriced(f"model family {row.text('model_family')[:20]!r}: no graph yet")
    if "every other layer" in row.notes:
        raise Unpriced("mixtures in every other block: no graph yet")
    if "MLA" in row.notes:
        raise Unpriced("multi-head latent attention: no graph yet")
    if (row.number("cp") or 1) > 1 and row.text("experts"):
        raise Unpriced("experts and context parallelism together: decided too slowly")
    if "MegaScale;" in row.notes or row.notes.startswith("MegaScale weak"):
        raise Unpriced("parallel blocks and sliding windows: no graph yet")


def _dims(row: Row, software: Software) -> Dims:
    hidden, heads, llama = row.needed("hidden"), row.needed("heads"), row.text("model_family") in ("llama", "qwen3-dense", "moe")
    nemotron = row.text("model_family") == "nemotron"
    positions = "alibi" if "ALiBi" in row.notes else "rotary" if llama or nemotron else "learned"
    flash = software.flash if row.text("flash_attention") == "" else row.text("flash_attention") == "1"
    named = f"{row.notes} {row.text('split_group')}".lower()
    head_width = next((width for name, width in HEAD_WIDTHS.items() if name in named and row.text("experts")), 0)
    if hidden % heads and not head_width:
        raise Unpriced(f"{heads} heads do not divide a width of {hidden}")
    return Dims(
        layers=row.needed("layers"), hidden=hidden, heads=heads, kv_heads=row.number("kv_heads") or heads,
        inner=row.number("ffn_hidden") or 4 * hidden, vocab=row.number("vocab") or 51200, seq=row.needed("seq"),
        norm="rms" if llama else "layer", activation="swiglu" if llama else "squared_relu" if nemotron else "gelu", positions=positions,
        biases=not llama and not nemotron and software.biases, tied=not llama and not nemotron, fused_attention=flash,
        dropout=0.0 if flash or llama else software.dropout, fused_norm=software.fused_norm or "RMS kernel" in row.notes, wide_loss=True, packed=flash,
        experts=_experts(row), head_width=head_width,
    )  # fmt: skip


def _experts(row: Row) -> Experts | None:
    """Widths that notes give are of experts; else they are as wide as the MLP."""
    if not row.text("experts"):
        return None
    width = re.search(r"moe_ffn=(\d+)", row.notes)
    inner = int(width[1]) if width else row.needed("ffn_hidden")
    return Experts(row.needed("experts"), row.needed("topk"), inner, inner if "shared expert" in row.notes else 0)


def _degrees_of_experts(row: Row, tp: int) -> tuple[int, bool]:
    """(ranks of dp that share the experts, whether tp cuts every expert): ranks of tp hold experts of their own unless the notes or the degrees say no."""
    ep = row.number("ep") or 1
    cut = tp > 1 and ("xpert tensor parallel" in row.notes or ep % tp > 0)
    return (ep, True) if cut else (max(1, ep // tp), False)


def _plan(row: Row, dims: Dims, software: Software) -> StepPlan:
    devices, tp, pp, cp = row.needed("num_gpus"), row.needed("tp"), row.needed("pp"), row.number("cp") or 1
    dp, left = divmod(devices, tp * pp * cp)
    if left or (row.number("dp") or dp) != dp:
        raise Unpriced(f"tp={tp} pp={pp} cp={cp} dp={row.text('dp')} do not make {devices} devices")
    batch = row.number("global_batch") or dp * (row.number("batch_per_replica") or row.number("micro_batch") or 1)
    micro = row.number("micro_batch") or (1 if pp * cp > 1 or dims.experts else max(1, batch // dp))
    times = max(1, round(batch / (dp * micro)))
    stage = software.zero if row.number("zero_stage") is None else row.needed("zero_stage") if row.text("zero_stage") != "0" else 0
    sp = row.text("sp") == "1" if row.text("sp") else software.sequence_parallel and tp > 1
    vpp = row.number("vpp") or (-(-dims.layers // pp) if "interleaved schedule" in row.notes else 1)
    if dims.layers < fewest_layers(pp, vpp):
        raise Unpriced(f"{dims.layers} layers on {pp} x {vpp} stages")
    layout = Layout3D(dp=dp, tp=tp, sp=sp and tp > 1, zero=stage if dp * cp > 1 else 0, micro_batch=micro, cp=cp, whole_loss=software.whole_loss)
    if dims.experts is not None:
        ep, cut = _degrees_of_experts(row, tp)
        layout = replace(layout, ep=ep, tp_of_experts=cut)
    return StepPlan(layout=layout, pp=pp, vpp=vpp if pp > 1 else 1, num_microbatches=times)


def _recompute(row: Row, software: Software, dims: Dims, *, offloads: bool) -> tuple[str, ...]:
    """Software that calls recomputation of attention's core "selective" has nothing to save by it where attention is fused. `offloads`: activations may
    be kept on the host, where the software can do that."""
    given, idle = row.text("recompute"), software.selects_attention and dims.fused_attention
    if given in RECOMPUTE:
        return ("none",) if given == "selective" and idle else (given,)
    if not idle:
        return RECOMPUTE
    return ("none", "offload", "full") if offloads and software.offloads else ("none", "full")


def _measured_s(row: Row, dims: Dims, plan: StepPlan, cluster: Cluster) -> float:
    metric = row.text("metric")
    try:
        value = float(row.text("value"))
    except ValueError:
        raise Unpriced(f"value {row.text('value')[:20]!r}") from None
    if not (math.isfinite(value) and value > 0):
        raise Unpriced(f"value {value}")
    devices, tokens = plan.num_devices, plan.layout.dp * plan.layout.micro_batch * plan.num_microbatches * dims.seq
    if metric == "iter_s":
        return value
    if metric == "tokens_per_s_per_gpu":
        return tokens / (value * devices)
    flops = model_flops(dims, tokens, row.text("tflops_convention"))
    if metric == "tflops_per_gpu":
        return flops / (value * 1e12 * devices)
    if metric == "mfu":
        return flops / (value / 100 * cluster.device.peak("bfloat16") * devices)
    raise Unpriced(f"metric {metric[:30]} is no step time")


def with_recompute(plan: StepPlan, mode: str) -> StepPlan:
    return replace(plan, layout=replace(plan.layout, recompute="none" if mode == "offload" else mode))
