"""Rounding on the fly gives a sound GPTQ model that is close to the plain one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_families import write_family

from qwenq.models.checkpoint import open_checkpoint
from qwenq.models.gptq_config import QuantConfig
from qwenq.models.gptq_format import DequantisedSource, validate_quantised
from qwenq.models.random_weights import random_checkpoint
from qwenq.models.rounded import rounded
from qwenq.models.shapes import ModelShape
from qwenq.runtime.engine import load


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family(tmp_path_factory.mktemp("rounded") / "tiny")


@pytest.mark.parametrize("bits", [4, 8])
def test_a_rounded_model_is_a_valid_gptq_model_as_its_headers_say(tiny: Path, bits: int) -> None:
    plain = open_checkpoint(tiny)
    made = rounded(plain, bits)
    quant = QuantConfig.read(made.config)
    validate_quantised(made.source, quant)
    for name in made.names():
        info, tensor = made.info(name), made.read(name)
        assert (tuple(tensor.shape), tensor.dtype) == (info.shape, info.dtype), name
    shape = ModelShape.from_config(plain.config)
    written = sum(made.info(name).nbytes for name in made.names())
    assert written == shape.quantised_bytes(bits, quant.group_size, plain.config["torch_dtype"])


@pytest.mark.parametrize("bits", [4, 8])
def test_no_weight_is_further_off_than_half_a_step(tiny: Path, bits: int) -> None:
    plain = open_checkpoint(tiny)
    made = rounded(plain, bits)
    quant = QuantConfig.read(made.config)
    again = DequantisedSource(made.source, quant, torch.float32)
    name = "model.layers.0.mlp.down_proj.weight"
    weight, back = plain.read(name).float(), again.read(name)
    grouped = weight.reshape(len(weight), quant.groups(weight.shape[1]), -1)  # [out, groups, group_size]
    step = grouped.abs().amax(-1, keepdim=True) / ((1 << (bits - 1)) - 1)
    off = (back - weight).reshape(grouped.shape).abs()
    assert bool((off <= step * 0.505).all())  # scales are float16


def test_logits_of_8_bits_are_close_to_those_of_the_plain_model(tiny: Path) -> None:
    plain = open_checkpoint(tiny)
    logits = [
        load(checkpoint, device="cpu", dtype="float32").logits([[1, 2, 3, 4]])[0]
        for checkpoint in (plain, rounded(plain, 8))
    ]
    assert not torch.equal(*logits)
    # 8 bits are close, whatever the model
    assert float((logits[0] - logits[1]).norm() / logits[0].norm()) < 0.1


@pytest.mark.parametrize("bits", [4, 8])
def test_of_a_random_model_the_integers_are_drawn_and_deviate_as_its_weights(bits: int) -> None:
    made, again = (rounded(random_checkpoint("smollm2-135m-instruct", 3), bits) for _ in range(2))
    quant, name = QuantConfig.read(made.config), "model.layers.4.mlp.up_proj"
    for part in ("qweight", "qzeros", "scales", "g_idx"):
        info, tensor = made.info(f"{name}.{part}"), made.read(f"{name}.{part}")
        assert (tuple(tensor.shape), tensor.dtype) == (info.shape, info.dtype)
        assert torch.equal(tensor, again.read(f"{name}.{part}"))
    weight = DequantisedSource(made.source, quant, torch.float32).read(f"{name}.weight")
    plain = random_checkpoint("smollm2-135m-instruct", 3).read(f"{name}.weight").float()
    assert weight.std().item() == pytest.approx(plain.std().item(), rel=0.03)
    other = rounded(random_checkpoint("smollm2-135m-instruct", 4), bits).read(f"{name}.qweight")
    assert not torch.equal(other, made.read(f"{name}.qweight"))
