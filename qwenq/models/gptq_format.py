"""Check GPTQ checkpoints, read their modules, and show them as plain checkpoints.

The layout of one module's tensors is in ``packing``, the settings in ``gptq_config`` (shown here as well).
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from qwenq.errors import ModelError
from qwenq.models.gptq_config import QuantConfig, is_quantised
from qwenq.models.source import TensorInfo, TensorSource

if TYPE_CHECKING:
    import torch

    from qwenq.models.packing import CheckpointFormat, PackedLinear

__all__ = [
    "DequantisedSource",
    "QuantConfig",
    "check_module_shapes",
    "is_quantised",
    "quantised_modules",
    "read_packed",
    "stored_format",
    "surplus_biases",
    "validate_quantised",
]

PACKED_PARTS = ("qweight", "qzeros", "scales", "g_idx")


def quantised_modules(source: TensorSource) -> list[str]:
    """Return names of the modules that have a ``.qweight``, in file order."""
    return [name.removesuffix(".qweight") for name in source.names() if name.endswith(".qweight")]


def read_packed(
    source: TensorSource, module: str, quant: QuantConfig, names: Container[str] | None = None
) -> PackedLinear:
    """Read the packed tensors of one module; without act-order a missing ``g_idx`` is trivial.

    Args:
        source: of the tensors.
        module: whose.
        quant: their settings.
        names: of all tensors, for callers that read many modules; None: they are asked for.
    """
    from qwenq.models.packing import PackedLinear, trivial_g_idx

    names = set(source.names()) if names is None else names
    quant = quant.of(module)
    check_module_shapes(source, names, module, quant)
    qweight = source.read(f"{module}.qweight")  # [in * bits / 32, out]
    if f"{module}.g_idx" in names:
        g_idx = source.read(f"{module}.g_idx")
    else:
        g_idx = trivial_g_idx(qweight.shape[0] * 32 // quant.bits, quant.group_size)
    return PackedLinear(qweight, source.read(f"{module}.qzeros"), source.read(f"{module}.scales"), g_idx)


class DequantisedSource:
    """A GPTQ checkpoint that reads like a plain one: ``X.weight`` in place of ``X.qweight`` and its company.

    Weights are dequantised when they are read. All-zero biases that AutoGPTQ wrote beside modules which have
    none (its releases up to 0.7.1) are hidden.

    Args:
        source: the packed tensors.
        quant: their settings.
        dtype: of the weights that are shown; None: that of the scales.
        config: config.json: biases that it asks for are shown, also where they are zero.
    """

    def __init__(
        self,
        source: TensorSource,
        quant: QuantConfig,
        dtype: torch.dtype | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self._source = source
        self._quant = quant
        self._config = config or {}
        self._dtype = dtype
        self._stored = frozenset(source.names())
        self._modules = {f"{module}.weight": module for module in quantised_modules(source)}
        self._names: list[str] | None = None

    def names(self) -> Iterable[str]:
        """Return all names, in file order; a weight stands where the first of its packed tensors stood."""
        if self._names is None:
            packed = {f"{m}.{part}": f"{m}.weight" for m in self._modules.values() for part in PACKED_PARTS}
            hidden = surplus_biases(self._source, self._modules.values(), self._config)
            shown = (packed.get(name, name) for name in self._source.names() if name not in hidden)
            self._names = list(dict.fromkeys(shown))
        return self._names

    def info(self, name: str) -> TensorInfo:
        """Return shape and dtype, without dequantising."""
        if name not in self._modules:
            return self._source.info(name)
        module = self._modules[name]
        words, out_features = self._source.info(f"{module}.qweight").shape
        dtype = self._dtype or self._source.info(f"{module}.scales").dtype
        return TensorInfo((out_features, words * 32 // self._quant.of(module).bits), dtype)

    def read(self, name: str) -> torch.Tensor:
        """Read a tensor; a quantised weight as ``[out, in]`` in the dtype that ``info`` names."""
        from qwenq.models.packing import dequantise

        if name not in self._modules:
            return self._source.read(name)
        packed = read_packed(self._source, self._modules[name], self._quant, self._stored)
        quant = self._quant.of(self._modules[name])
        return dequantise(packed, quant.bits, quant.checkpoint_format, self.info(name).dtype)


def surplus_biases(
    source: TensorSource, modules: Iterable[str], config: Mapping[str, Any] | None = None
) -> set[str]:
    """Return all-zero biases of quantised modules that have none in a Qwen or Llama block: o, gate, up, down.

    Args:
        source: the packed tensors.
        modules: names of the quantised modules.
        config: config.json, which may ask for some of these biases; nothing asks for any without it.
    """
    config = config or {}
    names, kind = set(source.names()), config.get("model_type")
    of_mlp = kind == "llama" and config.get("mlp_bias")
    suffixes = () if of_mlp else (".gate_proj", ".up_proj", ".down_proj")
    if kind == "qwen2" or not config.get("attention_bias"):
        suffixes = (*suffixes, ".o_proj")
    candidates = [f"{m}.bias" for m in modules if m.endswith(suffixes) and f"{m}.bias" in names]
    return {name for name in candidates if not bool(source.read(name).any())}


def validate_quantised(source: TensorSource, quant: QuantConfig) -> list[str]:
    """Check every quantised module against the config; returns their names.

    Raises:
        ModelError: no quantised module at all, a tensor of a module is missing, a shape contradicts bits or
            group size, a ``g_idx`` names a group that does not exist, or the zero points of a symmetric model
            are stored in the other format than the config says.
    """
    modules = quantised_modules(source)
    if not modules:
        raise ModelError(
            "the config says GPTQ, but no tensor is named *.qweight",
            hint="the folder mixes the config and the weights of two models, or a shard is missing",
        )
    names = set(source.names())
    for module in modules:
        check_module_shapes(source, names, module, quant)
        if f"{module}.g_idx" in names:
            check_g_idx(source.read(f"{module}.g_idx"), module, quant)
        if quant.of(module).sym:
            check_symmetric_zeros(source.read(f"{module}.qzeros"), module, quant)
    return modules


def check_module_shapes(source: TensorSource, names: Container[str], module: str, quant: QuantConfig) -> None:
    """Check that one module's tensors are all there, in the shapes of its bits and group size."""
    quant = quant.of(module)
    required = PACKED_PARTS if quant.desc_act else PACKED_PARTS[:3]
    missing = [part for part in required if f"{module}.{part}" not in names]
    if missing:
        raise ModelError(
            f"a quantised module lacks {', '.join(missing)}",
            where=module,
            hint="a shard is missing or the file was cut; download or quantise the model again",
        )
    _check_types(source, names, module)
    words, out_features = source.info(f"{module}.qweight").shape
    in_features = words * 32 // quant.bits
    groups = quant.groups(in_features)
    expected = {
        "scales": (groups, out_features),
        "qzeros": (groups, out_features * quant.bits // 32),
        "g_idx": (in_features,),
    }
    for part, shape in expected.items():
        name = f"{module}.{part}"
        if name in names and source.info(name).shape != shape:
            raise ModelError(
                f"{part} is {list(source.info(name).shape)}, but bits {quant.bits} and group_size "
                f"{quant.group_size} make it {list(shape)} (qweight is {[words, out_features]})",
                where=name,
                hint="bits or group_size of quantization_config are not those of the weights",
            )


def _check_types(source: TensorSource, names: Container[str], module: str) -> None:
    """Check that words are int32, scales are real, and the weight is a matrix that is not empty."""
    for part in PACKED_PARTS:
        name = f"{module}.{part}"
        if name not in names:
            continue
        info = source.info(name)
        sound = info.dtype.is_floating_point if part == "scales" else str(info.dtype) == "torch.int32"
        if part == "qweight":
            sound = sound and len(info.shape) == 2 and info.numel > 0
        if not sound:
            raise ModelError(
                f"{part} is {info.dtype} {list(info.shape)}, which no GPTQ layer has",
                where=name,
                hint="the file is damaged or no GPTQ checkpoint; download or quantise the model again",
            )


def check_g_idx(g_idx: torch.Tensor, module: str, quant: QuantConfig) -> None:
    """Check that a module's ``g_idx`` names groups that exist."""
    groups = quant.of(module).groups(g_idx.shape[0])
    if int(g_idx.min()) < 0 or int(g_idx.max()) >= groups:
        raise ModelError(
            f"g_idx runs from {int(g_idx.min())} to {int(g_idx.max())}, but there are {groups} groups",
            where=f"{module}.g_idx",
            hint="the file is damaged, or group_size of quantization_config is wrong",
        )


def stored_format(source: TensorSource, quant: QuantConfig) -> CheckpointFormat:
    """Return the format in which zero points are stored; the first module tells.

    Files have been published that say ``gptq`` and hold zero points as ``gptq_v2`` does. Of a symmetric model
    every zero point is the middle, so its values tell.
    """
    from qwenq.models.packing import unpack_zeros

    module = next(iter(quantised_modules(source)), None)
    own = quant if module is None else quant.of(module)
    if module is None or not own.sym or f"{module}.qzeros" not in set(source.names()):
        return quant.checkpoint_format
    qzeros = source.read(f"{module}.qzeros")
    other: CheckpointFormat = "gptq_v2" if quant.checkpoint_format == "gptq" else "gptq"
    if str(qzeros.dtype) != "torch.int32" or qzeros.ndim != 2 or not qzeros.numel():
        return quant.checkpoint_format
    fits = bool((unpack_zeros(qzeros, own.bits, other) == 2 ** (own.bits - 1)).all())
    return other if fits else quant.checkpoint_format


def check_symmetric_zeros(qzeros: torch.Tensor, module: str, quant: QuantConfig) -> None:
    """Check that every zero point of a symmetric model is the middle; one off means the other format."""
    from qwenq.models.packing import unpack_zeros

    quant = quant.of(module)
    zeros = unpack_zeros(qzeros, quant.bits, quant.checkpoint_format)
    middle = 2 ** (quant.bits - 1)
    if bool((zeros == middle).all()):
        return
    other = "gptq_v2" if quant.checkpoint_format == "gptq" else "gptq"
    off_by_one = middle + 1 if other == "gptq_v2" else middle - 1
    if bool((zeros == off_by_one).all()):
        raise ModelError(
            f"the config says {quant.checkpoint_format}, but the zero points are stored as {other} does",
            where=f"{module}.qzeros",
            hint=f'set "checkpoint_format": "{other}" in config.json and quantize_config.json',
        )
    raise ModelError(
        f"the config says sym, but zero points run from {int(zeros.min())} to {int(zeros.max())}",
        where=f"{module}.qzeros",
        hint='an asymmetric model needs "sym": false; otherwise the file is damaged',
    )
