"""A folder with everything for `qwenq run recipe.toml`: a tiny model, its calibration set, questions."""

from __future__ import annotations

from pathlib import Path

from evals.benchmark_data import write_mmlu
from tiny_families import write_calibration, write_family

RECIPE = """
model = "tiny"
precisions = ["fp32", "int4"]
[calibration]
source = "calibration.safetensors"
[quantize]
bits = 4
dtype = "float32"
[eval]
tasks = ["mmlu"]
protocol = "base"
subjects = ["abstract_algebra", "astronomy"]
shots = 0
data = "data"
limit = {limit}
[profile]
tokens = [8]
encode = [16]
attention = {attention}
[report]
name = "tiny"
"""


def write_chain(folder: Path, *, limit: int, attention: str = '["sdpa"]', more: str = "") -> None:
    """Write it all; ``more`` follows the recipe's last section."""
    model = write_family(folder / "tiny", max_position_embeddings=2048)
    write_calibration(model, folder / "calibration.safetensors")
    write_mmlu(folder / "data")
    text = RECIPE.format(limit=limit, attention=attention) + more
    (folder / "recipe.toml").write_text(text, encoding="utf-8")
