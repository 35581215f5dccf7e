"""torchrun's own agent around `examples/resume.py`, with ranks that are forked from a process that has imported everything.

    python tests/checkpoint/elastic.py FOLDER STEPS MAX_RESTARTS

It is what the command `torchrun` runs, but a restart takes a second instead of ten. Checkpoints are in FOLDER, one a step. Each
rank leaves its process number in `FOLDER/ranks/RESTART/RANK`, for whoever wants to kill it. PYTHONPATH names the folders of
autopar, the example and this file: the process that ranks are forked from knows no other path (Python 3.11).
"""

import multiprocessing
import os
import sys
from pathlib import Path

from torch.distributed.launcher.api import LaunchConfig, elastic_launch


def rank(folder: str, steps: int) -> None:
    """One life of one rank."""
    import resume  # type: ignore[import-not-found]  # a script, not a module of the package

    from autopar.runtime.launch import launch

    mark = Path(folder) / "ranks" / os.environ["TORCHELASTIC_RESTART_COUNT"] / os.environ["RANK"]
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.with_suffix(".new").write_text(str(os.getpid()))
    mark.with_suffix(".new").rename(mark)
    launch(resume.train, 2, resume.Settings(folder, steps, every=1), on_message=resume.show)


def main(folder: str, steps: int, max_restarts: int) -> None:
    multiprocessing.set_forkserver_preload(["warm"])
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=2, run_id="resume", rdzv_backend="c10d", rdzv_endpoint="localhost:0",
        max_restarts=max_restarts, monitor_interval=0.05, start_method="forkserver",
    )  # fmt: skip
    elastic_launch(config, rank)(folder, steps)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
