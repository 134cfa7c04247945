"""Run folders with figures made up for tests: a model in four precisions, on a machine of fancy."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qwenq.results import Model, Row, append_row, write_environment

ENVIRONMENT: dict[str, Any] = {
    "date": "2026-01-02",
    "versions": {"qwenq": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
    "python": "3.11.7",
    "os": "Linux 6.1",
    "cpu": {"model": "Imaginary CPU", "cores": 2, "threads": 2, "features": ["avx2", "avx512f"]},
    "memory_bytes": 24 * 2**30,
    "gpus": [],
    "command": "qwenq eval bundled --tasks mmlu,gsm8k",
}
FAMILY = "Qwen/Qwen-1_8B-Chat"
BYTES = {"fp32": 7_347_314_688, "bf16": 3_673_657_344, "int8": 2_490_000_000, "int4": 1_879_000_000}
ACCURACY = {"fp32": 0.48, "bf16": 0.48, "int8": 0.475, "int4": 0.44}
SPEED = {"fp32": 10.0, "bf16": 19.5, "int8": 31.25, "int4": 52.5}


def model(precision: str, **changes: Any) -> Model:
    group = 128 if precision.startswith("int") else None
    facts = {"nbytes": BYTES[precision], "group_size": group, **changes}
    return Model(f"Qwen-1_8B-Chat-{precision}", f"sha256:{precision}", precision, FAMILY, **facts)


def accuracy(precision: str, task: str = "mmlu", *, n: int = 500, flips: int = 0, seed: int = 0) -> Row:
    """``n`` items; the first share of them correct, ``flips`` of the others turned over at random."""
    correct = round(ACCURACY["fp32"] * n)
    items = {f"{task}/{index}": index < correct for index in range(n)}
    random.seed(seed)
    for index in random.sample(range(correct), flips):
        items[f"{task}/{index}"] = False
    share = sum(items.values()) / n
    half = 1.96 * math.sqrt(share * (1 - share) / n)
    point = {"task": task, "protocol": "card", "version": 1, "limit": n}
    return Row(
        "accuracy", model(precision), point, share, "share", share - half, share + half, n,
        implementation="qwenq 0.1.0", details={"items": items, "parts": {"all": share}}, date="2026-01-02",
    )  # fmt: skip


def speed(precision: str, tokens: int, attention: str = "off", factor: float = 1.0) -> Iterator[Row]:
    point = {
        "attention": attention,
        "engine": "fast",
        "context": 1,
        "tokens": tokens,
        "batch": 1,
        "device": "cpu",
    }
    value = SPEED[precision] * factor * (1 if tokens < 4096 else 0.8)
    common: dict[str, Any] = {"implementation": "fast", "date": "2026-01-02"}
    yield Row("speed.protocol", model(precision), point, value, "tokens/s", **common)
    positions = list(range(0, tokens + 1, tokens // 8))
    curve = [value * (1.2 - 0.4 * place / tokens) for place in positions]
    yield Row(
        "speed.decode", model(precision), point, value * 1.02, "tokens/s", value, value * 1.04, 5,
        details={"positions": positions, "values": curve}, **common,
    )  # fmt: skip
    parts = {"weights": BYTES[precision], "cache": tokens * 196_608, "activations": 60_000_000}
    peak = float(sum(parts.values()))
    yield Row("memory.generate", model(precision), point, peak, "bytes", details={"parts": parts}, **common)
    yield Row("memory.unreset", model(precision), point, peak * 1.05, "bytes", **common)
    yield Row("time.first_token", model(precision), point, 0.0213, "seconds", 0.021, 0.022, 5, **common)


def closeness(precision: str, kl: float) -> Iterator[Row]:
    point = {"text": "held out", "seq_len": 256}
    details = {
        "positions": list(range(0, 256, 32)),
        "values": [kl * (1 + 1 / (1 + place)) for place in range(8)],
        "lows": [kl * 0.8] * 8,
        "highs": [kl * 2.1] * 7 + [None],
        "modules": [
            {"name": f"model.layers.{layer}.mlp.up_proj", "error": kl / 10 * (1 + layer), "rtn_error": kl / 4}
            for layer in range(6)
        ],
    }
    yield Row("kl", model(precision), point, kl, "nats/token", kl * 0.9, kl * 1.1, 2048, details=details)
    yield Row("same_top", model(precision), point, 0.9, "share", 0.88, 0.92, 2048)


def rows() -> Iterator[Row]:
    flips = {"fp32": 0, "bf16": 1, "int8": 3, "int4": 22}
    for precision in BYTES:
        yield accuracy(precision, "mmlu", flips=flips[precision])
        yield accuracy(precision, "gsm8k", n=100, flips=flips[precision] // 4)
        for tokens in (2048, 8192):
            yield from speed(precision, tokens)
        point = {
            "attention": "v2",
            "engine": "fast",
            "context": 1,
            "tokens": 2048,
            "batch": 1,
            "device": "cpu",
        }
        reason = "flash-attn needs a CUDA GPU"
        yield Row(
            "speed.protocol", model(precision), point, None, "tokens/s", status="unavailable", reason=reason
        )
    yield from closeness("int8", 0.004)
    yield from closeness("int4", 0.062)


def write_run(folder: Path, made: list[Row] | None = None, **environment: Any) -> Path:
    """A run folder of these rows, or of all above."""
    for row in rows() if made is None else made:
        append_row(folder, row)
    write_environment(folder, {**ENVIRONMENT, **environment})
    return folder
