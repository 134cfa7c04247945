"""Write the files beside the weights: tokenizer, chat template, generation settings, licence.

Whatever writes a model folder calls ``write_companions``, so that the folder loads with plain
``AutoModelForCausalLM`` and ``AutoTokenizer`` and keeps its licence. Remote code (``*.py``) is never copied.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwenq.errors import ModelError
from qwenq.models.own_files import require_own_files
from qwenq.models.qwen_v1_config import V1_KEY, qwen2_generation_config
from qwenq.models.tokenizer import copy_tokenizer_files, has_tokenizer
from qwenq.storage import atomic_write_json, guard_storage

_LICENCE = re.compile(
    r"[\w .-]*(?:licen[sc]e|notice|copying)(?:[\w -]|\.\d)*(?:\.(?:txt|md|rst|pdf|html))?", re.IGNORECASE
)


_PROCESSOR = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")
"""How a vision-language model turns images into its input: carried along, never read here."""


def write_companions(source: Path | None, target: Path, config: Mapping[str, Any]) -> list[str]:
    """Copy what belongs to a model but is neither weights nor config.json.

    Beside Qwen v1's ranks file stands a ``tokenizer.json`` made from it; generation_config.json is said in
    today's words.

    Args:
        source: the folder of the original model; None: its weights are random and lie on no disk.
        target: an existing folder.
        config: config.json as it is (to be) written in ``target``.

    Returns:
        What the user has to be told, one line each.

    Raises:
        ModelError: a JSON file of the source is damaged.
        StorageError: the disk refused.
    """
    if source is None:
        return ["random weights come from no folder: no tokenizer is written beside them"]
    require_own_files(source)
    with guard_storage(target):
        _copy_licences(source, target)
        _write_generation_config(source, target, config)
        notices = _copy_processor(source, target, config)
    if not has_tokenizer(source):
        return [*notices, f"{source} holds no tokenizer; the folder that was written has none either"]
    copy_tokenizer_files(source, target)
    return notices


def _copy_processor(source: Path, target: Path, config: Mapping[str, Any]) -> list[str]:
    """Copy the image processor's files; a notice where a vision-language model has none."""
    found = [name for name in _PROCESSOR if (source / name).is_file()]
    for name in found:
        shutil.copyfile(source / name, target / name)
    if found or not config.get("vision_config"):
        return []
    return [
        f"{source} holds no {_PROCESSOR[0]}: what was written takes text, and images only once that file is "
        "copied beside it"
    ]


def _copy_licences(source: Path, target: Path) -> None:
    for file in source.iterdir():
        if _LICENCE.fullmatch(file.name) and file.is_file():
            shutil.copyfile(file, target / file.name)


def _write_generation_config(source: Path, target: Path, config: Mapping[str, Any]) -> None:
    path = source / "generation_config.json"
    settings = _read_json(path) if path.is_file() else {}
    if V1_KEY in config and settings.get("chat_format"):
        settings = qwen2_generation_config(settings, config)
    if settings:
        atomic_write_json(target / path.name, settings)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(
            f"{path.name} is not JSON ({error})", where=path, hint="copy the file again"
        ) from error
    if not isinstance(content, dict):
        raise ModelError(f"{path.name} holds no object", where=path, hint="copy the file again")
    return content
