"""Build chat prompts: ChatML as Qwen v1 does, and chat templates rendered in a process with limits.

The ChatML layout, with every ``\\n`` a token of its own and every role and content encoded on its own (so
that neither merges with its surroundings, and special tokens inside a content stay plain text)::

    <|im_start|>system\\n{system}<|im_end|>
    \\n<|im_start|>user\\n{question}<|im_end|>\\n<|im_start|>assistant\\n{answer}<|im_end|>   (each round)
    \\n<|im_start|>user\\n{question}<|im_end|>\\n<|im_start|>assistant\\n
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from qwenq.errors import ModelError, UsageError

DEFAULT_SYSTEM = "You are a helpful assistant."
DEFAULT_MAX_WINDOW = 6144  # tokens; generation_config.json of Qwen-1.8B-Chat

# The same layout for clients that render text first. A content that starts with white space may be split
# differently there, because it is no longer encoded on its own.
CHAT_TEMPLATE = (
    "{%- if not messages or messages[0].role != 'system' -%}"
    "{{- '<|im_start|>system\\n" + DEFAULT_SYSTEM + "<|im_end|>' -}}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{{- '' if loop.first and message.role == 'system' else '\\n' -}}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}"
    "{{- '\\n<|im_start|>assistant\\n' -}}"
    "{%- endif -%}"
)

Message = Mapping[str, Any]
"""Role and content, both texts, and whatever else a chat template may read: tool_calls, reasoning_content."""


class ChatmlTokenizer(Protocol):
    """What the layout needs of a tokenizer."""

    im_start_id: int
    im_end_id: int

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Return ids of a text; by default special tokens inside it are plain text."""


@dataclass(frozen=True)
class Context:
    """The ids of a prompt, and how many of the oldest rounds (question and answer) were left out."""

    ids: list[int]
    dropped_rounds: int


def without_surrogates(text: str) -> str:
    """Join surrogate pairs of a text; lone ones, which no UTF-8 can hold, become U+FFFD."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def build_context(
    tokenizer: ChatmlTokenizer,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    max_window: int | None = None,
) -> Context:
    """Build the prompt of a conversation; drop the oldest rounds until it fits the window.

    As in v1, the system prompt and the *earlier* rounds must together stay below ``max_window`` tokens;
    the last round is always kept and not counted. Messages are an optional system message (default:
    DEFAULT_SYSTEM), then user and assistant in turn; ``add_generation_prompt`` opens the next answer.
    """
    newline = tokenizer.encode("\n")

    def turn(role: str, content: str) -> list[int]:
        body = [*tokenizer.encode(role), *newline, *tokenizer.encode(content)]
        return [tokenizer.im_start_id, *body, tokenizer.im_end_id]

    system, rounds = split_rounds(messages, must_end_with_user=add_generation_prompt)
    head = turn("system", system)
    encoded = [
        [token for m in turns for token in (*newline, *turn(m["role"], m["content"]))] for turns in rounds
    ]
    first = 0
    if max_window is not None and rounds:
        first, total = len(rounds) - 1, len(head)
        while first > 0 and total + len(encoded[first - 1]) < max_window:
            first -= 1
            total += len(encoded[first])
    ids = head + [token for turns in encoded[first:] for token in turns]
    if add_generation_prompt:
        ids += [*newline, tokenizer.im_start_id, *tokenizer.encode("assistant"), *newline]
    return Context(ids, dropped_rounds=first)


def split_rounds(
    messages: Sequence[Message], *, must_end_with_user: bool = False
) -> tuple[str, list[list[Message]]]:
    """Split a conversation into its system prompt and rounds that begin with a user message."""
    for place, message in enumerate(messages):
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise UsageError(f"a chat message has no text under {key!r}", where=f"message {place}")
    has_system = bool(messages) and messages[0]["role"] == "system"
    system = str(messages[0]["content"]) if has_system else DEFAULT_SYSTEM
    turns = messages[1:] if has_system else messages
    for place, message in enumerate(turns):
        expected = ("user", "assistant")[place % 2]
        if message["role"] != expected:
            raise UsageError(
                f"the conversation has a {message['role']} message where {expected} has to speak",
                where=f"message {place + int(has_system)}",
                hint="an optional system message first, then user and assistant in turn",
            )
    if must_end_with_user and len(turns) % 2 == 0:
        raise UsageError("the conversation does not end with a user message: there is nothing to answer")
    return system, [list(turns[i : i + 2]) for i in range(0, len(turns), 2)]


# Render chat templates, which are programs from model folders, in a process with limits.
#
# jinja's sandbox keeps a template from files, attributes and code. It keeps none from looping for ever or
# from doubling a string forty times: for that there are a limit of CPU time, whose signal no program in the
# sandbox can catch, and one of address space. What is rendered is transformers' own doing, letter for
# letter.


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
    """One process for all templates of this one; started with the first prompt."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self._seconds = seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._owner = 0

    def render(
        self, template: str, messages: Sequence[Mapping[str, Any]], prompt: bool, special: Mapping[str, Any]
    ) -> str:
        """Render the text of a conversation, with the opening of an answer if it is a ``prompt``.

        ``special`` holds further variables of the template: the tokenizer's special tokens, tools.
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
    import resource

    import psutil
    from transformers.utils.chat_template_utils import render_jinja_template

    with suppress(OSError, ValueError):  # some systems cannot
        limit = int(psutil.Process().memory_info().vms) + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    for line in sys.stdin:
        seconds, template, messages, prompt, special = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        answers.write(_answer(render_jinja_template, template, messages, prompt, special) + "\n")
        answers.flush()
        signal.setitimer(signal.ITIMER_PROF, 0)


def _answer(library: Any, template: str, messages: list[Any], prompt: bool, special: dict[str, Any]) -> str:
    try:
        rendered, _ = library([messages], chat_template=template, add_generation_prompt=prompt, **special)
        text = str(rendered[0])
        if len(text) > LONGEST + TIMES * (len(str(messages)) + len(str(special))):
            raise ValueError(f"it made {len(text):,} characters")
        return json.dumps({"text": text})
    except MemoryError:
        return json.dumps({"error": f"it needs more than {MEMORY >> 20} MB of memory"})
    except Exception as error:  # whatever a template raises: its own complaint, or a sandbox violation
        return json.dumps({"error": f"{error or type(error).__name__}"[:1000]})
