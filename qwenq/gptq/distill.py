"""Distil scales and norms after GPTQ: integers stay, the whole model's KL divergence to its base falls.

Every integer of a quantised model is fixed; its scales and its norms are floats that any kernel reads anyway,
so tuning them changes neither size nor speed of the file (DWQ of mlx-lm; the norms alone: Norm Tweaking,
arXiv 2309.02784). What falls is the mean of KL(base ‖ quantised) over the calibration tokens, by Adam on the
relative change of each scale and norm.

The gradient needs all blocks; memory holds one of them. A step runs forward and keeps the hidden states
between blocks, then goes back block by block, each run once more with its gradient (checkpointing). Resident
are the packed integers, the output head and six floats for each scale.

An eighth of the calibration sequences takes no part in this: they decide which state counts, as it would be
stored. Unless it is nearer to the base than GPTQ's, those scales stay. The check's sequences are never read.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional

from qwenq.events import Listener, counted, silent
from qwenq.gptq.settings import Settings, quantised_linears
from qwenq.models.blocks import BlockwiseDecoder
from qwenq.models.gptq_format import PackedLinear, unpack, unpack_zeros
from qwenq.models.quantized_folder import DISTILLING, LAYER_PARTS, LayerStore
from qwenq.stopping import Terminated, asked
from qwenq.storage import atomic_write_bytes

ALGORITHM = 1  # raise it when the same settings give other scales
RATE = 1e-3  # of the relative change of a scale, at its largest
BETAS, EPSILON = (0.9, 0.99), 1e-15
WARM_UP = 4  # steps
TOKENS_PER_STEP = 512
DECIDING = 8  # one sequence in this many decides, at least FEWEST
FEWEST = 2
ELEMENTS = 1 << 23  # of logits at a time
DIVERGED = 2.0  # times the loss at the start: it will not come back
SAVE_AFTER = 120.0  # seconds of work that a kill may cost


@dataclass(frozen=True)
class Distilled:
    """What distilling did.

    Attributes:
        before, after: mean KL divergence of the deciding sequences, in nats a token; of GPTQ's scales, and of
            those that are kept.
        steps: how many were made.
        sequences: of how many each step chose.
        deciding: how many decided.
        stopped: why it ended before its last step, or None.
    """

    before: float
    after: float
    steps: int
    sequences: int
    deciding: int
    stopped: str | None = None

    @property
    def kept(self) -> bool:
        """Return whether the new scales count."""
        return self.after < self.before

    @property
    def sentence(self) -> str:
        """Return what happened, for the user."""
        ended = f"; stopped after {self.steps} steps, as {self.stopped}" if self.stopped else ""
        text = f"KL of {self.deciding} sequences that took no part"
        if not self.kept:
            return f"distilled without gain ({text} stays {self.before:.4f}): GPTQ's scales are kept{ended}"
        return f"distilled: {text} fell from {self.before:.4f} to {self.after:.4f}{ended}"

    def to_json(self) -> dict[str, Any]:
        """Return plain values, for the manifest."""
        return {**asdict(self), "kept": self.kept}


def split_sequences(count: int) -> tuple[list[int], list[int]] | None:
    """Return which calibration sequences are learned from, and which decide; None: there are too few."""
    deciding = max(FEWEST, count // DECIDING)
    if count - deciding < FEWEST:
        return None
    return list(range(count - deciding)), list(range(count - deciding, count))


class _Dequantised(torch.autograd.Function):
    """A weight from its scales, whose gradient is that of the scales alone."""

    @staticmethod
    def forward(ctx: Any, scales: Tensor, integers: Tensor, zeros: Tensor, dtype: torch.dtype) -> Tensor:
        """Return [out, in] in ``dtype``; scales and zeros are float32 [out, groups], integers uint8."""
        ctx.save_for_backward(integers, zeros)
        grouped = integers.unflatten(1, (scales.shape[1], -1)).float()  # [out, groups, group_size]
        weight: Tensor = grouped.sub_(zeros[..., None]).mul_(scales[..., None]).flatten(1).to(dtype)
        return weight

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        """Return the gradient of the scales: Σ over a group of dL/dw · (integer − zero)."""
        integers, zeros = ctx.saved_tensors
        steps = integers.unflatten(1, (zeros.shape[1], -1)).float().sub_(zeros[..., None])
        return steps.mul_(gradients[0].unflatten(1, (zeros.shape[1], -1))).sum(-1), None, None, None


@dataclass(frozen=True)
class _Trained:
    """A tensor that is tuned: its first value, where its change lies, and how it is stored."""

    start: Tensor
    where: slice
    dtype: torch.dtype

    def value(self, change: Tensor, *, stored: bool = False) -> Tensor:
        """Return float32 values; ``stored``: as a file holds them."""
        value = self.start * (1 + change[self.where].view(self.start.shape))
        return value.to(self.dtype).float() if stored else value


class Student:
    """A quantised model as a function of its scales and norms.

    Args:
        decoder: of the base, with ``differentiable`` blocks.
        store: the packed layers.
        settings: that they were made with.

    Attributes:
        change: float32, the relative changes of all that is tuned, one tensor after the other.
        gradient: of them.
    """

    def __init__(self, decoder: BlockwiseDecoder, store: LayerStore, settings: Settings) -> None:
        self._decoder, self._settings = decoder, settings
        self._size = 0
        self._trained: list[dict[str, _Trained]] = []  # of each block; of the last norm
        self._packed: list[dict[str, tuple[PackedLinear, Tensor, int]]] = []
        self._frozen: list[dict[str, Tensor]] = []
        for index, block in enumerate(decoder.blocks):
            self._add_block(index, block, store.tensors(index))
        weight = decoder.checkpoint.read("model.norm.weight")
        self._trained.append({"weight": self._add(weight)})
        self._base_norm = {"weight": weight.to(decoder.device, decoder.dtype)}
        head = "model.embed_tokens.weight" if decoder.checkpoint.tied else "lm_head.weight"
        self._head = decoder.checkpoint.read(head).to(decoder.device, decoder.dtype)
        self.change = torch.zeros(self._size, device=decoder.device)
        self.gradient = torch.zeros_like(self.change)

    def _add_block(self, index: int, block: nn.Module, tensors: dict[str, Tensor]) -> None:
        prefix, device = self._decoder.names[index], self._decoder.device
        trained, packed, frozen = {}, {}, {}
        for name in quantised_linears(block, self._settings):
            linear = PackedLinear(*(tensors[f"{prefix}.{name}.{part}"].to(device) for part in LAYER_PARTS))
            bits = self._settings.bits_of(name)
            zeros = unpack_zeros(linear.qzeros, bits, self._settings.checkpoint_format).float()
            packed[name] = linear, zeros, bits
            trained[f"{name}.scales"] = self._add(linear.scales.T)
        for name, parameter in block.state_dict(keep_vars=True).items():
            if name.removesuffix(".weight") in packed and name.endswith(".weight"):
                continue
            stored = self._decoder.checkpoint.read(f"{prefix}.{name}")
            if name.endswith("norm.weight"):
                trained[name] = self._add(stored)
            else:
                frozen[name] = stored.to(device, parameter.dtype)
        self._trained.append(trained)
        self._packed.append(packed)
        self._frozen.append(frozen)

    def _add(self, stored: Tensor) -> _Trained:
        where = slice(self._size, self._size + stored.numel())
        self._size = where.stop
        return _Trained(stored.to(self._decoder.device, torch.float32), where, stored.dtype)

    def tensors(self, change: Tensor) -> dict[str, Tensor]:
        """Return all that is tuned as a checkpoint holds it, by name."""
        found = {}
        for prefix, trained in zip([*self._decoder.names, "model.norm"], self._trained, strict=True):
            for name, each in trained.items():
                value = each.value(change, stored=True).to(each.dtype)
                value = value.T if name.endswith(".scales") else value
                found[f"{prefix}.{name}"] = value.contiguous().cpu()
        return found

    def loss(self, hidden: Tensor, wanted: Tensor) -> float:
        """Return the mean KL divergence of a batch, of what would be stored.

        Args:
            hidden: [batch, tokens, hidden], before the first block.
            wanted: the same of the base, behind its last block.
        """
        with torch.no_grad():
            for index in range(len(self._packed)):
                hidden = self._forward(index, hidden, self._values(index, stored=True))
            normed = self._norm(hidden, self._values(-1, stored=True))
            return self._divergence(normed, wanted)[0]

    def descend(self, hidden: Tensor, wanted: Tensor) -> float:
        """Add a batch's gradient to ``gradient``; return its mean KL divergence.

        Raises:
            NotFiniteError: names the block whose gradient holds NaN or Inf.
        """
        saved = []
        with torch.no_grad():
            for index in range(len(self._packed)):
                saved.append(hidden)
                hidden = self._forward(index, hidden, self._values(index))
        last, values = hidden.requires_grad_(), self._values(-1)
        with torch.enable_grad():
            normed = self._norm(last, values)
        loss, slope = self._divergence(normed.detach(), wanted)
        normed.backward(slope)
        self._collect(-1, values, "model.norm")
        for index in reversed(range(len(self._packed))):
            hidden, values = saved.pop().detach().requires_grad_(), self._values(index)
            with torch.enable_grad():
                output = self._forward(index, hidden, values)
            output.backward(last.grad)
            last = hidden
            self._collect(index, values, self._decoder.names[index])
        return loss

    def _collect(self, index: int, values: dict[str, Tensor], place: str) -> None:
        for name, value in values.items():
            if value.grad is None:  # of an expert that no token was routed to
                continue
            if not bool(torch.isfinite(value.grad).all()):
                raise NotFiniteError(place)
            each = self._trained[index][name]
            self.gradient[each.where] += (value.grad * each.start).flatten()

    def _values(self, index: int, *, stored: bool = False) -> dict[str, Tensor]:
        """Return the float32 values of what is tuned in a block (-1: of the last norm), as leaves."""
        trained = self._trained[index]
        return {
            name: each.value(self.change, stored=stored).requires_grad_() for name, each in trained.items()
        }

    def _forward(self, index: int, hidden: Tensor, values: dict[str, Tensor]) -> Tensor:
        """Run a block: [batch, tokens, hidden] → the same, with these scales and norms."""
        dtype, weights = self._decoder.dtype, dict(self._frozen[index])
        for name, (packed, zeros, bits) in self._packed[index].items():
            integers = unpack(packed, bits, self._settings.checkpoint_format)[0]
            scales = values[f"{name}.scales"]
            weights[f"{name}.weight"] = _Dequantised.apply(scales, integers, zeros, dtype)  # type: ignore[no-untyped-call]
        weights |= {name: value.to(dtype) for name, value in values.items() if not name.endswith(".scales")}
        return self._decoder.forward_with(self._decoder.blocks[index], hidden, weights)

    def _norm(self, hidden: Tensor, values: dict[str, Tensor]) -> Tensor:
        weights = {name: value.to(self._decoder.dtype) for name, value in values.items()}
        return self._decoder.forward_with(self._decoder.last_norm, hidden, weights)

    def _divergence(self, normed: Tensor, wanted: Tensor) -> tuple[float, Tensor]:
        """Return the mean of KL(base ‖ this) over tokens, and its gradient with respect to ``normed``."""
        with torch.no_grad():
            expected = self._norm(wanted, self._base_norm).flatten(0, 1)
        rows, slope, total = normed.flatten(0, 1), torch.empty_like(normed), 0.0
        slopes, at_once = slope.view_as(rows), max(1, ELEMENTS // len(self._head))
        for start in range(0, len(rows), at_once):
            part = slice(start, start + at_once)
            log_p, log_q = (
                functional.linear(x[part], self._head).float().log_softmax(-1) for x in (expected, rows)
            )
            p = log_p.exp()
            total += float((p * (log_p - log_q)).sum(dtype=torch.float64))
            slopes[part] = log_q.exp_().sub_(p).to(self._head.dtype) @ self._head / len(rows)
        return total / len(rows), slope


class NotFiniteError(Exception):
    """A gradient with NaN or Inf; names the block."""


# Descend, decide, and keep what a kill must not cost.


@dataclass
class _State:
    """How far a run is.

    Attributes:
        change, first, second: what ``Student`` tunes, and Adam's means of its gradient and of that's square.
        best: the change whose loss on the deciding sequences is the least so far.
        step: how many steps were made.
        before, after: the loss on the deciding sequences of no change, and of ``best``.
    """

    change: Tensor
    first: Tensor
    second: Tensor
    best: Tensor
    step: int = 0
    before: float = math.nan
    after: float = math.nan

    @classmethod
    def new(cls, change: Tensor) -> _State:
        first, second, best = (torch.zeros_like(change) for _ in range(3))
        return cls(change, first, second, best)

    def save(self, file: Path, facts: dict[str, Any]) -> None:
        """Write all of it, and the facts of the run."""
        numbers = {"step": self.step, "before": self.before, "after": self.after}
        tensors = {name: value.cpu() for name, value in vars(self).items() if isinstance(value, Tensor)}
        metadata = {"run": json.dumps(facts, sort_keys=True), "numbers": json.dumps(numbers)}
        atomic_write_bytes(file, save(tensors, metadata))

    def load(self, file: Path, facts: dict[str, Any]) -> bool:
        """Go on where an earlier run with the same facts was stopped; return whether there is one."""
        try:
            with safe_open(file, framework="pt") as opened:
                metadata = opened.metadata() or {}
                if metadata.get("run") != json.dumps(facts, sort_keys=True):
                    return False
                for name in ("change", "first", "second", "best"):
                    getattr(self, name).copy_(opened.get_tensor(name))
        except (OSError, SafetensorError):
            return False
        numbers = json.loads(metadata["numbers"])
        self.step, self.before, self.after = numbers["step"], numbers["before"], numbers["after"]
        return True

    def adam(self, gradient: Tensor, rate: float) -> None:
        """Move ``change`` against the gradient."""
        self.first.lerp_(gradient, 1 - BETAS[0])
        self.second.lerp_(gradient.square(), 1 - BETAS[1])
        corrected = self.second.div(1 - BETAS[1] ** (self.step + 1)).sqrt_().add_(EPSILON)
        self.change.addcdiv_(self.first, corrected, value=-rate / (1 - BETAS[0] ** (self.step + 1)))


def rate_at(step: int, steps: int) -> float:
    """Return Adam's step size: up over the first steps, then down to zero along a cosine."""
    return RATE * min(1.0, (step + 1) / WARM_UP) * (1 + math.cos(math.pi * step / steps)) / 2


def distil(
    base: BlockwiseDecoder,
    tokens: Tensor,
    settings: Settings,
    store: LayerStore,
    passes: int,
    seed: int,
    listener: Listener = silent,
) -> tuple[Distilled, dict[str, Tensor]] | None:
    """Tune scales and norms of the layers in ``store``; None: there is too little text to decide.

    Args:
        base: the unquantised model.
        tokens: int64 [samples, seq_len], the calibration set's.
        settings: that the layers were made with.
        store: holding all layers; its folder takes the state that a run which was stopped goes on from.
        passes: over the sequences that are learned from.
        seed: of their order.
        listener: receives the progress.

    Returns:
        What happened, and by name the tensors that take the place of the others; none where GPTQ's stay.

    Raises:
        Terminated: SIGTERM came; the state is on the disk.
    """
    parts = split_sequences(len(tokens))
    if parts is None:
        return None
    (learned, deciding), rows = parts, tokens.split(1)
    wanted = _behind_last_block(base, rows)
    decoder = BlockwiseDecoder(base.checkpoint, base.device, base.dtype, differentiable=True)
    with torch.no_grad():
        first = decoder.embed(rows)
    student = Student(decoder, store, settings)
    at_once = max(1, TOKENS_PER_STEP // tokens.shape[1])
    steps = passes * -(-len(learned) // at_once)
    run = {"algorithm": ALGORITHM, "passes": passes, "seed": seed, "layers": store.digest(len(base.names))}
    file = store.folder / DISTILLING
    state = _State.new(student.change)

    def decide() -> float:
        return sum(student.loss(first[row], wanted[row]) for row in deciding) / len(deciding)

    def result(stopped: str | None = None) -> tuple[Distilled, dict[str, Tensor]]:
        done = Distilled(state.before, state.after, state.step, len(learned), len(deciding), stopped)
        return done, student.tensors(state.best) if done.kept else {}

    if not state.load(file, run):
        state.before = state.after = decide()
    saved = time.monotonic()
    with counted(listener, "distilling scales and norms") as progress:
        for step in range(state.step, steps):
            batch = _batch(step, learned, at_once, seed)
            student.gradient.zero_()
            try:
                student.descend(*(torch.cat([of[row] for row in batch]) for of in (first, wanted)))
            except NotFiniteError as error:
                return result(f"the gradient in {error} is not finite")
            state.adam(student.gradient, rate_at(step, steps))
            state.step += 1
            if state.step * passes % steps == 0:
                loss = decide()
                if not loss < DIVERGED * state.before:
                    return result(f"the divergence rose from {state.before:.4f} to {loss:.4f}")
                if loss < state.after:
                    state.after, state.best = loss, student.change.clone()
            if state.step == steps or asked() or time.monotonic() - saved > SAVE_AFTER:
                state.save(file, run)
                saved = time.monotonic()
            if asked():
                raise Terminated
            progress(state.step, steps)
    return result()


def _batch(step: int, learned: Sequence[int], at_once: int, seed: int) -> list[int]:
    """Return the sequences of a step: each pass takes all of them, in an order of its own."""
    per_pass = -(-len(learned) // at_once)
    lap, place = divmod(step, per_pass)
    order = torch.randperm(len(learned), generator=torch.Generator().manual_seed(seed + lap)).tolist()
    return [learned[index] for index in order[place * at_once : (place + 1) * at_once]]


def _behind_last_block(base: BlockwiseDecoder, rows: Sequence[Tensor]) -> list[Tensor]:
    """Return the hidden states behind the last block, [1, tokens, hidden] for each sequence."""
    with torch.no_grad():
        hidden = base.embed(rows)
        for index in range(len(base.names)):
            with base.block(index) as block:
                hidden = [base.forward(block, states) for states in hidden]
    return hidden
