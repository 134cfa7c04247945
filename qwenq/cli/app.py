"""Define the root command and the list of commands: exit codes, and how errors and signals reach the user."""

from __future__ import annotations

import atexit
import gc
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from traceback import extract_tb
from types import FrameType, TracebackType
from typing import Annotated

import typer

from qwenq import stopping
from qwenq.environment import __version__
from qwenq.errors import QwenqError, UsageError

SHARED = ("quantize", "eval")
"""Commands that torchrun may start as several processes."""
PACKAGE = Path(__file__).parents[1]

app = typer.Typer(
    name="qwenq",
    help="Quantise Qwen models with GPTQ, and measure accuracy, speed and memory.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=True,
    rich_markup_mode=None,  # plain help: rich would double the time to the first line
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"qwenq {__version__}")
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks instead of short errors.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Quantise Qwen models with GPTQ, and measure accuracy, speed and memory."""
    if debug:
        os.environ["QWENQ_DEBUG"] = "1"  # read by main(), also in child processes
    several = "RANK" in os.environ and (os.environ.get("WORLD_SIZE") or "1") != "1"
    if several and context.invoked_subcommand not in SHARED:
        raise UsageError(
            f"qwenq {context.invoked_subcommand} runs as one process: each of several would do all the work",
            where="torchrun",
            hint="start it without torchrun; quantize and eval take several processes",
        )


def _share_the_cores() -> None:
    """Let idle threads sleep soon; set before torch is loaded, as GNU OpenMP reads it once.

    By default they spin for milliseconds at the end of each small operation. The solver has a hundred
    thousand of these: on a machine that does something else as well, spinning made it ten times slower.
    But they must not sleep between two calls from Python: at a spin count of 1000 decoding lost a third of
    its speed.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "30000")


def _collect_less() -> None:
    """Collect cyclic garbage less often, and not at exit.

    torch and transformers are hundreds of thousands of objects that live as long as the process: with
    Python's defaults, a sixth of their import time and most of a second at exit are spent on scanning them.
    """
    gc.set_threshold(10_000, *gc.get_threshold()[1:])
    atexit.register(gc.freeze)


def main() -> None:
    """Run a command: the entry point. A QwenqError becomes its message and exit code.

    An unexpected error reaches the caller; where that is the interpreter, it is shown in one line, or with
    ``--debug`` as a traceback.
    """
    from qwenq.cli.printing import explained_output

    if sys.platform == "win32":
        sys.exit("qwenq: it runs on Linux and macOS\n  try:   install it inside WSL: wsl --install")
    _share_the_cores()
    _collect_less()
    stopping.die_with_parent()  # a step of `qwenq run` would go on beside the step that follows
    with _sigterm_as_ctrl_c() as received:
        try:
            register()
            with explained_output():
                app()
        except QwenqError as error:
            if os.environ.get("QWENQ_DEBUG"):
                raise
            _show_error(error)
            sys.exit(error.exit_code)
        except (KeyboardInterrupt, SystemExit) as end:
            stopped = isinstance(end, KeyboardInterrupt) or end.code == 128 + signal.SIGINT
            if not stopped:
                raise
            sys.exit(_stopped_by(received))
        except Exception as error:  # a defect of qwenq, or an unforeseen failure of the machine
            if stopping.behind(error) is not None:
                sys.exit(_stopped_by(received))
            if not os.environ.get("QWENQ_DEBUG"):
                sys.excepthook = _show_unexpected  # a caller of main() in Python has the error itself
            raise


def _stopped_by(received: list[int]) -> int:
    """Return the exit code of a command that a signal ended: SIGTERM, or else Ctrl-C."""
    return 128 + (signal.SIGTERM if received else signal.SIGINT)


def _show_unexpected(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an unexpected error as a message; the interpreter then ends with exit code 1."""
    ours = [frame for frame in extract_tb(trace) if Path(frame.filename).is_relative_to(PACKAGE)]
    place = f"{Path(ours[-1].filename).relative_to(PACKAGE.parent)}, line {ours[-1].lineno}" if ours else None
    text = " ".join(f"{kind.__name__}: {error}".split())[:300].rstrip(": ")
    text = ", ".join([text, *getattr(error, "__notes__", ())])
    _show_error(
        QwenqError(
            f"unexpected error: {text}",
            where=place,
            hint="`qwenq --debug …` shows the traceback; if the machine is sound, please report it",
        )
    )


def _show_error(error: QwenqError) -> None:
    """Print an error on standard error; on a terminal in red, unless its exit code is 0 or NO_COLOR set."""
    red = error.exit_code != 0 and not os.environ.get("NO_COLOR")
    typer.secho(f"qwenq: {error}", fg="red" if red else None, err=True)


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[list[int]]:
    """Let SIGTERM, as job schedulers send it, stop a command as Ctrl-C does.

    But a layer or an item in progress is finished first, see ``qwenq.stopping``. The yielded list holds the
    signal once it was received, for the exit code.
    """
    received: list[int] = []

    def stop(number: int, _: FrameType | None) -> None:
        if stopping.passed_on():
            return
        received.append(number)
        until = stopping.note()
        if until is None:
            raise KeyboardInterrupt
        if len(received) == 1:
            text = f"\nSIGTERM: stopping once {until}; what is done is kept; a second one stops at once\n"
            with suppress(OSError):  # straight to the system: a stream may be in the middle of a line
                os.write(2, text.encode())

    if threading.current_thread() is not threading.main_thread():
        yield received  # only the main thread can set a handler
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, before)


COMMANDS = {
    "quantize": "qwenq.cli.quantize",
    "check": "qwenq.cli.check",
    "eval": "qwenq.cli.eval",
    "perplexity": "qwenq.cli.perplexity",
    "chat": "qwenq.cli.chat",
    "calibrate": "qwenq.cli.quantize",
    "plan": "qwenq.cli.plan",
    "profile": "qwenq.cli.profile",
    "report": "qwenq.cli.report",
    "compare": "qwenq.cli.report",
    "run": "qwenq.cli.run",
    "convert": "qwenq.cli.convert",
    "push": "qwenq.cli.push",
    "doctor": "qwenq.cli.plan",
    "recipe": "qwenq.cli.run",
    "tokenizer": "qwenq.cli.convert",
}
"""Module of each command, in the order in which a user meets them."""


def register() -> None:
    """Import the command modules; each adds its commands to ``app`` (they import no torch)."""
    for module in COMMANDS.values():
        import_module(module)
    order = list(COMMANDS)
    app.registered_commands.sort(
        key=lambda one: order.index(one.name or str(getattr(one.callback, "__name__", "")))
    )
