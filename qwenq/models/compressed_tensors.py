"""Show a GPTQ checkpoint in the layout of compressed-tensors: the same integers under other names.

``pack-quantized`` keeps a row's integers one after the other, offset by 2^(bits−1): that is GPTQ's
``qweight`` transposed, where zero points are in the middle. Scales are transposed, too; ``qzeros`` and
``g_idx`` are implied.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from qwenq.errors import UnsupportedError
from qwenq.models.gptq_config import LAYER_PARTS, QuantConfig, patterns
from qwenq.models.gptq_format import check_symmetric_zeros, quantised_modules
from qwenq.models.source import Part, PartsView, TensorInfo, TensorSource

_NAMES = {"qweight": "weight_packed", "scales": "weight_scale", "g_idx": "weight_shape"}
_BESIDE = re.compile(r"(^|\.)(visual|vision_tower|mtp)\.")
_NOT_LINEAR = re.compile(r"(embed_tokens|norm\w*|conv1d)$")


class CompressedTensorsView(PartsView):
    """The tensors of a symmetric GPTQ checkpoint under the names of ``pack-quantized``."""

    def __init__(self, source: TensorSource, quant: QuantConfig) -> None:
        self._settings = {module: quant.of(module) for module in quantised_modules(source)}
        for module, own in self._settings.items():
            if not own.sym or own.desc_act:
                raise UnsupportedError(
                    "free zero points" if not own.sym else "columns in activation order (desc_act)",
                    where=module,
                    hint="only symmetric weights in the order of the file have this form",
                )
        parts = {}
        for name in source.names():
            module, _, part = name.rpartition(".")
            if module not in self._settings or part not in LAYER_PARTS:
                parts[name] = Part(name)
            elif part != "qzeros":
                parts[f"{module}.{_NAMES[part]}"] = Part(name, transposed=part != "g_idx")
        super().__init__(source, parts)

    def info(self, name: str) -> TensorInfo:
        """Return shape and dtype from the headers."""
        return TensorInfo((2,), torch.int64) if name.endswith(".weight_shape") else super().info(name)

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor in the form of ``pack-quantized``."""
        module, _, part = name.rpartition(".")
        if part == "weight_shape":
            words, rows = self.whole.info(f"{module}.qweight").shape
            return torch.tensor([rows, words * 32 // self._settings[module].bits])
        if part == "weight_packed":
            check_symmetric_zeros(self.whole.read(f"{module}.qzeros"), module, self._settings[module])
        return super().read(name)

    def settings(self) -> dict[str, Any]:
        """Return ``quantization_config``: a group of settings for each width and group size."""
        kinds: dict[tuple[int, int], list[str]] = {}
        for module, own in self._settings.items():
            kinds.setdefault((own.bits, own.group_size), []).append(_in_block(module))
        groups = {}
        ordered = sorted(kinds.items(), key=lambda kind: len(kind[1]))
        for number, ((bits, group_size), modules) in enumerate(ordered):
            others = [m for other in kinds.values() if other is not modules for m in other]
            last = number == len(kinds) - 1
            targets = ["Linear"] if last else [f"re:{p}" for p in patterns(dict.fromkeys(modules), others)]
            groups[f"group_{number}"] = {
                "targets": targets,
                "weights": _weights(bits, group_size),
                "input_activations": None,
                "output_activations": None,
                "format": "pack-quantized",
            }
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": self._ignored(),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }

    def _ignored(self) -> list[str]:
        """Return patterns of linear layers that are not quantised."""
        plain = [
            name.removesuffix(".weight")
            for name in self.whole.names()
            if name.endswith(".weight") and len(self.whole.info(name).shape) == 2
        ]
        beside = sorted({found[2] for name in plain if (found := _BESIDE.search(name))})
        inner = [
            _in_block(name)
            for name in plain
            if not _BESIDE.search(name) and not _NOT_LINEAR.search(name) and name != "lm_head"
        ]
        quantised = [_in_block(module) for module in self._settings]
        rules = [f"re:{pattern}" for pattern in patterns(dict.fromkeys(inner), quantised)]
        return ["lm_head", *(f"re:.*{name}.*" for name in beside), *rules]


def _weights(bits: int, group_size: int) -> Mapping[str, Any]:
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "strategy": "channel" if group_size == -1 else "group",
        "group_size": None if group_size == -1 else group_size,
        "block_structure": None,
        "dynamic": False,
        "actorder": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }


def _in_block(module: str) -> str:
    """Return a module's name within its block."""
    return re.sub(r"^.*?\.layers\.\d+\.", "", module)
