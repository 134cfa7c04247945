"""Define a sandbox's programs, limits and outcomes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

Reason = Literal["passed", "failed", "raised", "timeout", "memory", "died"]


@dataclass(frozen=True)
class Program:
    """A solution and its tests.

    For HumanEval: ``solution`` = prompt + completion, ``entry_points`` = (entry_point,), ``prelude`` = prompt
    (its helpers are used by some tests; its last function has only a docstring as yet), ``tests`` = test +
    ``"\\ncheck(entry_point)"``. One after the other they are the program that openai/human-eval runs.

    Attributes:
        id: unique in a run.
        solution: source that the model wrote, whole.
        entry_points: functions of the solution that the tests call.
        tests: trusted source; passes by reaching its end.
        prelude: trusted source run before the tests, beside them, not beside the solution.
    """

    id: str
    solution: str
    entry_points: tuple[str, ...]
    tests: str
    prelude: str = ""


@dataclass(frozen=True)
class Limits:
    """Limits of one process in the sandbox.

    Attributes:
        seconds: of processor time, rounded up, so that load on the machine changes no verdict. By the clock a
            program may take ``WALL`` times as long, for those that sleep.
        memory: bytes of address space.
        scratch: bytes of its /tmp, and of any file.
        open_files: descriptors.
    """

    seconds: float = 3.0
    memory: int = 1 << 30
    scratch: int = 16 << 20
    open_files: int = 64

    WALL = 4

    @property
    def wall(self) -> float:
        """Return the seconds by the clock, from the moment both processes are ready."""
        return self.seconds * self.WALL

    def to_json(self) -> dict[str, float | int]:
        """Return the limits for the process inside."""
        return asdict(self)


@dataclass(frozen=True)
class Outcome:
    """Outcome of a program.

    Attributes:
        passed: the tests ran to their end.
        reason: ``passed``; ``failed``: an assertion of the tests; ``raised``: another exception, in the
            solution or because of what it returned; ``timeout``; ``memory``; ``died``: its process
            ended.
        detail: one line to read; the solution influences it, so it is never parsed.
    """

    passed: bool
    reason: Reason
    detail: str = ""
