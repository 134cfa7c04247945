"""A command of `qwenq` on a pseudo-terminal, and what its user would see."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import termios
import time
from collections.abc import Mapping

SIZE = (24, 80)  # rows and columns


class Terminal:
    """A child process on a pseudo-terminal of 80 columns.

    Args:
        command: the program's path, then its arguments.
        environment: over this process's own.
    """

    def __init__(self, command: list[str], environment: Mapping[str, str] | None = None) -> None:
        # A session of its own, whose controlling terminal is this one: that is what turns Ctrl-C into SIGINT.
        child, self._master = pty.fork()
        if child == 0:
            fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", *SIZE, 0, 0))
            os.environ |= {"TERM": "dumb", "OMP_NUM_THREADS": "1", **(environment or {})}
            os.execv(command[0], command)
        self._child = child
        self.text = ""

    def type(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def wait_for(self, text: str, seconds: float = 60) -> str:
        """Read until ``text`` comes after what was waited for before; what came before it."""
        end = time.monotonic() + seconds
        while text not in self.text:
            ready, _, _ = select.select([self._master], [], [], max(0, end - time.monotonic()))
            assert ready, f"waited for {text!r}, the screen shows {self.text!r}"
            try:
                self.text += os.read(self._master, 4096).decode(errors="replace")
            except OSError:  # the child closed the terminal
                assert text in self.text, f"ended without {text!r}: {self.text!r}"
        before, _, self.text = self.text.partition(text)
        return before

    def signal(self, number: int) -> None:
        os.kill(self._child, number)

    def exit_code(self) -> int:
        """Wait for the end."""
        _, status = os.waitpid(self._child, 0)
        self._child = 0
        return os.waitstatus_to_exitcode(status)

    def close(self) -> None:
        if self._child:
            os.kill(self._child, signal.SIGKILL)
            self.exit_code()
        os.close(self._master)


def screen(text: str) -> list[str]:
    """Return the lines that a terminal shows after this output: rich moves up a line and erases it."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[0-9;?]*[a-zA-Z]|[\r\n]|[^\x1b\r\n]+", text):
        if part == "\r":
            column = 0
        elif part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif part.endswith("A") and part.startswith("\x1b"):
            row -= int(part[2:-1] or 1)
        elif part == "\x1b[2K":
            lines[row] = ""
        elif not part.startswith("\x1b"):
            lines[row] = lines[row][:column].ljust(column) + part + lines[row][column + len(part) :]
            column += len(part)
    return [line.rstrip() for line in lines]
