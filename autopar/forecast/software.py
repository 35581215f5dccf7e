"""What published training software does, as a few properties: which kernels it fuses, what it overlaps, what it keeps."""

from dataclasses import dataclass, replace

from autopar.cost_models.kernels import ELEMENTARY_SCORE_PASSES, Kernels
from autopar.forecast.runs import Row


@dataclass(frozen=True, slots=True, kw_only=True)
class Software:
    """What rows leave open (`flash`: fused attention; `half`: float16; `zero`: its stage) and what the software does: `sums`: dtypes that gradients of
    (float16, bfloat16) are summed in; `fused_norm`: an RMS norm is one kernel; `selects_attention`: its selective recomputation is that of attention's
    core alone, `selects_blocks`: that of every second block; `whole_loss`: the loss is computed on whole logits; `sends_once`: a token to several experts
    of a node; `offloads`: without a pipeline, activations that do not fit may lie on the host; `fragments`: share of memory that the allocator loses between what is held.

    Source of `fragments`: assumed, set by hand where runs and reports of memory running out part; 0.03 with expandable segments.
    """

    name: str
    flash: bool = True
    half: bool = False
    biases: bool = True
    dropout: float = 0.0
    sums: tuple[str, str] = ("float32", "float32")
    sequence_parallel: bool = False
    overlap: bool = False
    zero: int = 0
    fused_norm: bool = True
    selects_attention: bool = False
    selects_blocks: bool = False
    whole_loss: bool = False
    fragments: float = 0.13
    sends_once: bool = False
    offloads: bool = False
    kernels: Kernels = Kernels(stops_early=False)

    def sums_in(self, dtype: str) -> str:
        """The dtype that gradients of `dtype` are summed in."""
        return self.sums[dtype == "bfloat16"]


FLASH_1 = 0.55
"""Share of FlashAttention-2's rate that FlashAttention reaches. Source: Dao 2023, figures 4 to 6."""

MEGATRON = Kernels(
    fused=True, repeats_collectives=True, sends_parts=True, stops_early=False, softmax_batches=4, loss_passes=(8.0, 2.0), loss_launches=(20, 7),
)  # fmt: skip
"""Source of `softmax_batches`: Megatron-LM, model/fused_softmax.py (is_kernel_available). Of `loss_passes` and `loss_launches`: mpu/cross_entropy.py, which
reads the logits for the largest; takes that off, makes exponentials and divides by their sum (each read, written); reads them for the sum; in the backward
multiplies by the gradient of the row (read, written); the launches are those and what is done with one number a row, three collectives among them."""

EAGER = Kernels(host_s=12e-6, adds_gradients=True, stops_early=False)

HALF_AS_IT_IS = ("float16", "float32")
MEGATRON_2021 = Software(
    name="Megatron-LM 2021", flash=False, half=True, dropout=0.1, sums=HALF_AS_IT_IS, kernels=replace(MEGATRON, host_s=8e-6, adds_gradients=True),
)  # fmt: skip
MEGATRON_2020 = replace(
    MEGATRON_2021, name="Megatron-LM 2020", kernels=replace(MEGATRON_2021.kernels, fused=False, score_passes=ELEMENTARY_SCORE_PASSES),
)  # fmt: skip
"""Before its fused kernels. Source: Narayanan et al. 2021, section 4.2."""

MEGATRON_2022 = Software(name="Megatron-LM 2022", flash=False, half=True, dropout=0.1, kernels=replace(MEGATRON, host_s=8e-6))
MEGATRON_2023 = Software(name="Megatron-LM 2023", flash=False, zero=1, sequence_parallel=True, kernels=replace(MEGATRON, host_s=8e-6))
"""As MegaScale's baseline, which has no flash attention yet. Source: Jiang et al. 2024, section 3.2 and table 3."""

MEGATRON_CORE = Software(
    name="Megatron Core", zero=1, selects_attention=True, sequence_parallel=True, overlap=True, biases=False, sums=("float16", "bfloat16"), fragments=0.03,
    sends_once=True, offloads=True, kernels=replace(MEGATRON, host_s=10e-6, loss_passes=None, loss_launches=(1, 1)),
)  # fmt: skip
"""Source of `offloads`: Megatron Bridge, perf_recipes/llama (cpu_offloading of 20 to 40 layers in every recipe with FSDP on Grace hosts). Of the loss in one
kernel: `cross_entropy_loss_fusion`, which NeMo's and Megatron Bridge's configurations of GPT set."""

LLAMA_3 = replace(MEGATRON_CORE, name="Llama 3", sums=("float32", "float32"))
"""Source: Llama 3, section 3.3.2: sums in float32."""

MEGATRON_DEEPSPEED = Software(
    name="Megatron-DeepSpeed", flash=False, half=True, dropout=0.1, sums=HALF_AS_IT_IS,
    kernels=replace(MEGATRON, host_s=60e-6, adds_gradients=True, sums_whole=True, loss_passes=(10.0, 2.0), loss_launches=(21, 7)),
)  # fmt: skip
"""Copies the logits before their loss. Source: bigscience-workshop/Megatron-DeepSpeed, mpu/cross_entropy.py. Of `host_s`: assumed, set by hand from vTrain's small
models, where one more block takes 54 to 63 us for each of its operators (microbatches of one, on one, two and four ranks of tp)."""
MEGATRON_DEEPSPEED_BLOCKING = replace(
    MEGATRON_DEEPSPEED, name="Megatron-DeepSpeed, launches block", kernels=replace(MEGATRON_DEEPSPEED.kernels, launches_block=True),
)  # fmt: skip
"""All trials and the run of BLOOM had CUDA_LAUNCH_BLOCKING=1, against hangs. Source: BigScience, tr11-176B-ml, chronicles-prequel.md and README.md."""

SCALING = Software(
    name="Aleph Alpha Scaling", zero=1, fused_norm=False, whole_loss=True, sums=("float16", "bfloat16"),
    kernels=replace(EAGER, repeats_collectives=True, sums_whole=True),
)  # fmt: skip
"""Source: Aleph-Alpha/scaling, losses/cross_entropy.py and optimizer/parameter_group.py."""

FOUNDRY = Software(name="llm-foundry FSDP", biases=False, overlap=True, kernels=replace(EAGER, attention_share=FLASH_1, attention_before=True))
TITAN = Software(
    name="torchtitan FSDP2", fused_norm=False, biases=False, overlap=True, sequence_parallel=True, selects_blocks=True,
    kernels=replace(EAGER, attention_before=True),
)  # fmt: skip

BY_SOURCE = (
    ("Korthikanti", MEGATRON_2022), ("MegaScale", MEGATRON_2023),
    ("BigScience BLOOM", MEGATRON_DEEPSPEED_BLOCKING), ("BigScience", MEGATRON_DEEPSPEED), ("vTrain", MEGATRON_DEEPSPEED), ("MT-NLG", MEGATRON_DEEPSPEED),
    ("Aleph Alpha", SCALING), ("MosaicML", FOUNDRY), ("torchtitan", TITAN), ("Automodel", TITAN),
    ("NVIDIA", MEGATRON_CORE), ("moe-modelzoo", MEGATRON_CORE), ("DeepSeek-V3", MEGATRON_CORE), ("Llama 3", LLAMA_3), ("2024 H100", MEGATRON_CORE), ("examples/llama", MEGATRON_CORE),
    ("Narayanan", MEGATRON_2021), ("September 2020", MEGATRON_2020), ("Megatron-LM README", MEGATRON_2021),
)  # fmt: skip
"""What a source says it ran, by words of its name; the first that fits."""

OTHER = Software(name="unnamed", half=True)


def software_of(row: Row) -> Software:
    """The software of a source, with the attention kernel that the row's notes name."""
    software = next((software for words, software in BY_SOURCE if words in row.source), OTHER)
    if "kernel: torch" in row.notes:
        return replace(software, kernels=replace(software.kernels, score_passes=ELEMENTARY_SCORE_PASSES))
    if "kernel: flash_attentionv1" in row.notes:
        return replace(software, kernels=replace(software.kernels, attention_share=FLASH_1))
    return software
