from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_model import write_tiny_model

from qwenq.calibration.self_text import load_whole_model, require_base_model, require_memory, store_transposed
from qwenq.errors import CorruptFileError, ModelError, UnsupportedError, UsageError
from qwenq.models.checkpoint import Checkpoint, open_checkpoint
from qwenq.models.source import TensorInfo


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path)


def test_the_whole_model_gives_transformers_logits(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    ids = torch.arange(20).view(2, 10)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = load_whole_model(open_checkpoint(folder), torch.float32, "cpu")
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected(ids).logits)
        store_transposed(model)
        torch.testing.assert_close(model(ids).logits, expected(ids).logits)
    assert model.model.layers[0].mlp.up_proj.weight.T.is_contiguous()
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_missing_tensors_are_named(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"the tensor model\.layers\.1\.mlp\.up_proj\.weight"):
        load_whole_model(open_checkpoint(folder), torch.float32, "cpu")


def test_an_unknown_architecture_is_refused(folder: Path) -> None:
    known = open_checkpoint(folder)
    strange = Checkpoint(folder, known.config | {"model_type": "mambo"}, known.source)
    with pytest.raises(UnsupportedError, match=r"(?s)no causal language model of type 'mambo'.*FILE"):
        load_whole_model(strange, torch.float32, "cpu")


def test_a_quantised_model_writes_no_calibration_text(folder: Path) -> None:
    known = open_checkpoint(folder)
    require_base_model(known)
    config = known.config | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    with pytest.raises(UsageError, match="already quantised"):
        require_base_model(Checkpoint(folder, config, known.source))


class Huge:
    """Ten trillion parameters."""

    def names(self) -> list[str]:
        return ["a", "b"]

    def info(self, name: str) -> TensorInfo:
        return TensorInfo((10_000_000, 500_000), torch.bfloat16)

    def read(self, name: str) -> torch.Tensor:
        raise AssertionError("nothing may be read before the memory is known to suffice")


def test_a_model_larger_than_memory_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"(?s)would need 48\.0 TB of memory.*are free.*--calibration FILE.*--source.*--text"
    ):
        require_memory(Checkpoint(tmp_path, {}, Huge()), torch.float32, 0)


def test_a_model_that_fits_is_not_refused(folder: Path) -> None:
    require_memory(open_checkpoint(folder), torch.float32, 1_000_000)


def test_a_containers_limit_counts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwenq.models.machine.cgroup_memory_left", lambda: 1_000_000)
    with pytest.raises(UsageError, match=r"1\.0 MB are free"):
        require_memory(open_checkpoint(folder), torch.float32, 1_000_000)


def test_a_tensor_with_nan_is_named(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CorruptFileError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds 1 NaN"):
        load_whole_model(open_checkpoint(folder), torch.float32, "cpu")
