"""How much of a device's speed is left when a part of the training state is fetched from host or disk at every use.

    efficiency = ait * bw / (ait * bw + peak)

ait: flops done per byte fetched; bw: bytes/s between device and where the state lies; peak: flops/s of the device; nothing overlaps.
(Rajbhandari et al. 2021, ZeRO-Infinity, https://arxiv.org/abs/2104.07857, sections 4.1 and 4.2, for transformers in mixed precision.)
"""


def efficiency(flops_per_byte: float, bandwidth_bytes_per_s: float, peak_flops_per_s: float) -> float:
    """Share of the peak that remains, 0 to 1."""
    fed = flops_per_byte * bandwidth_bytes_per_s
    return fed / (fed + peak_flops_per_s)


def parameter_intensity(seq: int, batch: int) -> float:
    """Flops per byte of parameters and gradients: read for forward, backward and recomputation, written once. `batch` is per device."""
    return float(seq * batch)


def optimizer_intensity(seq: int, batch: int) -> float:
    """Flops per byte of optimizer state, which is read and written in four times the bytes."""
    return seq * batch / 4


def checkpoint_intensity(hidden: int, blocks_per_checkpoint: int = 1) -> float:
    """Flops per byte of activation checkpoints, one in every so many blocks of width `hidden`."""
    return 24.0 * hidden * blocks_per_checkpoint
