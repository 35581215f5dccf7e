"""How much of a pipeline's time is idle: GPipe's published table, reproduced by running the schedules' lists against a clock.

    python examples/pipeline_bubbles.py [--trace FILE]

Idle is a share of the total. GPipe and 1F1B have the same bubble: what 1F1B saves is memory (the last two columns, most
microbatches in flight on the first rank). `--trace` writes 1F1B on 4 ranks for chrome://tracing or ui.perfetto.dev.
No torch, no processes; stages are equal, messages free, a backward takes twice a forward.
"""

import argparse

from autopar.core.timeline import Timeline
from autopar.cost_models.pipeline import PipelineCost
from autopar.cost_models.timeline import simulate
from autopar.schedules.check import check
from autopar.schedules.lower import make_schedule

PUBLISHED = {
    (4, 4): "0.429", (4, 8): "0.273", (4, 16): "0.158", (4, 32): "0.086", (4, 64): "0.045", (4, 100): "0.029",
    (8, 16): "0.304", (16, 32): "0.319", (32, 64): "0.326", (8, 32): "0.179", (16, 64): "0.190",
}  # fmt: skip
"""(ranks, microbatches) -> idle share of GPipe; Huang et al. 2019, (S-1) / (M+S-1)."""

SCHEDULES = (("naive", 1), ("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("zero-bubble", 1))


def run(name: str, ranks: int, microbatches: int, virtual_stages: int = 1) -> Timeline:
    schedule = make_schedule(name, ranks, microbatches, virtual_stages)
    check(schedule)
    share = 1 / virtual_stages
    cost = PipelineCost.uniform(schedule.num_stages, forward_s=share, input_gradient_s=share, weight_gradient_s=share)
    return simulate(schedule, cost)


def main(shapes: tuple[tuple[int, int], ...] = tuple(PUBLISHED)) -> None:
    print("ranks microbatches  published  " + "".join(f"{name:>12}" for name, _ in SCHEDULES) + "   in flight: gpipe  1f1b")
    for ranks, microbatches in shapes:
        found = {name: run(name, ranks, microbatches, virtual) for name, virtual in SCHEDULES}
        idle = "".join(f"{found[name].bubble_fraction:12.3f}" for name, _ in SCHEDULES)
        print(f"{ranks:5} {microbatches:12}  {PUBLISHED[ranks, microbatches]:>9}  {idle}{found['gpipe'].peak_in_flight(0):19}{found['1f1b'].peak_in_flight(0):6}")
    worst = max(run("1f1b", ranks, 4 * ranks).bubble_fraction for ranks in range(1, 17))
    print(f"4 microbatches per rank keep 1F1B's idle share at or below {worst:.3f} on 1 to 16 ranks")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", metavar="FILE")
    given = parser.parse_args()
    main()
    if given.trace:
        run("1f1b", 4, 8).save_trace(given.trace)
