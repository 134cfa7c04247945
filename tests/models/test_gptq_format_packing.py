"""The packed layout against a per-element oracle, golden words, and round trips."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qwenq.errors import QuantisationError
from qwenq.models.gptq_format import (
    PackedLinear,
    dequantise,
    has_trivial_g_idx,
    pack,
    trivial_g_idx,
    unpack,
    unpack_zeros,
)

WIDTHS = st.sampled_from([2, 3, 4, 8])
FORMATS = st.sampled_from(["gptq", "gptq_v2"])


def random_weight(
    seed: int, out_features: int, in_features: int, groups: int, bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    integers = torch.randint(0, 2**bits, (out_features, in_features), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(1, 2**bits, (out_features, groups), generator=generator, dtype=torch.uint8)
    scales = torch.rand(out_features, groups, generator=generator).half() + 0.01
    return integers, scales, zeros


def words_one_by_one(integers: Tensor, bits: int) -> list[list[int]]:
    """qweight as unsigned numbers, from the format's definition: integer i begins at bit ``bits * i``."""
    out_features, in_features = integers.shape
    words = [[0] * out_features for _ in range(in_features * bits // 32)]
    for o, row in enumerate(integers.tolist()):
        stream = sum(value << (bits * i) for i, value in enumerate(row))
        for place, word in enumerate(words):
            word[o] = stream >> (32 * place) & 0xFFFFFFFF
    return words


def unsigned(words: Tensor) -> list[list[int]]:
    return [[value & 0xFFFFFFFF for value in row] for row in words.tolist()]


@st.composite
def weights(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, int]:
    bits = draw(WIDTHS)
    word = 32 if bits == 3 else 32 // bits
    groups = draw(st.integers(1, 4))
    in_features = word * groups * draw(st.integers(1, 3))
    out_features = word * draw(st.integers(1, 4))
    return (*random_weight(draw(st.integers(0, 2**31)), out_features, in_features, groups, bits), bits)


@given(weights())
@settings(max_examples=40)
def test_words_are_those_of_the_definition(case: tuple[Tensor, Tensor, Tensor, int]) -> None:
    integers, scales, zeros, bits = case
    packed = pack(integers, scales, zeros, bits)
    assert unsigned(packed.qweight) == words_one_by_one(integers, bits)
    # zero points are packed along the output axis: the transpose of the weight's problem
    assert unsigned(packed.qzeros) == [
        list(row) for row in zip(*words_one_by_one(zeros.t() - 1, bits), strict=True)
    ]
    assert packed.qweight.dtype == packed.qzeros.dtype == packed.g_idx.dtype == torch.int32
    assert packed.scales.dtype == torch.float16


@given(weights(), FORMATS)
@settings(max_examples=80)
def test_unpack_gives_back_what_was_packed(case: tuple[Tensor, Tensor, Tensor, int], form: str) -> None:
    integers, scales, zeros, bits = case
    packed = pack(integers, scales, zeros, bits, form)
    for got, wanted in zip(unpack(packed, bits, form), (integers, scales, zeros), strict=True):
        assert torch.equal(got, wanted)
    assert all(tensor.is_contiguous() for tensor in packed.tensors("m").values())


@given(weights(), FORMATS, st.booleans(), st.randoms(use_true_random=False))
@settings(max_examples=60)
def test_dequantise_is_scale_times_integer_minus_zero(
    case: tuple[Tensor, Tensor, Tensor, int], form: str, shuffled: bool, random: object
) -> None:
    integers, scales, zeros, bits = case
    packed = pack(integers, scales, zeros, bits, form)
    if shuffled:
        g_idx = packed.g_idx.tolist()
        random.shuffle(g_idx)
        packed = PackedLinear(packed.qweight, packed.qzeros, packed.scales, torch.tensor(g_idx).int())
    weight = dequantise(packed, bits, form)
    for o in range(0, integers.shape[0], 3):
        for i in range(0, integers.shape[1], 3):
            g = int(packed.g_idx[i])
            assert float(weight[o, i]) == float(scales[o, g]) * (int(integers[o, i]) - int(zeros[o, g]))


@pytest.mark.parametrize(("bits", "golden"), [(4, 0x77777777), (8, 0x7F7F7F7F), (2, 0x55555555)])
def test_symmetric_zero_points_are_the_published_words(bits: int, golden: int) -> None:
    integers, scales, _ = random_weight(0, 32, 64, 2, bits)
    zeros = torch.full((32, 2), 2 ** (bits - 1), dtype=torch.uint8)
    assert set(pack(integers, scales, zeros, bits).qzeros.flatten().tolist()) == {golden}
    v2 = pack(integers, scales, zeros, bits, "gptq_v2").qzeros
    assert {value & 0xFFFFFFFF for value in v2.flatten().tolist()} == {
        int(f"{2 ** (bits - 1):0{bits}b}" * (32 // bits), 2)
    }


def test_three_bits_lie_across_words() -> None:
    """As the published kernels read them: of integer 10 two bits are in one word, of integer 21 one."""
    integers = torch.zeros(32, 32, dtype=torch.uint8)
    integers[:, 10], integers[:, 21] = 0b101, 0b110
    packed = pack(integers, torch.ones(32, 1), torch.full((32, 1), 4, dtype=torch.uint8), 3)
    assert [row[0] for row in unsigned(packed.qweight)] == [0b01 << 30, 0b1 | 0b0 << 31, 0b11]


def test_first_input_column_is_the_lowest_nibble() -> None:
    integers = torch.arange(8, dtype=torch.uint8).repeat(8, 1)
    packed = pack(integers, torch.ones(8, 1), torch.full((8, 1), 8, dtype=torch.uint8), 4)
    assert packed.qweight.tolist() == [[0x76543210] * 8]


def test_float16_result_is_the_float32_one_rounded_once() -> None:
    integers, scales, zeros = random_weight(3, 512, 64, 2, 8)
    packed = pack(integers, scales, zeros, 8)
    exact = dequantise(packed, 8)
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(dequantise(packed, 8, dtype=dtype), exact.to(dtype))


def test_stored_all_ones_reads_as_zero_point_zero() -> None:
    """Third-party v1 files wrap: stored 15 is zero point 0."""
    stored = torch.full((1, 1), -1, dtype=torch.int32)
    assert unpack_zeros(stored, 4).flatten().tolist() == [0] * 8
    assert unpack_zeros(stored, 8).flatten().tolist() == [0] * 4


def test_zero_point_zero_is_refused_in_v1_and_kept_in_v2() -> None:
    integers, scales, zeros = random_weight(1, 8, 8, 1, 4)
    zeros[3, 0] = 0
    with pytest.raises(QuantisationError, match="zero point is 0"):
        pack(integers, scales, zeros, 4)
    assert torch.equal(unpack(pack(integers, scales, zeros, 4, "gptq_v2"), 4, "gptq_v2")[2], zeros)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e6])
def test_scales_that_float16_cannot_hold_are_refused(bad: float) -> None:
    integers, scales, zeros = random_weight(1, 8, 8, 1, 4)
    scales = scales.float()
    scales[2, 0] = bad
    with pytest.raises(QuantisationError, match="float16"):
        pack(integers, scales, zeros, 4)


@pytest.mark.parametrize(
    ("out_features", "in_features", "groups", "bits", "top"),
    [
        (8, 12, 1, 4, 15),
        (12, 8, 1, 4, 15),
        (8, 24, 5, 4, 15),
        (8, 8, 1, 4, 16),
        (32, 48, 1, 3, 7),
        (32, 32, 1, 5, 7),
    ],
)
def test_what_no_layout_holds_is_refused(
    out_features: int, in_features: int, groups: int, bits: int, top: int
) -> None:
    integers = torch.full((out_features, in_features), top, dtype=torch.uint8)
    zeros = torch.ones(out_features, groups, dtype=torch.uint8)
    with pytest.raises(ValueError):
        pack(integers, torch.ones(out_features, groups), zeros, bits)


def test_a_trivial_g_idx_is_recognised() -> None:
    assert trivial_g_idx(6, 2).tolist() == [0, 0, 1, 1, 2, 2]
    assert trivial_g_idx(3, -1).tolist() == [0, 0, 0]
    assert has_trivial_g_idx(trivial_g_idx(64, 16), 4)
    assert not has_trivial_g_idx(trivial_g_idx(64, 16).flip(0), 4)
    assert not has_trivial_g_idx(trivial_g_idx(64, 16), 3)
