"""Other tools' layouts: what we write loads in transformers, what their packers write is read exactly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from dequantised import logits_of, transformers_model
from models.foreign_models import settings as settings_of
from models.foreign_models import write_foreign
from pipeline import run
from safetensors.torch import load_file, save_file
from test_generations import GENERATIONS, quantised
from tiny_families import random_tokens, write_calibration, write_family
from tiny_published import write_published

from qwenq.conversion import convert
from qwenq.models.checkpoint import open_checkpoint
from qwenq.models.gptq_config import QuantConfig
from qwenq.models.gptq_format import DequantisedSource

pytestmark = [pytest.mark.interop, pytest.mark.timeout(900)]


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for package in ("compressed_tensors", "gptqmodel"):
        pytest.importorskip(package, reason="needs the environment of `make interop`")
    monkeypatch.setenv("QWENQ_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", GENERATIONS)
def test_a_folder_converted_to_compressed_tensors_loads_in_transformers(
    tmp_path: Path, name: str, bits: int
) -> None:
    from transformers import AutoModelForCausalLM

    base, out = quantised(tmp_path, bits, **GENERATIONS[name])
    convert(out, tmp_path / "ct", to="compressed-tensors")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ct", dtype=torch.float32).eval()
    ids = random_tokens(base, 1, 60, seed=5)[0].tolist()
    torch.testing.assert_close(
        logits_of(model, ids), logits_of(transformers_model(out), ids), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize(
    ("family", "settings"),
    [("qwen3_moe", {}), ("qwen3_moe", {"module_bits": {"self_attn": 8}}), ("qwen3_5", {})],
)
def test_so_do_experts_hybrids_and_bits_by_module(
    tmp_path: Path, family: str, settings: dict[str, Any]
) -> None:
    """transformers multiplies integers and scales of experts in float16, and of other modules in float32."""
    from transformers import AutoModelForCausalLM

    model = write_published(tmp_path / "m", family)
    calibration = write_calibration(model, tmp_path / "c.safetensors", samples=8)
    run(model, tmp_path / "out", calibration=calibration, **settings)
    convert(tmp_path / "out", tmp_path / "ct", to="compressed-tensors")
    convert(tmp_path / "ct", tmp_path / "plain")
    theirs, ours = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32).eval()
        for name in ("ct", "plain")
    )
    ids = random_tokens(model, 1, 40, seed=5)[0].tolist()
    close = 2e-3 if "moe" in family else 1e-4
    torch.testing.assert_close(logits_of(theirs, ids), logits_of(ours, ids), atol=close, rtol=0)


@pytest.mark.parametrize("kind", ["packed-symmetric", "mixed", "int8", "float8", "fp8"])
def test_transformers_reads_the_weights_as_we_do(tmp_path: Path, kind: str) -> None:
    """The folders of our own tests are what compressed-tensors, and transformers for FP8, take them for.

    Free zero points are not among them: transformers 5.23 with compressed-tensors 0.20.1 expects these
    unpacked, and loads no such folder.
    """
    from transformers import AutoModelForCausalLM

    base = write_family(tmp_path / "m", "qwen3")
    expected = write_foreign(base, tmp_path / "f", kind)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "f", dtype=torch.float32).eval()
    logits_of(theirs, [1, 2, 3])  # weights are dequantised on first use
    weights = theirs.state_dict()
    for name, weight in expected.items():
        torch.testing.assert_close(weights[name].float(), weight, atol=0, rtol=1e-6)
    assert_read(tmp_path / "f", expected)


def grid(
    weight: torch.Tensor, bits: int, group: int, *, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zero points [out, groups] by minimum and maximum; float16 scales in float32."""
    grouped = weight.view(len(weight), -1, group)
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    if symmetric:
        scales = torch.maximum(-low, high) / ((1 << bits) / 2 - 0.5)
        return scales.half().float(), torch.full_like(scales, 1 << (bits - 1))
    scales = ((high - low) / ((1 << bits) - 1)).half().float()
    return scales, (-low / scales).round().clamp(0, (1 << bits) - 1)


def folder_of(model: Path, out: Path, parts: Any, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """A folder whose projections are what ``parts`` makes of them; returns the weights that it gives back."""
    out.mkdir()
    tensors, expected = {}, {}
    for name, weight in load_file(model / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            tensors[name] = weight
            continue
        stored, expected[name] = parts(weight.float())
        module = name.removesuffix(".weight")
        tensors |= {f"{module}.{part}": value.contiguous() for part, value in stored.items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    whole = json.loads((model / "config.json").read_text()) | {"quantization_config": config}
    (out / "config.json").write_text(json.dumps(whole))
    return expected


def assert_read(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    checkpoint = open_checkpoint(folder)
    assert len(checkpoint.foreign_modules) == len(expected) == 21
    for name, weight in expected.items():
        assert torch.equal(checkpoint.read(name), weight), name


@pytest.mark.parametrize("group", [16, 32])
def test_awq_as_gptqmodel_packs_it(tmp_path: Path, group: int) -> None:
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    def parts(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        rows, columns = weight.shape
        scales, zeros = grid(weight, 4, group, symmetric=False)
        linear = torch.nn.Linear(columns, rows, bias=False)
        linear.weight.data = weight
        packer = AwqTorchLinear(4, group, False, False, columns, rows)
        packer.pack(linear, scales, zeros)
        stored = {part: getattr(packer, part) for part in ("qweight", "qzeros", "scales")}
        meant = dequantize_gemm(stored["qweight"], stored["qzeros"], stored["scales"].float(), 4, group)
        return stored, meant.t().float()

    model = write_family(tmp_path / "m", "qwen3")
    expected = folder_of(model, tmp_path / "f", parts, settings_of("awq", 4, group))
    assert_read(tmp_path / "f", expected)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_as_gptqmodel_packs_it(tmp_path: Path, bits: int) -> None:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    def parts(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        rows, columns = weight.shape
        scales, zeros = grid(weight, bits, 32, symmetric=False)
        linear = torch.nn.Linear(columns, rows, bias=False)
        linear.weight.data = weight
        packer = TorchLinear(bits, 32, False, False, columns, rows)
        packer.pack(linear, scales, zeros, torch.arange(columns, dtype=torch.int32) // 32)
        packer.post_init()
        stored = {part: getattr(packer, part).clone() for part in ("qweight", "qzeros", "scales", "g_idx")}
        return stored, packer.dequantize_weight().t().float()

    quant = QuantConfig(bits, 32, sym=False, checkpoint_format="gptq_v2")
    model = write_family(tmp_path / "m", "qwen3")
    expected = folder_of(model, tmp_path / "f", parts, quant.to_config_json())
    plain = DequantisedSource(open_checkpoint(tmp_path / "f").source, quant, torch.float32)
    for name, weight in expected.items():
        torch.testing.assert_close(plain.read(name), weight, atol=0, rtol=1e-3)  # theirs is in float16


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_compressed_tensors_as_its_own_compressor_packs_it(
    tmp_path: Path, bits: int, symmetric: bool
) -> None:
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    args = QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, strategy="group", group_size=32)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)

    def parts(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        scales, zeros = grid(weight, bits, 32, symmetric=symmetric)
        signed = (zeros - (1 << (bits - 1))).to(torch.int8)  # the library's integers are around zero
        state = {"weight": weight, "weight_scale": scales, "weight_zero_point": signed}
        stored = PackedQuantizationCompressor.compress(state, scheme)
        meant = PackedQuantizationCompressor.decompress(dict(stored), scheme)["weight"]
        return stored, meant.float()

    model = write_family(tmp_path / "m", "qwen3")
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": json.loads(scheme.model_dump_json())},
        "ignore": ["lm_head"],
    }
    expected = folder_of(model, tmp_path / "f", parts, config)
    assert_read(tmp_path / "f", expected)
