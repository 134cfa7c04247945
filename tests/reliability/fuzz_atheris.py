"""Coverage-guided fuzzing (atheris, on libFuzzer) of what reads a stranger's file. `make fuzz`.

    .venv/bin/python tests/reliability/fuzz_atheris.py SECONDS [TARGET...]

Each target runs in a process of its own for its share of the seconds. Inputs that reach new branches of
qwenq are kept and changed further; sound files are where it starts. What is not a ``QwenqError`` that says
something ends the run with exit code 1, and the input lies under build/fuzz. Not collected by pytest: its
tests have a fixed budget and the same inputs each time; what is found here becomes an example there.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FOUND = ROOT / "build" / "fuzz"
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]

Read = Callable[[bytes], object]
MODULES = [
    "qwenq.recipe", "qwenq.results", "qwenq.models.checkpoint", "qwenq.models.config", "qwenq.models.shapes",
    "qwenq.models.safetensors_files", "qwenq.models.gptq_config", "qwenq.models.qwen_v1",
    "qwenq.models.qwen_v1", "qwenq.models.tokenizer", "qwenq.models.tokenizer",
    "qwenq.models.qwen_tokenizer", "qwenq.models.qwen_tokenizer", "qwenq.models.tokenizer",
    "qwenq.models.folders",
]  # fmt: skip
MEMORY_MB = 3072  # torch and transformers take most of one
LONGEST_S = 30  # of computing, for one input
HANGS_S = 1200  # by the clock: a machine that is paused or busy is no hang
SHARED_MEMORY = Path("/dev/shm")  # a file an input, thousands a second: not on a disk


def headers(folder: Path) -> tuple[Read, list[bytes]]:
    """A safetensors file: its header, and every tensor behind it."""
    from test_hostile_weights import WHOLE, read_all

    def read(raw: bytes) -> None:
        (folder / "model.safetensors").write_bytes(raw)
        assert read_all(folder) <= len(raw), "bytes were read that the file does not have"

    return read, [WHOLE]


def configs(folder: Path) -> tuple[Read, list[bytes]]:
    """config.json beside weights that belong to the sound one."""
    from test_hostile_config import V1, config_of
    from tiny_families import write_family

    from qwenq.models.checkpoint import open_checkpoint
    from qwenq.models.shapes import ModelShape

    model = write_family(folder / "model")

    def read(raw: bytes) -> None:
        (model / "config.json").write_bytes(raw)
        ModelShape.from_config(open_checkpoint(model).config)

    return read, [json.dumps(one).encode() for one in (*map(config_of, ("llama", "qwen2", "qwen3")), V1)]


def gptq_settings(folder: Path) -> tuple[Read, list[bytes]]:
    """quantize_config.json of a Qwen v1 folder."""
    import torch
    from safetensors.torch import save_file
    from test_hostile_config import GPTQ, V1, settings_of

    from qwenq.models.safetensors_files import open_safetensors

    (folder / "config.json").write_text(json.dumps(V1))
    weight = torch.zeros(8, 192, dtype=torch.int32)
    save_file({"transformer.h.0.attn.c_attn.qweight": weight}, folder / "model.safetensors")
    source = open_safetensors(folder)
    assert source is not None

    def read(raw: bytes) -> None:
        (folder / "quantize_config.json").write_bytes(raw)
        settings_of(folder, source)

    return read, [json.dumps(GPTQ).encode()]


def recipes(folder: Path) -> tuple[Read, list[bytes]]:
    """A recipe."""
    from test_hostile_rows import RECIPE

    from qwenq.recipe import read_recipe

    def read(raw: bytes) -> None:
        (folder / "recipe.toml").write_bytes(raw)
        read_recipe(folder / "recipe.toml")

    return read, [RECIPE.encode()]


def tokenizers(folder: Path) -> tuple[Read, list[bytes]]:
    """One of a tokenizer's files, the first byte says which; then all that commands ask of it."""
    from test_hostile_tokenizers import FILES, sound, use
    from tiny_model import write_tiny_model

    from qwenq.models.tokenizer import load_tokenizer

    model = write_tiny_model(folder / "model")
    whole = {name: json.dumps(value or sound(model, name)).encode() for name, value in FILES.items()}
    names = list(whole)

    def read(raw: bytes) -> None:
        for name in names:
            (model / name).write_bytes(whole[name])
        (model / names[raw[0] % len(names) if raw else 0]).write_bytes(raw[1:])
        use(load_tokenizer(model))

    return read, [bytes([number]) + whole[name] for number, name in enumerate(names)]


def rows(folder: Path) -> tuple[Read, list[bytes]]:
    """The JSON lines of a run folder."""
    from test_hostile_rows import SOUND

    from qwenq.results import read_rows

    def read(raw: bytes) -> None:
        (folder / "results.jsonl").write_bytes(raw)
        read_rows(folder)

    return read, [json.dumps(one).encode() + b"\n" for one in SOUND]


TARGETS = {one.__name__: one for one in (headers, configs, gptq_settings, recipes, tokenizers, rows)}


def as_words(seeds: list[bytes]) -> list[bytes]:
    """Names and values of sound files, as libFuzzer's dictionaries have them: what to put elsewhere."""
    found = {word for seed in seeds for word in re.findall(rb'"[^"]{1,40}"|[\w.]{2,30}', seed)}
    found |= {b"null", b"true", b"-1", b"1e999", b"{}", b"[]", b"18446744073709551616"}
    return [b'"' + b"".join(b"\\x%02x" % byte for byte in word) + b'"\n' for word in sorted(found)[:2000]]


def fuzz(name: str, seconds: int, counts: Path) -> None:
    """One target, in this process; does not return."""
    atheris: Any = import_module("atheris")
    with atheris.instrument_imports(include=["qwenq"]):
        for module in MODULES:
            import_module(module)
    from qwenq.errors import QwenqError

    folder = Path(tempfile.mkdtemp(dir=SHARED_MEMORY if SHARED_MEMORY.is_dir() else None))
    os.chdir(folder)
    os.environ["QWENQ_CACHE"] = str(folder / "cache")
    read, seeds = TARGETS[name](folder)
    corpus = folder / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(seeds):
        (corpus / str(number)).write_bytes(seed)
    with counts.open("r+b") as file:
        shared = mmap.mmap(file.fileno(), 24)
    tried, refused = 0, 0

    def one_input(raw: bytes) -> None:
        nonlocal tried, refused
        tried += 1
        began = time.process_time()
        try:
            read(raw)
        except QwenqError as error:
            refused += 1
            assert error.what.strip(), "a message that says nothing"
            assert len(str(error)) < 20_000 and "\x1b" not in str(error), "a message that nobody can read"
        now = time.process_time()
        assert now - began < LONGEST_S, f"{now - began:.0f} s for one input"
        shared[:24] = struct.pack("<QQd", tried, refused, now)
        assert not Path("pwned").exists(), "code was executed"

    options = [f"-max_total_time={seconds}", f"-rss_limit_mb={MEMORY_MB}", f"-timeout={HANGS_S}"]
    words = folder / "words"
    words.write_bytes(b"".join(as_words(seeds)))
    place = f"-artifact_prefix={FOUND}/{name}-"
    atheris.Setup(
        [
            sys.argv[0],
            *options,
            place,
            f"-dict={words}",
            "-max_len=20000",
            "-print_final_stats=1",
            str(corpus),
        ],
        one_input,
    )
    atheris.Fuzz()


def main() -> None:
    """All targets, one after the other, and a table of what was tried."""
    if sys.argv[1:2] == ["--target"]:
        fuzz(sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))
        return
    names = sys.argv[2:] or list(TARGETS)
    each = max(1, int(sys.argv[1]) // len(names))
    FOUND.mkdir(parents=True, exist_ok=True)
    failed, lines = [], []
    for name in names:
        counts = FOUND / f"{name}.counts"
        counts.write_bytes(bytes(24))
        command = [sys.executable, __file__, "--target", name, str(each), str(counts)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        tried, refused, seconds = struct.unpack("<QQd", counts.read_bytes())
        reached = re.findall(r"cov: (\d+)", done.stderr) or ["0"]
        lines.append(f"| {name} | {tried:,} | {refused:,} | {int(reached[-1]):,} | {seconds:,.0f} |")
        if done.returncode or not tried:
            failed.append(name)
            sys.stderr.write(done.stdout[-2000:] + done.stderr[-6000:])
    print("| target | inputs tried | refused with a message | branches reached | seconds of computing |")
    print("|---|---:|---:|---:|---:|")
    print("\n".join(lines))
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; the inputs are under {FOUND}")


if __name__ == "__main__":
    main()
