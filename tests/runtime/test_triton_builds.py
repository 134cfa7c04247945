"""Every Triton kernel is built ahead of time for sm_80, sm_89 and sm_90: no GPU is needed for that."""

from __future__ import annotations

import os
from collections import Counter

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted, not built", allow_module_level=True)

from runtime.triton_builds import Build, instructions, resources

from qwenq.compute.triton.attention import _attend_run, _flash_v1, _join_runs, stages
from qwenq.compute.triton.block import _add_norm, _gated, _rotate_and_store
from qwenq.compute.triton.linear import _dot, _gemv, _unpack

SHARED_BYTES = {
    80: 163 << 10,
    89: 99 << 10,
    90: 227 << 10,
}  # CUDA C++ programming guide, compute capabilities
LINEAR = {"x": "*bf16", "words": "*i32", "scales": "*fp16", "zeros": "*u8", "y": "*bf16"}
ROW = LINEAR | {"bias": "*bf16"}
CACHE = {"q": "*bf16", "k": "*bf16", "v": "*bf16", "positions": "*i64"}
INT4 = {"WORDS": 256, "GROUP_WORDS": 16, "BITS": 4, "SYMMETRIC": True}
INT8 = {"WORDS": 512, "GROUP_WORDS": 32, "BITS": 8, "SYMMETRIC": False}
STEP = {"BLOCK_WORDS": 128, "BLOCK_OUT": 16, "STEPS": 4}
RUN = {"D": 128, "BLOCK_D": 128, "BLOCK": 64, "BLOCKS": 4, "STAGES": stages(128)}
WIDE = {"D": 256, "BLOCK_D": 256, "BLOCK": 64, "BLOCKS": 4, "STAGES": stages(256)}

BUILDS = {
    "one-row-int4": Build(_gemv, ROW, INT4 | STEP | {"BIAS": True}, warps=8),
    "one-row-int4-wide": Build(
        _gemv, ROW, INT4 | STEP | {"BIAS": False, "BLOCK_WORDS": 64, "BLOCK_OUT": 32}, warps=4
    ),
    "one-row-int8": Build(_gemv, ROW, INT8 | STEP | {"BIAS": False, "BLOCK_OUT": 32}, warps=8),
    "rows-int4": Build(
        _dot, LINEAR, INT4 | {"BLOCK_WORDS": 16, "REPEAT": 1, "BLOCK_OUT": 64, "STEPS": 4}, odd=("rows",)
    ),
    "rows-int4-group32": Build(
        _dot,
        LINEAR,
        INT4 | {"GROUP_WORDS": 4, "BLOCK_WORDS": 4, "REPEAT": 4, "BLOCK_OUT": 64, "STEPS": 4},
        odd=("rows",),
    ),
    "rows-int8": Build(
        _dot, LINEAR, INT8 | {"BLOCK_WORDS": 32, "REPEAT": 1, "BLOCK_OUT": 64, "STEPS": 4}, odd=("rows",)
    ),
    "unpack-int4": Build(_unpack, LINEAR | {"weight": "*bf16"}, INT4 | {"BLOCK_WORDS": 8, "BLOCK_OUT": 128}),
    "unpack-int8": Build(_unpack, LINEAR | {"weight": "*fp16"}, INT8 | {"BLOCK_WORDS": 8, "BLOCK_OUT": 128}),
    "flash-v1": Build(
        _flash_v1,
        CACHE | {"o": "*fp32", "row_sum": "*fp32", "row_max": "*fp32"},
        {"D": 128, "BLOCK_D": 128, "BR": 64, "BC": 64},
        floats=("scale",),
        odd=("heads", "group", "tokens", "end", "column_blocks", "row_blocks", "position_batch"),
        stages=1,
    ),
    "split": Build(
        _attend_run,
        CACHE | {"parts": "*fp32", "logs": "*fp32"},
        RUN | {"GROUP": 1, "ROWS": 16},
        floats=("scale",),
        odd=("shared", "runs", "end"),
    ),
    "split-wide-heads": Build(
        _attend_run,
        CACHE | {"parts": "*fp32", "logs": "*fp32"},
        WIDE | {"GROUP": 8, "ROWS": 16},
        floats=("scale",),
        odd=("shared", "runs", "end"),
    ),
    "join": Build(
        _join_runs,
        {"parts": "*fp32", "logs": "*fp32", "o": "*bf16", "positions": "*i64"},
        {"D": 128, "BLOCK_D": 128, "RUNS": 16, "SLOTS": 256},
        odd=("heads", "runs", "end"),
    ),
    "add-norm": Build(
        _add_norm,
        dict.fromkeys(("x", "y", "weight", "normed"), "*bf16"),
        {"HIDDEN": 5120, "BLOCK": 8192, "ADD": True},
        floats=("eps",),
        warps=8,
    ),
    "rotate-and-store": Build(
        _rotate_and_store,
        dict.fromkeys(("qkv", "norm", "scales", "q", "keys", "values"), "*bf16")
        | {"cos": "*fp32", "sin": "*fp32", "positions": "*i64"},
        {"HEADS": 32, "SHARED": 8, "D": 128, "BLOCK": 128, "NORM": True, "SCALED": True},
        floats=("eps",),
        warps=1,
    ),
    "gated": Build(_gated, {"gate_up": "*bf16", "product": "*bf16"}, {"BLOCK": 1024}),
}


@pytest.mark.parametrize("capability", [80, 89, 90])
@pytest.mark.parametrize("name", BUILDS)
def test_kernels_build_fit_and_spill_no_registers(name: str, capability: int) -> None:
    built = BUILDS[name].on(capability)
    used = resources(built)
    assert built.metadata.shared <= SHARED_BYTES[capability]
    assert (used["STACK"], used["LOCAL"]) == (0, 0)


def test_one_row_reads_words_sixteen_bytes_at_a_time_and_shares_no_activations() -> None:
    built = BUILDS["one-row-int4"].on(90)
    counted = Counter(instructions(built))
    # Three stages of words and scales on their way: nothing narrower than 16 bytes fills them.
    assert sum(n for name, n in counted.items() if name.startswith("LDGSTS") and ".128" not in name) == 0
    assert counted["LDGSTS.E.BYPASS.128"] >= 3
    # Each thread has 8 words: 64 weights, one mask, one subtraction and one multiply-add each.
    assert counted["LOP3.LUT"] < 1.4 * 64
    assert counted["FFMA"] < 1.4 * 64
    assert counted["BAR.SYNC.DEFER_BLOCKING"] + counted["BAR.SYNC"] < 10


@pytest.mark.parametrize("name", ["rows-int4", "rows-int8", "split", "flash-v1"])
def test_tensor_cores_multiply(name: str) -> None:
    used = {instruction.split(".")[0] for instruction in instructions(BUILDS[name].on(90))}
    assert used & {"HMMA", "HGMMA"}
