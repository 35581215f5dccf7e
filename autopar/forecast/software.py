"""What published training software does, as a few properties: which kernels it fuses, what it overlaps, what it keeps."""

from dataclasses import dataclass

from autopar.cost_models.kernels import Kernels
from autopar.forecast.runs import Row


@dataclass(frozen=True, slots=True, kw_only=True)
class Software:
    """`flash`: fused attention where a row does not say; `half`: float16 where it does not say; `reduction`: dtype that gradients are summed in;
    `zero`: its stage where a row does not say; `fused_norm`: whether an RMS norm is one kernel."""

    name: str
    flash: bool = True
    half: bool = False
    biases: bool = True
    dropout: float = 0.0
    reduction: str | None = "float32"
    sequence_parallel: bool = False
    overlap: bool = False
    zero: int = 0
    fused_norm: bool = True
    kernels: Kernels = Kernels(stops_early=False)


MEGATRON_KERNELS = Kernels(fused=True, repeats_collectives=True, stops_early=False, host_s=8e-6)
EAGER = Kernels(stops_early=False, host_s=12e-6)
MEGATRON_2021 = Software(name="Megatron-LM 2021", flash=False, half=True, dropout=0.1, reduction=None, kernels=MEGATRON_KERNELS)
MEGATRON_2022 = Software(name="Megatron-LM 2022", flash=False, half=True, dropout=0.1, reduction="float32", kernels=MEGATRON_KERNELS)
MEGATRON_DEEPSPEED = Software(name="Megatron-DeepSpeed", flash=False, half=True, dropout=0.1, reduction=None, kernels=Kernels(fused=True, repeats_collectives=True, stops_early=False, host_s=30e-6))
MEGATRON_2023 = Software(name="Megatron-LM 2023", zero=1, sequence_parallel=True, kernels=Kernels(fused=True, repeats_collectives=True, stops_early=False, host_s=8e-6))
SCALING = Software(name="Aleph Alpha Scaling", zero=1, fused_norm=False, kernels=Kernels(repeats_collectives=True, stops_early=False, host_s=12e-6))
FOUNDRY = Software(name="llm-foundry FSDP", biases=False, overlap=True, kernels=Kernels(attention_share=0.6, stops_early=False, host_s=12e-6))
TITAN = Software(name="torchtitan FSDP2", fused_norm=False, biases=False, overlap=True, sequence_parallel=True, kernels=EAGER)
MEGATRON_CORE = Software(name="Megatron Core", zero=1, sequence_parallel=True, overlap=True, biases=False, kernels=Kernels(fused=True, repeats_collectives=True, stops_early=False))

BY_SOURCE = (
    ("Korthikanti", MEGATRON_2022), ("MegaScale", MEGATRON_2023),
    ("BigScience", MEGATRON_DEEPSPEED), ("vTrain", MEGATRON_DEEPSPEED), ("MT-NLG", MEGATRON_DEEPSPEED),
    ("Aleph Alpha", SCALING), ("MosaicML", FOUNDRY), ("torchtitan", TITAN), ("Automodel", TITAN),
    ("NVIDIA", MEGATRON_CORE), ("Llama 3", MEGATRON_CORE), ("2024 H100", MEGATRON_CORE), ("examples/llama", MEGATRON_CORE),
    ("Narayanan", MEGATRON_2021), ("Megatron-LM README", MEGATRON_2021),
)  # fmt: skip
"""What a source says it ran, by words of its name; the first that fits."""

OTHER = Software(name="unnamed", half=True)


def software_of(row: Row) -> Software:
    return next((software for words, software in BY_SOURCE if words in row.source), OTHER)
