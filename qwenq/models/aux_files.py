"""Write the files beside the weights: tokenizer, chat template, generation settings, licence.

With them a folder loads with plain ``AutoModelForCausalLM`` and ``AutoTokenizer`` and keeps its licence.
Remote code (``*.py``) is never copied.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwenq.errors import ModelError
from qwenq.models.folders import refuse_foreign_links
from qwenq.models.qwen_tokenizer import RANKS_FILE, WRITTEN, write_tokenizer_json
from qwenq.models.qwen_v1 import V1_KEY, qwen2_generation_config
from qwenq.models.tokenizer import has_tokenizer, load_qwen_tokenizer
from qwenq.storage import atomic_write_json, guard_storage, read_json

COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates",
    RANKS_FILE,
)
_LICENCE = re.compile(
    r"[\w .-]*(?:licen[sc]e|notice|copying)(?:[\w -]|\.\d)*(?:\.(?:txt|md|rst|pdf|html))?", re.IGNORECASE
)


_PROCESSOR = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")
"""How a vision-language model turns images into its input: carried along, never read here."""


def write_aux_files(source: Path | None, target: Path, config: Mapping[str, Any]) -> list[str]:
    """Copy what belongs to a model but is neither weights nor config.json; return notices for the user.

    Beside Qwen v1's ranks file stands a ``tokenizer.json`` made from it; generation_config.json is
    written with the keys of today's transformers.

    Args:
        source: the folder of the original model; None: its weights are random and lie on no disk.
        target: an existing folder.
        config: config.json as it is (to be) written in ``target``.
    """
    if source is None:
        return ["random weights come from no folder: no tokenizer is written beside them"]
    refuse_foreign_links(source)
    notices = []
    settings = read_json(source / "generation_config.json")
    if V1_KEY in config and settings.get("chat_format"):
        settings = qwen2_generation_config(settings, config)
    if settings:
        atomic_write_json(target / "generation_config.json", settings)
    with guard_storage(target):
        for file in source.iterdir():
            if file.is_file() and (_LICENCE.fullmatch(file.name) or file.name in _PROCESSOR):
                shutil.copyfile(file, target / file.name)
    if config.get("vision_config") and not any((source / name).is_file() for name in _PROCESSOR):
        notices.append(
            f"{source} holds no {_PROCESSOR[0]}: what was written takes text, and images only once that file "
            "is copied beside it"
        )
    if not has_tokenizer(source):
        return [*notices, f"{source} holds no tokenizer; the folder that was written has none either"]
    copy_tokenizer_files(source, target)
    return notices


def copy_tokenizer_files(src: Path, dst: Path) -> list[str]:
    """Put the tokenizer of ``src`` beside a model in ``dst``, loadable by AutoTokenizer without remote code.

    A folder with ``qwen.tiktoken`` alone gets a tokenizer.json exported from it, and none of v1's
    tokenizer_config.json, which asks for remote code. Returns the names of what was written.
    """
    if not has_tokenizer(src):
        raise ModelError("the folder holds no tokenizer", where=src)
    exports = (src / RANKS_FILE).is_file() and not (src / "tokenizer.json").is_file()
    names = [RANKS_FILE] if exports else [name for name in COPIED if (src / name).exists()]
    with guard_storage(dst):
        dst.mkdir(parents=True, exist_ok=True)
        for name in names:
            _copy(src / name, dst / name)
    if exports:
        length = read_json(src / "config.json").get("seq_length")
        length = length if isinstance(length, int) else None
        write_tokenizer_json(load_qwen_tokenizer(src), dst, max_length=length)
        names += WRITTEN
    return names


def _copy(src: Path, dst: Path) -> None:
    if src.name == "tokenizer_config.json":
        settings = read_json(src)
        settings.pop("auto_map", None)  # names remote code, which is neither copied nor run
        atomic_write_json(dst, settings)
    elif src.is_dir():
        # Templates alone, and not their modes: of a read-only model those would be unwritable files.
        dst.mkdir(exist_ok=True)
        for file in sorted(src.glob("*.jinja")):
            _copy(file, dst / file.name)
    elif not (dst.exists() and src.samefile(dst)):
        shutil.copyfile(src, dst)
