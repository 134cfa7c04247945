"""The same GPTQ weights in other groups, and the settings that no option of `quantize` gives."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def regrouped(folder: Path, size: int) -> Path:
    """Change a folder to groups of ``size`` columns: smaller ones repeat a scale, larger ones need one a row.

    The weights stay what they were.
    """
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if name.endswith(".g_idx")]:
        module, columns = name.removesuffix(".g_idx"), len(tensors[name])
        for part in ("scales", "qzeros"):
            stored = tensors[f"{module}.{part}"]
            assert stored.shape[0] in (1, columns // size) or columns // size % stored.shape[0] == 0
            tensors[f"{module}.{part}"] = stored.repeat_interleave(columns // size // stored.shape[0], 0)
        tensors[name] = torch.arange(columns, dtype=torch.int32) // size
    save_file(tensors, file, metadata={"format": "pt"})
    for name in ("config.json", "quantize_config.json"):
        content = json.loads((folder / name).read_text())
        content.get("quantization_config", content)["group_size"] = size
        (folder / name).write_text(json.dumps(content))
    (folder / "qwenq.json").unlink(missing_ok=True)  # the hashes of what was there
    return folder
