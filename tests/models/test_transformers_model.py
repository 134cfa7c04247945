"""What transformers raises while it builds a model is put down to the right cause."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qwenq.errors import ModelError, OutOfMemoryError, StorageError
from qwenq.models.transformers_model import as_cache, refused_by_transformers
from qwenq.stopping import Terminated


@pytest.mark.parametrize(
    "refusal",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_too_little_memory_is_not_called_a_damaged_config(refusal: Exception, tmp_path: Path) -> None:
    with pytest.raises(OutOfMemoryError, match="not enough memory"), refused_by_transformers(tmp_path):
        raise refusal


def test_our_own_errors_keep_their_words(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="the disk"), refused_by_transformers(tmp_path):
        raise StorageError("the disk is gone")


def test_anything_else_is_a_value_of_the_config(tmp_path: Path) -> None:
    said = r"(?s)KeyError: 'linear_attention'.*config\.json is damaged"
    with pytest.raises(ModelError, match=said), refused_by_transformers(tmp_path):
        raise KeyError("linear_attention")


def test_a_stop_that_breaks_into_a_device_mode_is_a_stop(tmp_path: Path) -> None:
    """What torch raises when it leaves the mode is then no word on the config."""

    def broken_into() -> None:
        with torch.device("meta"):
            torch.overrides._pop_mode()  # type: ignore[attr-defined]
            raise Terminated

    with pytest.raises(Terminated), refused_by_transformers(tmp_path):
        broken_into()


class _Named(torch.nn.Module):
    def forward(self, cache: object = None) -> object:
        return cache


class _NamedAsBefore(torch.nn.Module):
    def forward(self, past_key_values: object = None) -> object:
        return past_key_values


@pytest.mark.parametrize("model", [_Named(), _NamedAsBefore()])
def test_a_cache_has_the_name_that_this_transformers_gives_it(model: torch.nn.Module) -> None:
    kept = object()
    assert model(**as_cache(model, kept)) is kept
