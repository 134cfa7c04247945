"""Estimates: what fits, how a budget is shared, how it is written."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qwenq.errors import UsageError
from qwenq.profiling.planning import Device, Planned, allowances, parse_budget, plan, read_device
from qwenq.profiling.spec import Point, Subjects, subjects_of, sweep
from qwenq.profiling.worker import probe

CPU = Device("cpu", 24 << 30, 20e9, 1e11, "bfloat16", start_seconds=3.0)


def of_7b(device: Device) -> dict[str, Planned]:
    found = subjects_of(["qwen-7b-chat"], ["fp32", "bf16", "int4"], "random")
    points = sweep(found.subjects, attentions=["sdpa"], engines=["fast"], lengths=[(1, 2048)], device="cpu")
    return {each.point.subject.model.precision: each for each in plan(points, found.shapes, device)}


def test_bytes_are_weights_and_cache() -> None:
    planned = of_7b(CPU)
    # 7 721 324 544 parameters; 2 · 32 layers · 4096 values a token; one embedding in flight
    cache, embedding = 2 * 32 * 4096 * 2049, 151936 * 4096
    assert planned["bf16"].nbytes == 2 * (7_721_324_544 + cache + embedding)
    assert planned["fp32"].nbytes == 4 * (7_721_324_544 + cache + embedding)
    assert 5e9 < planned["int4"].nbytes < 9e9


@pytest.mark.parametrize(("precision", "group_size", "bits", "groups"), [
    ("int4", 128, 4, 1 / 128), ("int2", 128, 2, 1 / 128), ("int8", -1, 8, 0.0), ("int4", -1, 4, 0.0),
])  # fmt: skip
def test_quantised_weights_are_counted_by_their_bits_and_groups(
    precision: str, group_size: int, bits: int, groups: float
) -> None:
    """One scale for a whole row is nearly none; and a folder of another tool may have 2 bits."""
    found = subjects_of(["qwen-7b-chat"], ["int4"], "random")
    (subject,) = found.subjects
    model = replace(subject.model, precision=precision, group_size=group_size)
    points = sweep(
        [replace(subject, model=model)],
        attentions=["sdpa"],
        engines=["fast"],
        lengths=[(1, 2048)],
        device="cpu",
    )
    linear, cache = 32 * (4 * 4096**2 + 3 * 4096 * 11008), 2 * 2 * 32 * 4096 * 2049
    rest = 2 * (7_721_324_544 - linear) + 2 * 151936 * 4096  # and one embedding in flight
    expected = linear * bits / 8 + 4 * groups * linear + rest + cache
    assert plan(points, found.shapes, CPU)[0].nbytes == pytest.approx(expected, rel=0.002)


def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded() -> None:
    planned = of_7b(CPU)
    assert "it needs about" in planned["fp32"].too_large
    assert planned["bf16"].too_large is None
    assert of_7b(replace(CPU, free_bytes=200 << 30))["fp32"].too_large is None


def test_a_prompt_needs_memory_too_and_scores_where_no_fused_kernel_runs() -> None:
    """Of 100,000 tokens they would be 900 GB of a model of 0.3 GB: it is refused, and not killed."""
    found = subjects_of(["smollm2-135m-instruct"], ["fp32", "bf16"], "random")
    (shape,) = found.shapes.values()

    def of(attention: str, device: Device = CPU, prompt: int = 2048) -> list[Planned]:
        points = sweep(
            found.subjects, attentions=[attention], engines=["fast"], lengths=[(prompt, 1)], device="cpu"
        )
        return plan(points, found.shapes, device)

    for off, sdpa, itemsize, nbytes in zip(of("off"), of("sdpa"), (4, 2), (8, 10), strict=True):
        block = 2048 * (2 * shape.hidden + 3 * shape.ffn) * itemsize
        flying = shape.embedding_parameters * itemsize  # while loading, which is another moment
        scores = shape.heads * 2048**2 * nbytes
        assert off.nbytes - sdpa.nbytes == block + scores - max(block, flying)
    assert all("it needs about" in (each.too_large or "") for each in of("off", prompt=100_000))
    assert [each.too_large for each in of("sdpa", prompt=100_000)] == [None, None]
    gpu = replace(CPU, device="cuda")  # FP32 rows of v2 run off there
    assert of("v2", gpu)[0].nbytes == of("off", gpu)[0].nbytes
    assert of("v2", gpu)[1].nbytes < of("off", gpu)[1].nbytes


def test_a_cache_that_is_laid_out_for_decode_steps_is_float32() -> None:
    found = subjects_of(["qwen-7b-chat"], ["bf16"], "random")
    sizes = {}
    for attention in ("sdpa", "grouped"):
        points = sweep(
            found.subjects, attentions=[attention], engines=["fast"], lengths=[(1, 2048)], device="cpu"
        )
        sizes[attention] = plan(points, found.shapes, CPU)[0].nbytes
    assert sizes["grouped"] - sizes["sdpa"] == 2 * 2 * 32 * 4096 * 2049


def test_free_memory_is_limited_to_what_a_container_grants(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwenq.models.machine.cgroup_memory_left", lambda: 1000)
    assert probe("cpu")["free_bytes"] == 1000


def test_fewer_bytes_and_more_bandwidth_take_less_time() -> None:
    slow, fast = of_7b(CPU), of_7b(replace(CPU, copy_bytes_per_s=2e12))
    assert slow["int4"].seconds < slow["bf16"].seconds
    assert fast["bf16"].seconds < slow["bf16"].seconds


def test_loading_is_estimated_by_what_is_read_and_made(subjects: Subjects) -> None:
    """Libraries, as the probe found; the file's bytes; and integers, where they are made on the fly."""
    random = of_7b(CPU)
    assert random["bf16"].load > 3.0 + 15.4e9 / 2e9  # no disk reads so much
    starts = [of_7b(replace(CPU, start_seconds=s))["bf16"].load for s in (3.0, 10.0)]
    assert starts[1] - starts[0] == pytest.approx(7.0)
    made = sweep(subjects.subjects, attentions=["sdpa"], engines=["fast"], lengths=[(1, 8)], device="cpu")
    tiny = {each.point.subject.model.precision: each for each in plan(made, subjects.shapes, CPU)}
    assert tiny["int4"].load > tiny["fp32"].load > 3.0


def points_that_take(points: list[Point], load: float, work: float, least: float = 0.0) -> list[Planned]:
    return [Planned(point, load, work, least, 100) for point in points]


def test_a_budget_is_shared_by_need_and_used_up(points: list[Point]) -> None:
    planned = list(of_7b(CPU).values())
    shares = allowances(planned, 3600.0)
    assert sum(shares) == pytest.approx(3600)
    assert shares[0] == 0  # fp32 does not fit
    assert min(shares[1:]) > 0
    long, short = points_that_take(points[:1], 5, 40, 10) + points_that_take(points[1:2], 5, 20, 10)
    assert allowances([long, short], 60.0) == pytest.approx([15 + 30 * 30 / 40, 15 + 30 * 10 / 40])
    assert allowances(planned, None) == [None] * 3


def test_loading_is_paid_before_anything_is_shared(points: list[Point]) -> None:
    """However much the first could use, the last can begin."""
    first, *rest = points_that_take(points, 8, 1000, 2)[:1] + points_that_take(points[1:], 8, 10, 2)
    shares = allowances([first, *rest], 60.0)
    assert all(share >= 10 for share in shares)
    assert sum(shares) == pytest.approx(60)


def test_what_cannot_even_load_gets_nothing_and_the_others_do(points: list[Point]) -> None:
    large, *small = points_that_take(points[:1], 50, 10, 5) + points_that_take(points[1:], 5, 10, 5)
    shares = allowances([small[0], large, *small[1:]], 45.0)
    assert shares[1] == 0
    assert shares[0] == shares[2] == shares[3] == pytest.approx(15)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("10m", 600), ("1h", 3600), ("1h30m", 5400), ("1.5m", 90)]
)
def test_budget_formats(text: str, seconds: float) -> None:
    assert parse_budget(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "-5m", "ten", "5 minutes", "0m", "5m3h"])
def test_what_is_not_a_duration_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a duration"):
        parse_budget(text)


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(UsageError, match="not a device"):
        read_device({"error": {"what": "'tpu' is not a device", "where": "--device", "hint": "use cpu"}})


def test_attention_counts_the_square_of_a_prompt() -> None:
    """Of 100,000 tokens a small model spends nearly all on attention, of 2,048 next to nothing."""
    found = subjects_of(["smollm2-135m-instruct"], ["bf16"], "random")
    points = sweep(
        found.subjects, attentions=["sdpa"], engines=["fast"], lengths=[(2048, 1), (100_000, 1)], device="cpu"
    )
    short, long = (each.least for each in plan(points, found.shapes, CPU))
    shape = next(iter(found.shapes.values()))
    products = 2 * shape.parameters * 100_000 / (CPU.operations_per_s * 0.4)
    assert long > 3 * products * 10
    assert short < 2 * 3 * products * 2048 / 100_000
