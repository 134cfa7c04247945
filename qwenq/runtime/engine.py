"""One protocol for everything that runs a model, and the door to the engines."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

from qwenq import __version__
from qwenq.compute import cpu
from qwenq.errors import UsageError
from qwenq.models.checkpoint import Checkpoint, open_checkpoint
from qwenq.models.precision import compute_dtype, resolve_device
from qwenq.runtime.attention import attention_backend
from qwenq.runtime.cache import KVCache
from qwenq.runtime.cached_engine import CachedEngine
from qwenq.runtime.cuda_graph import Graphs
from qwenq.runtime.finite import checked, sum_in_float32
from qwenq.runtime.fused_step import why_not_fused
from qwenq.runtime.generation import Generated, OnToken
from qwenq.runtime.kernels.triton_support import triton_label
from qwenq.runtime.sampling import GREEDY, Sampling

if TYPE_CHECKING:
    from qwenq.runtime.decoder import Decoder

EngineName = Literal["fast", "transformers"]
HEADS = ("as-is", "int8")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Engine(Protocol):
    """Runs a model over a cache. Every method works on a batch whose rows may differ in length.

    Attributes:
        name: ``fast`` or ``transformers``.
        implementation: what exactly runs, for the row of a table: kernel, attention, package versions.
        notes: what a user should know about the choices made at load (a faster kernel that was passed over,
            and why), one line each.
        device, dtype: where and in what.
        vocab_size: columns of the logits.
        real_vocab: ids from here on are padding and are never sampled.
        context: tokens that the model was made for; None where the config says nothing.
    """

    name: str
    implementation: str
    notes: tuple[str, ...]
    device: torch.device
    dtype: torch.dtype
    vocab_size: int
    real_vocab: int
    context: int | None

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache for ``batch`` rows of at most ``capacity`` tokens."""
        ...

    def prefill(
        self, prompts: Sequence[Sequence[int]], cache: KVCache, rows: Sequence[int] | None = None
    ) -> Tensor:
        """Add prompts to rows of a cache; the head is computed at the last token of each alone.

        Args:
            prompts: ``prompts[i]`` is added to row ``rows[i]``.
            cache: what came before.
            rows: these rows of the cache and no others; None: all of them, in order.

        Returns:
            Float32 [len(prompts), vocabulary] after each prompt's last token.

        Raises:
            UsageError: a prompt is empty, holds an id that is not in the vocabulary, or does not fit.
        """
        ...

    def decode(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Add one token to each row, int64 [batch]; float32 [batch, vocabulary] after it."""
        ...

    def logits(self, prompts: Sequence[Sequence[int]], cache: KVCache | None = None) -> list[Tensor]:
        """Float32 [len(prompts[r]), vocabulary] after *every* token of each row; fills the cache if given."""
        ...

    def prompt_alpha(self, tokens: int) -> int:
        """Qwen v1's NTK factor for a prompt of that length (see ``rope``); 1 everywhere else.

        A cache whose ``alphas`` differ from it cannot stand for the beginning of such a prompt.
        """
        ...

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        sampling: Sampling = GREEDY,
        stop_ids: Collection[int] = (),
        exact_tokens: bool = False,
        cache: KVCache | None = None,
        on_token: OnToken | None = None,
    ) -> Generated:
        """Answer each prompt.

        Args:
            prompts: ids of each row; with a cache, what follows there.
            max_new_tokens: at most so many per row.
            sampling: how tokens are chosen.
            stop_ids: each ends its row, and is not part of the answer.
            exact_tokens: give every row exactly ``max_new_tokens``: stop ids are suppressed, their logits
                −∞, as ``min_new_tokens`` does in transformers.
            cache: goes on from there; None: an empty one, of the size that is needed.
            on_token: called with (row, id) as tokens come.

        Raises:
            UsageError: as `prefill`, no token was asked for, or every id is suppressed.
        """
        ...


class FastEngine(CachedEngine):
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
        if decoder.compiled_step:
            self.implementation += ", decode steps compiled for this CPU"
        self._graphs = None
        if (why_not := Graphs.why_not(decoder)) is None:
            self._graphs = Graphs(decoder)
            self.implementation += ", decode steps in CUDA graphs"
            if why_not := why_not_fused(decoder):
                missed = "norms, rotation and activation of decode steps"
                self.notes = (*self.notes, f"the faster kernels for {missed} were passed over: {why_not}")
            else:
                self.implementation += f", between products {triton_label()}"
        elif decoder.device.type == "cuda":
            self.notes = (*self.notes, f"decode steps run without CUDA graphs: {why_not}")
        self.device, self.dtype = decoder.device, decoder.dtype
        self.vocab_size, self.context = decoder.spec.shape.vocab, decoder.spec.shape.context
        self.real_vocab = min(decoder.spec.real_vocab, real_vocab or decoder.spec.real_vocab)

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache."""
        return self.decoder.new_cache(batch, capacity)

    @torch.inference_mode()
    def decode(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Float32 [batch, vocabulary] after one more token in each row."""
        if self._graphs is None or not self._graphs.wants(cache):
            return super().decode(tokens, cache)
        self._check_step(tokens, cache)
        with self._step_memory(cache):
            return checked(self._graphs.decode(tokens, cache), self.dtype, prompt=False)

    def prompt_alpha(self, tokens: int) -> int:
        """Qwen v1's NTK factor for a prompt of that length."""
        return self.decoder.rope.alpha(tokens)

    def _hidden(self, ids: Tensor, counts: Sequence[int], cache: KVCache) -> Tensor:
        return self.decoder.forward(ids, counts, cache)

    def _head(self, hidden: Tensor) -> Tensor:
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
        dtype: ``auto`` (bfloat16 where the device has it, see ``compute_dtype``), or a name in DTYPES.
        engine: ``fast`` (the lean decoder) or ``transformers``.
        kernel: what multiplies quantised weights, see ``kernels.table``; ``auto``: the fastest that can.
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
        raise UsageError(f"of a vocabulary of {real_vocab} ids nothing can be sampled")
    place = resolve_device(device)
    number = find_dtype(dtype, place, engine)
    sum_in_float32(place, number)
    backend = attention_backend(find_attention(attention, engine, place), place, number)
    checkpoint = model if isinstance(model, Checkpoint) else open_checkpoint(model)
    if engine == "transformers":
        from qwenq.runtime.transformers_engine import TransformersEngine

        found: Engine = TransformersEngine(checkpoint, place, number, backend, kernel, real_vocab)
    else:
        from qwenq.runtime.decoder import Decoder

        found = FastEngine(Decoder(checkpoint, place, number, backend, kernel, head), real_vocab)
    emulated = number is torch.bfloat16 and compute_dtype(place) is not torch.bfloat16
    if emulated and (engine != "fast" or place.type != "cpu" or cpu.unsupported_reason() is not None):
        found.notes = (*found.notes, f"bfloat16 is emulated: this {place.type} has no instructions for it")
    return found


def find_attention(name: str, engine: str, device: torch.device) -> str:
    """The backend that is meant; ``auto``: ``grouped`` in the fast engine on a CPU, else ``sdpa``."""
    if name != "auto":
        return name
    return "grouped" if engine == "fast" and device.type == "cpu" else "sdpa"


def find_dtype(name: str | torch.dtype, device: torch.device, engine: str = "fast") -> torch.dtype:
    """Return the dtype of that name; ``auto`` is what an engine runs fastest on the device.

    On a CPU the fast engine reads bfloat16 weights wherever C kernels run: they widen it in registers, so
    that it needs no instructions for bfloat16. transformers takes it where torch does not emulate it.

    Raises:
        UsageError: no such dtype.
    """
    if isinstance(name, torch.dtype):
        return name
    if name == "auto":
        widened = engine == "fast" and device.type == "cpu" and cpu.unsupported_reason() is None
        return torch.bfloat16 if widened else compute_dtype(device)
    if name not in DTYPES:
        raise UsageError(
            f"{name!r} is no dtype that models run in", where="--dtype", hint=f"use {', '.join(DTYPES)}"
        )
    return DTYPES[name]
