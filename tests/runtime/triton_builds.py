"""Builds a Triton kernel ahead of time for a GPU that is not there, as the launch of it would."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


@dataclass(frozen=True)
class Build:
    """One kernel with its types: ``pointers`` by name, ``constants`` by name; all else is a 32-bit integer.

    ``floats`` are float32 scalars. Pointers and integers count as multiples of 16 unless named in ``odd``, as
    they are for real layers.
    """

    kernel: Any
    pointers: dict[str, str]
    constants: dict[str, Any]
    floats: tuple[str, ...] = ()
    odd: tuple[str, ...] = ()
    warps: int = 4
    stages: int = 3

    def on(self, capability: int) -> CompiledKernel:
        signature = {}
        for name in self.kernel.arg_names:
            scalar = "fp32" if name in self.floats else "i32"
            signature[name] = "constexpr" if name in self.constants else self.pointers.get(name, scalar)
        even = {
            (place,): [["tt.divisibility", 16]]
            for place, name in enumerate(self.kernel.arg_names)
            if name not in (*self.constants, *self.floats, *self.odd)
        }
        source = ASTSource(self.kernel, signature, self.constants, even)
        options = {"num_warps": self.warps, "num_stages": self.stages}
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(built: CompiledKernel) -> dict[str, int]:
    """REG, STACK, SHARED, LOCAL of the machine code; STACK and LOCAL other than 0 mean spilled registers."""
    found = re.search(r"REG:.*", _dump(built.asm["cubin"], "--dump-resource-usage"))
    assert found
    return {name: int(number) for name, number in re.findall(r"([A-Z]+):(\d+)", found[0])}


def instructions(built: CompiledKernel) -> list[str]:
    """The machine instructions by name, with their modifiers."""
    text = _dump(built.asm["cubin"], "--dump-sass")
    return re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d\s+)?([A-Z][A-Z0-9_.]*)", text)


@cache
def _dump(cubin: bytes, option: str) -> str:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return subprocess.run(
            [CUOBJDUMP, option, str(path)], capture_output=True, text=True, check=True
        ).stdout
