"""Make models and run them: quantize, calibrate, convert, plan, load."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qwenq.events import counted, notify
from qwenq.progress import Progress, shown

if TYPE_CHECKING:
    from torch import Tensor

    from qwenq.calibration import CalibrationSet
    from qwenq.conversion import Converted
    from qwenq.models.chatml import Message
    from qwenq.models.tokenizer import Tokenizer
    from qwenq.planner.plan import Plan
    from qwenq.quantization import Quantised
    from qwenq.recipe import Recipe
    from qwenq.runtime.chat import Conversation
    from qwenq.runtime.engine import Engine

Name = str | Path


def chosen_recipe(
    recipe: Recipe | Name | None, top: dict[str, Any], calibration: dict[str, Any], quantize: dict[str, Any]
) -> Recipe:
    """Return a recipe, by itself or by its file, with the given keys (those that are not None) in it.

    Settings that describe the recipe's own source of text go where another source is given.
    """
    from qwenq.models.folders import local_path
    from qwenq.recipe import Recipe, read_recipe
    from qwenq.workflow import find_recipe

    if not isinstance(recipe, Recipe):
        recipe = Recipe() if recipe is None else read_recipe(find_recipe(Path(recipe)))
    own: dict[str, Any] = {}
    if (source := calibration.get("source")) is not None:
        if Path(source).suffix == ".safetensors":  # a saved set has its own sizes
            own |= {"samples": "auto", "seq_len": "auto", "column": None}
        if source == "self" or local_path(source, "--calibration").is_file():
            own["split"] = None
        if source == "self":
            own["column"] = None
    recipe = replace(recipe, calibration=replace(recipe.calibration, **own))
    return recipe.override(top, calibration=calibration, quantize=quantize)


def quantize(
    model: Name | None = None,
    *,
    out: Name | None = None,
    recipe: Recipe | Name | None = None,
    weights: str | None = None,
    calibration: Name | None = None,
    samples: int | None = None,
    seq_len: int | None = None,
    device: str = "auto",
    resume: bool = True,
    progress: Progress = True,
    **settings: Any,
) -> Quantised:
    """Quantise a model with GPTQ, check what was written, and return the folder and the check.

    Args:
        model: a folder or hub id; None: the recipe's, else the bundled model.
        out: the folder to make; None: named after the model, in the current folder.
        recipe: a recipe, its TOML file, or the name of one of qwenq's own; arguments replace its values.
        weights: "random": ``model`` is a catalogue name, drawn at random.
        calibration: "self" (the model writes the text), a file or folder, a saved set, or a hub dataset.
        samples, seq_len: calibration sequences, and tokens of each.
        device: "auto", "cpu", "cuda", "cuda:1", …
        resume: continue an unfinished run of the same settings.
        progress: see the module.
        **settings: keys of a recipe's ``[quantize]``: bits=4, group_size=128, damp=0.05, …

    Raises:
        QwenqError: see ``qwenq.errors``; finished layers are kept, the same call continues.
    """
    from qwenq.quantization import quantize as run

    source = None if calibration is None else str(calibration)
    text = {"source": source, "samples": samples, "seq_len": seq_len}
    top = {"model": model and str(model), "weights": weights}
    chosen = chosen_recipe(recipe, top, text, settings)
    with shown(progress) as listener:
        return run(chosen, Path(out) if out else None, listener, device=device, resume=resume)


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to run.

    Attributes:
        name, precision: such as "Qwen3-8B" and "bf16" or "int4".
        engine: runs the network; ``engine.implementation`` names the kernels.
        tokenizer: of the same model.
        thinking: whether it thinks before it answers a chat.
    """

    name: str
    precision: str
    engine: Engine
    tokenizer: Tokenizer
    thinking: bool = False

    def generate(
        self,
        prompt: str | Sequence[Message],
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> str:
        """Continue a text, or answer messages such as ``[{"role": "user", "content": "Hello"}]``.

        Raises:
            UsageError: messages for a base model, or a prompt that does not fit the context.
        """
        from qwenq.runtime.sampling import Sampling

        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else self.tokenizer.chat(list(prompt))
        found = self.engine.generate(
            [ids],
            max_new_tokens,
            sampling=Sampling(temperature=temperature, top_p=top_p, seed=seed),
            stop_ids=self.tokenizer.eos_ids,
        )
        return self.tokenizer.decode(found.answers[0].ids)

    def logits(self, ids: Sequence[int]) -> Tensor:
        """Return float32 logits [tokens, vocabulary] after every token of ``ids``."""
        return self.engine.logits([ids])[0]

    def chat(
        self,
        system: str | None = None,
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        seed: int = 0,
    ) -> Conversation:
        """Begin a conversation; its ``ask(question)`` yields the answer piece by piece.

        Args:
            system: the system message; None: the chat template's own.
            max_new_tokens: of an answer; None: 512, or 32768 where the model thinks.
            temperature, top_p: None: 0.7 and 0.8, or 0.6 and 0.95 where the model thinks.
            seed: of the random numbers.

        Raises:
            UsageError: a base model.
        """
        from qwenq.runtime.chat import ANSWER, THOUGHTS, Conversation, Session
        from qwenq.runtime.sampling import Sampling

        tokens, heat, mass = (THOUGHTS, 0.6, 0.95) if self.thinking else (ANSWER, 0.7, 0.8)
        sampling = Sampling(
            temperature=heat if temperature is None else temperature,
            top_p=mass if top_p is None else top_p,
            seed=seed,
        )
        return Conversation(
            Session(self.engine),
            self.tokenizer,
            system=system,
            sampling=sampling,
            max_new_tokens=tokens if max_new_tokens is None else max_new_tokens,
        )


def load(
    model: Name | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    engine: Literal["fast", "transformers"] = "fast",
    kernel: str = "auto",
    attention: str = "auto",
    head: Literal["as-is", "int8"] = "as-is",
    thinking: Literal["auto", "on", "off"] = "auto",
    for_chat: bool = False,
    progress: Progress = True,
) -> LoadedModel:
    """Load a model, quantised or not, to run it; None is the bundled one. The options are `qwenq chat`'s.

    Args:
        for_chat: refuse a base model before its weights are read.

    Raises:
        QwenqError: no such model, device, kernel, …, or not enough memory.
    """
    from qwenq.models.checkpoint import open_checkpoint
    from qwenq.models.identity import model_name, precision_of
    from qwenq.models.machine import resolve_device
    from qwenq.models.opening import resolve_model
    from qwenq.models.tokenizer import load_tokenizer
    from qwenq.runtime import engine as engines
    from qwenq.runtime.chat import require_chat, thinking_in_chat

    resolve_device(device)  # before a download
    given = None if model is None else str(model)
    with shown(progress) as listener:
        resolved = resolve_model(given)
        notify(listener, resolved.notices)
        tokenizer, thinks = load_tokenizer(resolved.folder), False
        if for_chat:
            require_chat(tokenizer)
        if tokenizer.template is not None or thinking != "auto":
            tokenizer, thinks = thinking_in_chat(tokenizer, thinking)
        checkpoint = open_checkpoint(resolved.folder)
        notify(listener, checkpoint.notices)
        runner = engines.load(
            checkpoint,
            device=device,
            dtype=dtype,
            engine=engine,
            kernel=kernel,
            attention=attention,
            head=head,
            real_vocab=tokenizer.vocab_size,
        )
        notify(listener, runner.notes)
    return LoadedModel(model_name(given), precision_of(checkpoint, runner.dtype), runner, tokenizer, thinks)


def convert(
    source: Name,
    target: Name,
    *,
    zeros: Literal["v1", "v2"] | None = None,
    to: Literal["compressed-tensors"] | None = None,
    store_head: bool = False,
    max_shard_bytes: int = 5_000_000_000,
    progress: Progress = True,
) -> Converted:
    """Rewrite a model in another layout: Qwen v1 as Qwen2, GPTQ zero points v1 ↔ v2, other shards.

    ``to`` and ``store_head`` are the options of `qwenq convert`.

    Raises:
        QwenqError: the source is damaged, or the target holds something.
    """
    from qwenq.conversion import convert as run
    from qwenq.models.opening import resolve_model

    resolved = resolve_model(str(source))
    with shown(progress) as listener:
        notify(listener, resolved.notices)
        return run(
            resolved.folder,
            Path(target),
            zeros=zeros,
            to=to,
            store_head=store_head,
            max_shard_bytes=max_shard_bytes,
            listener=listener,
        )


def plan(
    model: Name | None = None,
    *,
    weights: Literal["stored", "random"] = "stored",
    bits: Sequence[int] = (4, 8),
    context: int = 8192,
    batch: int = 1,
    gpus: Sequence[str] = (),
    tensor_parallel: Sequence[int] = (1,),
    group_size: int | None = None,
    samples: int | None = None,
    seq_len: int | None = None,
) -> Plan:
    """Compute what a model needs before anything is downloaded: bytes, memory, bounds of its speed.

    Args:
        model: a catalogue name such as "qwen3-8b", a folder or a hub id; None is the bundled model.
        gpus: such as "rtx-4090"; none: this machine's CPU.
        samples, seq_len: of calibration; None: what `qwenq.quantize` takes there, as far as memory goes.

    Raises:
        QwenqError: no such model or GPU; the nearest names are suggested.
    """
    from qwenq.models.machine import memory_limit
    from qwenq.planner.estimates import gpu
    from qwenq.planner.plan import PlanOptions, find_model, make_plan

    options = PlanOptions(
        bits=tuple(bits),
        context=context,
        batch=batch,
        gpus=tuple(map(gpu, gpus)),
        tensor_parallel=tuple(tensor_parallel),
        group_size=group_size,
        samples=samples,
        seq_len=seq_len,
        ram=memory_limit(),
    )
    return make_plan(find_model(None if model is None else str(model), weights), options)


def calibrate(
    model: Name | None = None,
    out: Name | None = None,
    *,
    source: Name = "self",
    samples: int | Literal["auto"] | None = None,
    seq_len: int | Literal["auto"] | None = None,
    held_out: int | None = None,
    seed: int = 0,
    split: str | None = None,
    column: str | None = None,
    thinking: Literal["auto", "on", "off"] = "auto",
    weights: Literal["stored", "random"] = "stored",
    device: str = "auto",
    force: bool = False,
    progress: Progress = True,
) -> CalibrationSet:
    """Make a calibration set for a model once, to share between quantisations; save it to ``out`` if given.

    Args:
        weights: "random": tokens are drawn at random, as random weights have no tokenizer.
        force: overwrite a different file. One that holds these very tokens is kept, and returned.

    Raises:
        QwenqError: no such text, or too little of it; ``out`` holds something else.
    """
    from qwenq.calibration.calibration_set import require_writable, save_or_keep
    from qwenq.calibration.load import calibration_tokenizer, load_calibration
    from qwenq.models.machine import resolve_device
    from qwenq.models.opening import open_model
    from qwenq.recipe import Recipe

    if out is not None:
        require_writable(Path(out))
    sizes = {"samples": samples, "seq_len": seq_len, "held_out": held_out}
    text: dict[str, Any] = {"source": str(source), "split": split, "column": column, "thinking": thinking}
    Recipe().override(
        {"weights": weights}, calibration={**text, **sizes}, quantize={"seed": seed}
    )  # in range
    given = {key: None if value == "auto" else value for key, value in sizes.items()}
    options: dict[str, Any] = {"seed": seed, "split": split, "column": column, **given}
    options["device"] = str(resolve_device(device))
    with shown(progress) as listener:
        name = None if model is None else str(model)
        checkpoint = open_model(name, weights, seed)
        tokenizer = None if weights == "random" else calibration_tokenizer(checkpoint.folder, thinking)
        notify(listener, checkpoint.notices)
        with counted(listener, "writing text" if source == "self" else "reading text", "tokens") as update:
            made = load_calibration(
                str(source),
                checkpoint=checkpoint,
                tokenizer=tokenizer,
                progress=update,
                **options,
            )
        if out is not None:
            made = save_or_keep(made, Path(out), force=force)
        notify(listener, made.manifest.notices)
    return made
