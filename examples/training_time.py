"""How long GPT-3 trains on 8 and on 512 V100: the formula of the courses, and what autopar predicts instead of assuming.

    python examples/training_time.py

    time = work / (rate of a device x devices x parallel efficiency)

The courses say 36 years on 8 devices and nearly 7 months on 512. Both follow from one assumed rate and an efficiency of 1; a plan for 512 devices
predicts what becomes of these. Below that, a small model on more and more devices, beside the laws of Amdahl and Gustafson. No torch, no processes.
"""

from dataclasses import dataclass

from autopar.core.cluster import Cluster
from autopar.cost_models.scaling import TrainingTime
from autopar.forecast.flops import model_flops
from autopar.forecast.forced import Layout3D
from autopar.forecast.scaling import fastest, scaling
from autopar.forecast.step import Step, StepPlan
from autopar.forecast.transformer import Dims

WORK_FLOPS = 3.14e23
"""Source: Brown et al. 2020, appendix D."""

RATE = 34.5e12
"""Assumed: flops per second that a V100 keeps, 0.28 of its 125 TFLOP/s; it is what 36 years on 8 devices imply."""

YEAR_S, MONTH_S = 365.25 * 86400, 365.25 * 86400 / 12
GPT_3 = Dims(layers=96, hidden=12288, heads=96, kv_heads=96, inner=49152, vocab=51200, seq=2048, tied=True, fused_attention=False, wide_loss=True)
GPT_2 = Dims(layers=12, hidden=768, heads=12, kv_heads=12, inner=3072, vocab=50257, seq=1024, tied=True)
LAYOUT = Layout3D(dp=4, tp=8, recompute="full")
MICROBATCHES, RANKS = 384, 16


@dataclass(frozen=True)
class Predicted:
    """A plan for 512 devices: seconds of a step, flops per second of a device that count as work, and how much longer one device would take, over 512."""

    step_s: float
    rate_flops_per_s: float
    parallel_efficiency: float


def predict() -> Predicted:
    cluster = Cluster.preset("v100-sxm", 64)
    step = Step(GPT_3, StepPlan(layout=LAYOUT, pp=RANKS, num_microbatches=MICROBATCHES), cluster, dtype="float16")
    alone = Step(GPT_3, StepPlan(layout=Layout3D(recompute="full"), num_microbatches=MICROBATCHES * LAYOUT.dp), cluster, dtype="float16")
    work = model_flops(GPT_3, MICROBATCHES * LAYOUT.dp * GPT_3.seq)
    devices = step.plan.num_devices
    return Predicted(step.step_s, work / step.step_s / devices, alone.step_s / step.step_s / devices)


def main() -> None:
    print(f"GPT-3: {WORK_FLOPS:.3g} flops; assumed {RATE / 1e12:g} TFLOP/s a V100 at an efficiency of 1")
    for devices, unit, name in ((8, YEAR_S, "years"), (512, MONTH_S, "months")):
        time = TrainingTime(work_flops=WORK_FLOPS, device_flops_per_s=RATE, num_devices=devices, efficiency=1.0)
        print(f"  {devices:4} devices: {time.seconds / unit:5.2f} {name}")
    found = predict()
    print(f"a plan for 512 (pp{RANKS} x dp{LAYOUT.dp} x tp{LAYOUT.tp}, full recomputation): {found.step_s:.1f} s a step,")
    print(f"  {found.rate_flops_per_s / 1e12:.1f} TFLOP/s a device, parallel efficiency {found.parallel_efficiency:.2f}")
    time = TrainingTime(work_flops=WORK_FLOPS, device_flops_per_s=found.rate_flops_per_s / found.parallel_efficiency, num_devices=512, efficiency=found.parallel_efficiency)
    print(f"  {time.seconds / MONTH_S:5.2f} months\n")
    points = scaling(GPT_2, Cluster.preset("v100-sxm", 16), [2**k for k in range(8)], 128, dtype="float16")
    print("GPT-2, 128 samples a step  | the same work: s, speed-up, Amdahl, efficiency | growing work: s, speed-up, Gustafson")
    for p in points:
        print(f"  {p.num_devices:4} devices {p.strong_s:28.3f} {p.strong_speed_up:9.2f} {p.amdahl:7.2f} {p.efficiency:11.2f} {p.weak_s:18.3f} {p.weak_speed_up:9.2f} {p.gustafson:10.2f}")
    print(f"  fastest for the same work: {fastest(points).num_devices} devices")


if __name__ == "__main__":
    main()
