"""A quantised Qwen v1 folder, converted, in transformers with GPTQModel: the logits of a plain v1 forward."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models.plain_qwen_v1 import MemorySource, forward, quantise_v1, random_tensors, small_config, write_v1

pytestmark = [pytest.mark.interop, pytest.mark.timeout(900)]

IDS = [7, 3, 250, 11, 11, 0, 99, 42]


@pytest.mark.parametrize("zeros", ["v1", "v2"])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_converted_v1_model_means_the_same_to_gptqmodel(tmp_path: Path, bits: int, zeros: str) -> None:
    pytest.importorskip("gptqmodel", reason="needs the environment of `make interop`")
    from transformers import AutoModelForCausalLM, GPTQConfig

    from qwenq.conversion import convert
    from qwenq.models.gptq_config import QuantConfig
    from qwenq.models.gptq_format import DequantisedSource

    plain = small_config(hidden_size=128, num_attention_heads=2, kv_channels=64, intermediate_size=512)
    config, tensors = quantise_v1(plain, random_tensors(plain), bits, 32)
    convert(write_v1(tmp_path / "v1", config, tensors), tmp_path / "out", zeros=zeros)

    kernel = GPTQConfig(bits=bits, backend="gptq_torch")  # float32, no packing for one CPU or another
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", quantization_config=kernel, dtype=torch.float32
    )
    with torch.inference_mode():
        logits = model(torch.tensor([IDS])).logits[0]

    meant = DequantisedSource(MemorySource(tensors), QuantConfig.read(config))
    wanted = forward(config, {name: meant.read(name).float() for name in meant.names()}, IDS)
    torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)
