"""Which model a measurement is about: its name, fingerprint, precision, and the family it is compared in."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenq.errors import CorruptFileError
from qwenq.models.bundled import NAME as BUNDLED
from qwenq.models.gptq_config import QuantConfig, is_quantised
from qwenq.models.manifest import MANIFEST
from qwenq.models.random_weights import RANDOM_KEY, is_random
from qwenq.results import Model

if TYPE_CHECKING:
    import torch

    from qwenq.models.checkpoint import Checkpoint

_SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
_QUANTISED_NAME = re.compile(r"[-_.](?:gptq[-_.])?int[48]$|[-_.]gptq(?:[-_.].*)?$", re.IGNORECASE)


def result_model(checkpoint: Checkpoint, dtype: torch.dtype, given: str | None) -> Model:
    """What rows of results say of a model.

    The family of a quantised model is the base that its qwenq.json names; without one, its own name less
    ``-GPTQ-Int4`` and the like.

    Args:
        checkpoint: as opened.
        dtype: what it is run in: an unquantised model's precision.
        given: what the user typed: a folder, a hub id, or None for the bundled model.

    Raises:
        CorruptFileError: the manifest is no JSON object.
    """
    name = model_name(given)
    if is_random(checkpoint.config):
        fingerprint = f"random:{checkpoint.config[RANDOM_KEY].get('seed')}:{name}"
    else:
        fingerprint = checkpoint.fingerprint
    if not is_quantised(checkpoint.config):
        size = dtype.itemsize * sum(checkpoint.info(tensor).numel for tensor in checkpoint.names())
        return Model(name, fingerprint, precision_name(dtype), name, size)
    size = sum(tensor_bytes(checkpoint, tensor) for tensor in checkpoint.names())
    quant = QuantConfig.read(checkpoint.config, checkpoint.folder / "config.json")
    base = base_of(checkpoint.folder)
    family = model_name(base["model"]) if "model" in base else family_name(name)
    return Model(name, fingerprint, f"int{quant.bits}", family, size, quant.group_size)


def family_name(name: str) -> str:
    """The name less ``-GPTQ-Int4`` and the like."""
    return _QUANTISED_NAME.sub("", name)


def precision_name(dtype: torch.dtype) -> str:
    """``fp32``, ``bf16`` or ``fp16``."""
    name = str(dtype).removeprefix("torch.")
    return _SHORT.get(name, name)


def model_name(given: str | None) -> str:
    """The folder's name, the hub id's last part, or the bundled model's name."""
    return BUNDLED if given is None else folder_name(Path(given).expanduser())


def folder_name(folder: Path) -> str:
    """The name of a model's folder; of a snapshot in the hub's cache its repository's, not its commit."""
    folder = folder.absolute().resolve()
    repository = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.rsplit("--", 1)[-1]
    return folder.name


def base_of(folder: Path) -> dict[str, Any]:
    """``{"model": …, "fingerprint": …}`` of the model that this one was made from; empty where nothing says.

    Raises:
        CorruptFileError: the manifest is no JSON object, or calls the base something that is no name.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return {}
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"the manifest is not JSON: {error}", where=path) from error
    if not isinstance(manifest, dict):
        raise CorruptFileError("the manifest is not a JSON object", where=path)
    base = manifest.get("base")
    if not isinstance(base, dict):
        return {}
    names = [base[key] for key in ("model", "fingerprint") if base.get(key) is not None]
    if not all(isinstance(name, str) and "\0" not in name for name in names):
        raise CorruptFileError("the manifest calls the model's base something that is no name", where=path)
    return base


def tensor_bytes(checkpoint: Checkpoint, name: str) -> int:
    """Bytes of a tensor in the file."""
    info = checkpoint.info(name)
    return info.numel * info.dtype.itemsize
