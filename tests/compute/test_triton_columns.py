"""The GPU's kernels for the columns of a block: interpreted beside torch's loops, and built ahead of time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qwenq.compute import gpu
from qwenq.compute.columns import fallback_reason, triton_unsupported_reason

pytest.importorskip("triton")

TESTS = Path(__file__).resolve().parents[1]
PROGRAM = """
import torch
from qwenq.compute.columns import Block, by_triton, move_by_torch, round_by_torch

random = torch.Generator().manual_seed(0)
for count, rows, groups, levels in ((64, 70, 2, 15), (5, 33, 1, 255), (1, 8, 1, 15), (17, 32, 17, 15)):
    U = torch.eye(count + 3) + torch.triu(torch.randn(count + 3, count + 3, generator=random) * 0.1, 1)
    U = U if count % 2 else U.T.contiguous().T  # as LAPACK lays it out
    W = torch.randn(count, rows, generator=random)
    scales = (torch.rand(groups, rows, generator=random) * 0.2 + 0.05) * torch.randn(groups, rows).sign()
    zeros = torch.randint(1, levels, (groups, rows), generator=random).float()

    def block():
        places = [i * groups // count for i in range(count)]
        filled = torch.zeros(count, rows, dtype=torch.uint8), torch.zeros(count, rows)
        return Block(W.clone(), U[:count, :count], scales, zeros, places, levels, *filled)

    ours, theirs = block(), block()
    torch.testing.assert_close(by_triton(ours), round_by_torch(theirs), rtol=1e-5, atol=1e-5)
    assert torch.equal(ours.integers, theirs.integers), (count, rows)
    assert torch.equal(ours.errors, theirs.errors), (count, rows)
    assert theirs.integers.float().std() > 1
    H = U[:count, :count].T @ U[:count, :count]
    values = torch.randn(count, rows, generator=random)
    ours, theirs = block()._replace(U=H), block()._replace(U=H)
    gains = by_triton(ours, values), move_by_torch(theirs, values)
    torch.testing.assert_close(*gains, rtol=1e-4, atol=1e-4)
    assert torch.equal(ours.integers, theirs.integers), (count, rows)
    torch.testing.assert_close(ours.errors, theirs.errors, rtol=1e-5, atol=1e-5)
    assert torch.equal(ours.columns, W), "the gradients stay as they were"
print("agreed")
"""


def test_the_interpreted_kernel_finds_the_integers_that_torch_finds() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(TESTS.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "agreed", done.stderr


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted, not built")
@pytest.mark.parametrize("capability", [80, 89, 90])
@pytest.mark.parametrize("moves", [False, True])
def test_the_kernel_builds_and_keeps_everything_in_registers(moves: bool, capability: int) -> None:
    from runtime.triton_builds import Build, resources

    from qwenq.compute.triton.columns import _columns

    pointers = dict.fromkeys(("columns", "values", "U", "scales", "zeros", "errors", "cost"), "*fp32")
    build = Build(
        _columns,
        pointers | {"groups": "*i32", "integers": "*u8"},
        {"MOVES": moves, "COUNT": 64, "ROWS": 32, "AHEAD": 16},
        odd=("levels",),
        warps=1,
    )
    used = resources(build.on(capability))
    assert (used["STACK"], used["LOCAL"]) == (0, 0)


def test_tensors_that_are_not_on_a_gpu_are_refused() -> None:
    assert triton_unsupported_reason(torch.zeros(4, 4)) == "that is for NVIDIA GPUs, not for cpu"
    assert (
        triton_unsupported_reason(torch.zeros(4, 4, device="meta")) == "that is for NVIDIA GPUs, not for meta"
    )


def test_on_a_gpu_it_needs_float32_and_what_triton_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    def on_gpu(dtype: torch.dtype, numbers: int) -> Any:
        return SimpleNamespace(device=torch.device("cuda"), dtype=dtype, numel=lambda: numbers)

    monkeypatch.setattr(gpu, "unsupported_reason", lambda device: "triton is not installed")
    assert triton_unsupported_reason(on_gpu(torch.float32, 64)) == "triton is not installed"
    assert fallback_reason(torch.device("cuda")) == "triton is not installed"
    monkeypatch.setattr(gpu, "unsupported_reason", lambda device: None)
    assert triton_unsupported_reason(on_gpu(torch.float32, 64)) is None
    assert "float32" in str(triton_unsupported_reason(on_gpu(torch.float64, 64)))
    assert "2³¹" in str(triton_unsupported_reason(on_gpu(torch.float32, 2**31)))
