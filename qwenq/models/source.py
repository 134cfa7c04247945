"""Define where tensors come from, check them against a config, and show the language model among them.

A checkpoint is a config and a source. Sources nest: a safetensors folder, the Qwen2 view of a Qwen v1 folder
and the dequantised view of a GPTQ folder are read in the same way.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from qwenq.errors import ModelError
from qwenq.models.gptq_config import NESTED

if TYPE_CHECKING:
    import torch

OTHER_MODEL = "config.json and the weights are not of one model, or a shard is missing: copy the folder again"
"""What to do where tensors and config.json disagree."""


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a tensor, from a file's header."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Return the number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Return the bytes that it takes in a file."""
        return self.numel * self.dtype.itemsize


class TensorSource(Protocol):
    """Lazy access to named tensors. ``read`` raises ``ModelError`` for an unknown name.

    A source may have more: ``files``, whose tensors it holds (as long as those stay the same, so do they;
    empty: not known); ``decided_by``, all that its values follow from, as JSON can hold it, so that it need
    not be read to be known; ``read_part(name, index)``, one step along a tensor's first dimension.
    """

    def names(self) -> Iterable[str]:
        """Return all tensor names, in file order."""
        ...

    def info(self, name: str) -> TensorInfo:
        """Return shape and dtype from the header alone."""
        ...

    def read(self, name: str) -> torch.Tensor:
        """Return the tensor on the CPU, in its stored dtype."""
        ...


def require_tensors(
    source: TensorSource, expected: Mapping[str, Sequence[int]], where: str | Path | None
) -> None:
    """Check that a source has the tensors that its config.json asks for, and no others in its blocks.

    Only names and headers are read. Biases of zeros that the source hides from its names, but reads, count as
    there.
    """
    names = set(source.names())
    for name, shape in expected.items():
        try:
            found = source.info(name).shape if name in names or name.endswith(".bias") else None
        except (ModelError, KeyError):
            found = None
        require_shape(name, found, shape, where)
    for name in sorted(names - expected.keys()):
        if name.startswith("model.layers.") and not name.endswith(".rotary_emb.inv_freq"):
            raise ModelError(f"{name} has no place in this architecture", where=where, hint=OTHER_MODEL)


def require_shape(
    name: str, found: Sequence[int] | None, expected: Sequence[int], where: str | Path | None
) -> None:
    """Check one tensor's shape against what config.json asks for."""
    if found is None:
        raise ModelError(f"the tensor {name} is missing", where=where, hint=OTHER_MODEL)
    if tuple(found) != tuple(expected):
        raise ModelError(
            f"{name} has shape {tuple(found)}, config.json asks for {tuple(expected)}",
            where=where,
            hint=OTHER_MODEL,
        )


@dataclass(frozen=True)
class Part:
    """Where a tensor of a view lies: all of a tensor of the files, or a part of it."""

    stored: str  # name in the files
    expert: int | None = None  # index along the first dimension of fused experts
    transposed: bool = False  # the expert's matrix is stored as [in, out]
    # of equal parts along an axis, once the matrix is [out, in], which one it is
    axis: int = 0
    part: int = 0
    parts: int = 1


class PartsView:
    """A source that shows tensors of another one, or parts of them, under names of its own, in that order."""

    def __init__(self, whole: TensorSource, parts: dict[str, Part]) -> None:
        self.whole, self._parts = whole, parts

    @property
    def files(self) -> Sequence[Path]:
        """Return the files of the whole; empty where they are not known."""
        return getattr(self.whole, "files", ())

    def names(self) -> Iterable[str]:
        """Return all names, in file order."""
        return list(self._parts)

    def info(self, name: str) -> TensorInfo:
        """Return shape and dtype from the header alone."""
        part = self._part(name)
        info = self.whole.info(part.stored)
        shape = list(info.shape if part.expert is None else info.shape[1:])
        if part.transposed:
            shape.reverse()
        if part.parts > 1:
            shape[part.axis] //= part.parts
        return TensorInfo(tuple(shape), info.dtype)

    def read(self, name: str) -> torch.Tensor:
        """Return the tensor on the CPU, in its stored dtype."""
        part = self._part(name)
        if part.expert is None:
            tensor = self.whole.read(part.stored)
        elif (read_part := getattr(self.whole, "read_part", None)) is not None:  # without the other experts
            tensor = read_part(part.stored, part.expert)
        else:
            tensor = self.whole.read(part.stored)[part.expert]
        if part.transposed:
            tensor = tensor.T.contiguous()
        if part.parts == 1:
            return tensor
        size = tensor.shape[part.axis] // part.parts
        return tensor.narrow(part.axis, part.part * size, size).clone()  # a view would keep the rest alive

    def _part(self, name: str) -> Part:
        if name not in self._parts:
            where = self.files[0].parent if self.files else None
            raise ModelError(f"there is no tensor named {name}", where=where)
        return self._parts[name]


class WeightsView:
    """A quantised checkpoint that reads like a plain one: ``X.weight`` in place of what stands for it.

    Args:
        stored: the tensors as they lie in the files.
        parts: what stands for a weight, such as ``qweight``; the first tells that a module is quantised.
    """

    def __init__(self, stored: TensorSource, parts: Sequence[str]) -> None:
        self.stored, self._kinds = stored, parts
        first = f".{parts[0]}"
        self.modules = [name.removesuffix(first) for name in stored.names() if name.endswith(first)]
        self._module_of = {f"{module}.weight": module for module in self.modules}
        self._names: list[str] | None = None

    def names(self) -> Iterable[str]:
        """Return all names, in file order; a weight stands where the first of its parts stood."""
        if self._names is None:
            parts = {f"{m}.{part}": f"{m}.weight" for m in self.modules for part in self._kinds}
            hidden = self.hidden()
            shown = (parts.get(name, name) for name in self.stored.names() if name not in hidden)
            self._names = list(dict.fromkeys(shown))
        return self._names

    def info(self, name: str) -> TensorInfo:
        """Return shape and dtype, without dequantising."""
        module = self._module_of.get(name)
        return self.stored.info(name) if module is None else self.weight_info(module)

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor; a quantised weight as [out, in], in the dtype that ``info`` names."""
        module = self._module_of.get(name)
        return self.stored.read(name) if module is None else self.weight(module)

    def hidden(self) -> set[str]:
        """Return names that are not shown."""
        return set()

    def weight_info(self, module: str) -> TensorInfo:
        """Return shape and dtype of a quantised module's weight."""
        raise NotImplementedError

    def weight(self, module: str) -> torch.Tensor:
        """Dequantise the weight of a module."""
        raise NotImplementedError


# Show the language model inside a checkpoint: one spelling of names, each expert's matrices apart.
#
# Vision-language checkpoints call their blocks ``model.language_model.layers``; some keep the experts of a
# block as one tensor of three dimensions; beside them lie vision towers and draft heads (``mtp``), which
# nothing here runs. ``TextView`` shows what runs under the names that transformers' causal language model
# has, with each expert's matrices apart: ``model.layers.3.mlp.experts.7.gate_proj.weight``. ``whole`` keeps
# the files as they are: what is published is written from it.


_NOT_RUN = re.compile(r"(mtp|visual|model\.visual)\.")
"""Draft heads and vision towers: published as they are, and no part of the language model."""
_FUSED = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


class TextView(PartsView):
    """A source that shows a checkpoint's language model alone.

    Args:
        whole: the tensors as the files name them.
        hidden: the width of the hidden states, which tells how fused experts are oriented.
        layers: how many blocks run; None: all that there are. DeepSeek and GLM store draft heads behind them.
        rename: the name in transformers' model of a name in the files, where these differ.
    """

    def __init__(
        self,
        whole: TensorSource,
        hidden: Any,
        folder: Path | None = None,
        *,
        layers: int | None = None,
        rename: Callable[[str], str] = str,
    ) -> None:
        super().__init__(whole, {})
        self._stored_modules: dict[str, str] = {}
        self._drafts: dict[str, str] = {}
        names = list(whole.names())
        self.nested = any(name.startswith(NESTED) for name in names)
        stored = self._by_model_name(names, layers, rename)
        for shown, name in stored.items():
            if (fused := _FUSED.fullmatch(shown)) is None:
                self._parts[shown] = Part(name)
            else:
                full = (f"{fused[1]}.{kind}" for kind in ("gate_up_proj", "down_proj"))
                both = [stored.get(each, each) for each in full]
                transposed = _is_transposed(whole, both, hidden, folder)
                self._parts.update(_experts(fused[1], fused[2], name, whole.info(name).shape[0], transposed))
        self._shown: dict[str, list[str]] = {}
        for shown, part in self._parts.items():
            self._shown.setdefault(part.stored, []).append(shown)
        self.plain = len(self._parts) == len(names) and all(
            shown == part.stored for shown, part in self._parts.items()
        )

    def _by_model_name(
        self, names: Iterable[str], layers: int | None, rename: Callable[[str], str]
    ) -> dict[str, str]:
        """Return the names in the files of the language model's tensors, by those in transformers' model."""
        found = {}
        for name in names:
            if name.startswith("lm_head.") or (not self.nested and not _NOT_RUN.match(name)):
                shown = name
            elif self.nested and name.startswith(NESTED):
                shown = "model." + name.removeprefix(NESTED)
            else:
                continue
            if layers is not None and (m := _LAYER.match(shown)) is not None and int(m[1]) >= layers:
                self._drafts[name] = m[1]
                continue
            if (renamed := rename(shown)) != shown:
                self._stored_modules[renamed.rpartition(".")[0]] = shown.rpartition(".")[0]
            found[renamed] = name
        return found

    def shown(self, stored: str) -> list[str]:
        """Return the names under which a tensor of the files is shown: none, one, or its experts'."""
        return self._shown.get(stored, [])

    @property
    def beside(self) -> list[str]:
        """Return patterns of what lies beside the language model: ``mtp``, ``visual``, blocks of drafts."""
        hidden = [name for name in self.whole.names() if not self.shown(name)]
        named = [part for part in ("mtp", "visual") if any(f"{part}." in name for name in hidden)]
        return named + [rf"\.layers\.{number}\." for number in dict.fromkeys(self._drafts.values())]

    def published(self, shown: str) -> str:
        """Return the name that a tensor of the language model has in files of this checkpoint's layout."""
        module, _, leaf = shown.rpartition(".")
        if (stored := self._stored_modules.get(module)) is not None:
            shown = f"{stored}.{leaf}"
        if self.nested and shown.startswith("model."):
            return NESTED + shown.removeprefix("model.")
        return shown


def _is_transposed(whole: TensorSource, both: Sequence[str], hidden: Any, folder: Path | None) -> bool:
    """Return whether fused experts are stored as [expert, in, out]; both of their tensors have to agree."""
    gate_up, down = (whole.info(name).shape for name in both)
    prefix = both[0].rpartition(".")[0]
    if len(gate_up) == len(down) == 3 and gate_up[0] == down[0]:
        if gate_up[1:] == (2 * down[2], hidden) and down[1] == hidden:
            return False
        if gate_up[1:] == (hidden, 2 * down[1]) and down[2] == hidden:
            return True
    raise ModelError(
        f"the experts' gate_up_proj {list(gate_up)} and down_proj {list(down)} do not fit each other at a "
        f"hidden size of {hidden}",
        where=f"{prefix} in {folder}" if folder else prefix,
        hint="config.json and the weights are from different models: copy the folder again",
    )


def _experts(prefix: str, kind: str, stored: str, experts: int, transposed: bool) -> dict[str, Part]:
    """Return the parts of one fused tensor: a matrix [out, in] for each expert, or two for gate and up."""
    if kind == "down_proj":
        return {f"{prefix}.{e}.down_proj.weight": Part(stored, e, transposed) for e in range(experts)}
    return {
        f"{prefix}.{e}.{name}.weight": Part(stored, e, transposed, 0, half, 2)
        for e in range(experts)
        for half, name in enumerate(("gate_proj", "up_proj"))  # gate's rows come first
    }
