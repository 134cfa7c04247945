"""Distil scales after GPTQ: integers stay, the whole model's KL divergence to its base falls.

Every integer of a quantised model is fixed; its scales are floats that any kernel reads anyway, so tuning
them changes neither size nor speed of the file (as DWQ of mlx-lm does). What falls is the mean of
KL(base ‖ quantised) over the calibration tokens, by Adam on the relative change of each scale.

The gradient needs all blocks; memory holds one of them. A step runs forward and keeps the hidden states
between blocks, then goes back block by block, each run once more with its gradient (checkpointing). Resident
are the packed integers, the output head and six floats for each scale.

The gradient of few tokens is mostly noise, and a scale that follows it costs more than it gains. So an eighth
of the calibration sequences is not learned from: it decides, after each pass, between the change, half of it
and none, all as they would be stored. GPTQ has seen them, which favours its scales. The check's sequences are
never read.
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
SHARES = (1.0, 0.5)  # of the change that are tried
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
        text = f"KL of {self.deciding} sequences that were not learned from"
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
class _Linear:
    """A quantised linear: what is packed, its zeros, and where the changes of its scales lie."""

    packed: PackedLinear
    zeros: Tensor
    bits: int
    where: slice

    def scales(self, change: Tensor) -> Tensor:
        """Return float32 [out, groups]."""
        start = self.packed.scales.T.float()
        return start * (1 + change[self.where].view(start.shape))


class Student:
    """A quantised model as a function of its scales.

    Args:
        decoder: of the base, with ``differentiable`` blocks.
        store: the packed layers.
        settings: that they were made with.

    Attributes:
        change: float32, the relative changes of all scales, one linear after the other.
        gradient: of them.
    """

    def __init__(self, decoder: BlockwiseDecoder, store: LayerStore, settings: Settings) -> None:
        self._decoder, self._settings = decoder, settings
        self._linears: list[dict[str, _Linear]] = []
        self._frozen: list[dict[str, Tensor]] = []
        size = 0
        for index, block in enumerate(decoder.blocks):
            size = self._add_block(index, block, store.tensors(index), size)
        self._norm = {
            "weight": decoder.checkpoint.read("model.norm.weight").to(decoder.device, decoder.dtype)
        }
        head = "model.embed_tokens.weight" if decoder.checkpoint.tied else "lm_head.weight"
        self._head = decoder.checkpoint.read(head).to(decoder.device, decoder.dtype)
        self.change = torch.zeros(size, device=decoder.device)
        self.gradient = torch.zeros_like(self.change)

    def _add_block(self, index: int, block: nn.Module, tensors: dict[str, Tensor], size: int) -> int:
        """Take a block over; return how many scales there are with its own."""
        prefix, device = self._decoder.names[index], self._decoder.device
        linears, frozen = {}, {}
        settings = self._settings.of_block(prefix)
        for name in quantised_linears(block, settings):
            packed = PackedLinear(*(tensors[f"{prefix}.{name}.{part}"].to(device) for part in LAYER_PARTS))
            bits = settings.bits_of(name)
            zeros = unpack_zeros(packed.qzeros, bits, self._settings.checkpoint_format).float()
            linears[name] = _Linear(packed, zeros, bits, slice(size, size + zeros.numel()))
            size += zeros.numel()
        for name, parameter in block.state_dict(keep_vars=True).items():
            if not (name.endswith(".weight") and name.removesuffix(".weight") in linears):
                stored = self._decoder.checkpoint.read(f"{prefix}.{name}")
                frozen[name] = stored.to(device, parameter.dtype)
        self._linears.append(linears)
        self._frozen.append(frozen)
        return size

    def tensors(self, change: Tensor) -> dict[str, Tensor]:
        """Return all scales as a checkpoint holds them, by name."""
        return {
            f"{prefix}.{name}.scales": linear.scales(change)
            .to(linear.packed.scales.dtype)
            .T.contiguous()
            .cpu()
            for prefix, linears in zip(self._decoder.names, self._linears, strict=True)
            for name, linear in linears.items()
        }

    def loss(self, hidden: Tensor, wanted: Tensor, change: Tensor) -> float:
        """Return the mean KL divergence of a batch with these changes, rounded as they would be stored.

        Args:
            hidden: [batch, tokens, hidden], before the first block.
            wanted: the same of the base, behind its last block.
            change: of the scales.
        """
        with torch.no_grad():
            for index, linears in enumerate(self._linears):
                scales = {
                    name: linear.scales(change).to(linear.packed.scales.dtype).float()
                    for name, linear in linears.items()
                }
                hidden = self._forward(index, hidden, scales)
            return self._divergence(self._normed(hidden), wanted)[0]

    def descend(self, hidden: Tensor, wanted: Tensor) -> float:
        """Add a batch's gradient to ``gradient``; return its mean KL divergence.

        Raises:
            NotFiniteError: names the block whose gradient holds NaN or Inf.
        """
        saved = []
        with torch.no_grad():
            for index in range(len(self._linears)):
                saved.append(hidden)
                hidden = self._forward(index, hidden, self._scales(index))
        last = hidden.requires_grad_()
        with torch.enable_grad():
            normed = self._normed(last)
        loss, slope = self._divergence(normed.detach(), wanted)
        normed.backward(slope)
        for index in reversed(range(len(self._linears))):
            hidden, scales = saved.pop().detach().requires_grad_(), self._scales(index)
            with torch.enable_grad():
                output = self._forward(index, hidden, scales)
            output.backward(last.grad)
            last = hidden
            self._collect(index, scales)
        return loss

    def _collect(self, index: int, scales: dict[str, Tensor]) -> None:
        for name, value in scales.items():
            if value.grad is None:  # of an expert that no token was routed to
                continue
            if not bool(torch.isfinite(value.grad).all()):
                raise NotFiniteError(self._decoder.names[index])
            linear = self._linears[index][name]
            self.gradient[linear.where] += (value.grad * linear.packed.scales.T).flatten()

    def _scales(self, index: int) -> dict[str, Tensor]:
        """Return the scales of a block as leaves of a graph."""
        linears = self._linears[index].items()
        return {name: linear.scales(self.change).requires_grad_() for name, linear in linears}

    def _forward(self, index: int, hidden: Tensor, scales: dict[str, Tensor]) -> Tensor:
        """Run a block with these scales: [batch, tokens, hidden] → the same."""
        weights = dict(self._frozen[index])
        for name, linear in self._linears[index].items():
            integers = unpack(linear.packed, linear.bits, self._settings.checkpoint_format)[0]
            given = scales[name], integers, linear.zeros, self._decoder.dtype
            weights[f"{name}.weight"] = _Dequantised.apply(*given)  # type: ignore[no-untyped-call]
        return self._decoder.forward_with(self._decoder.blocks[index], hidden, weights)

    def _normed(self, hidden: Tensor) -> Tensor:
        return self._decoder.forward_with(self._decoder.last_norm, hidden, self._norm)

    def _divergence(self, normed: Tensor, wanted: Tensor) -> tuple[float, Tensor]:
        """Return the mean of KL(base ‖ this) over tokens, and its gradient with respect to ``normed``."""
        with torch.no_grad():
            expected = self._normed(wanted).flatten(0, 1)
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
        change, first, second: of ``Student``, and Adam's means of its gradient and of the gradient's square.
        best: the change that has the least loss on the deciding sequences so far.
        step: how many steps were made.
        before, after: the loss on the deciding sequences of no change, and of ``best``.
        stopped: why no further step is made, or None.
    """

    change: Tensor
    first: Tensor
    second: Tensor
    best: Tensor
    step: int = 0
    before: float = math.nan
    after: float = math.nan
    stopped: str | None = None

    @classmethod
    def new(cls, change: Tensor) -> _State:
        first, second, best = (torch.zeros_like(change) for _ in range(3))
        return cls(change, first, second, best)

    def save(self, file: Path, facts: dict[str, Any]) -> None:
        """Write all of it, and the facts of the run."""
        tensors = {name: value.cpu() for name, value in vars(self).items() if isinstance(value, Tensor)}
        rest = {name: value for name, value in vars(self).items() if name not in tensors}
        metadata = {"run": json.dumps(facts, sort_keys=True), "rest": json.dumps(rest)}
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
        vars(self).update(json.loads(metadata["rest"]))
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


class _Run:
    """The student, its text, and what the base makes of that."""

    def __init__(
        self, base: BlockwiseDecoder, tokens: Tensor, settings: Settings, store: LayerStore,
        parts: tuple[list[int], list[int]],
    ) -> None:  # fmt: skip
        self.learned, self.deciding = parts
        rows = tokens.split(1)
        self._wanted = _behind_last_block(base, rows)
        decoder = BlockwiseDecoder(base.checkpoint, base.device, base.dtype, differentiable=True)
        with torch.no_grad():
            self._first = decoder.embed(rows)
        self.student = Student(decoder, store, settings)
        self._at_once = max(1, TOKENS_PER_STEP // tokens.shape[1])
        self.per_pass = -(-len(self.learned) // self._at_once)

    def decide(self, change: Tensor) -> float:
        """Return the mean loss of the deciding sequences."""
        losses = (self.student.loss(self._first[row], self._wanted[row], change) for row in self.deciding)
        return sum(losses) / len(self.deciding)

    def descend(self, step: int, seed: int) -> None:
        """Compute the gradient of a step: each pass takes all sequences, in an order of its own."""
        lap, place = divmod(step, self.per_pass)
        order = torch.randperm(len(self.learned), generator=torch.Generator().manual_seed(seed + lap))
        rows = [
            self.learned[at] for at in order[place * self._at_once : (place + 1) * self._at_once].tolist()
        ]
        self.student.gradient.zero_()
        self.student.descend(*(torch.cat([of[row] for row in rows]) for of in (self._first, self._wanted)))

    def choose(self, state: _State) -> None:
        """Keep the best change so far in ``state``, and why the run has to stop, if it has to."""
        for share in SHARES:
            loss = self.decide(share * state.change)
            if not loss < DIVERGED * state.before:
                state.stopped = f"the divergence rose from {state.before:.4f} to {loss:.4f}"
                return
            if loss < state.after:
                state.after, state.best = loss, share * state.change


def distil(
    base: BlockwiseDecoder, tokens: Tensor, settings: Settings, store: LayerStore, passes: int, seed: int,
    listener: Listener = silent,
) -> tuple[Distilled, dict[str, Tensor]] | None:  # fmt: skip
    """Tune the scales of the layers in ``store``; None: there is too little text to decide.

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
    if (parts := split_sequences(len(tokens))) is None:
        return None
    run = _Run(base, tokens, settings, store, parts)
    facts = {"algorithm": ALGORITHM, "passes": passes, "seed": seed, "layers": store.digest(len(base.names))}
    file, state = store.folder / DISTILLING, _State.new(run.student.change)
    if not state.load(file, facts):
        state.before = state.after = run.decide(state.best)
    steps, saved = passes * run.per_pass, time.monotonic()
    with counted(listener, "distilling scales") as progress:
        while state.step < steps and state.stopped is None:
            try:
                run.descend(state.step, seed)
                state.adam(run.student.gradient, rate_at(state.step, steps))
                state.step += 1
                if state.step % run.per_pass == 0:
                    run.choose(state)
            except NotFiniteError as error:
                state.stopped = f"the gradient in {error} is not finite"
            ended = state.step == steps or state.stopped is not None
            if ended or asked() or time.monotonic() - saved > SAVE_AFTER:
                state.save(file, facts)
                saved = time.monotonic()
            if asked():
                raise Terminated
            progress(state.step, steps)
    done = Distilled(
        state.before, state.after, state.step, len(run.learned), len(run.deciding), state.stopped
    )
    return done, run.student.tensors(state.best) if done.kept else {}


def _behind_last_block(base: BlockwiseDecoder, rows: Sequence[Tensor]) -> list[Tensor]:
    """Return the hidden states behind the last block, [1, tokens, hidden] for each sequence."""
    with torch.no_grad():
        hidden = base.embed(rows)
        for index in range(len(base.names)):
            with base.block(index) as block:
                hidden = [base.forward(block, states) for states in hidden]
    return hidden
