"""One contender's turn of decode_vs_peers: load, prefill, decode. The last line of the output is JSON.

Usage: ``python _decode.py TOOL MODEL IDS.json PREFILL DECODE[,DECODE…] THREADS``. Each decode starts from 16
tokens, is greedy, and runs to exactly that many new tokens; its speed counts the steps after the first. Of
three prefills the fastest counts. Loading does not count imports, the larger part of it in Python. Each tool
is imported inside its function: each has its own environment.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

START = 16  # tokens before the first that is decoded
Decode = Callable[[list[int], int], list[float]]
"""(prompt, new tokens) → seconds of each new token."""


def qwenq(folder: Path, head: str) -> tuple[Decode, str, float]:
    """Our engines."""
    import qwenq.runtime.decoder  # noqa: F401 - what loading would import
    from qwenq.runtime.engine import load
    from qwenq.runtime.sampling import GREEDY

    start = time.perf_counter()
    runner = load(folder, device="cpu", dtype="bfloat16", head=head)
    load_s = time.perf_counter() - start

    def decode(prompt: list[int], count: int) -> list[float]:
        times = [time.perf_counter()]
        runner.generate(
            [prompt],
            count,
            sampling=GREEDY,
            exact_tokens=True,
            on_token=lambda *_: times.append(time.perf_counter()),
        )
        return _gaps(times)

    return decode, runner.implementation, load_s


def transformers(folder: Path, quantised: bool) -> tuple[Decode, str, float]:
    """Load transformers in bfloat16, or with GPTQModel's kernels where the folder is quantised."""
    import torch
    from transformers import AutoModelForCausalLM, __version__
    from transformers.generation.streamers import BaseStreamer

    version = f"transformers {__version__}"
    if quantised:
        import gptqmodel

        version += f" + gptqmodel {gptqmodel.__version__}"
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    load_s = time.perf_counter() - start
    if quantised:
        kernels = {type(m).__name__ for m in model.modules() if hasattr(m, "qweight")}
        version += f" ({', '.join(sorted(kernels))})"

    class Clock(BaseStreamer):  # type: ignore[misc]
        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: Any) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None:
            pass

    def decode(prompt: list[int], count: int) -> list[float]:
        clock = Clock()
        with torch.inference_mode():
            model.generate(
                torch.tensor([prompt]),
                min_new_tokens=count,
                max_new_tokens=count,
                do_sample=False,
                streamer=clock,  # it is given the prompt first, then each token
                pad_token_id=0,
            )
        return _gaps(clock.times)

    return decode, version, load_s


def llamacpp(file: Path, threads: int) -> tuple[Decode, str, float]:
    """llama.cpp through llama-cpp-python, on a GGUF file."""
    import llama_cpp
    import numpy as np

    start = time.perf_counter()
    model = llama_cpp.Llama(
        str(file), n_ctx=2304, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False
    )
    load_s = time.perf_counter() - start
    vocab = model.n_vocab()

    def decode(prompt: list[int], count: int) -> list[float]:
        model.reset()
        times, tokens = [time.perf_counter()], prompt
        for _ in range(count):
            model.eval(tokens)
            logits = llama_cpp.llama_get_logits_ith(model.ctx, -1)
            tokens = [int(np.ctypeslib.as_array(logits, shape=(vocab,)).argmax())]
            times.append(time.perf_counter())
        return _gaps(times)

    return decode, f"llama-cpp-python {llama_cpp.__version__}", load_s


def _gaps(times: list[float]) -> list[float]:
    return [after - before for before, after in pairwise(times)]


def main() -> None:
    """Load, warm up, measure."""
    tool, model, numbers, prefill, decodes, threads = sys.argv[1:]
    ids = json.loads(Path(numbers).read_text(encoding="utf-8"))
    match tool:
        case "qwenq" | "qwenq-int8-head":
            decode, what, load_s = qwenq(Path(model), "int8" if tool.endswith("head") else "as-is")
        case "transformers":
            decode, what, load_s = transformers(Path(model), quantised=False)
        case "gptqmodel":
            decode, what, load_s = transformers(Path(model), quantised=True)
        case _:
            decode, what, load_s = llamacpp(Path(model), int(threads))
    decode(ids[:START], 8)
    row: dict[str, Any] = {"implementation": what, "load_s": round(load_s, 3)}
    tokens = int(prefill)
    seconds = min(decode(ids[:tokens], 1)[0] for _ in range(3))
    row[f"prefill_{tokens}"] = round(tokens / seconds, 1)
    for count in map(int, decodes.split(",")):
        steps = decode(ids[:START], count)[1:]
        row[f"decode_{count}"] = round(len(steps) / sum(steps), 2)
    print(json.dumps(row))


if __name__ == "__main__":
    main()
