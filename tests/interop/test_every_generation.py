"""A small model of every dense generation means the same to transformers with GPTQModel as it does here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from dequantised import logits_of, transformers_model
from test_generations import GENERATIONS, quantised
from tiny_families import random_tokens

from qwenq.models.checkpoint import open_checkpoint

pytestmark = [pytest.mark.interop, pytest.mark.timeout(900)]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", GENERATIONS)
def test_what_is_saved_means_the_same_to_gptqmodel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, bits: int
) -> None:
    pytest.importorskip("gptqmodel", reason="needs the environment of `make interop`")
    from transformers import AutoModelForCausalLM, GPTQConfig

    monkeypatch.setenv("QWENQ_CACHE", str(tmp_path / "cache"))
    base, out = quantised(tmp_path, bits, **GENERATIONS[name])
    kernel = GPTQConfig(bits=bits, backend="gptq_torch")  # float32, no packing for one CPU or another
    model = AutoModelForCausalLM.from_pretrained(out, quantization_config=kernel, dtype=torch.float32)
    packed = {name: module for name, module in model.named_modules() if hasattr(module, "qweight")}
    assert len(packed) == 7 * model.config.num_hidden_layers
    stored = open_checkpoint(out)
    for module_name, module in packed.items():  # as loaded it would multiply scale by integer in float16
        module.scales = module.scales.float()
        if module.bias is not None:  # and add the bias as float16, whatever the file holds
            module.bias = stored.read(f"{module_name}.bias").float()
    ids = random_tokens(base, 1, 60, seed=5)[0].tolist()
    torch.testing.assert_close(
        logits_of(model.eval(), ids), logits_of(transformers_model(out), ids), atol=1e-4, rtol=0
    )
