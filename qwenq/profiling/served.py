"""Measure a model as a server serves it: latency and throughput at several concurrencies, closed loop.

At each concurrency so many clients send one request after another. A repetition is a fixed number of
requests; every figure is computed in each repetition, and a row holds the median of these with its interval.
"""

from __future__ import annotations

import hashlib
import math
import queue
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from random import SystemRandom
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from qwenq.environment import MACHINE, machine
from qwenq.errors import QwenqError, UsageError
from qwenq.events import Listener, Notice, Start, silent
from qwenq.http import Again, Server, ServerState, checked_address, checked_key, served_model
from qwenq.models.identity import served_identity
from qwenq.profiling.spec import has_rows
from qwenq.profiling.stream import Answer, StoppedError, complete, fit_words, words
from qwenq.profiling.sweep import note_kept, record
from qwenq.results import HERE, RESULTS_FILE, Model, Row, Status, Value, read_rows, write_environment
from qwenq.statistics import MOST, enough, summarise, wilson

CONCURRENCY, INPUT, OUTPUT = (1, 4, 16, 64), 512, 128
LARGEST = {"concurrency": 1024, "input": 1_000_000, "output": 100_000}
SECONDS = 60.0
"""Of one concurrency, unless a budget leaves less: no repetition is begun that would exceed them, and no
request is sent after them."""
LEAST_REQUESTS = 8  # of a repetition; at least two by each client
WARM_UP, WARM_UP_TOKENS = 8, 8  # requests and new tokens, at each concurrency
_HOPELESS = 5  # failures without any answer, after which a repetition is given up
_BUSY_CLIENT = 0.7  # of a core: what is measured may be this process
QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
METRICS = {
    "speed.served": "tokens/s",
    **{f"time.first_token.{name}": "seconds" for name in QUANTILES},
    **{f"time.inter_token.{name}": "seconds" for name in QUANTILES},
    "failed.served": "share",
}
"""Metrics of a concurrency, and their units."""


@dataclass(frozen=True)
class Target:
    """A served model."""

    server: Server
    name: str  # the model's name there
    model: Model  # its identity in rows


@dataclass(frozen=True)
class Load:
    """Requests to send: tokens of the prompt and of the answer, and how many at once."""

    concurrency: tuple[int, ...] = CONCURRENCY
    input: int = INPUT
    output: int = OUTPUT

    def __post_init__(self) -> None:
        numbers = {"concurrency": self.concurrency, "input": (self.input,), "output": (self.output,)}
        for name, found in numbers.items():
            least = 2 if name == "output" else 1  # between two tokens there is a latency
            if not found or not all(least <= number <= LARGEST[name] for number in found):
                raise UsageError(
                    f"{', '.join(map(str, found)) or 'nothing'} is out of range",
                    where=f"--{name}",
                    hint=f"give {least} to {LARGEST[name]:,}",
                )

    def place(self, concurrency: int) -> dict[str, Value]:
        """Return ``Row.point``."""
        return {"concurrency": concurrency, "context": self.input, "tokens": self.output}


@dataclass(frozen=True)
class Repetition:
    """The outcome of a fixed number of requests."""

    answers: tuple[Answer, ...]  # of the requests that succeeded
    failures: tuple[str, ...]  # reasons of the others
    seconds: float  # from the first request to the last answer
    cpu: float = 0.0  # share of a core that this process used
    cut: bool = False  # the time was over before all requests were sent

    @property
    def speed(self) -> float:
        """Return tokens per second of all answers together."""
        return sum(answer.tokens for answer in self.answers) / self.seconds

    def figures(self) -> dict[str, float]:
        """Return the figures of ``METRICS`` that it has."""
        firsts = [answer.first for answer in self.answers]
        gaps = [gap for answer in self.answers for gap in answer.gaps]
        found = {"speed.served": self.speed}
        for kind, values in (("first_token", firsts), ("inter_token", gaps)):
            for name, share in QUANTILES.items() if values else ():
                found[f"time.{kind}.{name}"] = max(float(np.quantile(values, share)), 1e-9)
        return found


def find_target(
    url: str,
    model: str | None,
    key: str | None,
    listener: Listener = silent,
    *,
    precision: str = "served",
    timeout: float = 300.0,
) -> Target:
    """Return a model behind an address, after one request for the models served there.

    Without a name it is the only one. A request has failed after ``timeout`` seconds without a byte.
    """
    if not re.fullmatch(r"[a-z0-9.]{1,16}", precision):
        raise UsageError(
            f"{precision!r} is not the precision of one model",
            where="--precision",
            hint="such as bf16 or int4",
        )
    server = Server(checked_address(url), checked_key(key), timeout, state=ServerState(listener))
    name = served_model(server, model)
    return Target(server, name, served_identity(server.url, name, precision))


def profile_served(
    target: Target,
    load: Load,
    out: Path,
    listener: Listener = silent,
    *,
    environment: Mapping[str, Any],
    budget: float | None = None,
    command: str = "",
) -> list[Row]:
    """Measure the concurrencies that the run folder lacks, and return the rows of all.

    Args:
        environment: of this machine, recorded in the folder and in each row; that of the server is unknown.
        budget: seconds for all; each concurrency gets an even share of what is left, at most ``SECONDS``.
        command: what the user typed, for the rows.
    """
    held = read_rows(out) if (out / RESULTS_FILE).exists() else []
    todo = [each for each in load.concurrency if not has_rows(held, load.place(each), target.model, METRICS)]
    note_kept(len(load.concurrency) - len(todo), len(load.concurrency), listener)
    if todo:
        began, session = time.monotonic(), _Session.begin(target, load, listener)
        write_environment(out, dict(environment))
        known = environment.get("gpus") == [] and place_of(target.server.url) == HERE
        where = {MACHINE: machine(environment), **({"device": "cpu"} if known else {})}
        for number, each in enumerate(todo):
            left = SECONDS * len(todo) if budget is None else budget - (time.monotonic() - began)
            seconds = min(SECONDS, max(0.0, left) / (len(todo) - number))
            label = f"{target.model.name}, concurrency {each}"
            listener(Start(label, len(todo), "points", number, seconds, seconds if budget else None))
            for row in session.rows(each, seconds):
                record(row, out, where, command, label, listener)
    places = [load.place(each) for each in load.concurrency]
    rows = [row for row in read_rows(out) if row.model == target.model and row.point in places]
    speeds = [row for row in rows if row.metric == "speed.served"]
    if speeds and all(row.value is None for row in speeds):
        raise QwenqError(
            f"no request was answered: {speeds[-1].reason}",
            where=target.server.url,
            hint="see the server's log; the same command tries again",
        )
    return rows


def place_of(url: str) -> str:
    """Return where a server runs, as far as its address tells: ``HERE``, or a hash of its host's name."""
    host = (urlsplit(url).hostname or "").lower()
    if host in ("localhost", "::1") or host.startswith("127."):
        return HERE
    return hashlib.sha256(host.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class _Session:
    """A warm server, and the prompts that have the length asked for."""

    target: Target
    load: Load
    listener: Listener
    words: int  # of a prompt
    counted: int | None  # tokens that the server counts in them; None: it does not say
    seed: int  # of the prompts; each session has another one, or a server that caches would know them

    @classmethod
    def begin(cls, target: Target, load: Load, listener: Listener) -> _Session:
        """Find the length of prompts, and send the first streamed request."""
        seed = SystemRandom().randrange(2**32)
        count, counted = fit_words(target.server, target.name, load.input, f"{seed}")
        if counted is None:
            said = f"no plausible usage: a prompt is {count} words, about as many tokens"
            listener(Notice(f"{target.server.url} reports {said}"))
        elif counted != load.input:
            listener(Notice(f"prompts have {counted} tokens instead of {load.input}, the nearest found"))
        found = cls(target, load, listener, count, counted, seed)
        for attempt in range(3):
            try:
                found.send(f"warm/{attempt}", load.output, threading.Event(), 0)
                break
            except Again as again:
                target.server.require_present(again)
                if attempt == 2:
                    raise QwenqError(
                        f"the warm-up request failed three times, the last: {again}",
                        where=f"{target.server.url}/completions",
                        hint="nothing was measured; see the server's log",
                    ) from again
        return found

    def send(self, name: str, tokens: int, stop: threading.Event, number: int) -> Answer:
        """Send one request with a prompt that no other request has."""
        prompt = words(self.words, f"{self.seed}/{name}/{number}")
        return complete(self.target.server, self.target.name, prompt, tokens, stop)

    def rows(self, concurrency: int, seconds: float) -> Iterator[Row]:
        """Measure one concurrency and yield its rows."""
        count, tokens = min(concurrency, WARM_UP), min(WARM_UP_TOKENS, self.load.output)
        closed_loop(partial(self.send, f"warm/{concurrency}", tokens), count, count, SECONDS)
        found = list(self._repetitions(concurrency, seconds))
        for text in _remarks(found, self.load.output):
            self.listener(Notice(f"concurrency {concurrency}: {text}"))
        yield from self._made(concurrency, found)

    def _repetitions(self, concurrency: int, seconds: float) -> Iterator[Repetition]:
        began, speeds = time.monotonic(), list[float]()
        while True:
            send = partial(self.send, f"{concurrency}/{len(speeds)}", self.load.output)
            left = max(0.0, seconds - (time.monotonic() - began))
            found = closed_loop(send, concurrency, max(LEAST_REQUESTS, 2 * concurrency), left)
            yield found
            speeds.append(found.speed)
            if not found.answers or len(speeds) == MOST:
                return
            if enough(speeds, time.monotonic() - began, seconds):
                return

    def _made(self, concurrency: int, found: Sequence[Repetition]) -> Iterator[Row]:
        details = _details(found) | {"prompt_tokens": self.counted}
        unknown = self.target.server.state.unknown
        settings = {
            "device": "unknown",
            "engine": "served",
            "server": {"kind": self.target.server.state.kind, "place": place_of(self.target.server.url)},
            "threads": "the server's",
            "seed": self.seed,
            "ignore_eos": "refused" if "ignore_eos" in unknown else "sent",
        }
        row = partial(
            Row,
            model=self.target.model,
            point=self.load.place(concurrency),
            implementation=f"{self.target.name}, served",
            settings=settings,
            date=date.today().isoformat(),
        )
        for metric, unit in METRICS.items():
            yield row(metric, unit=unit, **_value(metric, found, details))


def _value(metric: str, found: Sequence[Repetition], details: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a row that hold its figure, or the reason why there is none."""
    failures = [reason for one in found for reason in one.failures]
    if metric == "failed.served":
        count = len(failures) + sum(len(one.answers) for one in found)
        share = len(failures) / count
        low, high = wilson(share, count)
        return {"value": share, "low": low, "high": high, "n": count, "details": details}
    values = [figures[metric] for one in found if one.answers and metric in (figures := one.figures())]
    if values:
        middle = summarise(values)
        bounds = {"value": middle.median, "low": middle.low, "high": middle.high, "n": middle.n}
        return {**bounds, "details": {**details, **middle.details()}}
    status: Status = "unavailable" if any(one.answers for one in found) else "failed"
    reason = "each answer came in one chunk"
    if status == "failed":
        why, number = Counter(failures).most_common(1)[0]
        reason = f"all {len(failures)} requests failed, {number} of them: {why}"
        details = {**details, "again": True}
    return {"value": None, "status": status, "reason": reason, "details": details}


def _details(found: Sequence[Repetition]) -> dict[str, Any]:
    """Return what all repetitions together say about how they were measured."""
    answers = [answer for one in found for answer in one.answers]
    failures = Counter(reason for one in found for reason in one.failures)
    details: dict[str, Any] = {
        "requests": len(answers) + failures.total(),
        "failed": dict(failures.most_common(10)),
        "refused_busy": sum(answer.refused for answer in answers),
        "counted_by": dict(Counter(answer.counted for answer in answers)),
        "client_cpu": round(max(one.cpu for one in found), 3),
    }
    if answers:
        tokens = sum(answer.tokens for answer in answers)
        details["tokens_per_answer"] = tokens / len(answers)
        details["tokens_per_chunk"] = tokens / sum(1 + len(answer.gaps) for answer in answers)
    return details | ({"cut": True} if any(one.cut for one in found) else {})


def _remarks(found: Sequence[Repetition], output: int) -> Iterator[str]:
    """Yield what a reader of the figures has to know."""
    answers = [answer for one in found for answer in one.answers]
    details, of = _details(found), f"of {len(answers)}"
    by = details["counted_by"]
    if failed := sum(details["failed"].values()):
        reasons = ", ".join(f"{count} × {reason}" for reason, count in details["failed"].items())
        yield f"{failed} of {details['requests']} requests failed: {reasons}"
    if details["refused_busy"]:
        yield f"the server was too busy {details['refused_busy']} times; those requests were sent again later"
    if by.get("chunks"):
        yield f"tokens of {by['chunks']} {of} answers are counted by chunks: the server streams no usage"
    if by.get("contradicted"):
        yield (
            f"usage of {by['contradicted']} {of} answers contradicts what was streamed: "
            "tokens are counted by chunks"
        )
    if short := sum(answer.tokens < output for answer in answers):
        yield f"{short} {of} answers have fewer than {output} tokens; tokens/s counts those that came"
    if answers and details["tokens_per_chunk"] > 1.05:
        yield (
            f"a chunk holds {details['tokens_per_chunk']:.1f} tokens on average: "
            "inter-token latency is that between chunks"
        )
    if details["client_cpu"] > _BUSY_CLIENT:
        yield f"qwenq itself used {details['client_cpu']:.0%} of a core, which may have slowed the answers"
    if details.get("cut"):
        yield "the time was over before all requests of a repetition were sent"


def closed_loop(
    send: Callable[[threading.Event, int], Answer], concurrency: int, count: int, seconds: float
) -> Repetition:
    """Send requests from so many clients, each its next one when its last is answered.

    Args:
        send: receives an event that ends the request, and the request's number.
        count: requests; fewer where ``seconds`` are over, or all of the first ones failed.
        seconds: after which no request is sent, but the first of each client.
    """
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in range(count):
        waiting.put(number)
    ended: queue.SimpleQueue[Answer | str | BaseException | None] = queue.SimpleQueue()
    stop, answered = threading.Event(), threading.Event()
    began, cpu = time.perf_counter(), time.process_time()
    working = min(concurrency, count)
    most = math.ceil(_HOPELESS / working)

    def work() -> None:
        sent = 0
        while not stop.is_set() and (sent == 0 or time.perf_counter() - began < seconds):
            if sent >= most and not answered.is_set():
                break
            try:
                number = waiting.get_nowait()
            except queue.Empty:
                break
            outcome = _outcome(send, stop, number)
            sent += 1
            if isinstance(outcome, Answer):
                answered.set()
            ended.put(outcome)
        ended.put(None)

    for _ in range(working):
        threading.Thread(target=work, daemon=True).start()  # a silent server must not hold up the exit
    answers, failures, last = list[Answer](), list[str](), began
    try:
        while working:
            outcome = ended.get()
            match outcome:
                case None:
                    working -= 1
                case Answer():
                    answers.append(outcome)
                case str():
                    failures.append(outcome)
                case BaseException():
                    raise outcome
            last = time.perf_counter() if outcome is not None else last
    finally:
        stop.set()
    taken, cut = last - began, len(answers) + len(failures) < count
    used = (time.process_time() - cpu) / max(taken, 1e-9)
    return Repetition(tuple(answers), tuple(failures), max(taken, 1e-9), used, cut and bool(answers))


def _outcome(
    send: Callable[[threading.Event, int], Answer], stop: threading.Event, number: int
) -> Answer | str | BaseException | None:
    """Return an answer, or the reason of a failure; an error of this program is raised by the main thread."""
    try:
        return send(stop, number)
    except StoppedError:
        return "given up when the measurement ended"
    except Again as again:
        return str(again)
    except QwenqError as error:
        return error.what
    except BaseException as error:
        return error
