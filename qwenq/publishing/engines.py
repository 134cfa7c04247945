"""Say which engines load a GPTQ checkpoint, and on how many GPUs: their rules as code.

The rules are those of the versions in ``ENGINES``, read in their loaders: which settings a kernel takes,
which modules an engine fuses, what it expects of ``dynamic`` and ``modules_in_block_to_quantize``. No engine
is imported; only the headers of the files are read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from qwenq.errors import ModelError, UsageError
from qwenq.models.autoround import is_autoround
from qwenq.models.block_shapes import ROW_PARALLEL, splits_groups, unshared_heads
from qwenq.models.checkpoint import Checkpoint
from qwenq.models.gptq_config import EXPERT, FUSED, QuantConfig, engine_layer, rule_for
from qwenq.models.gptq_format import quantised_modules
from qwenq.storage import read_json

_NOT_LINEAR = re.compile(r"(embed_tokens|lm_head|norm\w*|visual|vision_tower|conv1d|mtp)(\.|$)")
_STACKED = re.compile(r"(.*\.experts)\.(?!\d)\w+$")
"""The weights of all experts of a block in one tensor, which is not quantised."""
_LAYER = re.compile(r"layers\.(\d+)\.")
_GROUPS = (-1, 32, 64, 128)
_TORCH_INT4_GROUPS = (32, 64, 128, 256)
"""What torch's Int4 product takes on a CPU, which gptqmodel chooses for whole rows."""
_WITH_PICTURES = ("qwen3_5", "qwen3_vl")
"""Model types whose class in vLLM is that of pictures, also for a file of text alone."""


@dataclass(frozen=True)
class Problem:
    """Why an engine does not load a checkpoint, and what mends it."""

    reason: str
    remedy: str


@dataclass(frozen=True)
class Verdict:
    """Whether an engine of a version loads a checkpoint on a number of GPUs: without problems it does.

    ``notes`` are what else a user of it has to know.
    """

    engine: str
    version: str
    gpus: int
    problems: tuple[Problem, ...]
    notes: tuple[str, ...] = ()

    @property
    def loads(self) -> bool:
        """Return whether nothing stands in the way."""
        return not self.problems


@dataclass(frozen=True)
class Module:
    """A quantised linear: its settings and its weight's [rows, columns] = [out, in]."""

    quant: QuantConfig
    rows: int
    columns: int


@dataclass(frozen=True)
class GptqFolder:
    """What the rules ask of a checkpoint, from its config and the headers of its files."""

    config: Mapping[str, Any]  # config.json, whole
    quant: QuantConfig  # its quantization_config
    modules: Mapping[str, Module]  # the quantised linears by name
    plain: tuple[str, ...]  # names of unquantised matrices that engines build as linear layers
    names: tuple[str, ...]  # of all tensors
    counted_in: str = ""  # the part whose modules these are, such as "each block"; empty: the whole folder

    @cached_property
    def text(self) -> Mapping[str, Any]:
        """Return the config of the language model."""
        nested = self.config.get("text_config")
        return nested if isinstance(nested, dict) else self.config

    @property
    def has_experts(self) -> bool:
        """Return whether it is a mixture of experts."""
        return any(EXPERT.match(name) for name in self.modules)

    @cached_property
    def exceptional_experts(self) -> list[str]:
        """Return the modules of experts that are unquantised, or whose settings are not those of ``quant``.

        Draft layers, which stand behind the last layer, are not counted.
        """
        common, layers = _settings(self.quant), int(self.text.get("num_hidden_layers") or 0)
        other = [name for name, module in self.modules.items() if _settings(module.quant) != common]
        stacked = [name for name in self.names if not _NOT_LINEAR.search(name)]
        found = [EXPERT.match(name) for name in (*other, *self.plain)]
        found += [_STACKED.match(name) for name in stacked]
        experts = {match[1] for match in found if match}
        return sorted(name for name in experts if not (at := _LAYER.search(name)) or int(at[1]) < layers)


def read_gptq_folder(checkpoint: Checkpoint) -> GptqFolder:
    """Return what the rules ask of a quantised checkpoint."""
    if checkpoint.foreign is not None:
        raise UsageError(
            f"the rules are about GPTQ files, and this is {checkpoint.foreign.format.name}",
            where=checkpoint.folder,
            hint="engines load what the tool that wrote it says",
        )
    if is_autoround(read_json(checkpoint.folder / "config.json")):
        raise UsageError(
            "the rules are about GPTQ files, and this config.json is AutoRound's",
            where=checkpoint.folder,
            hint="`qwenq convert` writes it as a GPTQ folder",
        )
    config = checkpoint.published_config
    if "quantization_config" not in config:
        raise UsageError(
            "this model is not quantised: every engine loads it that knows its architecture",
            where=checkpoint.folder,
            hint="name a folder that `qwenq quantize` made",
        )
    quant = QuantConfig.read(config, checkpoint.folder / "config.json")
    source = checkpoint.published
    names = tuple(source.names())
    modules = {}
    for name in quantised_modules(source):
        own = quant.of(name)
        packed, rows = source.info(f"{name}.qweight").shape
        modules[name] = Module(own, rows, packed * 32 // own.bits)
    weights = [name.removesuffix(".weight") for name in names if name.endswith(".weight")]
    linears = (module for module in weights if not _NOT_LINEAR.search(module))
    plain = tuple(module for module in linears if len(source.info(f"{module}.weight").shape) == 2)
    return GptqFolder(config, quant, modules, plain, names)


def planned_gptq_folder(
    config: Mapping[str, Any], quant: QuantConfig, linears: Mapping[str, tuple[int, int]], kept: Iterable[str]
) -> GptqFolder:
    """Return what the rules ask of a checkpoint that is not written yet.

    ``linears`` are [out, in] of those to quantise, by their names in a block; ``kept`` are the names of the
    modules that are not.
    """
    block = "model.layers.0."
    modules = {
        block + name: Module(quant.of(block + name), rows, columns)
        for name, (rows, columns) in linears.items()
    }
    plain = tuple(block + name for name in kept if not _NOT_LINEAR.search(name))
    return GptqFolder(config, quant, modules, plain, names=(), counted_in="each block")


def engine_verdicts(
    folder: GptqFolder, engines: Iterable[str] = (), gpus: Iterable[int] = (1,)
) -> list[Verdict]:
    """Return a verdict by engine (names of ``ENGINES``; none: all of them) and number of GPUs.

    Engines without tensor parallelism are asked about one GPU only.
    """
    found = []
    for name in tuple(engines) or tuple(ENGINES):
        if name not in ENGINES:
            raise UsageError(
                f"the rules of {name!r} are not known", where="--for", hint=f"known: {', '.join(ENGINES)}"
            )
        version, rules, by_gpus, notes = ENGINES[name]
        problems = tuple(problem for rule in rules for problem in rule(folder))
        for count in gpus if by_gpus else (1,):
            own = tuple(problem for rule in by_gpus for problem in rule(folder, count))
            found.append(Verdict(name, version, count, problems + own, tuple(notes(folder))))
    return found


# Rules: each yields what it finds wrong, with the number of modules that it concerns.


def _marlin_settings(folder: GptqFolder) -> Iterator[Problem]:
    """Symmetric 4 and 8 bits, groups of 32, 64, 128 or whole rows, in the order of the file."""
    quants = [module.quant for module in folder.modules.values()]
    if wrong := [quant for quant in quants if not quant.sym]:
        yield Problem(
            f"{_count(wrong, folder)} free zero points; its kernels take symmetric weights",
            "quantise the model without --asym",
        )
    if wrong := [quant for quant in quants if quant.bits not in (4, 8)]:
        widths = _listed({quant.bits for quant in wrong})
        yield Problem(f"{_count(wrong, folder)} {widths} bits; it takes 4 and 8", "use --bits 4 or 8")
    if wrong := [quant for quant in quants if quant.group_size not in _GROUPS]:
        sizes = _listed({quant.group_size for quant in wrong})
        yield Problem(
            f"{_count(wrong, folder)} groups of {sizes}; it takes 32, 64, 128 and whole rows",
            "use --group-size 32, 64 or 128",
        )
    if wrong := [quant for quant in quants if quant.desc_act and quant.group_size != -1]:
        yield Problem(
            f"{_count(wrong, folder)} their columns in activation order (desc_act)",
            "quantise it with --act-order static, which keeps the columns in the order of the file",
        )


def _fused_alike(folder: GptqFolder) -> Iterator[Problem]:
    """Modules that an engine fuses have one setting, and all or none of them are quantised."""
    parents = {name.rpartition(".")[0] for name in (*folder.modules, *folder.plain)}
    partly, mixed = [], []
    for parent in sorted(parents):
        for fused, parts in FUSED.items():
            own = [f"{parent}.{part}" for part in parts]
            quantised = [folder.modules[name] for name in own if name in folder.modules]
            if quantised and any(name in folder.plain for name in own):
                partly.append(f"{parent}.{fused}")
            elif len({_settings(module.quant) for module in quantised}) > 1:
                mixed.append(f"{parent}.{fused}")
    experts: dict[str, set[Any]] = {}
    for name, module in folder.modules.items():
        if found := EXPERT.match(name):
            experts.setdefault(found[1], set()).add(_settings(module.quant))
    mixed += [name for name, settings in experts.items() if len(settings) > 1]
    if partly:
        yield Problem(
            f"of {_some(partly)} some parts are quantised and some are not",
            "give all of its parts the same --module-bits",
        )
    if mixed:
        yield Problem(
            f"the parts of {_some(mixed)} have different settings, and are one layer there",
            "give all of its parts the same --module-bits",
        )


def _dynamic_by_fused_names(folder: GptqFolder) -> Iterator[Problem]:
    """``dynamic`` gives a fused layer what it gives the parts: engines look its own name up."""
    if not folder.quant.dynamic:
        return
    wrong = []
    for name, module in folder.modules.items():
        fused = engine_layer(name)
        try:
            found = folder.quant.of(fused)
        except ModelError:  # a rule says that it is not quantised
            found = None
        if found is None or _settings(found) != _settings(module.quant):
            wrong.append(fused)
    if wrong:
        yield Problem(
            f"dynamic has other settings for {_some(sorted(set(wrong)))} than the files",
            "write rules that match the fused names, too, such as "
            r"+:.*\.self_attn\.(q_proj|k_proj|v_proj|qkv_proj)$",
        )


def _draft_layers_excluded(folder: GptqFolder) -> Iterator[Problem]:
    """Draft (MTP) layers are built unquantised only where a negative rule names them."""
    has_drafts = any(re.search(r"(^|\.)mtp\.", name) for name in folder.names)
    if has_drafts and not any(key.startswith("-:") and "mtp" in key for key in folder.quant.dynamic):
        yield Problem("dynamic has no rule -:.*mtp.*, so the draft layers are taken as quantised",
                      'add "-:.*mtp.*": {} to dynamic of config.json')  # fmt: skip


def _plain_layers_excluded(folder: GptqFolder) -> Iterator[Problem]:
    """Every unquantised linear needs a negative rule: nothing is detected from the files."""
    rules = {name: rule_for(folder.quant.dynamic, name) for name in folder.plain}
    if missing := [name for name, rule in rules.items() if rule is None or not rule[0].startswith("-:")]:
        yield Problem(
            f"dynamic has no negative rule for {_some(missing)}, which it then takes as quantised",
            'add a rule "-:…": {} for each to dynamic of config.json',
        )


def _experts_as_all(folder: GptqFolder) -> Iterator[Problem]:
    """Experts have the common settings: ``dynamic`` is looked up for linear layers alone."""
    if own := folder.exceptional_experts:
        yield Problem(
            f"it passes over dynamic for experts, by which {_some(own)} differ from the common settings",
            "give experts the bits of --bits, and other modules theirs with --module-bits",
        )


def _converted(folder: GptqFolder) -> Iterator[Problem]:
    """Qwen v1 is gone from current engines; its weights fit the layout of Qwen2."""
    if folder.config.get("model_type") == "qwen":
        yield Problem(
            "it no longer has the architecture of Qwen v1", "run `qwenq convert` on the folder first"
        )


def _one_setting(folder: GptqFolder) -> Iterator[Problem]:
    """optimum replaces plain linears by one kind of quantised ones, and reads no ``dynamic``."""
    if folder.has_experts:
        yield Problem(
            "transformers keeps experts as one tensor, and optimum replaces linear layers only",
            "load it with GPTQModel, vLLM or SGLang",
        )
    if len({_settings(module.quant) for module in folder.modules.values()}) > 1:
        yield Problem(
            "optimum has one setting for all modules, and this file has several",
            "load it with GPTQModel, vLLM or SGLang",
        )
    if folder.plain and not folder.has_experts and not folder.quant.modules:
        yield Problem(
            f"{_some(list(folder.plain))} are not quantised, which modules_in_block_to_quantize does not say",
            "quantise it again with this version, which writes that key",
        )


def _stored_zeros(folder: GptqFolder) -> Iterator[Problem]:
    """GPTQModel refuses free zero points in the format that stores them minus one."""
    if not folder.quant.sym and folder.quant.checkpoint_format == "gptq":
        yield Problem("it reads free zero points in the format gptq_v2 only",
                      "quantise it again with this version, which writes gptq_v2")  # fmt: skip


def _tensor_parallel(folder: GptqFolder, gpus: int) -> Iterator[Problem]:
    """Heads are shared evenly, and a GPU gets whole groups of what is split along its inputs."""
    if gpus == 1:
        return
    heads = int(folder.text.get("num_attention_heads", 0))
    kv_heads = int(folder.text.get("num_key_value_heads") or heads)
    recurrent = [int(folder.text.get(f"linear_num_{kind}_heads") or 0) for kind in ("key", "value")]
    choose = "choose another number of GPUs"
    for unshared in unshared_heads(gpus, heads, kv_heads, recurrent):
        yield Problem(f"{unshared} cannot be shared by {gpus} GPUs", choose)
    split, rows = set(), set()
    for name, module in folder.modules.items():
        leaf = name.rpartition(".")[2]
        if leaf in ROW_PARALLEL:
            group = module.quant.group_size
            if splits_groups(module.columns, group, gpus):
                split.add((leaf, module.columns, group))
        elif module.rows % gpus:
            rows.add((leaf, module.rows))
    for leaf, columns, group in sorted(split):
        smaller = [size for size in (64, 32) if size < group and not columns % (gpus * size)]
        yield Problem(
            f"the {columns:,} inputs of {leaf} in groups of {group} cannot be split among {gpus} GPUs",
            f"use --group-size {smaller[0]}" if smaller else "use fewer GPUs",
        )
    for leaf, count in sorted(rows):
        yield Problem(f"the {count:,} outputs of {leaf} are not a multiple of {gpus} GPUs", choose)


def _experts_in_marlin(folder: GptqFolder, gpus: int) -> Iterator[Problem]:
    """Experts that its Marlin kernel does not take go another way, which does not look ``dynamic`` up."""
    if not (own := folder.exceptional_experts):
        return
    text, group = folder.text, folder.quant.group_size
    width = int(text.get("moe_intermediate_size") or text.get("intermediate_size") or 0) // gpus
    smaller: list[int] = []
    if text["hidden_size"] % 128:
        why = f"the model is {text['hidden_size']:,} wide, no multiple of 128"
    elif group > 0 and width % group:
        share = " on each GPU" if gpus > 1 else ""
        why = f"experts are {width:,} wide{share}, no whole number of groups of {group}"
        smaller = [size for size in (64, 32) if size < group and not width % size]
    else:
        return
    yield Problem(
        f"{why}: then it passes over dynamic, by which {_some(own)} differ from the common settings",
        f"use --group-size {smaller[0]}" if smaller else "give experts the bits of --bits",
    )


def _no_notes(_: GptqFolder) -> Iterator[str]:
    yield from ()


def _gptqmodel_notes(folder: GptqFolder) -> Iterator[str]:
    whole = (m for m in folder.modules.values() if m.quant.group_size == -1 and m.quant.bits == 4)
    if any(module.columns not in _TORCH_INT4_GROUPS for module in whole):
        yield 'on a CPU, its default kernel stops at Int4 of whole rows; backend="torch" runs it'


def _vllm_notes(folder: GptqFolder) -> Iterator[str]:
    if any(module.quant.bits == 8 for module in folder.modules.values()):
        yield "its CPU build takes Int4 only, and layers left in 16 bits"
    elif folder.has_experts:
        yield "its CPU build runs Int4 experts only on CPUs with AMX"
    else:
        yield "its CPU build runs Int4 only on CPUs with AVX-512"
    if str(folder.config.get("model_type")).startswith(_WITH_PICTURES):
        yield "its class of this model imports torchvision"


def _transformers_notes(folder: GptqFolder) -> Iterator[str]:
    yield "needs optimum and gptqmodel beside it"
    yield from _gptqmodel_notes(folder)


Rule = Callable[[GptqFolder], Iterator[Problem]]
ByGpus = Callable[[GptqFolder, int], Iterator[Problem]]
Notes = Callable[[GptqFolder], Iterator[str]]
_SERVED: tuple[Rule, ...] = (_converted, _marlin_settings, _fused_alike, _dynamic_by_fused_names)
ENGINES: dict[str, tuple[str, tuple[Rule, ...], tuple[ByGpus, ...], Notes]] = {
    "vllm": (
        "0.33.0",
        (*_SERVED, _draft_layers_excluded),
        (_tensor_parallel, _experts_in_marlin),
        _vllm_notes,
    ),
    "sglang": (
        "0.5.23",
        (*_SERVED, _plain_layers_excluded, _experts_as_all),
        (_tensor_parallel,),
        _no_notes,
    ),
    "transformers": ("5.24", (_converted, _stored_zeros, _one_setting), (), _transformers_notes),
    "gptqmodel": ("7.7.0", (_converted, _stored_zeros), (), _gptqmodel_notes),
}
"""Engines: the version whose rules these are, the rules, rules by the number of GPUs that share a model (none
where an engine splits no model), and notes."""


def _settings(quant: QuantConfig) -> tuple[int, int, bool, bool]:
    return quant.bits, quant.group_size, quant.sym, quant.desc_act


def _count(modules: Sized, folder: GptqFolder) -> str:
    """Return such as ``3 modules of each block have``."""
    one = len(modules) == 1
    part = f" of {folder.counted_in}" if folder.counted_in else ""
    return f"{len(modules)} module{'' if one else 's'}{part} {'has' if one else 'have'}"


def _listed(values: set[int]) -> str:
    return ", ".join(map(str, sorted(values)))


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
