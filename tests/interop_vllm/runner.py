"""Load a folder in vLLM and answer with tokens and log probabilities; run by the Python of `make interop-vllm`.

Reads one JSON object from standard input, and prints one as its last line:

    {"folder": …, "dtype": "bfloat16", "plain": false, "prompts": [[ids], …], "new": 32, "top": 20}
    {"vllm": "0.32.0", "kernels": {…}, "seconds": …, "tokens": [[ids], …], "prompts": [[{id: logprob}, …], …]}

or {"refused": message} where vLLM did not load the folder.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from typing import Any

# One process, which holds the model too: what `plain` replaces is replaced in it.
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def main() -> None:
    asked = json.load(sys.stdin)
    if asked["plain"]:
        import plain_products

        plain_products.install()
    print(json.dumps(answer(asked)))


def answer(asked: dict[str, Any]) -> dict[str, Any]:
    import vllm

    started = time.perf_counter()
    try:
        engine = vllm.LLM(
            asked["folder"], dtype=asked["dtype"], max_model_len=512, enforce_eager=True, max_logprobs=-1, seed=0
        )
    except Exception as error:  # of any kind: the message is what is asked for
        return {"vllm": vllm.__version__, "refused": f"{type(error).__name__}: {error}"}
    seconds = time.perf_counter() - started
    prompts = [{"prompt_token_ids": ids} for ids in asked["prompts"]]
    wanted = vllm.SamplingParams(
        temperature=0, max_tokens=asked["new"], min_tokens=asked["new"], prompt_logprobs=asked["top"]
    )
    outputs = engine.generate(prompts, wanted, use_tqdm=False)
    return {
        "vllm": vllm.__version__,
        "kernels": engine.apply_model(kernels)[0],
        "seconds": seconds,
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "prompts": [
            [{token: one.logprob for token, one in (likely or {}).items()} for likely in output.prompt_logprobs]
            for output in outputs
        ],
    }


def kernels(model: Any) -> dict[str, int]:
    """How many modules each method of multiplying has."""
    found: Counter[str] = Counter()
    for module in model.modules():
        method = getattr(module, "quant_method", None) or getattr(module, "scheme", None)
        if method is not None:
            kernel = getattr(method, "kernel", None) or getattr(method, "experts_cls", None)
            kernel = kernel if isinstance(kernel, type) or kernel is None else type(kernel)
            found[f"{type(method).__name__}{f' ({kernel.__name__})' if kernel else ''}"] += 1
    return dict(found)


if __name__ == "__main__":
    main()
