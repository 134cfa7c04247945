"""A chat template that does what the published text of Qwen3's does, written for these tests.

No released tokenizer of Qwen3 is at hand here: this stands in its place, without tools. What it keeps of the
published text: each turn ends in a line end, thoughts of earlier answers are left out, and with
``enable_thinking`` false the prompt holds an empty block of thoughts.
"""

from __future__ import annotations

import json
from pathlib import Path

QWEN3 = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message.role + '\\n' -}}"
    "{{- message.content.split('</think>')[-1].lstrip('\\n') if message.role == 'assistant'"
    " else message.content -}}"
    "{{- '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}"
    "{{- '<|im_start|>assistant\\n' -}}"
    "{%- if enable_thinking is defined and enable_thinking is false -%}"
    "{{- '<think>\\n\\n</think>\\n\\n' -}}"
    "{%- endif -%}"
    "{%- endif -%}"
)
ALWAYS = (
    "{%- for message in messages -%}{{- message.role + ': ' + message.content + '\\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'assistant: <think>\\n' -}}{%- endif -%}"
)
"""As models do that cannot be asked not to think."""

TURNS = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": "<think>\nOne and one.\n</think>\n\n2"},
    {"role": "user", "content": "And 2 + 2?"},
)
_HISTORY = (
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1 + 1?<|im_end|>\n"
    "<|im_start|>assistant\n2<|im_end|>\n<|im_start|>user\nAnd 2 + 2?<|im_end|>\n<|im_start|>assistant\n"
)
GOLDEN = {True: _HISTORY, False: _HISTORY + "<think>\n\n</think>\n\n"}
"""The prompt of ``TURNS`` with thinking on and off."""


def set_template(folder: Path, template: str) -> Path:
    """Give a model folder this chat template."""
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**settings, "chat_template": template}))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    return folder
