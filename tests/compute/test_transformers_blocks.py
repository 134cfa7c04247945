"""Blocks with our operations between their products, beside transformers' own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_families import write_family
from torch import Tensor, nn

from qwenq.compute import cpu, transformers_blocks
from qwenq.gptq.sequential import run_sequential, shared_inputs
from qwenq.models.blocks import BlockwiseDecoder
from qwenq.models.checkpoint import open_checkpoint
from qwenq.models.transformers_model import linears_of

CPU = torch.device("cpu")
in_both = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
LAST = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-20}  # how far results may be apart beside their size

WINDOW = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
MODELS = [
    ("llama", {}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 48}),
    ("qwen2", {}),
    ("qwen2", {"head_dim": 32, **WINDOW}),
    ("qwen3", {}),
    ("qwen3", {"head_dim": 64}),
]


def two_decoders(
    folder: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype = torch.float32
) -> tuple[BlockwiseDecoder, BlockwiseDecoder]:
    """One that is fused, one of transformers' modules, both with compiled attention."""
    fused = BlockwiseDecoder(open_checkpoint(folder), CPU, dtype)
    with monkeypatch.context() as patch:
        patch.setattr("qwenq.models.blocks.fuse_blocks", lambda *_: None)
        plain = BlockwiseDecoder(open_checkpoint(folder), CPU, dtype)
    return fused, plain


def kinds(block: nn.Module) -> list[str]:
    return [type(module).__name__ for module in block.modules()]


@in_both
@pytest.mark.parametrize(("family", "changes"), MODELS)
def test_blocks_give_what_transformers_give(
    tmp_path: Path, family: str, changes: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_family(tmp_path / "model", family, **changes)
    decoders = two_decoders(folder, monkeypatch, dtype)
    tokens = torch.randint(0, 90, (3, 71), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        (hidden,) = decoders[0].embed([tokens])
        decoders[1].embed([tokens])
        for index in range(len(decoders[0].names)):
            outputs = []
            for decoder in decoders:
                before = hidden.clone()
                with decoder.block(index) as block:
                    outputs.append(decoder.forward(block, hidden))
                assert torch.equal(hidden, before)
            fused, plain = outputs
            assert fused.dtype is dtype and fused.shape == plain.shape
            added = (plain - hidden).double().norm()
            assert (fused - plain).double().norm() <= LAST[dtype] * added
            hidden = plain
    assert "FusedAttention" in kinds(decoders[0].blocks[0])
    assert "FusedAttention" not in kinds(decoders[1].blocks[0])


@pytest.mark.parametrize(("family", "changes"), MODELS)
def test_parameters_and_linears_keep_names_and_order(
    tmp_path: Path, family: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    fused, plain = (
        decoder.blocks[0]
        for decoder in two_decoders(write_family(tmp_path / "m", family, **changes), monkeypatch)
    )
    shapes = [{name: tensor.shape for name, tensor in block.named_parameters()} for block in (fused, plain)]
    assert shapes[0] == shapes[1]
    assert list(linears_of(fused)) == list(linears_of(plain))
    assert not any(module.training for module in fused.modules())


@in_both
@pytest.mark.parametrize(("family", "changes"), MODELS)
def test_a_walk_pauses_where_it_did(
    tmp_path: Path, family: str, changes: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[list[list[str]], dict[str, list[Tensor]], list[Tensor]]] = []
    for decoder in two_decoders(write_family(tmp_path / "m", family, **changes), monkeypatch, dtype):
        tokens = torch.randint(0, 90, (2, 2, 33), generator=torch.Generator().manual_seed(1))
        inputs: dict[str, list[Tensor]] = {}

        def solve(
            names: Any, batches: list[Tensor], *_: object, inputs: dict[str, list[Tensor]] = inputs
        ) -> dict[str, Tensor]:
            inputs["+".join(names)] = [batch.clone() for batch in batches]
            return {}

        with torch.inference_mode():
            hidden = decoder.embed(list(tokens))
            with decoder.block(0) as block:

                def forward(x: Tensor, decoder: Any = decoder, block: nn.Module = block) -> Tensor:
                    output: Tensor = decoder.forward(block, x)
                    return output

                groups = shared_inputs(block, forward, hidden[0][:1])
                outputs, _ = run_sequential(block, forward, hidden, groups, solve)
                whole = [forward(x) for x in hidden]
        assert all(torch.equal(*pair) for pair in zip(outputs, whole, strict=True))
        seen.append((groups, inputs, outputs))
    (groups, inputs, _), (plain_groups, plain_inputs, _) = seen
    assert groups == plain_groups
    assert groups[0] == ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
    for name, batches in inputs.items():
        for ours, theirs in zip(batches, plain_inputs[name], strict=True):
            assert (ours - theirs).double().norm() <= 2 * LAST[dtype] * theirs.double().norm()


def test_keys_of_earlier_tokens_are_refused(tmp_path: Path) -> None:
    decoder = BlockwiseDecoder(open_checkpoint(write_family(tmp_path / "m")), CPU, torch.float32)
    attention: Any = decoder.blocks[0].get_submodule("self_attn")
    with pytest.raises(ValueError, match="keep no keys"):
        attention(torch.zeros(1, 1, 64), (torch.zeros(1), torch.zeros(1)), None, past_key_values=object())


@pytest.mark.parametrize(
    ("changes", "because"),
    [
        ({"hidden_act": "gelu"}, "activation gelu"),
        ({"intermediate_size": 100}, "the MLP, 100, is not a multiple of 16"),
    ],
)
def test_other_architectures_keep_transformers_modules_with_a_notice(
    tmp_path: Path, changes: dict[str, Any], because: str
) -> None:
    folder = write_family(tmp_path / "m", **changes)
    decoder = BlockwiseDecoder(open_checkpoint(folder), CPU, torch.bfloat16)
    assert because in str(decoder.fallback_notice)
    assert "norms and activations run in torch" in str(decoder.fallback_notice)
    assert not any(kind.startswith("Fused") for kind in kinds(decoder.blocks[0]))


def test_blocks_of_unknown_structure_stay(tmp_path: Path) -> None:
    class Other(nn.Module): ...

    assert transformers_blocks.fuse_blocks([Other()], None) == "there is none for a Other"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_in_other_dtypes_blocks_are_transformers(tmp_path: Path, dtype: torch.dtype) -> None:
    decoder = BlockwiseDecoder(open_checkpoint(write_family(tmp_path / "m")), CPU, dtype)
    assert not any(kind.startswith("Fused") for kind in kinds(decoder.blocks[0]))
    assert decoder.fallback_notice is None


@in_both
@pytest.mark.parametrize(
    ("family", "changes"), [("llama", {}), ("qwen2", {}), ("qwen3", {}), ("qwen2", WINDOW)]
)
def test_blocks_take_it_and_come_as_near_to_float64(
    tmp_path: Path, family: str, changes: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 70 tokens most lie beyond the window: there a mask comes, and torch's attention with it."""
    folder = write_family(tmp_path / "model", family, **changes)
    tokens = torch.randint(0, 90, (3, 70), generator=torch.Generator().manual_seed(0))

    def after_blocks(dtype: torch.dtype) -> tuple[str, Tensor]:
        decoder = BlockwiseDecoder(open_checkpoint(folder), CPU, dtype)
        with torch.inference_mode():
            (hidden,) = decoder.embed([tokens])
            for index in range(len(decoder.names)):
                with decoder.block(index) as block:
                    hidden = decoder.forward(block, hidden)
        return decoder.attention, hidden.double()

    name, exact = after_blocks(torch.float64)
    assert name == transformers_blocks.TORCH
    name, compiled = after_blocks(dtype)
    assert name == transformers_blocks.OURS
    monkeypatch.setenv(cpu.VARIABLE, "torch")
    name, plain = after_blocks(dtype)
    assert name == transformers_blocks.TORCH
    assert (compiled - exact).norm() <= 1.2 * (plain - exact).norm()


def test_a_decoder_knows_why_its_attention_is_torchs(tmp_path: Path) -> None:
    model = open_checkpoint(write_family(tmp_path / "m", head_dim=24))
    decoder = BlockwiseDecoder(model, CPU, torch.bfloat16)
    assert decoder.attention == transformers_blocks.TORCH
    assert decoder.attention_reason == "the width of a head, 24, is not a multiple of 16"
    assert str(decoder.fallback_notice).endswith(decoder.attention_reason)
    assert BlockwiseDecoder(model, CPU, torch.float16).fallback_notice is None


def test_sliding_window_layers_are_a_notice(tmp_path: Path) -> None:
    plain, sliding = (
        BlockwiseDecoder(
            open_checkpoint(write_family(tmp_path / name, "qwen2", **changes)), CPU, torch.bfloat16
        )
        for name, changes in (("plain", {}), ("sliding", WINDOW))
    )
    assert plain.attention == sliding.attention == transformers_blocks.OURS
    assert plain.fallback_notice is None
    assert "attention of 2 of 3 layers slides a window of 8 tokens" in str(sliding.fallback_notice)
