"""Render chat templates, which are programs from model folders, in a process with limits.

jinja's sandbox keeps a template from files, attributes and code. It keeps none from looping for ever or from
doubling a string forty times: for that there are a limit of CPU time, whose signal no program in the sandbox
can catch, and one of address space. What is rendered is transformers' own doing, letter for letter.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from qwenq.errors import ModelError, UsageError

SECONDS = 10.0
"""CPU time for one prompt; a real template takes less than a hundredth of one."""
MEMORY = 1 << 30
"""Bytes of new address space in that process."""
LONGEST, TIMES = 1_000_000, 8
"""Characters of one prompt beyond TIMES those of its messages: tokenizers take 200 bytes for each."""

_KEPT = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "HOME", "TZ", "LANG", "LC_ALL", "LC_TIME")
_PACKAGE = str(Path(__file__).parents[2])
_START = f"import sys; sys.path.append({_PACKAGE!r}); from {__name__} import serve; serve()"


class TemplateProcess:
    """One process for all templates of this one; started with the first prompt.

    Args:
        seconds: of CPU time for one prompt.
    """

    def __init__(self, seconds: float = SECONDS) -> None:
        self._seconds = seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._owner = 0

    def render(
        self, template: str, messages: Sequence[Mapping[str, Any]], prompt: bool, special: Mapping[str, Any]
    ) -> str:
        """Render the text of a conversation.

        Args:
            template: Jinja.
            messages: of the conversation.
            prompt: end with the opening of the assistant's answer.
            special: further variables of the template: the tokenizer's special tokens, tools.

        Raises:
            UsageError: the template refuses the messages, or takes too long or too much memory.
            ModelError: the process cannot be started.
        """
        request = json.dumps([self._seconds, template, [dict(m) for m in messages], prompt, dict(special)])
        with self._lock:
            try:
                answer = self._ask(request)
            except BaseException:
                self.close()  # a half-read answer must not become the next prompt's
                raise
        if "text" in answer:
            return str(answer["text"])
        raise UsageError(f"the chat template refuses this: {answer.get('error')}")

    def close(self) -> None:
        """End the process, if it runs."""
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with suppress(OSError):
                assert pipe is not None  # noqa: S101 - both were asked for
                pipe.close()

    def _ask(self, request: str) -> dict[str, Any]:
        process = self._running()
        assert process.stdin is not None and process.stdout is not None  # noqa: S101 - both were asked for
        with suppress(BrokenPipeError):
            process.stdin.write(request + "\n")
            process.stdin.flush()
        line = process.stdout.readline()
        if line.endswith("\n"):
            answer: dict[str, Any] = json.loads(line)
            return answer
        status = process.wait()
        self.close()  # the next prompt starts another
        if status == -signal.SIGPROF:
            return {"error": f"it was stopped after {self._seconds:g} s of computing"}
        raise ModelError(
            f"the process that renders chat templates ended with status {status}",
            hint="is there memory for one more Python process?",
        )

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None or self._owner != os.getpid():  # a fork shares the pipes: it gets its own
            environment = {key: os.environ[key] for key in _KEPT if key in os.environ}
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _START],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=environment | {"OMP_NUM_THREADS": "1"},
                start_new_session=True,  # Ctrl-C is for us
            )
            self._owner = os.getpid()
            atexit.register(self.close)
        return self._process


PROCESS = TemplateProcess()
"""The one of this process."""


def serve() -> None:
    """Serve requests in that process: a request a line on stdin, an answer a line on stdout."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever else prints
    from transformers.utils.chat_template_utils import render_jinja_template

    _limit_memory()
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    for line in sys.stdin:
        seconds, template, messages, prompt, special = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        _answer(answers, lambda: _render(render_jinja_template, template, messages, prompt, special))  # noqa: B023
        signal.setitimer(signal.ITIMER_PROF, 0)


def _render(library: Any, template: str, messages: list[Any], prompt: bool, special: dict[str, Any]) -> str:
    rendered, _ = library([messages], chat_template=template, add_generation_prompt=prompt, **special)
    text = str(rendered[0])
    if len(text) > LONGEST + TIMES * (len(str(messages)) + len(str(special))):
        raise ValueError(f"it made {len(text):,} characters")
    return text


def _answer(answers: IO[str], make: Any) -> None:
    try:
        said = json.dumps({"text": make()})
    except MemoryError:
        said = json.dumps({"error": f"it needs more than {MEMORY >> 20} MB of memory"})
    except Exception as error:  # whatever a template raises: its own complaint, or a sandbox violation
        said = json.dumps({"error": f"{error or type(error).__name__}"[:1000]})
    answers.write(said + "\n")
    answers.flush()


def _limit_memory() -> None:
    """Limit memory on top of what Python and its libraries have taken; some systems cannot."""
    import resource

    import psutil

    with suppress(OSError, ValueError):
        limit = int(psutil.Process().memory_info().vms) + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
