"""Name the model of a measurement: name, fingerprint, precision, and the family it is compared in."""

from __future__ import annotations

import hashlib
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenq.errors import CorruptFileError, QwenqError, UsageError
from qwenq.models.bundled import NAME as BUNDLED
from qwenq.models.bundled import is_bundled
from qwenq.models.checkpoint import Checkpoint, open_checkpoint
from qwenq.models.folders import MANIFEST, hub_repository, local_path
from qwenq.models.gptq_config import QuantConfig, is_quantised
from qwenq.models.random_weights import RANDOM_KEY, is_random
from qwenq.results import Model
from qwenq.storage import read_json

if TYPE_CHECKING:
    import torch

    from qwenq.models.source import TensorSource

_SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
_QUANTISED_NAME = re.compile(
    r"[-_.](?:(?:gptq|awq)[-_.])?int[2348]$"
    r"|(?:[-_.](?:int[2348]|[2348]bit|quantized))?[-_.](?:gptq|awq|fp8|w[48]a(?:8|16)|auto-?round)(?:[-_.].*)?$",
    re.IGNORECASE,
)


def result_model(checkpoint: Checkpoint, dtype: torch.dtype, given: str | None) -> Model:
    """Return what rows of results hold about a model.

    The family of a quantised model is the base that its qwenq.json names; without one, its own name less
    ``-GPTQ-Int4`` and the like. ``dtype``, what it is run in, is an unquantised model's precision; ``given``
    is what the user typed: a folder, a hub id, or None for the bundled model.
    """
    name, precision = model_name(given), precision_of(checkpoint, dtype)
    if is_random(checkpoint.config):
        fingerprint = f"random:{checkpoint.config[RANDOM_KEY].get('seed')}:{name}"
    else:
        fingerprint = checkpoint.fingerprint
    foreign = checkpoint.foreign
    if foreign is None and not is_quantised(checkpoint.config):
        size = dtype.itemsize * sum(checkpoint.info(tensor).numel for tensor in checkpoint.names())
        return Model(name, fingerprint, precision, name, size)
    stored: TensorSource = checkpoint if foreign is None else foreign.stored
    size = sum(stored.info(tensor).nbytes for tensor in stored.names())
    if foreign is not None:
        group = None if foreign.format.group_size == -1 else foreign.format.group_size
        return Model(name, fingerprint, precision, family_name(name), size, group)
    quant = QuantConfig.read(checkpoint.config, checkpoint.folder / "config.json")
    base = base_of(checkpoint.folder)
    named = base.get("name") or (model_name(base["model"]) if "model" in base else None)
    family = named or family_name(name)
    return Model(name, fingerprint, precision, family, size, quant.group_size)


def precision_of(checkpoint: Checkpoint, dtype: torch.dtype) -> str:
    """Return ``int4``, ``awq-int4`` and the like; of unquantised weights the short name of ``dtype``."""
    if checkpoint.foreign is not None:
        return checkpoint.foreign.format.precision
    if is_quantised(checkpoint.config):
        return f"int{QuantConfig.read(checkpoint.config, checkpoint.folder / 'config.json').bits}"
    run_in = str(dtype).removeprefix("torch.")
    return _SHORT.get(run_in, run_in)


def family_name(name: str) -> str:
    """Return the name less ``-GPTQ-Int4`` and the like."""
    return _QUANTISED_NAME.sub("", name)


def served_identity(url: str, name: str, precision: str = "served") -> Model:
    """Return the identity of a model behind a server in rows of results.

    Its weights are unknown: its fingerprint is that of address and name. Its family is its name less
    ``-GPTQ-Int4`` and the like, so that `qwenq compare` pairs it with its served base.
    """
    digest = hashlib.sha256(f"{url} {name}".encode()).hexdigest()[:16]
    short = name.rsplit("/", 1)[-1]
    return Model(short, f"endpoint:{digest}", precision, family_name(short))


def model_name(given: str | None) -> str:
    """Return the folder's name, the hub id's last part, or the bundled model's name."""
    return BUNDLED if given is None or is_bundled(given) else folder_name(Path(given).expanduser())


def folder_name(folder: Path) -> str:
    """Return the name of a model's folder; of a snapshot in the hub's cache that of its repository."""
    folder = folder.absolute().resolve()
    repository = hub_repository(folder)
    return folder.name if repository is None else repository.name.rsplit("--", 1)[-1]


def base_facts(base: Checkpoint, given: str | None, target: Path) -> dict[str, str | None]:
    """Return what the manifest of a model records about the one that it was made from.

    ``model`` as the user typed it (``given``; None: the bundled model), ``name``, ``fingerprint``; and of a
    folder that the user named its place from ``target``, which the manifest is for: what was typed means
    something only where it was typed.
    """
    facts = {"model": given, "name": model_name(given), "fingerprint": base.fingerprint}
    if given is None or not base.on_disk or not Path(given).expanduser().is_dir():
        return facts
    start = target.parent.resolve() / target.name
    return facts | {"folder": os.path.relpath(base.folder.resolve(), start)}


def base_of(folder: Path) -> dict[str, Any]:
    """Read ``base_facts`` of the model that this one was made from; empty where there are none.

    Older manifests have ``model`` and ``fingerprint`` alone.
    """
    path = folder / MANIFEST
    base = read_json(path).get("base")
    if not isinstance(base, dict):
        return {}
    names = [base[key] for key in ("model", "name", "fingerprint", "folder") if base.get(key) is not None]
    if not all(isinstance(name, str) and "\0" not in name for name in names):
        raise CorruptFileError("the manifest calls the model's base something that is not a name", where=path)
    return base


def local_base(named: dict[str, Any], quantised: Path) -> Path:
    """Find the folder of the base that a manifest names: as it was typed, or from the quantised one.

    Whichever is that very model; if neither is, one that is there. Neither is looked for on the hub, whatever
    it is spelt like.
    """
    typed = local_path(str(named.get("model")), "the base that qwenq.json names")
    beside = Path(os.path.normpath(quantised.resolve() / named["folder"]))
    there = [place for place in (typed, beside) if (place / "config.json").exists()]
    for place in there:
        with suppress(QwenqError):
            if open_checkpoint(place).fingerprint == named.get("fingerprint"):
                return place
    if not there:
        raise UsageError(
            f"the base that qwenq.json names is not there: neither {typed} nor, from this folder, {beside}",
            where=quantised,
            hint="name it: --against BASE",
        )
    return there[-1]
