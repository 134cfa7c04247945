"""Open a checkpoint: a folder, its config, and a lazy source of tensors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenq.errors import QwenqError
from qwenq.models.autoround import gptq_settings, is_autoround
from qwenq.models.config import (
    by_inspection,
    is_nested,
    read_config,
    require_layers,
    text_config,
    whole_config,
)
from qwenq.models.folders import missing_manifest, refuse_foreign_links
from qwenq.models.gptq_config import QuantConfig, is_quantised, settings_of
from qwenq.models.qwen_v1 import long_context_of, qwen2_view
from qwenq.models.source import TensorInfo, TensorSource, TextView

if TYPE_CHECKING:
    import torch

    from qwenq.models.foreign_formats import ForeignSource

HEADS = ("lm_head.weight", "lm_head.qweight")
"""Names of the output head's tensor, plain or quantised."""


@dataclass(frozen=True)
class Checkpoint:
    """A model at rest."""

    # where the files lie; of a model that lies on no disk, words that stand for that in messages
    folder: Path
    # config.json in the layout of the architecture that is run (Qwen v1 is seen as Qwen2): of a larger model
    # the language model's part
    config: dict[str, Any]
    # the tensors, under the names of that architecture; of a vision-language model, a model with a draft head
    # or fused experts it is a ``TextView``, or stands before one
    source: TensorSource
    notices: list[str] = field(default_factory=list)  # for the user, on how it was read, one line each
    on_disk: bool = True  # else weights are drawn as they are read, and nothing in ``folder`` belongs to them
    # how the language model was found among the files' tensors; None: they are all it has
    view: TextView | None = None
    file_config: dict[str, Any] | None = None  # config.json as it was read, where ``config`` is a part of it
    # the tensors of another tool's quantised model, which ``source`` shows as plain weights
    foreign: ForeignSource | None = None

    @property
    def companions(self) -> Path | None:
        """Return the folder of tokenizer, licence and settings; None where there can be none."""
        return self.folder if self.on_disk else None

    @property
    def published_config(self) -> dict[str, Any]:
        """Return the config.json of the whole model, whose language model is this one."""
        return whole_config(self.file_config, self.config) if self.file_config else dict(self.config)

    @property
    def published(self) -> TensorSource:
        """Return the tensors of the whole model, under the names in its files."""
        return self.view.whole if self.view is not None else self.source

    @property
    def foreign_modules(self) -> list[str]:
        """Return the modules that another tool quantised, under the names of ``source``."""
        modules = self.foreign.modules if self.foreign is not None else []
        if self.view is None:
            return modules
        shown = (name for module in modules for name in self.view.shown(f"{module}.weight"))
        return [name.removesuffix(".weight") for name in shown]

    def names(self) -> Iterable[str]:
        """Return all tensor names, in file order."""
        return self.source.names()

    def info(self, name: str) -> TensorInfo:
        """Return shape and dtype of a tensor, from the header alone."""
        return self.source.info(name)

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor, on the CPU, in its stored dtype."""
        return self.source.read(name)

    @cached_property
    def tied(self) -> bool:
        """Return whether the output head is the embedding."""
        return set(self.names()).isdisjoint(HEADS) and bool(self.config.get("tie_word_embeddings", False))

    @cached_property
    def fingerprint(self) -> str:
        """Return 16 hex digits over names, shapes, dtypes and bytes of all weights, and the config."""
        from qwenq.models.integrity import fingerprint

        if self.view is not None and self.source is self.view:  # files are hashed as they are
            return fingerprint(self.published_config, self.view.whole)
        return fingerprint(self.config, self.source)


def open_checkpoint(folder: Path, *, unfinished: bool = False) -> Checkpoint:
    """Open a model folder for lazy reading; only headers are read, and all of them are checked.

    A GPTQ folder opens with its packed tensors, and so does one of AutoRound in that layout, whose settings
    are shown as GPTQ's; a notice is added where it has no qwenq.json, or where only AutoGPTQ's
    quantize_config.json has the settings. Weights that another tool quantised (AWQ, compressed-tensors, FP8)
    are shown dequantised. A Qwen v1 folder opens in Qwen2's layout. ``unfinished`` opens what `qwenq
    quantize` has staged and not yet published; its own check does.

    Raises:
        ModelError: not a model folder, a config that no model can have, or an unfinished quantisation.
        CorruptFileError: a shard is missing, truncated or damaged; a file is a link out of the folder.
        UnsupportedError: an architecture or a weight format that is not supported.
    """
    from qwenq.models.foreign_formats import open_foreign  # with torch

    refuse_foreign_links(folder)
    config, notices = read_config(folder)
    source, unread = open_weights(folder)
    notices += unread
    foreign = open_foreign(config, source, folder / "config.json") if is_quantised(config) else None
    if foreign is not None:
        source = foreign
        config = {key: value for key, value in config.items() if key != "quantization_config"}
        notices.append(foreign.notice)
    elif is_autoround(config):
        settings = gptq_settings(config["quantization_config"], folder / "config.json")
        config = {**config, "quantization_config": settings}
        notices.append("quantised with AutoRound, in GPTQ's layout")
    names = list(source.names())
    if config["model_type"] == "qwen":
        config, source = qwen2_view(folder, config, source)
    elif not is_quantised(config) and (quant := settings_of(folder, config, names)):
        config = {**config, "quantization_config": quant.to_config_json()}
        notices.append("config.json has no GPTQ settings: those of quantize_config.json are used")
    quantised = is_quantised(config)
    long_context_of(config, folder / "config.json")
    file_config = config if is_nested(config) else None
    config = text_config(config)
    found = _view(folder, config, source)
    view = None if found.plain else found
    source = view or source
    require_layers(config, source.names(), folder)
    config = _untie(config, source, notices)
    if quantised:
        config = _correct_format(config, source, notices)
        if not unfinished:
            notices += missing_manifest(folder)
    return Checkpoint(folder, config, source, notices, view=view, file_config=file_config, foreign=foreign)


def _view(folder: Path, config: dict[str, Any], source: TensorSource) -> TextView:
    """Return the view of the language model's tensors, under the names that transformers' model has."""
    hidden = config.get("hidden_size")
    if not by_inspection(config):
        return TextView(source, hidden, folder)
    from qwenq.models.inspection import model_names

    layers = config["num_hidden_layers"] if config.get("num_nextn_predict_layers") else None
    return TextView(source, hidden, folder, layers=layers, rename=model_names(config["model_type"], folder))


def _correct_format(config: dict[str, Any], source: TensorSource, notices: list[str]) -> dict[str, Any]:
    """Return the config with the format in which zero points are in fact stored, and add a notice."""
    from qwenq.models.gptq_format import stored_format

    try:
        quant = QuantConfig.read(config)
        found = stored_format(source, quant)
    except QwenqError:  # raised again, with its place, by what needs the settings or the tensor
        return config
    if found == quant.checkpoint_format:
        return config
    settings = {**config["quantization_config"], "checkpoint_format": found}
    if "format" in settings:
        settings["format"] = found
    notices.append(
        f"config.json names {quant.checkpoint_format}, but the zero points are stored as in {found}, and are "
        "read so"
    )
    return {**config, "quantization_config": settings}


def _untie(config: dict[str, Any], source: TensorSource, notices: list[str]) -> dict[str, Any]:
    """Return a config that agrees with the weights where it ties a head that is not the embedding."""
    embedding, names = "model.embed_tokens.weight", set(source.names())
    head = next((name for name in HEADS if name in names), None)
    if not config.get("tie_word_embeddings") or head is None or embedding not in names:
        return config
    import torch

    same = source.info(head) == source.info(embedding)
    if same and torch.equal(source.read(head), source.read(embedding)):
        return config
    notices.append(
        f"config.json sets tie_word_embeddings, but {head} is not the embedding: the head in the file is "
        "used, and what is written here has tie_word_embeddings: false"
    )
    return {**config, "tie_word_embeddings": False}


def open_weights(folder: Path) -> tuple[TensorSource, list[str]]:
    """Open a folder's tensors under the names in its files; return notices on weights that are not read, too.

    Safetensors come first, else pickle, read safely.
    """
    from qwenq.models.pickles import open_pickles
    from qwenq.models.safetensors_files import open_safetensors, unread_files

    source = open_safetensors(folder)
    return (open_pickles(folder), []) if source is None else (source, unread_files(folder, source.files))
