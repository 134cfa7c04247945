"""Find the config of a folder, a catalogue name, or a hub id (its config.json alone)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qwenq.errors import HubError, UsageError
from qwenq.models import catalogue
from qwenq.models.config import read_config
from qwenq.models.hub import network_errors
from qwenq.models.local_path import local_path
from qwenq.models.not_yet import refuse_by_name
from qwenq.models.shapes import ModelShape
from qwenq.models.text_config import text_config


@dataclass(frozen=True)
class PlannedModel:
    """A model as far as a plan needs it.

    Attributes:
        origin: where the sizes come from, for the reader.
        dtype: of the unquantised weights.
        entry: in the catalogue, if it is there.
    """

    name: str
    origin: str
    shape: ModelShape
    dtype: str
    entry: catalogue.Entry | None = None


def find_model(model: str | None, weights: str = "stored") -> PlannedModel:
    """Find a catalogue name, a folder (or its config.json), or a hub id; None is the bundled model.

    Args:
        model: as typed.
        weights: "random": a catalogue name only, with the bfloat16 weights of `--weights random`.

    Raises:
        UsageError: no such catalogue name, with suggestions; unknown ``weights``.
        UnsupportedError: the model is not supported, by name or config.json; names what is missing.
        ModelError: the folder's config.json is missing, damaged or of an unsupported model.
        HubError: the hub does not have it, or cannot be reached.
    """
    if model is None:
        model = catalogue.BUNDLED
    if weights == "random":
        drawn = catalogue.entry(model)
        return PlannedModel(drawn.names[0], "catalogue, random weights", drawn.shape, "bfloat16")
    if weights != "stored":
        raise UsageError(f"{weights!r} weights", where="--weights", hint="use stored or random")
    if not model.strip():  # `plan "$UNSET"` must not mean the current folder
        raise UsageError(
            "MODEL is empty", hint="leave it out, or name a folder, a catalogue name or a hub id"
        )
    path = local_path(model, "MODEL")
    if path.exists():
        folder = path if path.is_dir() else path.parent
        return _from_config(folder, str(path), str(path))
    entry = catalogue.find(model)
    if entry is not None:
        return PlannedModel(entry.names[0], "catalogue", entry.shape, entry.dtype_of(model), entry)
    refuse_by_name(model)
    if model.count("/") == 1 and not model.startswith((".", "/", "~")):
        return _from_config(_hub_config(model).parent, model, "config.json from the hub")
    raise UsageError(
        f"{model!r} is neither a folder nor a catalogue name",
        where="MODEL",
        hint=f"did you mean {' or '.join(catalogue.suggestions(model))}? A hub id looks like Qwen/Qwen3-8B",
    )


def _from_config(folder: Path, name: str, origin: str) -> PlannedModel:
    config, _ = read_config(folder)
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    if config.get("quantization_config") or dtype not in ("bfloat16", "float16", "float32"):
        dtype = "bfloat16"  # the sizes of the model before it was quantised
    return PlannedModel(name, origin, ModelShape.from_config(text_config(config)), dtype)


def _hub_config(model: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    known: tuple[type[Exception], ...] = (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError)
    known += network_errors()
    try:
        return Path(hf_hub_download(model, "config.json"))
    except known as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise HubError(
            f"config.json of {model} could not be fetched: {reason}",
            where=model,
            hint=f"check the id and the network; the catalogue has {', '.join(catalogue.suggestions(model))}",
        ) from error
