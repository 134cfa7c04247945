"""A whole plan: from what the user names to numbers."""

from __future__ import annotations

import json
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from qwenq.errors import HubError, ModelError, UnsupportedError, UsageError
from qwenq.models import catalogue
from qwenq.models.hub import network_errors
from qwenq.models.unsupported import missing_by_name
from qwenq.planner.estimates import GIB, gpu
from qwenq.planner.plan import PlanOptions, find_model, make_plan
from qwenq.planner.tables import answer, plan_tables


def test_bytes_of_qwen_7b_chat() -> None:
    plan = make_plan(find_model("qwen-7b-chat"), PlanOptions())
    assert plan.parameters == 7_721_324_544
    found = {item.label: (item.bytes, item.published_bytes) for item in plan.precisions}
    assert found["BF16"] == (15_442_649_088, None)
    assert found["Int8"][1] == 9_123_864_576
    assert found["Int4"][1] == 5_860_564_992
    assert found["Int4"][0] == catalogue.entry("qwen-7b").shape.quantised_bytes(4, 128)


def test_a_tied_head_stored_twice_has_a_note() -> None:
    bf16 = make_plan(find_model("qwen3-0.6b"), PlanOptions()).precisions[0]
    assert (bf16.bytes, bf16.published_bytes) == (596_049_920 * 2, 751_632_384 * 2)
    assert "tied head" in str(bf16.published_note)
    int4 = make_plan(find_model("qwen3-0.6b"), PlanOptions(bits=(4,))).precisions[1]
    assert int4.published_bytes == int4.bytes + (751_632_384 - 596_049_920) * 2


def test_a_model_of_float32_keeps_it_in_what_is_not_quantised() -> None:
    """The bundled model: its embedding is stored in four bytes, and loaded in two where Int4 is run."""
    model = find_model(None)
    plan = make_plan(model, PlanOptions(bits=(4,)))
    full, int4 = plan.precisions
    assert (model.dtype, full.label, full.bytes) == ("float32", "FP32", 134_515_008 * 4)
    kept = plan.shape.vocab * plan.shape.hidden + (2 * plan.shape.layers + 1) * plan.shape.hidden
    assert int4.bytes - int4.loaded == 2 * kept
    assert plan.generation["Int4"].weights == int4.loaded
    assert find_model("HuggingFaceTB/SmolLM2-135M-Instruct").dtype == "bfloat16"


def test_random_weights_are_planned_by_their_shape_as_they_are_drawn() -> None:
    drawn = make_plan(find_model(None, "random"), PlanOptions())
    assert drawn.precisions[0].label == "BF16"
    assert drawn.parameters == 134_515_008
    with pytest.raises(UsageError, match="no model called"):
        find_model("some/folder", "random")


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("Qwen/Qwen2.5-VL-7B-Instruct", "the vision tower"),
        ("qwen2-audio-7b", "the audio tower"),
        ("qwen2.5-omni-7b", "the vision tower and the audio tower"),
    ],
)
@pytest.mark.parametrize("weights", ["stored", "random"])
def test_unsupported_models_are_refused_with_what_is_missing(name: str, missing: str, weights: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        find_model(name, weights)
    assert caught.value.what == f"{name} is not supported yet: {missing} would have to be added"


@pytest.mark.parametrize("name", ["Qwen/Qwen3.8-Flash-Next", "qwen3.8-flash-next-fp8"])
def test_flash_next_is_refused_with_the_reason_and_its_bytes(name: str) -> None:
    with pytest.raises(UnsupportedError, match="hyper-connections") as caught:
        find_model(name)
    billions = 125 + 51 + 4
    assert f"about {billions * 2e9 / GIB:.0f} GiB in bfloat16" in str(caught.value.hint)


@pytest.mark.parametrize("name", ["qwen1.5-moe-a2.7b-chat", "Qwen/Qwen2-57B-A14B-Instruct", "mixtral-8x7b"])
def test_what_runs_and_cannot_be_planned_is_named(name: str) -> None:
    with pytest.raises(UnsupportedError, match=r"the sizes of .* are not known here"):
        find_model(name)


def test_a_shortened_name_of_a_supported_mixture_is_suggested() -> None:
    with pytest.raises(UsageError) as caught:
        find_model("qwen3-next")
    assert "qwen3-next-80b-a3b-instruct" in str(caught.value.hint)


def test_every_name_of_the_catalogue_is_supported() -> None:
    for name in catalogue.names():
        for key in (*catalogue.entry(name).names, *catalogue.entry(name).hub):
            assert missing_by_name(key) is None
            found = find_model(key)
            assert found.entry is not None
            assert make_plan(found, PlanOptions(gpus=(gpu("h200"),))).precisions[-1].bytes > 0


def test_a_plan_says_where_sizes_of_secondary_sources_come_from() -> None:
    assert "as others report them; widths inferred" in find_model("qwen3.8-2.4t-a95b").origin
    assert find_model("Qwen/Qwen3.8-27B", "random").origin.startswith(
        "catalogue, random weights, the sizes of"
    )
    assert find_model("qwen3.5-27b").origin == "catalogue"


def test_deployments_share_weights_and_cache() -> None:
    plan = make_plan(
        find_model("qwen2.5-72b-instruct"),
        PlanOptions(gpus=(gpu("h200"), gpu("rtx-4090")), tensor_parallel=(1, 2, 4, 8)),
    )
    found = {(row.speed.gpu, row.precision, row.split.gpus): row for row in plan.deployments}
    assert len(found) == 2 * 3 * 4
    assert found["h200", "BF16", 1].fits
    assert not found["rtx-4090", "Int4", 1].fits
    assert found["rtx-4090", "Int4", 2].memory < found["rtx-4090", "Int4", 1].memory
    assert not found["h200", "Int4", 2].split.possible
    assert found["h200", "BF16", 2].split.possible


def test_a_folder_and_its_config_file(tmp_path: Path) -> None:
    config = catalogue.config_for("qwen3-4b") | {"dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for named in (tmp_path, tmp_path / "config.json"):
        plan = make_plan(find_model(str(named)), PlanOptions(bits=(4,), group_size=64))
        assert plan.shape == catalogue.entry("qwen3-4b").shape
        assert [item.label for item in plan.precisions] == ["FP32", "Int4"]
        assert plan.precisions[1].bytes == plan.shape.quantised_bytes(4, 64, "float32")


def test_a_mixture_reads_the_active_experts_alone() -> None:
    """Qwen3-30B-A3B: 120 of 128 experts in 48 layers rest, and the embedding is looked up."""
    h200 = gpu("h200")
    plan = make_plan(find_model("qwen3-30b-a3b"), PlanOptions(gpus=(h200,), bits=(4,)))
    idle, embedding = 48 * 120 * 3 * 768 * 2048, 151936 * 2048
    assert plan.active_parameters == 30_532_122_624 - idle
    full, int4 = plan.precisions
    assert full.active == 2 * (30_532_122_624 - idle - embedding)
    groups = 3 * 768 * 2048 // 128 * (2 + 0.5)  # float16 scales, 4-bit zero points
    one = 3 * 768 * 2048 // 2 + groups + 4 * (2 * 2048 + 768)  # and g_idx
    assert int4.active == int4.loaded - 48 * 120 * one - 2 * embedding
    rates = {row.precision: row.speed for row in plan.deployments}
    assert rates["BF16"].empty == pytest.approx(h200.bandwidth_gb_s * 1e9 / full.active)
    batch = make_plan(find_model("qwen3-30b-a3b"), PlanOptions(gpus=(h200,), bits=(4,), batch=64))
    assert full.idle > batch.precisions[0].idle > 0
    assert batch.deployments[0].speed.empty < 64 * rates["BF16"].empty


@pytest.mark.parametrize("gpus", [(), ("h200",)])
def test_what_a_token_reads_is_shown_once(gpus: tuple[str, ...]) -> None:
    console = Console(width=200, file=StringIO(), highlight=False)
    options = PlanOptions(gpus=tuple(map(gpu, gpus)), bits=(4,))
    for part in plan_tables(make_plan(find_model("qwen3-30b-a3b"), options)):
        console.print(part)
    assert isinstance(console.file, StringIO)
    words = " ".join(console.file.getvalue().split())
    assert words.count("Weights that a token reads, GiB: BF16 5.67, Int4 ") == 1


def test_states_do_not_grow_with_the_context() -> None:
    """Qwen3.5-27B: 16 of 64 layers keep keys and values; 48 keep 48 heads of 128 × 128 in float32."""
    model = find_model("qwen3.5-27b")
    one, two = (
        make_plan(model, PlanOptions(bits=(4,), context=context)).generation["BF16"]
        for context in (1000, 2000)
    )
    assert one.states == two.states == 48 * (48 * 128 * 128 * 4 + (2 * 16 + 48) * 128 * 4 * 2)
    assert two.kv_cache == 2 * one.kv_cache == 2 * 1000 * 16 * 2 * 4 * 256 * 2
    assert one.decode_peak == one.weights + one.kv_cache + one.states + one.decode_activations


PUBLISHED_BYTES = {
    "Qwen/Qwen3.5-0.8B": 1_746_882_752,
    "Qwen/Qwen3.5-2B": 4_548_144_832,
    "Qwen/Qwen3.5-4B": 9_319_737_856,
    "Qwen/Qwen3.5-9B": 19_306_216_416,
    "Qwen/Qwen3.5-27B": 55_562_872_800,
    "Qwen/Qwen3.6-27B": 55_562_855_904,
    "Qwen/Qwen3.6-35B-A3B": 71_903_645_408,
    "Qwen/Qwen3.5-122B-A10B": 250_173_007_840,
    "Qwen/Qwen3.5-397B-A17B": 806_795_875_168,
    "Qwen/Qwen3-VL-2B-Instruct": 4_255_064_064,
    "Qwen/Qwen3-VL-4B-Instruct": 8_875_631_616,
    "Qwen/Qwen3-VL-8B-Instruct": 17_534_247_392,
    "Qwen/Qwen3-VL-32B-Instruct": 66_714_780_128,
    "Qwen/Qwen3-VL-30B-A3B-Instruct": 62_141_508_064,
    "Qwen/Qwen3-VL-235B-A22B-Instruct": 471_340_045_792,
}
"""`total_size` of the publishers' index files; of Qwen3-VL twice the parameters that the hub shows."""


@pytest.mark.parametrize("model", list(PUBLISHED_BYTES))
def test_bytes_of_vision_language_files_are_the_published_ones(model: str) -> None:
    """Language model, draft layers and vision tower; in Qwen3.5's files some vectors are float32."""
    full, int4 = make_plan(find_model(model), PlanOptions(bits=(4,))).precisions
    assert full.bytes == PUBLISHED_BYTES[model]
    shape = find_model(model).shape
    beside = PUBLISHED_BYTES[model] - shape.bytes()  # it is copied
    assert int4.group_size is not None
    assert int4.bytes == shape.quantised_bytes(4, int4.group_size) + beside


def test_draft_layers_are_counted() -> None:
    plan = make_plan(find_model("Qwen/Qwen3.6-27B"), PlanOptions(bits=(4,)))
    drafts = plan.shape.draft_parameters
    # a block with full attention, `fc` [hidden, 2 hidden] and three norms
    block = 5120 * (2 * 24 + 2 * 4 + 24) * 256 + 3 * 17408 * 5120 + 2 * 256 + 2 * 5120
    assert drafts == block + 2 * 5120**2 + 3 * 5120
    tower = 460_730_096
    assert plan.precisions[0].bytes == 2 * (26_895_998_464 + drafts + tower)
    assert plan.copied_note == "of draft layers (mtp) and the vision tower are copied"
    assert make_plan(find_model("qwen3-8b"), PlanOptions()).copied_note is None


def test_a_v1_folder_is_planned_as_the_catalogue_has_it(tmp_path: Path) -> None:
    config = {"model_type": "qwen", "hidden_size": 2048, "intermediate_size": 11008, "vocab_size": 151936}
    config |= {"num_hidden_layers": 24, "num_attention_heads": 16, "max_position_embeddings": 8192}
    (tmp_path / "config.json").write_text(json.dumps(config | {"seq_length": 8192, "kv_channels": 128}))
    found = make_plan(find_model(str(tmp_path)), PlanOptions())
    assert found.parameters == 1_836_828_672
    assert found.precisions == make_plan(find_model("qwen-1.8b"), PlanOptions()).precisions


def test_hub_ids_in_the_catalogue_need_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert find_model("Qwen/Qwen2.5-7B-Instruct").name == "qwen2.5-7b-instruct"
    assert find_model(None).name == catalogue.BUNDLED


def test_a_hub_id_whose_config_is_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0" * 40
    repository = tmp_path / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "snapshots" / commit / "config.json").write_text(
        json.dumps(catalogue.config_for("qwen3-8b"))
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert find_model("someone/tiny").shape == catalogue.entry("qwen3-8b").shape
    for name in ("someone/missing", "someone/qwen3-30b-a3b"):  # which may be anything
        with pytest.raises(HubError, match=name):
            find_model(name)


def test_a_hub_that_stops_answering_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def cut_off(*_: object) -> str:
        raise network_errors()[0]("the server closed the connection")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", cut_off)
    with pytest.raises(HubError, match="someone/tiny could not be fetched: the server closed the connection"):
        find_model("someone/tiny")


def test_an_unknown_name_and_an_empty_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as error:
        find_model("qwen3-8bb")
    assert "qwen3-8b" in str(error.value.hint)
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        find_model(str(tmp_path))


@pytest.mark.parametrize(
    "options",
    [
        PlanOptions(context=0),
        PlanOptions(batch=-1),
        PlanOptions(tensor_parallel=(0, 1)),
        PlanOptions(bits=(5,)),
        PlanOptions(group_size=96),
    ],
)
def test_options_out_of_bounds_are_refused(options: PlanOptions) -> None:
    with pytest.raises(UsageError):
        make_plan(find_model("qwen3-8b"), options)


def test_quantising_is_planned_as_quantize_does_it_there() -> None:
    """128 × 2048 tokens on a GPU, 48 × 256 on a CPU; fewer where that does not fit."""
    model = find_model("qwen2.5-7b-instruct")
    (cpu,) = make_plan(model, PlanOptions()).quantisation
    small, large = make_plan(model, PlanOptions(gpus=(gpu("rtx-4090"), gpu("h200")))).quantisation
    assert (cpu.gpu, cpu.size.tokens, cpu.fits) == (None, "48 × 256 tokens", None)
    assert (large.size.tokens, large.size.usual, large.fits) == ("128 × 2048 tokens", None, True)
    assert (small.size.tokens, small.fits) == ("64 × 2048 tokens", True)
    assert small.size.usual is not None
    assert small.size.usual.tokens == "128 × 2048 tokens"
    assert small.size.usual.memory.peak / GIB == pytest.approx(32.55, abs=0.01)
    assert small.size.memory.peak <= 24 * GIB


def test_sizes_that_were_asked_for_are_kept_and_what_would_fit_is_named() -> None:
    model = find_model("qwen2.5-7b-instruct")
    asked = PlanOptions(gpus=(gpu("rtx-4090"),), samples=128, seq_len=2048)
    (found,) = make_plan(model, asked).quantisation
    assert (found.size.tokens, found.size.usual, found.fits) == ("128 × 2048 tokens", None, False)
    assert found.fitting is not None
    samples, peak = found.fitting
    (given,) = make_plan(model, replace(asked, samples=samples)).quantisation
    assert (given.fits, given.size.memory.peak) == (True, peak)
    assert make_plan(model, replace(asked, samples=2 * samples)).quantisation[0].fits is False


def test_the_answer_comes_first() -> None:
    model, asked = find_model("qwen2.5-7b-instruct"), PlanOptions(gpus=(gpu("rtx-4090"),))
    first, second = answer(make_plan(model, asked))
    assert first == (
        "Quantising on NVIDIA GeForce RTX 4090 24 GB: 19.8 of 24 GiB of GPU memory with 64 × 2048 tokens: "
        "fits; the usual 128 × 2048 tokens need 32.6; no time estimate: this GPU was not timed."
    )
    large, _ = answer(make_plan(model, replace(asked, samples=128, seq_len=2048)))
    assert large == (
        "Quantising on NVIDIA GeForce RTX 4090 24 GB: 32.6 of 24 GiB of GPU memory with 128 × 2048 tokens: "
        "does not fit; `--samples 64` needs 19.8 GiB."
    )
    assert second == "Running Int4: fits, 6.6 of 24 GiB, at most 203 tokens/s at 8192 tokens."
    first, second = answer(make_plan(find_model("qwen2.5-7b-instruct"), PlanOptions()))
    assert "8.7 GiB of RAM with 48 × 256 tokens" in first
    assert second.startswith("Running Int4: ")
    shared = make_plan(
        find_model("qwen2.5-72b-instruct"), PlanOptions(gpus=(gpu("h200"),), tensor_parallel=(1, 2))
    )
    reason = "231 groups of down_proj cannot be shared evenly"
    assert list(answer(shared))[-1] == f"Running Int4 on 2 GPUs: not possible, as {reason}."
