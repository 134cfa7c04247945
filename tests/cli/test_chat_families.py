"""``qwenq chat`` with models of every kind: newer, quantised, bundled, and a hostile one."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
from models.qwen3_template import ALWAYS, QWEN3, set_template
from runtime.small_chat import write_chat_folder
from safetensors.torch import load_file, save_file
from tiny_families import write_calibration, write_family
from tiny_model import write_tiny_model
from typer.testing import CliRunner

from qwenq.cli.app import app, register
from qwenq.errors import UsageError
from qwenq.models.qwen_tokenizer import RANKS_FILE
from qwenq.models.tokenizer import load_tokenizer
from qwenq.runtime.chat import Session

register()
runner = CliRunner()
QUICK = ["--greedy", "--max-new-tokens", "6", "--dtype", "float32", "--device", "cpu"]


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """What the model is given, one list of ids a question."""
    given: list[list[int]] = []
    answer = Session.answer

    def noted(self, prompt, *rest, **options):
        given.append(list(prompt))
        return answer(self, prompt, *rest, **options)

    monkeypatch.setattr(Session, "answer", noted)
    return given


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family(tmp_path_factory.mktemp("chat") / "qwen3", "qwen3", head_dim=32)


@pytest.fixture(scope="module")
def int8(qwen3: Path) -> Path:
    """The same model as `qwenq quantize` writes it."""
    tokens, out = qwen3.parent / "tokens.safetensors", qwen3.parent / "int8"
    write_calibration(qwen3, tokens)
    arguments = ["quantize", str(qwen3), "--bits", "8", "--calibration", str(tokens), "--out", str(out)]
    done = runner.invoke(
        app, [*arguments, "--device", "cpu"], env={"QWENQ_CACHE": str(qwen3.parent / "cache")}
    )
    assert done.exit_code == 0, (done.output, done.exception)
    return out


@pytest.fixture(scope="module")
def v1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_folder(tmp_path_factory.mktemp("chat") / "v1")


@pytest.mark.parametrize("kind", ["qwen3", "int8", "v1"])
def test_two_turns_as_the_model_was_taught_them(
    kind: str, request: pytest.FixtureRequest, prompts: list[list[int]]
) -> None:
    folder = request.getfixturevalue(kind)
    tokenizer = load_tokenizer(folder)
    done = runner.invoke(
        app, ["chat", str(folder), *QUICK, "--system", "You count."], input="hello\nand again\n"
    )
    assert done.exit_code == 0, (done.output, done.exception)
    first, second = map(tokenizer.decode, prompts)
    assert first == (
        "<|im_start|>system\nYou count.<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    )
    assert second.startswith(first)
    assert second.endswith("<|im_end|>\n<|im_start|>user\nand again<|im_end|>\n<|im_start|>assistant\n")
    assert "prefill" in done.stderr
    assert done.stderr.count("tok/s") >= 1
    assert "not verified" not in done.stderr


def test_both_engines_say_the_same_of_a_newer_model(qwen3: Path) -> None:
    texts = [
        runner.invoke(app, ["chat", str(qwen3), *QUICK, "--engine", engine], input="hello\nagain\n").stdout
        for engine in ("fast", "transformers")
    ]
    assert texts[0] == texts[1] != ""


def test_without_a_model_it_is_the_bundled_one(
    qwen3: Path, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwenq.models.bundled.bundled_model", lambda: qwen3)
    done = runner.invoke(app, ["chat", *QUICK], input="hello\n")
    assert done.exit_code == 0, (done.output, done.exception)
    assert "note: no MODEL given: using the bundled SmolLM2-135M-Instruct" in done.stderr
    assert len(prompts) == 1


def test_what_would_drive_the_terminal_is_shown_as_text(tmp_path: Path) -> None:
    """A model that answers nothing but escape sequences: red, the bell, and text turned around."""
    folder = write_chat_folder(tmp_path / "hostile")
    hostile = b"\x1b[31mred\x07\xc2\x9b2J" + "\u202e".encode()
    tokens = [hostile, *(bytes([value]) for value in range(256))]
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)]
    (folder / RANKS_FILE).write_bytes(b"".join(lines))
    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.ln_f.weight"].zero_()  # all logits are 0: the likeliest id is the first
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    done = runner.invoke(app, ["chat", str(folder), *QUICK], input="hello\n")
    assert done.exit_code == 0, (done.output, done.exception)
    assert "[31mred2J\ufffd" * 6 in done.stdout
    assert not set(done.stdout) & set("\x1b\x07\x9b\u202e")


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return set_template(write_tiny_model(tmp_path_factory.mktemp("chat") / "Thinker"), QWEN3)


@pytest.mark.parametrize(
    ("wish", "ending"),
    [("on", ""), ("auto", ""), ("off", "<think>\n\n</think>\n\n")],  # auto: as the template does by itself
)
def test_thoughts_are_asked_for_in_the_prompt(
    wish: str, ending: str, thinker: Path, prompts: list[list[int]]
) -> None:
    done = runner.invoke(app, ["chat", str(thinker), *QUICK, "--thinking", wish], input="1 + 1?\n")
    assert done.exit_code == 0, (done.output, done.exception)
    (prompt,) = prompts
    asked = load_tokenizer(thinker).decode(prompt)
    assert asked == f"<|im_start|>user\n1 + 1?<|im_end|>\n<|im_start|>assistant\n{ending}"
    assert "the answer was cut at its limit of tokens" in done.stderr


@pytest.mark.parametrize(("template", "wish"), [(None, "on"), (ALWAYS, "off")])
def test_what_a_template_cannot_do_is_refused(tmp_path: Path, template: str | None, wish: str) -> None:
    folder = write_tiny_model(tmp_path / "Tiny")
    if template is not None:
        set_template(folder, template)
    done = runner.invoke(app, ["chat", str(folder), *QUICK, "--thinking", wish], input="hello\n")
    assert isinstance(done.exception, UsageError)
    assert "chat template" in done.exception.what
