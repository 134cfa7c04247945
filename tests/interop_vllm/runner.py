"""Load folders in vLLM and answer with tokens and log probabilities, in the Python of `make interop-vllm`.

Reads a JSON object from each line of standard input and prints one, behind ``ANSWER``:

    {"folder": …, "dtype": "bfloat16", "prompts": [[ids], …], "new": 32, "top": 20}
    {"vllm": "0.32.0", "kernels": {…}, "tokens": [[ids], …], "prompts": [[{id: log probability}, …], …]}

or {"refused": message} where vLLM did not load the folder or did not run it. With the
argument ``plain``, products of packed weights are those of plain_products.py.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

# One process, which holds the model too: what is replaced is replaced in it.
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
ANSWER = "ANSWER "
KEPT: list[Any] = []
"""What is undone when it is collected."""


def main() -> None:
    let_torchvision_be_imported()
    if sys.argv[1:] == ["plain"]:
        import plain_products

        plain_products.install()
    from vllm.distributed import cleanup_dist_env_and_memory

    for line in sys.stdin:
        print(f"\n{ANSWER}{json.dumps(answer(json.loads(line)))}", flush=True)
        cleanup_dist_env_and_memory()


def let_torchvision_be_imported() -> None:
    """Declare torchvision's operators where its build is not torch's: Qwen3.5's class imports it.

    PyPI's is made for CUDA: beside torch's CPU build its operators are missing, and its import fails where it
    registers their fakes. Text needs none of them. It lies beside the environment: with it in there, not even
    vLLM could be imported without this.
    """
    import torch

    beside = Path(sys.prefix) / "beside"
    folder = beside / "torchvision"
    if not folder.is_dir():
        return
    sys.path.append(str(beside))
    try:
        torch.ops.load_library(str(folder / "_C.so"))
    except OSError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        fakes = (folder / "_meta_registrations.py").read_text()
        named = re.findall(r'register_(?:meta|fake)\("(?:torchvision::)?(\w+)"\)', fakes)
        for name in sorted(set(named)):
            library.define(f"{name}() -> ()")
        KEPT.append(library)
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda inspect: inspect()  # in another process nothing is declared


def answer(asked: dict[str, Any]) -> dict[str, Any]:
    import vllm

    longest = max(map(len, asked["prompts"])) + asked["new"]
    settings = {"dtype": asked["dtype"], "max_model_len": longest, "enforce_eager": True, "max_logprobs": -1}
    wanted = vllm.SamplingParams(
        temperature=0, max_tokens=asked["new"], ignore_eos=True, prompt_logprobs=asked["top"]
    )
    prompts = [{"prompt_token_ids": ids} for ids in asked["prompts"]]
    try:
        engine = vllm.LLM(asked["folder"], **settings)
        outputs = engine.generate(prompts, wanted, use_tqdm=False)
    except Exception as error:  # of any kind: the message is what is asked for
        return {"vllm": vllm.__version__, "refused": f"{type(error).__name__}: {error}"}
    return {
        "vllm": vllm.__version__,
        "kernels": engine.apply_model(kernels)[0],
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "prompts": [
            [
                {token: one.logprob for token, one in (likely or {}).items()}
                for likely in output.prompt_logprobs
            ]
            for output in outputs
        ],
    }


def kernels(model: Any) -> dict[str, int]:
    """How many modules each way of multiplying has."""
    found: Counter[str] = Counter()
    for module in model.modules():
        method = getattr(module, "scheme", None) or getattr(module, "quant_method", None)
        if method is not None:
            kernel = getattr(method, "kernel", None)
            chosen = getattr(method, "experts_cls", None) or (type(kernel) if kernel else None)
            found[f"{type(method).__name__}{f' ({chosen.__name__})' if chosen else ''}"] += 1
    return dict(found)


if __name__ == "__main__":
    main()
