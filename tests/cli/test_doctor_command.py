"""``qwenq doctor`` as a user runs it."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from qwenq.cli import doctor
from qwenq.cli.app import app
from qwenq.cli.doctor import examination
from qwenq.errors import UnsupportedError, UsageError
from qwenq.evals.sandbox import find
from qwenq.evals.sandbox.find import Sandbox
from qwenq.gptq import columns
from qwenq.native import support
from qwenq.runtime import doctor as runtime_doctor
from qwenq.runtime.attention import BACKENDS
from qwenq.runtime.kernels.table import KERNELS


@pytest.fixture(scope="module")
def found() -> dict:
    return examination("cpu", "bfloat16")


def test_every_kernel_and_backend_runs_or_says_why_not(found: dict) -> None:
    names = {(part["kind"], part["name"]) for part in found["parts"]}
    assert names >= {("kernel", kernel.name) for kernel in KERNELS}
    assert names >= {("attention", name) for name in BACKENDS}
    assert {name for kind, name in names if kind == "engine"} == {"fast", "transformers"}
    assert {name for kind, name in names if kind == "decode step"} == {"compiled", "graph", "fused"}
    assert {name for kind, name in names if kind == "quantize"} == {
        "Hessians",
        "scales",
        "rounding",
        "refining",
    }
    assert all((part["runs"] is None) != (part["why_not"] is None) for part in found["parts"])


def test_a_gpu_that_is_not_there_is_the_reason(found: dict) -> None:
    reasons = {part["name"]: part["why_not"] for part in found["parts"]}
    assert "GPU" in reasons["v2"]
    assert reasons["dequantise"] is None
    assert reasons["off"] is None


def test_another_dtype_has_other_reasons() -> None:
    reasons = {part["name"]: part["why_not"] for part in examination("cpu", "float32")["parts"]}
    assert reasons["cpu-int4"] == "it computes in bfloat16, not in float32"


def test_what_is_missed_without_llvmlite_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "why_not", lambda *features: "llvmlite is not installed")
    parts = {(part["kind"], part["name"]): part["why_not"] for part in examination("cpu", "float32")["parts"]}
    for name in ("Hessians", "scales", "rounding", "refining"):
        assert parts["quantize", name] == "llvmlite is not installed"
    parts = {(part["kind"], part["name"]): part["why_not"] for part in examination("cpu", "float16")["parts"]}
    assert parts["quantize", "Hessians"] == "that is for bfloat16 and float32, not for float16"


def test_what_is_missed_without_triton_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, lacking = torch.device("cuda"), "triton is not installed"
    for room in (columns.gpu, runtime_doctor):
        monkeypatch.setattr(room, "why_not_triton", lambda device: lacking)
    rounding = {part.name: part.why_not for part in doctor._quantising(gpu, torch.bfloat16)}["rounding"]
    steps = {part.name: part.why_not for part in runtime_doctor._steps(gpu, torch.bfloat16)}
    assert rounding == steps["fused"] == lacking
    assert steps["graph"] is None


def test_a_device_that_is_not_there_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UsageError, match="0 CUDA GPUs"):
        examination("cuda", "auto")


def without_bubblewrap(monkeypatch: pytest.MonkeyPatch, *, namespaces: bool) -> None:
    def make() -> Sandbox:
        if namespaces:
            return Sandbox("Linux namespaces (6.1)", True, lambda command, _: command, "/inside")
        raise UnsupportedError("unshare is refused")

    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr(find, "_namespaces", make)
    monkeypatch.setattr(find, "_try", lambda sandbox: None)


def test_how_to_get_bubblewrap_where_nothing_confines(found: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    without_bubblewrap(monkeypatch, namespaces=False)
    sandbox = doctor._sandbox()
    assert sandbox["runs"] is None
    lines = doctor._lines({**found, "sandbox": sandbox})
    (place,) = (n for n, line in enumerate(lines) if line.startswith("  HumanEval "))
    assert " no   nothing here can confine the code" in lines[place]
    assert "bubblewrap: not installed" in lines[place] and "unshare is refused" in lines[place]
    assert lines[place + 1].strip().startswith("try: apt-get install bubblewrap")


def test_how_to_get_bubblewrap_where_namespaces_do(found: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    without_bubblewrap(monkeypatch, namespaces=True)
    lines = doctor._lines({**found, "sandbox": doctor._sandbox()})
    (place,) = (n for n, line in enumerate(lines) if line.startswith("  HumanEval "))
    assert lines[place] == "  HumanEval     yes  Linux namespaces (6.1)"
    assert lines[place + 1].strip() == "try: apt-get install bubblewrap, which is taken where it works"


def test_the_same_for_people_and_as_json() -> None:
    shown = CliRunner().invoke(app, ["doctor", "--device", "cpu"])
    assert shown.exit_code == 0, shown.output
    for expected in ("engine:", "kernel:", "attention:", "sandbox", "dequantise    yes", "torch "):
        assert expected in shown.output
    told = json.loads(CliRunner().invoke(app, ["doctor", "--device", "cpu", "--json"]).output)
    assert told["device"] == "cpu"
    assert all(package["version"] or package["get"] for package in told["optional"])
