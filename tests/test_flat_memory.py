"""Memory is flat over depth: twice the layers, the same peak."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_families import write_calibration

WIDTH, FFN = 512, 1408
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": WIDTH,
    "intermediate_size": FFN,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 325,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}
MIXTURE = CONFIG | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "head_dim": 64,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 128,
    "norm_topk_prob": True,
}
# Not getrusage's ru_maxrss: that starts with the peak of the process that was forked, which is pytest's.
PEAK = """
import sys
from pathlib import Path
from qwenq.cli import main
sys.argv = ["qwenq", *sys.argv[1:]]
try:
    main()
except SystemExit as ended:
    assert not ended.code, ended.code
lines = Path("/proc/self/status").read_text().splitlines()
print("peak", *(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")))
"""


def peak_of(folder: Path, config: dict[str, Any], layers: int) -> int:
    """Peak RSS in bytes of quantising that many layers of random float32 weights, the check included."""
    from tiny_model import write_tiny_model

    from qwenq.models.random_weights import RANDOM_KEY, write_random_checkpoint

    model = folder / f"m{layers}"
    write_random_checkpoint(config, model, 0, "float32", layers=layers)
    written = (model / "config.json").read_text()
    (model / "config.json").write_text(written.replace(RANDOM_KEY, "synthetic"))  # so that the check runs
    tokenizer = write_tiny_model(folder / f"t{layers}")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).write_bytes((tokenizer / name).read_bytes())
    calibration = write_calibration(model, folder / f"c{layers}.safetensors", samples=2, seq_len=16)
    fast = ["--no-coordinate-descent", "--scale-search", "none", "--group-size", "128", "--dtype", "float32"]
    files = [str(model), "--calibration", str(calibration), "--out", str(folder / f"q{layers}")]
    command = ["quantize", "--bits", "8", *files, *fast]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "QWENQ_CACHE": str(folder / "cache")}
    ended = subprocess.run(
        [sys.executable, "-c", PEAK, *command], capture_output=True, text=True, env=environment, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return int(ended.stdout.split("peak ")[1])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("config", [CONFIG, MIXTURE], ids=["dense", "mixture"])
def test_peak_memory_does_not_grow_with_depth(tmp_path: Path, config: dict[str, Any]) -> None:
    few, many = (peak_of(tmp_path, config, layers) for layers in (24, 48))
    assert abs(many - few) <= 0.1 * few, f"{few / 1e6:.0f} MB with 24 layers, {many / 1e6:.0f} MB with 48"
    weights = sum(file.stat().st_size for file in (tmp_path / "m24").glob("*.safetensors"))
    assert 0.3 * few < weights, "a run that kept all layers would not show"
