"""What ranks do in the tests of the launcher: end in every way a rank can."""

import os
import signal
import time

import torch
import torch.distributed as dist

from autopar.errors import UsageError
from autopar.runtime.launch import Worker


def together() -> float:
    """One collective."""
    x = torch.ones(())
    dist.all_reduce(x)
    return float(x)


def count(worker: Worker, factor: int) -> None:
    worker.send((worker.rank, factor * together(), torch.get_num_threads()))


def fail_on_one(worker: Worker) -> None:
    together()
    if worker.rank == 2:
        raise ValueError("two\nlines")
    together()


def refuse_on_all(worker: Worker) -> None:
    raise UsageError("use it otherwise")


def killed(worker: Worker) -> None:
    together()
    if worker.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    together()


def leave(worker: Worker) -> None:
    together()
    if worker.rank == 1:
        os._exit(3)
    together()


def stop(worker: Worker) -> None:
    together()
    if worker.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    together()


def wait_for_ever(worker: Worker) -> None:
    """Tells its process id, then computes without end."""
    worker.send(os.getpid())
    while True:
        together()
        time.sleep(0.01)
