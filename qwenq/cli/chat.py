"""``qwenq chat``: talk to a model, full precision or quantised."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from qwenq import stopping
from qwenq.cli import options
from qwenq.cli.app import app
from qwenq.cli.printing import note_events
from qwenq.errors import UsageError, visible
from qwenq.progress import note, say
from qwenq.results import Model

if TYPE_CHECKING:
    from qwenq.api import LoadedModel
    from qwenq.runtime.chat import Conversation
    from qwenq.runtime.generation import Timing


@app.command()
def chat(
    model: options.ModelArgument = None,
    weights: options.RealWeights = "stored",
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    thinking: options.ThinkingChoice = "auto",
    temperature: Annotated[
        float | None,
        typer.Option(help="0: always the likeliest token. [default: 0.7; 0.6 where the model thinks]"),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            help="Nucleus sampling: probability that the likeliest tokens sum to. [default: 0.8; 0.95 where "
            "the model thinks]"
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Limit of new tokens. [default: 512; 32768 where the model thinks]"),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random numbers.")] = 0,
    greedy: Annotated[bool, typer.Option("--greedy", help="The same as --temperature 0.")] = False,
    engine: options.EngineName = "fast",
    kernel: options.KernelName = "auto",
    attention: options.AttentionName = "auto",
    head: Annotated[
        Literal["as-is", "int8"],
        typer.Option(help="int8: quantise the output head to 8 bits (CPU only)."),
    ] = "as-is",
    device: options.DeviceName = "auto",
    dtype: options.DtypeName = "auto",
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Show only answers, and notes about them.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Also show kernels, attention, dtype and device.")
    ] = False,
) -> None:
    """Chat with a model.

    Ctrl-C stops an answer; Ctrl-D, /exit, or Ctrl-C twice at the prompt, ends the chat; /clear forgets it,
    /help lists the commands. When the input is not a terminal, every line of it is one question.
    """
    from qwenq import api
    from qwenq.models.chatml import without_surrogates
    from qwenq.runtime.sampling import Sampling

    temperature = 0.0 if greedy else temperature
    Sampling(temperature=temperature or 0.0, top_p=1.0 if top_p is None else top_p)  # before a download
    loaded = api.load(
        model,
        device=device,
        dtype=dtype,
        engine=engine,
        kernel=kernel,
        attention=attention,
        head=head,
        thinking=thinking,
        for_chat=True,
        progress=False if quiet else note_events,
    )
    if system is not None:
        system = without_surrogates(system)  # as Python passes on bytes of a command line that are not text
        _note_lost_text(system)
    conversation = loaded.chat(
        system, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed
    )
    if not quiet:
        say(_first_line(loaded))
    if verbose:
        computed_in = str(loaded.engine.dtype).removeprefix("torch.")
        say(f"{loaded.engine.implementation}, {computed_in} on {loaded.engine.device}")
    _talk(conversation)
    if not quiet:
        typer.echo(summary(conversation.timing), err=True)


def _first_line(loaded: LoadedModel) -> str:
    """Return the model with its precision and, where somebody types, how to get help and how to leave."""
    label = Model(loaded.name, "", loaded.precision, loaded.name).label
    return f"{label}; /help lists the commands, Ctrl-D ends the chat" if _on_terminal() else label


def _on_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


def _note_lost_text(text: str) -> None:
    if "\ufffd" in text:
        note("bytes that are not text in the input's encoding were read as \ufffd")


def summary(timing: Timing) -> str:
    """Return the speed of prefill and decode."""
    parts = []
    for name, tokens, seconds in (
        ("prefill", timing.prefill_tokens, timing.prefill_seconds),
        ("decode", timing.decode_tokens, timing.decode_seconds),
    ):
        speed = f"{tokens / seconds:.1f} tok/s" if tokens else "no tokens"
        parts.append(f"{name} {speed} ({tokens} tokens)" if tokens else f"{name} {speed}")
    return ", ".join(parts)


def _talk(conversation: Conversation) -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without UTF-8 shows "?" and goes on
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    on_terminal = _on_terminal()
    reported = 0
    for question in _typed() if on_terminal else _piped():
        if on_terminal and re.match(r"/\w*(\s|$)", question):
            if question.split()[0] == "/exit":
                return
            _obey(question.split()[0], conversation)
            reported = 0
            continue
        _note_lost_text(question)
        try:
            with closing(conversation.ask(question.strip())) as pieces:
                for piece in pieces:
                    typer.echo(visible(piece), nl=False)  # it flushes, too
        except KeyboardInterrupt:
            if stopping.came():
                typer.echo()
                raise
            typer.echo(" [stopped]", nl=False)
        except UsageError as error:
            if not on_terminal:
                raise
            typer.echo(f"qwenq: {error}", err=True, nl=False)
        typer.echo()
        if conversation.cut:
            note("the answer was cut at its limit of tokens; --max-new-tokens sets it")
        if conversation.dropped_rounds > reported:
            reported = conversation.dropped_rounds
            rounds = "round" if reported == 1 else f"{reported} rounds"
            note(f"the oldest {rounds} of the chat no longer fit the context")


_COMMANDS = {"/clear": "forget the chat so far", "/exit": "end the chat", "/help": "list these commands"}


def _obey(command: str, conversation: Conversation) -> None:
    """Run a command that was typed at the prompt, other than /exit."""
    if command == "/clear":
        conversation.clear()
        typer.echo("the chat so far is forgotten", err=True)
        return
    if command not in _COMMANDS:
        typer.echo(f"there is no command {command}; a space before it makes it a question", err=True)
    for name, does in _COMMANDS.items():
        typer.echo(f"  {name:<8}{does}", err=True)


def _piped() -> Iterator[str]:
    """Yield one question a line; empty lines are skipped, and a closed input has no question."""
    for line in sys.stdin or ():
        if question := line.strip():
            yield question


def _typed() -> Iterator[str]:
    """Yield what the user types, with line editing; end at Ctrl-D, or at the second Ctrl-C in a row.

    A space before a slash is kept: it makes a question of what would be a command.
    """
    with suppress(ImportError):  # not there on every platform
        import readline  # noqa: F401 - gives input() its line editing
    warned = False
    while True:
        try:
            typer.echo()
            question = input("> ").rstrip()
        except EOFError:
            typer.echo()
            return
        except KeyboardInterrupt:
            typer.echo()
            if stopping.came():
                raise
            if warned:
                return
            warned = True
            typer.echo("(Ctrl-C again, or Ctrl-D, ends the chat)", err=True)
            continue
        warned = False
        if question.strip():
            yield question
