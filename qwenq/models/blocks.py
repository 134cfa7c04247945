"""Run a decoder block by block: transformers' own blocks on the meta device, filled one at a time.

Quantising and checking both run a model layer by layer over many sequences. This gives them the hidden states
before the first block, each block in turn with its weights read from the checkpoint, and the head's logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from qwenq.compute import attention
from qwenq.compute.block import fallback_notice
from qwenq.compute.transformers_blocks import OURS, attention_name, fuse_blocks
from qwenq.models import inspection, transformers_model
from qwenq.models.config import by_inspection
from qwenq.models.integrity import check_finite, require_numbers
from qwenq.models.machine import FreedMemory
from qwenq.models.qwen_v1 import require_plain
from qwenq.models.source import require_shape, require_tensors

if TYPE_CHECKING:
    from qwenq.models.checkpoint import Checkpoint

VOCABULARY_CHUNK = 16_384  # rows of the head converted at a time: bounds the copy of a 150k-row matrix


class BlockwiseDecoder:
    """The blocks of a checkpoint's decoder, one at a time; GPTQ is read through ``DequantisedSource``.

    Attributes:
        blocks: all of them, without weights.
        attention: the name of what computes it. In layers that slide a window it is torch's for texts that
            fill that. Where it is ours, norms, rotary positions and activations are, too, if
            the architecture allows it: the same on all machines.
        attention_reason: why attention is torch's, in words that follow "because"; None: it is ours.
        fallback_notice: a sentence for the user on what runs slower, in torch, or None.
        names: "model.layers.0", …, the blocks' names in the checkpoint.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        from transformers import AutoModelForCausalLM

        self.checkpoint, self.device, self.dtype = checkpoint, device, dtype
        self.attention_reason: str | None
        self.fallback_notice: str | None
        config = transformers_model.transformers_config(checkpoint.config, checkpoint.folder)
        self._inspected = by_inspection(checkpoint.config)
        if self._inspected:
            self._choose_inspected(config)
        else:
            self._choose(config)
        with transformers_model.refused_by_transformers(checkpoint.folder):
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(
                    config, dtype=dtype, attn_implementation=self.attention
                )
            if self._inspected:
                inspection.require_plain_stack(model, checkpoint.folder)
            self._model, self._inner = model, model.model.eval()
            transformers_model.unfuse(self._inner.layers, every=True)
            # In no file, so not to be left on the meta device: rotary frequencies follow from the config.
            self._inner.rotary_emb = type(self._inner.rotary_emb)(config=config).to(device)
            if self._inspected:
                inspection.fill_computed(model, device)
        self.blocks: nn.ModuleList = self._inner.layers
        if self._inspected:
            list(self.kept())  # refuses what is not a linear layer, before tensors are looked for
        self._require_tensors()
        if self.attention == OURS and (reason := fuse_blocks(self.blocks, config)) is not None:
            missed = f"norms and activations run in torch, which takes longer, because {reason}"
            self.fallback_notice = f"{self.fallback_notice}; {missed}" if self.fallback_notice else missed
        self._arguments: dict[nn.Module, dict[str, Any]] = {}
        self._freed = FreedMemory()
        self.names = [f"model.layers.{index}" for index in range(len(self.blocks))]

    def _choose(self, config: Any) -> None:
        """Choose what computes attention in a family that is known here."""
        device, dtype = self.device, self.dtype
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.attention = attention_name(device, dtype, head_dim)
        self.attention_reason = attention.unsupported_reason(device, dtype, head_dim)
        what = "attention, norms and activations"
        self.fallback_notice = fallback_notice(what, device, dtype, {"a head": head_dim})
        kinds = getattr(config, "layer_types", None) or []
        windowed = sum(kind == "sliding_attention" for kind in kinds)
        if windowed and self.fallback_notice is None and self.attention_reason is None:
            self.fallback_notice = (
                f"attention of {windowed} of {len(kinds)} layers slides a window of {config.sliding_window} "
                "tokens: where a text fills it, it runs in torch, which takes longer"
            )

    def _choose_inspected(self, config: Any) -> None:
        """Leave all that a block computes to transformers: nothing here knows what its class asks for."""
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

        self.attention, why = inspection.attention_of(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], config)
        self.attention_reason = f"{why} (attention {self.attention})"
        self.fallback_notice = (
            f"attention ({self.attention}), norms and activations run in transformers, which takes longer, "
            f"because {why}"
        )

    @property
    def kinds(self) -> dict[tuple[str, ...], nn.Module]:
        """Return one block without weights of each kind, by the names of its linears."""
        return {tuple(transformers_model.linears_of(block)): block for block in reversed(self.blocks)}

    def kept(self) -> Iterator[dict[str, str]]:
        """Yield what is not quantised, block by block: ``kept_of``."""
        yield from map(transformers_model.kept_of, self.blocks)

    @property
    def vocabulary(self) -> int:
        """Return rows of the embedding."""
        return self.checkpoint.info("model.embed_tokens.weight").shape[0]

    def embed(self, batches: Sequence[Tensor]) -> list[Tensor]:
        """Compute the hidden states before the first block, [batch, tokens, hidden] of each batch.

        Batches are int64 [batch, tokens], all of one length, no padding. What the blocks need besides
        (positions, rotary tables, masks where some layers slide a window) is kept for ``forward``.
        """
        for batch in batches:
            require_plain(
                self.checkpoint.config, batch.shape[1], option="a sequence", where=self.checkpoint.folder
            )
        recorders = [_Recorder(block) for block in self.blocks]
        for name in ("model.norm.weight", *(() if self.checkpoint.tied else ("lm_head.weight",))):
            # Now, not after the blocks: those may take hours.
            check_finite(name, self.checkpoint.read(name), self.checkpoint.folder)
        table = self.checkpoint.read("model.embed_tokens.weight")
        check_finite("model.embed_tokens.weight", table, self.checkpoint.folder)
        require_numbers("model.embed_tokens.weight", table, self.checkpoint.folder)
        norm, self._inner.norm = self._inner.norm, nn.Identity()
        self._inner.layers = nn.ModuleList(recorders)
        try:
            for batch in batches:
                rows = self._rows(batch, table)
                self._inner(inputs_embeds=rows, use_cache=False)
            hidden = list(recorders[0].hidden)
            # Positions may come with a row for each sequence, and batches differ in how many they have.
            self._inner(inputs_embeds=rows[:1], use_cache=False)
        finally:
            self._inner.norm, self._inner.layers = norm, self.blocks
            self._inner.embed_tokens.weight = None
        recorded = zip(self.blocks, recorders, strict=True)
        self._arguments = {block: recorder.arguments for block, recorder in recorded}
        return hidden

    def _rows(self, batch: Tensor, table: Tensor) -> Tensor:
        """Embed a batch by the model's own module, with only those rows of the table that it needs.

        Converting the whole table would cost too much.
        """
        ids, places = batch.unique(return_inverse=True)
        embedding = self._inner.embed_tokens
        embedding.padding_idx = None  # of the whole table; it matters to gradients alone
        embedding.weight = nn.Parameter(table[ids].to(self.device, self.dtype), requires_grad=False)
        rows: Tensor = embedding(places.to(self.device))
        return rows

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """Give block ``index`` its weights; they are dropped on leaving."""
        block: nn.Module = self.blocks[index]
        computed = [(module, inspection.computed_buffers(module)) for module in block.modules()]
        self._fill(block, self.names[index])
        try:
            yield block
        finally:
            block.to("meta")
            for module, buffers in computed:
                module._buffers.update(buffers)
            self._freed.layer_done()

    def forward(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """Run a block: [batch, tokens, hidden] → the same."""
        output = block(hidden, **self._arguments[block])
        return output[0] if isinstance(output, tuple) else output  # type: ignore[no-any-return]

    def _require_tensors(self) -> None:
        """Check all that will be read: what is wrong is known before the first layer, not after the last."""
        shapes = {f"model.{name}": tensor.shape for name, tensor in self._inner.state_dict().items()}
        config = self.checkpoint.config
        heads = ("model.embed_tokens.weight", *(() if self.checkpoint.tied else ("lm_head.weight",)))
        shapes |= dict.fromkeys(heads, torch.Size((config["vocab_size"], config["hidden_size"])))
        require_tensors(self.checkpoint.source, shapes, self.checkpoint.folder)

    @contextmanager
    def head(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """Load the final norm and the output head: […, hidden] → […, vocabulary] float32."""
        norm = self._inner.norm
        self._fill(norm, "model.norm")
        name = "model.embed_tokens.weight" if self.checkpoint.tied else "lm_head.weight"
        try:
            product = _Product(self.checkpoint.read(name), self.device, self.dtype)
            head = inspection.ClassHead(self._model, product) if self._inspected else product
            yield lambda hidden: head(norm(hidden)).float()
        finally:
            self._inner.norm.to("meta")

    def _fill(self, module: nn.Module, prefix: str) -> None:
        state = {}
        for name, parameter in module.state_dict(keep_vars=True).items():  # buffers that are stored, too
            full = f"{prefix}.{name}"
            tensor = check_finite(full, self.checkpoint.read(full), self.checkpoint.folder)
            require_numbers(full, tensor, self.checkpoint.folder)
            require_shape(full, tensor.shape, parameter.shape, self.checkpoint.folder)
            state[name] = tensor.to(self.device, parameter.dtype)  # some routers' are float32 in any model
        module.load_state_dict(state, assign=True)
        module.requires_grad_(False)


class _Product(nn.Module):
    """The output head, from hidden states behind the norm to float32: converted chunk by chunk."""

    def __init__(self, weight: Tensor, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self._weight, self._device, self._dtype = weight, device, dtype

    def forward(self, normed: Tensor) -> Tensor:
        logits = torch.empty(*normed.shape[:-1], len(self._weight), dtype=torch.float32, device=self._device)
        chunks = zip(self._weight.split(VOCABULARY_CHUNK), logits.split(VOCABULARY_CHUNK, -1), strict=True)
        for rows, place in chunks:
            place.copy_(functional.linear(normed, rows.to(self._device, self._dtype)))
        return logits


class _Recorder(nn.Module):
    """Stands in for a block: keeps what that would be given, and has its attributes."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self._block = [block]  # in a list: no child, whose parameters would be this module's
        self.hidden: list[Tensor] = []
        self.arguments: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_block"][0], name)

    def forward(self, hidden: Tensor, **arguments: Any) -> Tensor:
        self.hidden.append(hidden)
        self.arguments = arguments
        return hidden
