"""Compile ``csrc/`` into one shared library per variant: ``python -m qwenq.compute.build``.

The build of a wheel and an editable install run it (``hatch_build.py``). It uses the standard library alone,
since an isolated build environment has nothing else. The compiler is the system's, or the one that comes as
the wheel ``ziglang``, which also compiles for other platforms.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = HERE / "csrc"
LIBRARIES = HERE / "lib"

FLAGS = (
    "-std=gnu11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-g0",
    "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas", "-Wno-psabi",
)  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """A set of instructions that the library is compiled for."""

    name: str  # of the library's file, of ``QWENQ_CPU`` and of tables
    machine: str  # as ``platform.machine()`` names it on Linux
    features: tuple[str, ...]  # that a CPU needs, as ``torch.cpu.get_capabilities()`` names them
    gcc: tuple[str, ...]  # flags for GCC and Clang
    zig: str  # the CPU for ``zig cc -mcpu``


_AVX2 = ("avx2", "fma3", "f16c", "bmi2")
_AVX512 = (*_AVX2, "avx512_f", "avx512_bw", "avx512_vl", "avx512_dq", "avx512_vnni")
_V4 = ("-march=x86-64-v4", "-mavx512vnni", "-mprefer-vector-width=512")

_V3 = ("-march=x86-64-v3",)

VARIANTS = (
    Variant(
        "avx512-bf16", "x86_64", (*_AVX512, "avx512_bf16"), (*_V4, "-mavx512bf16"),
        "x86_64_v4+avx512vnni+avx512bf16",
    ),
    Variant("avx512-vnni", "x86_64", _AVX512, _V4, "x86_64_v4+avx512vnni"),
    Variant("avx-vnni", "x86_64", (*_AVX2, "avx_vnni"), (*_V3, "-mavxvnni"), "x86_64_v3+avxvnni"),
    Variant("avx2", "x86_64", _AVX2, _V3, "x86_64_v3"),
    Variant(
        "neon", "aarch64", ("dot",), ("-march=armv8.2-a+dotprod+fp16",), "generic+v8_2a+dotprod+fullfp16"
    ),
)  # fmt: skip
"""The best first; a CPU that has a variant's features also has those of the later ones of its machine, except
that one with AVX-512 need not have AVX-VNNI."""

SUFFIX = ".dylib" if sys.platform == "darwin" else ".so"


@dataclass(frozen=True)
class Platform:
    """What a wheel can be built for on any machine, by Zig."""

    tag: str  # of the wheel's file name: the system, its oldest version, the machine
    machine: str  # as `Variant.machine`
    zig: str  # the target for `zig cc`
    suffix: str  # of libraries


PLATFORMS = (
    Platform("manylinux_2_17_x86_64", "x86_64", "x86_64-linux-gnu.2.17", ".so"),
    Platform("manylinux_2_17_aarch64", "aarch64", "aarch64-linux-gnu.2.17", ".so"),
    Platform("macosx_11_0_arm64", "aarch64", "aarch64-macos.11.0", ".dylib"),
)


class BuildError(RuntimeError):
    """A variant cannot be compiled; the message says why."""


def machine_name(machine: str) -> str:
    """Return the name that ``Variant.machine`` uses."""
    return {"arm64": "aarch64", "amd64": "x86_64"}.get(machine.lower(), machine.lower())


def library_name(variant: str, suffix: str = SUFFIX) -> str:
    """Return the file name of a variant's library."""
    return f"libqwenq-{variant}{suffix}"


def sources_hash() -> str:
    """Return a hash of all sources; a library holds the hash of those that it was compiled from."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.iterdir()):
        if path.suffix in {".c", ".h", ".def"}:
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def find_compiler() -> tuple[list[str], bool]:
    """Return the command of a C compiler, and whether it is ``zig cc``."""
    if os.environ.get("QWENQ_BUILD_WITH") != "zig":
        for name in filter(None, (os.environ.get("CC"), "cc", "gcc", "clang")):
            command = name.split()
            if shutil.which(command[0]):
                return command, False
    try:
        return find_zig()
    except BuildError:
        raise BuildError("there is no C compiler: install gcc or clang, or pip install ziglang") from None


def find_zig() -> tuple[list[str], bool]:
    """Return the command of ``zig cc``, which compiles for every platform, and True."""
    if importlib.util.find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "cc"], True
    raise BuildError("there is no compiler for other platforms: pip install ziglang")


def compile_variant(
    variant: Variant,
    target: Path,
    *,
    zig_target: str | None = None,
    extra: Sequence[str] = (),
    program: Path | None = None,
) -> Path:
    """Compile all sources for a variant.

    Args:
        variant: what to compile for.
        target: the library's path; replaced at once when it is complete.
        zig_target: another platform, as Zig names it (``aarch64-linux-gnu.2.17``); None: this one.
        extra: more flags, such as ``-fsanitize=address``.
        program: a C file with a ``main``; makes a program of it and the kernels, in place of a library.
    """
    command, zig = find_zig() if zig_target is not None else find_compiler()
    flags = [f"-mcpu={variant.zig}"] if zig else list(variant.gcc)
    if zig_target is not None:
        flags += ["-target", zig_target]
    sources = [str(path) for path in sorted(SOURCES.glob("*.c"))]
    if program is None:
        flags += ["-fPIC", "-shared"]
    else:
        sources.append(str(program))
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder, target.name)
        defines = [f'-DQWENQ_SOURCES="{sources_hash()}"', f'-DQWENQ_VARIANT="{variant.name}"']
        run = subprocess.run(
            [*command, *FLAGS, *flags, *defines, *extra, "-o", str(made), *sources, "-lm", "-lpthread"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if run.returncode:
            raise BuildError(f"{command[0]} could not compile {variant.name}:\n{run.stderr.strip()[-4000:]}")
        made.replace(target)
    return target


def build(folder: Path = LIBRARIES, target: Platform | None = None, extra: Sequence[str] = ()) -> list[Path]:
    """Compile every variant of this machine, or of one that Zig compiles for; skip those that are current."""
    machine = target.machine if target else machine_name(platform.machine())
    paths = []
    for variant in VARIANTS:
        if variant.machine == machine:
            path = folder / library_name(variant.name, target.suffix if target else SUFFIX)
            if not path.is_file() or sources_hash().encode() not in path.read_bytes():
                compile_variant(variant, path, zig_target=target.zig if target else None, extra=extra)
            paths.append(path)
    return paths


def platform_of(tag: str) -> Platform:
    """Return a platform by its tag."""
    for known in PLATFORMS:
        if known.tag == tag:
            return known
    raise BuildError(f"no wheel is built for {tag!r}: use {', '.join(known.tag for known in PLATFORMS)}")


def main() -> int:
    """Compile for this machine, or print why that failed."""
    argparse.ArgumentParser(prog="python -m qwenq.compute.build", description=__doc__).parse_args()
    try:
        paths = build()
    except BuildError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    for path in paths:
        sys.stdout.write(f"{path}\n")
    if not paths:
        sys.stdout.write(f"no variant for {platform.machine()}: everything runs in torch\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
