"""The kernels for Arm, run by an emulator, compute what those of this machine compute.

All tests that run a variant of the C library run once more, and their calls of kernels are recorded. A
program for aarch64 (``arm_main.c`` and the kernels, compiled by Zig) then makes the same calls under qemu,
with as many threads. Integers have to be equal. Sums of floats are taken in another order: they may differ by
a small part of the largest number.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from compute.conftest import TESTS, variant_test_files

from qwenq.compute import build, cpu, step

QEMU = "qemu-aarch64"
NEON = next(variant for variant in build.VARIANTS if variant.name == "neon")
THREADS = "2"
BOUNDS = {"float32": 1e-5, "float16": 2.0**-10, "bfloat16": 2.0**-7}
"""Of the largest finite number in the same piece of memory."""
BOUNDS_OF = {"decode_step": 1e-3}
"""Activations are rounded to 16 bits on the way, steps of 3e-5 of their largest, and a hybrid's last inputs
of a convolution to bfloat16, steps of 4e-3 of their own size: another order of additions may fall on the
other side of a step."""
SCRATCH = {
    "linear": {4},
    "causal_attention": {7, 8, 9},
    "round_columns": {10},
    "move_columns": {10},
    "fit_scale": {12},
}
"""Arguments that point to memory whose layout is a variant's own."""
CHECKED = ("-fsanitize=undefined", "-fsanitize-trap=undefined")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernels for Arm, as a program that stops at undefined behaviour."""
    for missing, needed in ((not find_spec("ziglang"), "ziglang"), (not shutil.which(QEMU), "qemu-user")):
        if missing:
            pytest.skip(f"needs {needed}")
    return build.compile_variant(
        NEON,
        tmp_path_factory.mktemp("arm") / "arm_main",
        zig_target="aarch64-linux-musl",
        extra=["-static", "-I", str(build.SOURCES), *CHECKED],
        program=Path(__file__).with_name("arm_main.c"),
    )


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the calls that tests make here, under the lowest variant, and their results."""
    if build.machine_name(platform.machine()) != "x86_64" or not cpu.variants_here():
        pytest.skip("needs an x86-64 CPU that runs a variant")
    folder = tmp_path_factory.mktemp("calls")
    run = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "compute.record_calls"),
            *("--record-calls", str(folder), "-k", cpu.variants_here()[-1].name, *variant_test_files()),
        ],
        env={**os.environ, "OMP_NUM_THREADS": THREADS, "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}"},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    return folder


def objects_of(
    calls: list[dict[str, Any]], *contents: bytes
) -> Iterator[tuple[str, dict[str, Any], list[bytes]]]:
    """Describe each object, and take its bytes from each file; leave out a kernel's scratch memory."""
    at = 0
    for number, call in enumerate(calls):
        scratch = SCRATCH.get(call["kernel"], set())
        if call["kernel"] == "decode_step":  # its arguments by name, behind the number of threads
            scratch = {1 + step._fields().index(name) for name in ("workspace", "scores")}
        skipped = {target for place, target, _ in call["objects"][-1]["places"] if place // 8 in scratch}
        for index, held in enumerate(call["objects"]):
            if index not in skipped:
                what = f"call {number}, {call['kernel']} of {call['test']}, object {index} ({held['dtype']})"
                yield what, held, [content[at : at + held["size"]] for content in contents]
            at += held["size"]


def difference(kernel: str, held: dict[str, Any], expected: bytes, found: bytes) -> str | None:
    """In what memory differs from what is expected; None: in nothing that matters."""
    if expected == found:
        return None
    if held["dtype"] not in BOUNDS:
        kind = torch.int64 if held["places"] else torch.uint8
        one, other = (torch.frombuffer(bytearray(content), dtype=kind) for content in (expected, found))
        changed = (one != other).nonzero().flatten().tolist()
        addresses = {place // 8 for place, *_ in held["places"]}
        wrong = [at for at in changed if at not in addresses]
        return f"{len(wrong)} of {one.numel()} integers or bytes, the first at {wrong[0]}" if wrong else None
    kind = getattr(torch, held["dtype"])
    one, other = (torch.frombuffer(bytearray(content), dtype=kind).double() for content in (expected, found))
    finite = one.isfinite()
    if not torch.equal(finite, other.isfinite()) or not torch.equal(one.isnan(), other.isnan()):
        return "what is not finite"
    if not finite.any():
        return None
    bound = max(BOUNDS_OF.get(kernel, 0.0), BOUNDS[held["dtype"]])
    largest, error = one[finite].abs().max(), (one - other)[finite].abs().max()
    return f"{error / largest:.2e} of the largest" if error > bound * largest else None


def test_arm_computes_the_same(program: Path, recorded: Path, tmp_path: Path) -> None:
    results = tmp_path / "results.bin"
    run = subprocess.run(
        [QEMU, str(program), str(recorded / "calls.bin"), str(results)],
        capture_output=True,
        text=True,
        check=False,
    )
    calls = json.loads((recorded / "calls.json").read_text())
    expected, found = (recorded / "expected.bin").read_bytes(), results.read_bytes()
    unfinished = [what for what, held, (content,) in objects_of(calls, found) if len(content) < held["size"]]
    assert run.returncode == 0, f"exit status {run.returncode} in {unfinished[:1]}: {run.stderr}"
    assert len(expected) == len(found)
    differences = [
        f"{what}: {wrong}"
        for what, held, (one, other) in objects_of(calls, expected, found)
        if (wrong := difference(what.split()[2], held, one, other))
    ]
    assert not differences, f"{len(differences)} differences:\n" + "\n".join(differences[:20])
    kernels = (build.SOURCES / "kernels.def").read_text().split()
    assert {f"KERNEL({call['kernel']})" for call in calls} == set(kernels), (
        "tests of every kernel are recorded"
    )
