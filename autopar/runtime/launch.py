"""Ranks as processes of this machine, over gloo: one error that names the rank that failed, and no process left behind.

Each process watches its parent and the parent watches each process, so whoever dies takes the group along. The parent
holds the store through which the ranks meet: no port is chosen twice, and a lost rank cannot take the store with it.
Under torchrun the same call runs the function in this process, as the rank the environment names.
"""

import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

from autopar.errors import AutoparError
from autopar.runtime.distributed import leave

HOST = "127.0.0.1"
MAX_PROCESSES = 256
GRACE_S = 0.5
"""How long after the first failure others are heard: the rank that fails first is not always the one whose word comes first."""
STOP_S = 2.0
"""How long a process may take to end when asked, before it is killed."""


class RankFailure(AutoparError):
    """A rank ended with an error of its own, or was ended from outside."""

    exit_code = 70


@dataclass(frozen=True)
class Worker:
    """What a function on a rank is told: which one it is, and how to send a value to the process that launched it."""

    rank: int
    num_ranks: int
    send: Callable[[Any], None]


@dataclass(frozen=True)
class _Failure:
    """How a rank failed. `error` is set where it is one of ours; `lost_peer`: it only saw another rank go."""

    rank: int
    text: str
    details: str = ""
    error: AutoparError | None = None
    lost_peer: bool = False


def _ignore(message: Any) -> None:
    """What happens to messages that nobody asked for."""


def launch(
    function: Callable[..., None],
    num_processes: int,
    *args: Any,
    on_message: Callable[[Any], None] = _ignore,
    timeout_s: float = 300.0,
    preload: Sequence[str] = (),
) -> None:
    """Call `function(worker, *args)` on `num_processes` ranks with an initialised gloo group, and wait for all.

    The function and its arguments travel by pickle, so it is one of the top level of a module. What a rank passes to
    `worker.send` arrives at `on_message` here. `timeout_s` bounds one collective; `preload` names modules that are
    imported once for all ranks, where the system can. Raises the error of the rank that failed first if it is an
    AutoparError, else RankFailure; by then every process has ended.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        _run_here(function, args, on_message, timeout_s)
        return
    if not 1 <= num_processes <= MAX_PROCESSES:
        raise RankFailure(f"{num_processes} processes on one machine; start 1 to {MAX_PROCESSES}, or use torchrun on several machines")
    store = dist.TCPStore(HOST, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))
    with _Group(_context((function.__module__, *preload)), num_processes, on_message) as group:
        group.start(function, args, store.port, timeout_s)
        group.wait()


def _context(modules: Sequence[str]) -> BaseContext:
    """Processes forked from a clean server that has the slow imports behind it; spawned where there is no such thing."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed.tensor", *(name for name in modules if name != "__main__")])
    return context


def _run_here(function: Callable[..., None], args: Sequence[Any], on_message: Callable[[Any], None], timeout_s: float) -> None:
    """This process as the rank that torchrun made it; messages of rank 0 alone are passed on."""
    joined = not dist.is_initialized()
    if joined:
        store, rank, num_ranks = _meeting_point(timedelta(seconds=timeout_s))
        dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks, timeout=timedelta(seconds=timeout_s))
    rank = dist.get_rank()
    function(Worker(rank, dist.get_world_size(), on_message if rank == 0 else _ignore), *args)
    if joined:
        leave()


def _meeting_point(timeout: timedelta) -> tuple[dist.Store, int, int]:
    """The store of torchrun, this rank, and the number of ranks.

    On one machine every restart meets at the same store (torch 2.13), which still has the addresses of ranks that were
    killed: about every third restart then waits for them or is refused. So each attempt gets keys of its own.
    """
    store, rank, num_ranks = next(dist.rendezvous("env://", timeout=timeout))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT")
    if attempt is not None and os.environ.get("GROUP_WORLD_SIZE") == "1":  # several machines need not agree on the count
        store = dist.PrefixStore(f"attempt {attempt}", store)
    return store, rank, num_ranks


class _Group:
    """The processes and one pipe from each; leaving the context ends whoever is still there."""

    def __init__(self, context: BaseContext, num_processes: int, on_message: Callable[[Any], None]) -> None:
        self._context, self._num_processes, self._on_message = context, num_processes, on_message
        self._processes: list[BaseProcess] = []
        self._pipes: dict[int, Connection] = {}
        self._failures: list[_Failure] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, cause: BaseException | None, trace: TracebackType | None) -> None:
        for process in self._processes:
            if process.is_alive():
                process.terminate()
        deadline = time.monotonic() + STOP_S
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
        for pipe in self._pipes.values():
            pipe.close()

    def start(self, function: Callable[..., None], args: Sequence[Any], port: int, timeout_s: float) -> None:
        for rank in range(self._num_processes):
            here, there = self._context.Pipe(duplex=False)
            given = (function, args, rank, self._num_processes, port, timeout_s, there)
            process = self._context.Process(target=_work, args=given, name=f"rank {rank}")  # type: ignore[attr-defined]
            process.start()
            there.close()
            self._processes.append(process)
            self._pipes[rank] = here

    def wait(self) -> None:
        """Until every process has ended well; raises for the first that did not."""
        running = set(range(self._num_processes))
        deadline: float | None = None
        while running and (deadline is None or time.monotonic() < deadline):
            sentinels = [self._processes[rank].sentinel for rank in running]
            connection.wait([*self._pipes.values(), *sentinels], timeout=None if deadline is None else max(0.0, deadline - time.monotonic()))
            for rank in sorted(self._pipes):
                self._read(rank)
            for rank in sorted(running):
                if not self._processes[rank].is_alive():
                    running.remove(rank)
                    self._ended(rank)
            if self._failures and deadline is None:
                deadline = time.monotonic() + GRACE_S
        if self._failures:
            raise _error(self._failures, self._num_processes)

    def _read(self, rank: int) -> None:
        """Hand on what has arrived from a rank; forget its pipe at the end of it."""
        pipe = self._pipes[rank]
        try:
            while pipe.poll():
                message = pipe.recv()
                if isinstance(message, _Failure):
                    self._failures.append(message)
                else:
                    self._on_message(message)
        except (EOFError, ConnectionResetError):
            self._pipes.pop(rank).close()

    def _ended(self, rank: int) -> None:
        if rank in self._pipes:
            self._read(rank)
        code = self._processes[rank].exitcode or 0
        if code and not any(failure.rank == rank for failure in self._failures):
            self._failures.append(_Failure(rank, _how_it_ended(code)))


def _how_it_ended(code: int) -> str:
    if code > 0:
        return f"ended with exit code {code} and without a word"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else "unknown"
    advice = "; the machine may have run out of memory, use fewer processes or a smaller model" if -code == signal.SIGKILL else ""
    return f"was killed by signal {-code} ({name}){advice}"


def _error(failures: Sequence[_Failure], num_processes: int) -> AutoparError:
    """The failure that caused the others: not one that only saw a peer go, if there is another, and else a rank without a word."""
    cause = min(failures, key=lambda failure: failure.lost_peer)
    error = cause.error or RankFailure(f"rank {cause.rank} of {num_processes} {cause.text}")
    silent = sorted(set(range(num_processes)) - {failure.rank for failure in failures})
    if cause.lost_peer and silent:
        names = f"rank{'s' * (len(silent) > 1)} {', '.join(map(str, silent))} of {num_processes}"
        error = RankFailure(f"{names} did not come to where the others waited (rank {cause.rank} {cause.text})")
    if cause.details:
        error.add_note(cause.details)
    return error


class _Reporting:
    """Context of a rank: whatever ends the function with an error is sent to the parent, and the process then ends with code 1."""

    def __init__(self, rank: int, pipe: Connection) -> None:
        self._rank, self._pipe = rank, pipe

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, cause: BaseException | None, trace: TracebackType | None) -> None:
        if cause is None:
            return
        text = " ".join(f"{type(cause).__name__}: {cause}".split())
        lost_peer = isinstance(cause, dist.DistError) or "gloo" in text or "onnection reset" in text
        details = "".join(traceback.format_exception(cause))
        failure = _Failure(self._rank, f"failed: {text[:300]}", details, cause if isinstance(cause, AutoparError) else None, lost_peer)
        with suppress(OSError):  # the parent is gone; this process follows
            self._pipe.send(failure)
        os._exit(1)  # at once: an orderly end would wait for peers that wait for this rank


def _work(
    function: Callable[..., None], args: Sequence[Any], rank: int, num_ranks: int, port: int, timeout_s: float, pipe: Connection
) -> None:
    """The life of one rank."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent answers for all
    _follow_parent()
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_ranks), MASTER_ADDR=HOST, MASTER_PORT=str(port))
    with _Reporting(rank, pipe):
        timeout = timedelta(seconds=timeout_s)
        store = dist.TCPStore(HOST, port, is_master=False, timeout=timeout)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks, timeout=timeout)
        function(Worker(rank, num_ranks, pipe.send), *args)
        dist.barrier()  # nobody leaves while another still talks
        dist.destroy_process_group()


def _follow_parent() -> None:
    """End this process when its parent ends, in whatever way."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True, name="parent watch").start()

