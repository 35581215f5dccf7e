"""The command as a process: what it imports, how fast it answers, and how it ends when something goes wrong around it."""

import os
import pty
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from autopar.cli import models_command
from autopar.cli.main import INTERNAL_ERROR, INTERRUPTED
from autopar.core.cluster import Cluster
from tests.cli.calling import Call, assert_refused

COMMAND = [sys.executable, "-m", "autopar"]
ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}
SLOW_IMPORTS = ("torch", "transformers", "ortools", "networkx", "numpy")
SUBCOMMANDS = ("plan", "verify", "run", "models", "clusters")


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in SUBCOMMANDS), ["models"], ["clusters"], ["plan", "x", "-c", "nowhere"], *([name, "gpt2-tyni", "-c", "local:2"] for name in ("plan", "verify", "run"))])
def test_quick_commands_import_nothing_slow(arguments: list[str]) -> None:
    code = f"import sys; from autopar.cli.main import main; main({arguments!r}); print([n for n in {SLOW_IMPORTS!r} if n in sys.modules], file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT, check=True)
    assert done.stderr.splitlines()[-1] == "[]"


def test_help_is_quick() -> None:
    """Beside what its libraries alone take to be imported, in processor time: the machine may be busy."""

    def seconds(command: list[str]) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert "--help" not in command or all(name in done.stdout for name in SUBCOMMANDS)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    pairs = [(seconds([*COMMAND, "--help"]), seconds([sys.executable, "-c", "import typer, rich.console, rich.table"])) for _ in range(5)]
    assert min(ours / bare for ours, bare in pairs) < 4  # 1.6 to 2.5 as a rule; importing torch takes 15 times as long as these libraries (torch 2.13)


def test_no_command_prints_the_help(call: Call) -> None:
    called = call()
    assert called.code == 2 and "Commands:" in called.out and called.err == ""


def test_version(call: Call) -> None:
    assert call("--version").out == "0.1.0\n"


@pytest.mark.parametrize("unbuffered", ["", "1"])  # the pipe breaks at the last flush, or in the middle of the command
@pytest.mark.parametrize("arguments", [["models"], ["models", "--json"]])
def test_reader_that_closes_early(arguments: list[str], unbuffered: str) -> None:
    environment = ENVIRONMENT | {"PYTHONUNBUFFERED": unbuffered}
    process = subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 0


@pytest.mark.parametrize("thread", ["pass", "threading.Timer(0.3, print, ['of a thread']).start()"])
def test_the_end_leaves_nothing_undone(thread: str) -> None:
    """What is registered for it is done, output is written, other threads are waited for."""
    code = f"import atexit, sys, threading; from autopar.cli.main import process; atexit.register(print, 'last'); {thread}; sys.exit(process())"
    done = subprocess.run([sys.executable, "-c", code, "plan", "x", "-c", "nowhere"], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 2 and done.stdout == ("" if thread == "pass" else "of a thread\n") + "last\n" and "nowhere" in done.stderr


def _fail_with(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(models_command, "presets", fail)


def test_internal_error_is_one_line(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    _fail_with(RuntimeError("broken\n  in two lines"), monkeypatch)
    assert_refused(call("models"), INTERNAL_ERROR, ("RuntimeError: broken in two lines", "--debug"))


@pytest.mark.parametrize("arguments", [("models", "--debug"), ("--debug", "models")])
def test_debug_shows_the_traceback(arguments: tuple[str, ...], call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    _fail_with(RuntimeError("broken"), monkeypatch)
    called = call(*arguments)
    assert called.code == INTERNAL_ERROR and "Traceback" in called.err and "def " not in called.err.splitlines()[-1]


def test_interrupt_is_one_line(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    _fail_with(KeyboardInterrupt(), monkeypatch)
    assert_refused(call("models"), INTERRUPTED, ("interrupted",))


def _on_a_terminal(arguments: list[str], **environment: str) -> str:
    """What a command writes to a terminal."""
    ours, theirs = pty.openpty()
    subprocess.run([*COMMAND, *arguments], stdout=theirs, stderr=subprocess.DEVNULL, env=ENVIRONMENT | {"TERM": "xterm-256color"} | environment, check=True)
    os.close(theirs)
    found = b""
    while chunk := _read(ours):
        found += chunk
    os.close(ours)
    return found.decode()


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # Linux says so when the other side is closed
        return b""


def test_no_colour_where_none_is_wanted() -> None:
    assert "\x1b[3" not in _on_a_terminal(["clusters"], NO_COLOR="1")
    piped = subprocess.run([*COMMAND, "clusters"], capture_output=True, text=True, env=ENVIRONMENT, check=True)
    assert "\x1b" not in piped.stdout and piped.stderr == ""


def test_names_of_files_are_not_markup(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = Cluster.local(2).to_toml().replace('name = "local:2"', 'name = "[bold]rack[/bold] :boom:"', 1)
    (tmp_path / "rack.toml").write_text(text)
    called = call("plan", "mlp-tiny", "--cluster", "rack.toml")
    assert called.code == 0 and "[bold]rack[/bold] :boom:" in called.out


def test_what_a_model_prints_is_not_the_result(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    lines = ["import torch", "def model(batch):", "    print('hello')", "    return torch.nn.Linear(8, 8), torch.zeros(batch, 8)"]
    (tmp_path / "noisy.py").write_text("\n".join(lines))
    called = call("plan", "noisy:model", "--cluster", "local:2", "--json")
    assert called.code == 0 and called.out.startswith("{") and called.err == "hello\n"
