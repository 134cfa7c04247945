"""Hold, save and load calibration sets: token sequences, held-out sequences for the check, and a manifest."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from qwenq.calibration.sequences import Sizes, check_vocabulary
from qwenq.environment import __version__
from qwenq.errors import CalibrationError, CorruptFileError, UsageError
from qwenq.models.folders import local_path
from qwenq.storage import atomic_write_bytes, atomic_write_json

_METADATA_KEY = "qwenq_calibration"
_TENSORS = {"tokens", "held_out"}


class CalibrationManifest(BaseModel):
    """Origin of a calibration set, enough to make it again.

    ``held_out_from`` says whether the held-out sequences share documents with the calibration ones.
    ``documents`` counts those whose tokens are in the set, ``documents_read`` those that could have been.
    ``notices`` name what of the source the tokens do not hold, or hold in another form, one sentence each.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["qwenq-calibration-1"] = "qwenq-calibration-1"
    source: str
    template: Literal["plain", "chat", "mixed", "self", "random"]
    seed: int
    samples: int = Field(ge=1)
    seq_len: int = Field(ge=2)
    held_out: int = Field(ge=0)
    held_out_from: Literal["other documents", "the same documents", "other random streams", "none"]
    documents: int | None = None
    documents_read: int | None = None
    source_read_to_end: bool | None = None
    tokenizer: str
    model: str | None = None
    tokens: str
    notices: tuple[str, ...] = ()
    made_by: str = f"qwenq {__version__}"


@dataclass(frozen=True)
class CalibrationSet:
    """Token sequences for the Hessians, and held-out ones.

    Attributes:
        tokens: int64 [samples, seq_len], no padding.
        held_out: int64 [check_samples, seq_len]; only the check after quantising reads them.
        manifest: source, template, seed, fingerprints.
    """

    tokens: torch.Tensor
    held_out: torch.Tensor
    manifest: CalibrationManifest

    @classmethod
    def of(cls, tokens: torch.Tensor, held_out: torch.Tensor, **origin: Any) -> CalibrationSet:
        """Return the set of these sequences, whose manifest also says where they come from."""
        sizes: dict[str, Any] = {
            "samples": len(tokens),
            "seq_len": tokens.shape[1],
            "held_out": len(held_out),
        }
        manifest = CalibrationManifest(**sizes, tokens=fingerprint_tokens(tokens, held_out), **origin)
        return cls(tokens, held_out, manifest)

    @property
    def fingerprint(self) -> str:
        """Return 16 hex digits over both token tensors, the same for equal data, whatever the file."""
        return self.manifest.tokens

    def save(self, path: Path) -> None:
        """Write ``path`` (safetensors, manifest in its metadata) and a readable ``<path>.json`` beside it.

        Raises:
            UsageError: ``path`` does not end in .safetensors.
            StorageError: the disk refused; nothing is left behind.
        """
        if path.suffix != ".safetensors":
            raise UsageError(
                "a calibration set is a .safetensors file",
                where=path,
                hint=f"name it {path.name}.safetensors",
            )
        tensors = {"tokens": self.tokens.contiguous(), "held_out": self.held_out.contiguous()}
        atomic_write_bytes(path, save(tensors, metadata={_METADATA_KEY: self.manifest.model_dump_json()}))
        # not chats.json, which may be the source of chats.safetensors
        atomic_write_json(path.with_name(f"{path.name}.json"), self.manifest.model_dump(mode="json"))

    @classmethod
    def load(cls, path: Path) -> CalibrationSet:
        """Read a saved set and check its bytes against its fingerprint.

        Raises:
            CorruptFileError: truncated, changed, or its tensors are not what its manifest says.
            CalibrationError: a safetensors file that is not a calibration set, or of another version.
        """
        tensors, metadata = _read(path)
        if _METADATA_KEY not in metadata or len(tensors) != len(_TENSORS):
            raise CalibrationError(
                "this safetensors file is not a calibration set",
                where=path,
                hint="make one with `qwenq calibrate`",
            )
        loaded = cls(tensors["tokens"], tensors["held_out"], _parse(metadata[_METADATA_KEY], path))
        loaded._verify(path)
        return loaded

    def _verify(self, path: Path) -> None:
        facts = self.manifest
        shapes = (facts.samples, facts.seq_len), (facts.held_out, facts.seq_len)
        whole = (tuple(self.tokens.shape), tuple(self.held_out.shape)) == shapes
        whole = whole and self.tokens.dtype == self.held_out.dtype == torch.int64
        if not whole or fingerprint_tokens(self.tokens, self.held_out) != facts.tokens:
            raise CorruptFileError(
                "the tokens of this calibration set are not those it was saved with",
                where=path,
                hint="make it again with `qwenq calibrate`",
            )


def require_writable(out: Path) -> None:
    """Refuse a name that could not be saved to, before any work."""
    if local_path(out, "--out").is_dir():
        raise UsageError("--out is a folder", where=out, hint=f"name a file: {out / 'calib.safetensors'}")
    if out.suffix != ".safetensors":
        raise UsageError("--out has to end in .safetensors", where=out, hint=f"{out.stem}.safetensors")


def save_or_keep(made: CalibrationSet, out: Path, *, force: bool) -> CalibrationSet:
    """Save a set, or keep a file of these very tokens, from whatever source; return what the file holds."""
    if force or not out.exists():
        made.save(out)
        return made
    try:
        there = CalibrationSet.load(out)
    except (CalibrationError, CorruptFileError):
        there = None
    if there is None or there.fingerprint != made.fingerprint:
        raise UsageError(
            "the output file exists and holds something else",
            where=out,
            hint="name another --out, or overwrite it with --force",
        )
    return there


def fingerprint_tokens(tokens: torch.Tensor, held_out: torch.Tensor) -> str:
    """Return 16 hex digits over shapes and values (little-endian int64) of both tensors."""
    digest = hashlib.sha256()
    for tensor in (tokens, held_out):
        digest.update(repr(tuple(tensor.shape)).encode())
        digest.update(tensor.contiguous().numpy().astype("<i8", copy=False).tobytes())
    return digest.hexdigest()[:16]


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            names = _TENSORS & set(file.keys())
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise CorruptFileError(
            f"not a whole safetensors file: {error}", where=path, hint="make it again with `qwenq calibrate`"
        ) from error


def _parse(manifest: str, path: Path) -> CalibrationManifest:
    try:
        return CalibrationManifest.model_validate_json(manifest)
    except ValidationError as error:
        raise CalibrationError(
            f"the manifest of this calibration set cannot be read: {error.errors()[0]['msg']}",
            where=path,
            hint="it was made by another version of qwenq: make it again with `qwenq calibrate`",
        ) from error


def load_saved(
    path: Path, vocabulary: int, asked: tuple[int | None, int | None, int | None] = (None, None, None)
) -> CalibrationSet:
    """Return the set in a file, whose sizes are fixed.

    Args:
        vocabulary: ids have to be below it.
        asked: samples, tokens of each, and held-out sequences that the user named; None: not named.
    """
    path = local_path(path, "the calibration set")
    if not path.is_file():
        raise UsageError("no such calibration set", where=path, hint="make it with `qwenq calibrate`")
    loaded = CalibrationSet.load(path)
    has = loaded.manifest
    for name, wish, fact in zip(
        ("samples", "seq-len", "held-out"), asked, (has.samples, has.seq_len, has.held_out), strict=True
    ):
        if wish is not None and wish != fact:
            raise UsageError(
                f"--{name} {wish} was asked for, but this saved set has {fact}",
                where=path,
                hint=f"leave --{name} out, or make another set",
            )
    for tokens in (loaded.tokens, loaded.held_out):
        check_vocabulary(tokens, vocabulary, str(path))
    return loaded


def random_tokens(vocabulary: int, wanted: Sizes, seed: int) -> CalibrationSet:
    """Return uniformly drawn ids, [samples, seq_len] and [held_out, seq_len]."""
    if seed >= 1 << 63:
        raise UsageError(f"the seed {seed} is too large", where="--seed", hint="give one below 2⁶³")
    generator = torch.Generator().manual_seed(seed)
    shape = (wanted.samples + wanted.held_out, wanted.seq_len)
    ids = torch.randint(vocabulary, shape, generator=generator)
    tokens, held_out = ids[: wanted.samples], ids[wanted.samples :]
    streams = "other random streams" if wanted.held_out else "none"
    return CalibrationSet.of(
        tokens,
        held_out,
        source="random",
        template="random",
        seed=seed,
        held_out_from=streams,
        tokenizer="none",
    )
