"""The process that the solvers run in: solvers are large programs of others, so they get a limit of seconds and bytes, and are killed where they pass it.

Questions and answers are arrays by name, as numpy writes them, behind eight bytes of length. The process starts with the first question and lives as
long as the `with solvers()` that is outermost; after any failure, Ctrl-C included, it is killed and reaped, and the next question starts another.
"""

import io
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import BinaryIO

import numpy as np

from autopar.errors import AutoparError

MEMORY_BYTES = 2_000_000_000
"""Of data, for the solvers: half of the 4 GB that planning may take in all. 64,000 columns took 0.2 GB, 326,000 took 0.6 GB."""

MAX_ANSWER_BYTES = 1 << 30
OUT_OF_MEMORY = 12
"""The exit code of a process that could not get the memory it asked for (ENOMEM)."""

GRACE_S = 1.0
"""For a process that hung up to say with what code."""

COMMAND = (sys.executable, "-P", "-m", "autopar.search.child", str(MEMORY_BYTES))

Arrays = Mapping[str, np.ndarray]


class SolverFailed(AutoparError):
    """A solver that gave no answer, or one that cannot be true."""


def send(stream: BinaryIO, arrays: Arrays) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    stream.write(len(buffer.getbuffer()).to_bytes(8, "little"))
    stream.write(buffer.getbuffer())
    stream.flush()


def receive(stream: BinaryIO) -> Arrays:
    """Raises EOFError where nothing more comes, and something else where it is not what `send` wrote."""
    header = stream.read(8)
    length = int.from_bytes(header, "little")
    if len(header) < 8:
        raise EOFError
    if length > MAX_ANSWER_BYTES:
        raise ValueError(f"{length} bytes are announced")
    with np.load(io.BytesIO(stream.read(length)), allow_pickle=False) as arrays:
        return dict(arrays)


class SolverProcess:
    """One process at a time that answers questions."""

    def __init__(self, command: Sequence[str] = COMMAND) -> None:
        self.command = command
        self._process: subprocess.Popen[bytes] | None = None
        self._hung: SolverFailed | None = None

    def ask(self, question: Arrays, limit_s: float) -> Arrays:
        """The answer; raises SolverFailed where none can be read within so many seconds, and then for all that is asked later: that time is waited once."""
        if self._hung is not None:
            raise self._hung
        late = threading.Event()
        watchdog = threading.Timer(limit_s, self._kill, (late,))  # reading blocks until something comes or the process is gone
        watchdog.daemon = True
        watchdog.start()
        try:
            process = self._running()
            send(process.stdin, question)
            return receive(process.stdout)
        except Exception as error:  # noqa: BLE001 - numpy raises about anything on bytes that it did not write
            lost = isinstance(error, EOFError | OSError)
            code = self.close(GRACE_S if lost and not late.is_set() else 0.0)
            failure = SolverFailed(f"the solver {_fault(lost, code, limit_s if late.is_set() else None)}")
            self._hung = failure if late.is_set() else None
            raise failure from error
        except BaseException:
            self.close()
            raise
        finally:
            watchdog.cancel()

    def close(self, grace_s: float = 0.0) -> int | None:
        """Kill and reap it; its exit code, or minus the signal that ended it, None where there is none. It may end by itself for so long."""
        process, self._process = self._process, None
        if process is None:
            return None
        if grace_s:
            with suppress(subprocess.TimeoutExpired):
                process.wait(grace_s)
        process.kill()
        for pipe in (process.stdin, process.stdout):
            with suppress(OSError):  # what was written last has no reader any more
                pipe.close()
        return process.wait()

    def _kill(self, late: threading.Event) -> None:
        late.set()
        process = self._process
        if process is not None:
            process.kill()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self.close()
            # a session of its own: Ctrl-C is for this process, which then kills it. Threads of numpy would only count against its memory
            environment = os.environ | {"PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
            self._process = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True, env=environment
            )
        return self._process


def _fault(lost: bool, code: int | None, limit_s: float | None) -> str:
    if limit_s is not None:
        return f"was ended after {limit_s:.0f} s"
    if code == OUT_OF_MEMORY:
        return "asked for more memory than it may take"
    return f"ended without an answer (code {code})" if lost else "gave an answer that cannot be read"


_CURRENT: ContextVar[SolverProcess | None] = ContextVar("solver_process", default=None)


@contextmanager
def solvers(process: SolverProcess | None = None) -> Iterator[SolverProcess]:
    """The process that solves all that is asked inside: this one, or that of the `with` around, or a new one. Who brought it in ends it."""
    around = _CURRENT.get()
    if process is None and around is not None:
        yield around
        return
    process = process or SolverProcess()
    token = _CURRENT.set(process)
    try:
        yield process
    finally:
        _CURRENT.reset(token)
        process.close()
