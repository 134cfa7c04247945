"""One turn of before_after: a task by the checkout that is on ``PYTHONPATH``; ends with a line of JSON.

Usage: ``python _before_after_turn.py TASK VARIANT [ARGUMENTS]``. The checkout of before knows no
``QWENQ_CPU``: features of the CPU are hidden from it, as from this one.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import shutil
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

PROMPT, START = 512, 16


def hide_avx512() -> None:
    """Answer as a CPU without AVX-512 would, where the checkout asks torch or LLVM for features."""
    import torch

    here = {name: value for name, value in torch.cpu.get_capabilities().items() if "avx512" not in name}
    torch.cpu.get_capabilities = lambda: here  # type: ignore[assignment]
    if importlib.util.find_spec("qwenq.native"):
        support: Any = importlib.import_module("qwenq.native.support")
        support.reason = lambda *features: "AVX-512 is hidden" if features else None


def decode(folder: str, dtype: str, head: str, counts: str) -> dict[str, Any]:
    """Measure a prompt and so many new tokens, batch 1, greedy."""
    from qwenq.runtime.engine import load
    from qwenq.runtime.sampling import GREEDY

    engine = load(Path(folder), device="cpu", dtype=dtype, head=head)
    ids = list(range(1000, 1000 + PROMPT))

    def seconds(prompt: list[int], count: int) -> list[float]:
        times = [time.perf_counter()]
        engine.generate(
            [prompt],
            count,
            sampling=GREEDY,
            exact_tokens=True,
            on_token=lambda *_: times.append(time.perf_counter()),
        )
        return [after - before for before, after in pairwise(times)]

    seconds(ids[:START], 8)
    prompt = min(seconds(ids, 1)[0] for _ in range(3))
    found: dict[str, Any] = {"prompt_512": round(PROMPT / prompt, 1)}
    for count in map(int, counts.split(",")):
        steps = seconds(ids[:START], count)[1:]
        found[f"decode_{count}"] = round(len(steps) / sum(steps), 1)
    return found | {"implementation": engine.implementation} | _bytes_and_operations(engine, Path(folder))


def _bytes_and_operations(engine: Any, folder: Path) -> dict[str, int]:
    """Return what a step reads of the weights, and what a prompt's token multiplies; nothing from before."""
    try:
        from qwenq.profiling.meters import weight_bytes
    except ImportError:
        return {}
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    attention = hidden // heads * (2 * heads + 2 * config["num_key_value_heads"])
    block = hidden * (attention + 3 * config["intermediate_size"])
    return {"step_bytes": weight_bytes(engine), "token_operations": 2 * block * config["num_hidden_layers"]}


def peaks() -> dict[str, float]:
    """Measure what the machine can do: a copy in GB/s (read and written), products in GFLOP/s."""
    import torch

    from qwenq.profiling.meters import copy_bandwidth, matmul_rate

    device = torch.device("cpu")
    rates = {name: matmul_rate(device, getattr(torch, name)) for name in ("float32", "bfloat16")}
    return {
        "copy_gb_per_s": round(copy_bandwidth(device) / 1e9, 1),
        **{f"{name}_gflop_per_s": round(rate / 1e9, 1) for name, rate in rates.items()},
    }


def command(*arguments: str, out: str) -> dict[str, Any]:
    """Measure a command of the command line; its folder or file is removed first."""
    from typer.testing import CliRunner

    from qwenq.cli.app import app

    where = "qwenq.cli.commands" if importlib.util.find_spec("qwenq.cli.commands") else "qwenq.cli.app"
    importlib.import_module(where).register()
    path = Path(out)
    shutil.rmtree(path, ignore_errors=True)
    path.unlink(missing_ok=True)
    start = time.perf_counter()
    result = CliRunner().invoke(app, [*arguments, "--out", out])
    if result.exit_code:
        sys.exit(result.output[-2000:])
    return {"seconds": round(time.perf_counter() - start, 1)}


def main() -> None:
    """Run the task."""
    task, variant, *arguments = sys.argv[1:]
    if variant == "avx2":
        hide_avx512()
    if task == "peaks":
        found: dict[str, Any] = peaks()
    else:
        found = decode(*arguments) if task == "decode" else command(*arguments[1:], out=arguments[0])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
