"""Load a model into an engine: the fast decoder or transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from qwenq.compute import cpu, gpu
from qwenq.compute.gpu import triton_label
from qwenq.environment import __version__
from qwenq.errors import UsageError
from qwenq.models.checkpoint import Checkpoint, open_checkpoint
from qwenq.models.machine import compute_dtype, resolve_device
from qwenq.recipe import EngineName
from qwenq.runtime.attention import attention_backend
from qwenq.runtime.cache import KVCache
from qwenq.runtime.cuda_graph import Graphs
from qwenq.runtime.decoder import Decoder
from qwenq.runtime.generation import Engine, checked, sum_in_float32

__all__ = ["DTYPES", "HEADS", "Engine", "EngineName", "FastEngine", "find_attention", "find_dtype", "load"]

HEADS = ("as-is", "int8")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class FastEngine(Engine):
    """The lean decoder."""

    name = "fast"

    def __init__(self, decoder: Decoder, real_vocab: int | None = None) -> None:
        self.decoder = decoder
        head = "" if decoder.head.name in ("dense", decoder.kernel) else f", {decoder.head.name}"
        self.implementation = (
            f"qwenq {__version__} fast, kernel {decoder.kernel}{head}, "
            f"attention {decoder.attend.name}: {decoder.attend.implementation}; torch {torch.__version__}"
        )
        self.notes = decoder.notes
        if decoder.device.type == "cpu" and decoder.dtype is torch.bfloat16 and cpu.float32_is_faster():
            self.implementation += ", prompts multiplied by float32 units"
        if decoder.spec.shape.linear_attention is not None:
            self.implementation += ", linear attention of prompts in torch"
        if decoder.compiled is not None:
            self.implementation += ", decode steps compiled for this CPU"
        self._graphs = None
        if (reason := Graphs.unsupported_reason(decoder)) is None:
            self._graphs = Graphs(decoder)
            self.implementation += ", decode steps in CUDA graphs"
            if reason := gpu.unsupported_reason(decoder.device):
                what = "the faster kernels for norms, rotation and activation of decode steps"
                self.notes = (*self.notes, f"{what} are not used because {reason}")
            else:
                self.implementation += f", between products {triton_label()}"
        elif decoder.device.type == "cuda":
            self.notes = (*self.notes, f"decode steps run without CUDA graphs because {reason}")
        self.device, self.dtype = decoder.device, decoder.dtype
        self.vocab_size, self.context = decoder.spec.shape.vocab, decoder.spec.shape.context
        self.real_vocab = min(decoder.spec.real_vocab, real_vocab or decoder.spec.real_vocab)

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """Return an empty cache."""
        return self.decoder.new_cache(batch, capacity)

    @torch.inference_mode()
    def decode(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Add one token to each row, by a graph where there is one."""
        if self._graphs is None or not self._graphs.wants(cache):
            return super().decode(tokens, cache)
        self._check_step(tokens, cache)
        with self._step_memory(cache):
            return checked(self._graphs.decode(tokens, cache), self.dtype, prompt=False)

    def prompt_alpha(self, tokens: int) -> int:
        """Return Qwen v1's NTK factor for a prompt of that length."""
        return self.decoder.rope.alpha(tokens)

    def forward(self, ids: Tensor, counts: Sequence[int], cache: KVCache) -> Tensor:
        """Run new tokens through the decoder."""
        return self.decoder.forward(ids, counts, cache)

    def head(self, hidden: Tensor) -> Tensor:
        """Return float32 logits."""
        return self.decoder.logits(hidden)


def load(
    model: Path | Checkpoint,
    *,
    device: str = "auto",
    dtype: str | torch.dtype = "auto",
    engine: str = "fast",
    kernel: str = "auto",
    attention: str = "auto",
    head: str = "as-is",
    real_vocab: int | None = None,
) -> Engine:
    """Load a model folder, full precision or GPTQ, Qwen v1 or newer, to run it.

    Args:
        model: a model folder, or an open checkpoint.
        device: ``auto`` (a CUDA GPU if there is one), ``cpu``, ``cuda``, ``cuda:1``.
        dtype: ``auto`` (see ``find_dtype``), or a name in DTYPES.
        engine: ``fast`` (the lean decoder) or ``transformers``.
        kernel: what multiplies quantised weights, see ``quantised_linear.KERNELS``; ``auto``: the fastest.
        attention: see ``attention_backend``; or ``auto``, see ``find_attention``.
        head: ``as-is``, or ``int8``: the output head rounded to 8 bits (fast engine, CPU, bfloat16).
        real_vocab: never sample ids from here on; None: as the config says.

    Raises:
        UsageError: a device, dtype, engine, kernel or attention that does not exist here; no real vocabulary.
        ModelError: the folder cannot be read, or its weights do not fit its config.
        UnsupportedError: the engine cannot run this architecture, or what was asked for cannot run here.
        OutOfMemoryError: the weights take more than what is free.
    """
    if engine not in ("fast", "transformers"):
        raise UsageError(f"there is no engine {engine!r}", where="--engine", hint="use fast or transformers")
    heads = HEADS if engine == "fast" else HEADS[:1]
    if head not in heads:
        hint = f"use {' or '.join(heads)}{'' if head not in HEADS else ', or --engine fast'}"
        raise UsageError(f"the engine {engine} has no head {head!r}", where="--head", hint=hint)
    if real_vocab is not None and real_vocab < 1:
        raise UsageError(f"no token can be sampled from a vocabulary of {real_vocab} ids")
    torch_device = resolve_device(device)
    torch_dtype = find_dtype(dtype, torch_device, engine)
    sum_in_float32(torch_device, torch_dtype)
    backend = attention_backend(find_attention(attention, engine, torch_device), torch_device, torch_dtype)
    checkpoint = model if isinstance(model, Checkpoint) else open_checkpoint(model)
    parts = checkpoint, torch_device, torch_dtype, backend
    if engine == "transformers":
        from qwenq.runtime.transformers_engine import TransformersEngine

        loaded: Engine = TransformersEngine(*parts, kernel, real_vocab)
    else:
        loaded = FastEngine(Decoder(*parts, kernel, head), real_vocab)
    emulated = torch_dtype is torch.bfloat16 and compute_dtype(torch_device) is not torch.bfloat16
    if emulated and (engine != "fast" or torch_device.type != "cpu" or cpu.unsupported_reason() is not None):
        note = f"bfloat16 is emulated: this {torch_device.type} has no instructions for it"
        loaded.notes = (*loaded.notes, note)
    return loaded


def find_attention(name: str, engine: str, device: torch.device) -> str:
    """Return the backend of a name; ``auto``: ``grouped`` in the fast engine on a CPU, else ``sdpa``."""
    if name != "auto":
        return name
    return "grouped" if engine == "fast" and device.type == "cpu" else "sdpa"


def find_dtype(name: str | torch.dtype, device: torch.device, engine: str = "fast") -> torch.dtype:
    """Return the dtype of that name; ``auto`` is what an engine runs fastest on the device.

    On a CPU the fast engine reads bfloat16 weights wherever C kernels run: they widen it in registers, so
    that it needs no instructions for bfloat16. transformers takes it where torch does not emulate it.
    """
    if isinstance(name, torch.dtype):
        return name
    if name == "auto":
        widened = engine == "fast" and device.type == "cpu" and cpu.unsupported_reason() is None
        return torch.bfloat16 if widened else compute_dtype(device)
    if name not in DTYPES:
        raise UsageError(
            f"{name!r} is not a dtype that models run in", where="--dtype", hint=f"use {', '.join(DTYPES)}"
        )
    return DTYPES[name]
