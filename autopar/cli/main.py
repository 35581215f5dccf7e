"""The `autopar` command: its subcommands, and every way it can end as an exit code and at most one line on stderr.

0 done; 2 an argument or file that cannot be used; 3 no plan fits the memory; 4 the time was over before the search was
(the best plan so far is printed); 5 not the same training; 70 an error inside autopar; 130 interrupted.
"""

import atexit
import gc
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated

import typer
from typer.exceptions import TyperException

from autopar import __version__
from autopar.cli import (
    calibrate_command,
    clusters_command,
    compare_command,
    explain_command,
    models_command,
    plan_command,
    run_command,
    verify_command,
    whatif_command,
)
from autopar.cli.options import Debug, Session
from autopar.errors import AutoparError

INTERNAL_ERROR = 70
INTERRUPTED = 130

app = typer.Typer(
    name="autopar",
    help="How should this model be parallelized on this cluster? Plans, proves and runs the answer.",
    add_completion=False,
    invoke_without_command=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command("plan")(plan_command.plan)
app.command("explain")(explain_command.explain)
app.command("compare")(compare_command.compare)
app.command("whatif")(whatif_command.whatif)
app.command("verify")(verify_command.verify)
app.command("run")(run_command.run)
app.command("models")(models_command.models)
app.command("calibrate")(calibrate_command.calibrate)
app.command("clusters")(clusters_command.clusters)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")] = False,
    debug: Debug = False,
) -> None:
    """How should this model be parallelized on this cluster? Plans, proves and runs the answer."""
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(AutoparError.exit_code)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code; `arguments` default to those of the process."""
    session = Session()
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # advice of libraries to their own developers; `python -W` brings it back
    try:
        code = app(None if arguments is None else list(arguments), prog_name="autopar", standalone_mode=False, obj=session)
        sys.stdout.flush()
        if code == INTERRUPTED:  # how typer reports Ctrl-C, without a word
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except AutoparError as error:
        return _fail(session, error, str(error), error.exit_code)
    except TyperException as error:
        return _fail(session, error, f"{error.format_message()} (see autopar --help)", AutoparError.exit_code)
    except (KeyboardInterrupt, typer.Abort) as error:
        return _fail(session, error, "interrupted", INTERRUPTED)
    except (BrokenPipeError, SystemExit) as error:
        if isinstance(error, SystemExit) and not isinstance(error.__context__, BrokenPipeError):  # typer makes the one of the other
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the last flush of Python has somewhere to go
        return 0  # who reads the output had enough of it
    except Exception as error:  # noqa: BLE001 - the one place that sees the errors nobody foresaw, and says so in one line
        text = f"internal error, {type(error).__name__}: {error}; repeat with --debug for the traceback and report it"
        return _fail(session, error, text, INTERNAL_ERROR)


def process() -> int:
    """`main` of a process that ends with it. Its objects are left to the system, which takes them back at once: the interpreter would look for cycles among them and
    take them apart one by one, a second and more where torch is loaded. It does so where other threads go on, which it waits for."""
    code = main()
    gc.freeze()
    if threading.active_count() == 1:
        atexit._run_exitfuncs()  # as the interpreter does
        with suppress(OSError):  # what could not be written was reported
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return code


def _fail(session: Session, error: BaseException, text: str, code: int) -> int:
    """The last words of a command: one line on stderr, the traceback before it with --debug."""
    if session.debug:
        traceback.print_exception(error, file=sys.stderr)
    print("autopar:", " ".join(text.split()), file=sys.stderr)
    return code
