"""What the engines share: prompts and steps over a cache, checked before they run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from qwenq.errors import UsageError
from qwenq.runtime.cache import LOWER, KVCache
from qwenq.runtime.finite import checked
from qwenq.runtime.generation import Generated, OnToken, generate, padded
from qwenq.runtime.memory import explained
from qwenq.runtime.sampling import GREEDY, Sampling


class CachedEngine(ABC):
    """Each engine has to say how tokens become hidden states, and those become logits."""

    name: str
    implementation: str
    notes: tuple[str, ...]
    device: torch.device
    dtype: torch.dtype
    vocab_size: int
    real_vocab: int
    context: int | None
    _form: tuple[int, int, int, torch.dtype] | None = None

    @abstractmethod
    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache."""

    @abstractmethod
    def _hidden(self, ids: Tensor, counts: Sequence[int], cache: KVCache) -> Tensor:
        """Int64 [batch, tokens] → [batch, tokens, hidden]; adds ``counts[r]`` tokens to each row r."""

    @abstractmethod
    def _head(self, hidden: Tensor) -> Tensor:
        """[..., hidden] → float32 [..., vocabulary]."""

    def prompt_alpha(self, tokens: int) -> int:
        """1: only the fast engine has Qwen v1's dynamic NTK."""
        del tokens
        return 1

    @torch.inference_mode()
    def prefill(
        self, prompts: Sequence[Sequence[int]], cache: KVCache, rows: Sequence[int] | None = None
    ) -> Tensor:
        """Float32 [len(prompts), vocabulary] after each prompt's last token."""
        if rows is not None:
            # A small cache of their own: the other rows cost nothing, and what is copied is little.
            cache.check_rows(rows)
            added = max(map(len, prompts), default=0)
            part = cache.take(rows, max((cache.lengths[row] for row in rows), default=0) + added)
            found = self.prefill(prompts, part)
            cache.put(rows, part)
            return found
        self._check(prompts, cache)
        with self._memory(prompts):
            hidden = self._prompt_hidden(prompts, cache)
            last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=self.device)
            logits = self._head(hidden[torch.arange(len(prompts), device=self.device), last])
            return checked(logits, self.dtype, prompt=True)

    @torch.inference_mode()
    def decode(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Float32 [batch, vocabulary] after one more token in each row."""
        self._check_step(tokens, cache)
        with self._step_memory(cache):
            hidden = self._hidden(tokens.unsqueeze(1), [1] * len(tokens), cache)
            return checked(self._head(hidden[:, 0]), self.dtype, prompt=False)

    @torch.inference_mode()
    def logits(self, prompts: Sequence[Sequence[int]], cache: KVCache | None = None) -> list[Tensor]:
        """Float32 [len(prompts[r]), vocabulary] after every token of each row."""
        cache = cache or self.new_cache(len(prompts), max(map(len, prompts), default=1))
        self._check(prompts, cache)
        with self._memory(prompts):
            hidden = self._prompt_hidden(prompts, cache)
            heads = (self._head(row[: len(prompt)]) for row, prompt in zip(hidden, prompts, strict=True))
            return [checked(logits, self.dtype, prompt=True) for logits in heads]

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
        """Answer each prompt; see `Engine.generate`."""
        return generate(self, prompts, max_new_tokens, sampling, stop_ids, exact_tokens, cache, on_token)

    def _prompt_hidden(self, prompts: Sequence[Sequence[int]], cache: KVCache) -> Tensor:
        return self._hidden(padded(prompts, self.device), [len(prompt) for prompt in prompts], cache)

    def _memory(self, prompts: Sequence[Sequence[int]]) -> AbstractContextManager[None]:
        what = f"{len(prompts)} prompts of up to {max(map(len, prompts), default=0)} tokens"
        return explained(self.device, what, "run fewer prompts at once (in eval --batch), or shorter ones")

    def _step_memory(self, cache: KVCache) -> AbstractContextManager[None]:
        what = f"a decode step of {cache.batch} rows of up to {cache.capacity} tokens"
        return explained(self.device, what, LOWER)

    def _check(self, prompts: Sequence[Sequence[int]], cache: KVCache) -> None:
        self._check_cache(cache)
        if not prompts:
            raise UsageError("there is no prompt to run")
        if len(prompts) != cache.batch:
            raise UsageError(f"{len(prompts)} prompts do not fit a cache of {cache.batch} rows")
        for row, prompt in enumerate(prompts):
            if not prompt:
                raise UsageError("an empty prompt: there is nothing to go on from", where=f"prompt {row}")
            if not 0 <= min(prompt) <= max(prompt) < self.vocab_size:
                raise UsageError(
                    f"ids run from {min(prompt)} to {max(prompt)}, the model knows 0 … {self.vocab_size - 1}",
                    where=f"prompt {row}",
                    hint="the tokenizer belongs to another model",
                )

    def _check_step(self, tokens: Tensor, cache: KVCache) -> None:
        self._check_cache(cache)
        if tokens.shape != (cache.batch,) or not cache.batch:
            raise UsageError(
                f"tokens of shape {list(tokens.shape)} are not one for each of {cache.batch} rows"
            )
        # A GPU would have to be waited for; there they come from the sampler, which draws no others.
        if tokens.device.type == "cpu":
            least, most = (int(end) for end in tokens.aminmax())
            if not 0 <= least <= most < self.vocab_size:
                raise UsageError(f"ids run from {least} to {most}, the model knows 0 … {self.vocab_size - 1}")

    def _check_cache(self, cache: KVCache) -> None:
        if self._form is None:
            self._form = self.new_cache(1, 1).form
        if cache.form != self._form:
            raise UsageError(
                f"a cache of {cache.form} (layers, key/value heads, their width, dtype) is of another model, "
                f"this one has {self._form}",
                hint="make it with new_cache of the same engine",
            )
