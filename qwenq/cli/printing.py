"""What commands print: output that ends early is a message and no traceback; commands as they were typed."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from qwenq.errors import StorageError


def as_typed(words: Iterable[str]) -> str:
    """A command for a shell, for rows to keep: what is not UTF-8, as a folder may be, in quotes of bash."""
    return " ".join(map(_quoted, words))


def typed_command(processes: int = 1) -> str:
    """This process's own command as it was typed; of several processes that of torchrun, their launcher."""
    if processes == 1:
        return as_typed(["qwenq", *sys.argv[1:]])
    here = os.environ.get("LOCAL_WORLD_SIZE", str(processes))
    machines = os.environ.get("GROUP_WORLD_SIZE", "1")
    options = [*(["--nnodes", machines] if machines != "1" else []), "--nproc-per-node", here]
    return as_typed(["torchrun", *options, "-m", "qwenq", *sys.argv[1:]])


def _quoted(word: str) -> str:
    raw = os.fsencode(word)
    try:
        return shlex.quote(raw.decode())
    except UnicodeDecodeError:
        plain = (chr(byte) if 32 <= byte < 127 and byte not in b"\\'" else f"\\x{byte:02x}" for byte in raw)
        return f"$'{''.join(plain)}'"


@contextmanager
def to_standard_output() -> Iterator[None]:
    """For what prints and must be seen whole.

    Raises:
        StorageError: it is a file, and the disk refused.
        BrokenPipeError: its reader has seen enough.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        _give_up()
        raise
    except OSError as error:
        raise _refused(error) from error


@contextmanager
def explained_output() -> Iterator[None]:
    """Around a whole command: whoever in it prints, what standard output refuses is explained.

    Within it ``write`` and ``flush`` of standard output raise StorageError where the disk behind it refused.
    A reader that has seen enough stays a BrokenPipeError, which ends a command without a word.
    """
    stream, names = sys.stdout, ("write", "flush")
    if stream is None:  # it was closed before the command began
        yield
        return
    before = {name: getattr(stream, name) for name in names}
    for name, function in before.items():
        setattr(stream, name, _explained(function))
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(stream, name, function)


def _explained(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except OSError as error:
            if isinstance(error, BrokenPipeError) or arguments in (
                ("",),
                (b"",),
            ):  # typer asks by writing nothing
                raise
            raise _refused(error) from error

    return call


def _refused(error: OSError) -> StorageError:
    _give_up()
    return StorageError(f"it cannot be written: {error.strerror}", where="standard output")


def _give_up() -> None:
    """Python flushes once more at its end, and would complain then."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
