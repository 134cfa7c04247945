"""One contender's turn of decode_vs_peers: load, prefill, decode. The last line of the output is JSON.

Usage: ``python _decode.py TOOL MODEL IDS.json PREFILL DECODE[,DECODE…] THREADS``. Each decode starts from 16
tokens, is greedy, and runs to exactly that many new tokens; its speed counts the steps after the first. Of
three prefills the fastest counts. Each tool is imported inside its function: each has its own environment.
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


def qwenq(folder: Path, engine: str, head: str) -> tuple[Decode, str]:
    """Our engines."""
    from qwenq.runtime.engine import load
    from qwenq.runtime.sampling import GREEDY

    runner = load(folder, device="cpu", dtype="bfloat16", engine=engine, head=head)

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

    return decode, runner.implementation


def transformers(folder: Path, quantised: bool) -> tuple[Decode, str]:
    """transformers in bfloat16, or with GPTQModel's kernels where the folder is quantised."""
    import torch
    from transformers import AutoModelForCausalLM, __version__
    from transformers.generation.streamers import BaseStreamer

    version = f"transformers {__version__}"
    if quantised:
        import gptqmodel

        version += f" + gptqmodel {gptqmodel.__version__}"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
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

    return decode, version


def llamacpp(file: Path, threads: int) -> tuple[Decode, str]:
    """llama.cpp through llama-cpp-python, on a GGUF file."""
    import llama_cpp
    import numpy as np

    model = llama_cpp.Llama(
        str(file), n_ctx=2304, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False
    )
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

    return decode, f"llama-cpp-python {llama_cpp.__version__}"


def _gaps(times: list[float]) -> list[float]:
    return [after - before for before, after in pairwise(times)]


def main() -> None:
    """Load, warm up, measure."""
    tool, model, numbers, prefill, decodes, threads = sys.argv[1:]
    ids = json.loads(Path(numbers).read_text(encoding="utf-8"))
    start = time.perf_counter()
    match tool:
        case "qwenq" | "qwenq-int8-head":
            decode, what = qwenq(Path(model), "fast", "int8" if tool.endswith("head") else "as-is")
        case "transformers":
            decode, what = transformers(Path(model), quantised=False)
        case "gptqmodel":
            decode, what = transformers(Path(model), quantised=True)
        case _:
            decode, what = llamacpp(Path(model), int(threads))
    load_s = time.perf_counter() - start
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
