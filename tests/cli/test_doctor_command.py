"""``qwenq doctor`` as a user runs it."""

from __future__ import annotations

import json
import re

import pytest
import torch
from typer.testing import CliRunner

from qwenq.cli import plan
from qwenq.cli.app import app
from qwenq.cli.plan import examination
from qwenq.compute import cpu, gpu
from qwenq.compute.ops import operations
from qwenq.errors import UnsupportedError, UsageError
from qwenq.evals.sandbox import run
from qwenq.evals.sandbox.run import Sandbox
from qwenq.runtime import doctor as runtime_doctor
from qwenq.runtime.attention import BACKENDS
from qwenq.runtime.quantised_linear import KERNELS


@pytest.fixture(scope="module")
def found() -> dict:
    return examination("cpu", "bfloat16")


def test_every_kernel_and_backend_runs_or_says_why_not(found: dict) -> None:
    names = {(part["kind"], part["name"]) for part in found["parts"]}
    assert names >= {("kernel", kernel.name) for kernel in KERNELS}
    assert names >= {("attention", name) for name in BACKENDS}
    assert {name for kind, name in names if kind == "engine"} == {"fast", "transformers"}
    assert {name for kind, name in names if kind == "decode step"} == {"compiled", "graph", "fused"}
    assert {name for kind, name in names if kind == "operation"} == {
        each.name for each in operations(torch.device("cpu"), torch.bfloat16)
    }
    others = [part for part in found["parts"] if part["kind"] != "operation"]
    assert all((part["runs"] is None) != (part["reason"] is None) for part in others)


def test_a_gpu_that_is_not_there_is_the_reason(found: dict) -> None:
    reasons = {part["name"]: part["reason"] for part in found["parts"]}
    assert "GPU" in reasons["v2"]
    assert reasons["dequantise"] is None
    assert reasons["off"] is None


def test_another_dtype_has_other_reasons() -> None:
    reasons = {part["name"]: part["reason"] for part in examination("cpu", "float32")["parts"]}
    assert reasons["cpu-native"] == "it computes in bfloat16, not in float32"


def test_operations_that_run_in_torch_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cpu.VARIABLE, "torch")
    found = examination("cpu", "bfloat16")
    parts = {part["name"]: part for part in found["parts"] if part["kind"] == "operation"}
    for part in parts.values():
        assert (part["runs"], part["reason"]) == ("torch", "QWENQ_CPU=torch turns it off")
    lines = [line for line in plan._lines(found) if " slow torch: QWENQ_CPU=torch turns it off" in line]
    assert len(lines) == len(parts)


def test_operations_name_the_variant_that_runs() -> None:
    if reason := cpu.unsupported_reason():
        pytest.skip(f"no C kernels here: {reason}")
    parts = [part for part in examination("cpu", "bfloat16")["parts"] if part["kind"] == "operation"]
    assert {part["runs"] for part in parts} == {f"C ({cpu.variant_name()})"}


def test_what_is_missed_without_triton_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    device, lacking = torch.device("cuda"), "triton is not installed"
    monkeypatch.setattr(gpu, "unsupported_reason", lambda device: lacking)
    rounding = {each.name: each for each in operations(device, torch.bfloat16)}
    steps = {part.name: part.reason for part in runtime_doctor._steps(device, torch.bfloat16)}
    assert rounding["rounding and coordinate descent"].reason == steps["fused"] == lacking
    assert steps["graph"] is None


def test_a_device_that_is_not_there_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UsageError, match="0 CUDA GPUs"):
        examination("cuda", "auto")


def without_bubblewrap(monkeypatch: pytest.MonkeyPatch, *, namespaces: bool) -> None:
    def make() -> Sandbox:
        if namespaces:
            return Sandbox("Linux namespaces (6.1)", lambda command, _: command, "/inside")
        raise UnsupportedError("unshare is refused")

    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr(run, "_namespaces", make)
    monkeypatch.setattr(run, "_try", lambda sandbox: None)


def test_how_to_get_bubblewrap_where_nothing_confines(found: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    without_bubblewrap(monkeypatch, namespaces=False)
    sandbox = plan._sandbox()
    assert sandbox["runs"] is None
    lines = plan._lines({**found, "sandbox": sandbox})
    (place,) = (n for n, line in enumerate(lines) if line.startswith("  HumanEval "))
    assert " no   no sandbox works here for the code that a model wrote" in lines[place]
    assert "bubblewrap: not installed" in lines[place] and "unshare is refused" in lines[place]
    assert lines[place + 1].strip().startswith("try: apt-get install bubblewrap")


def test_how_to_get_bubblewrap_where_namespaces_do(found: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    without_bubblewrap(monkeypatch, namespaces=True)
    lines = plan._lines({**found, "sandbox": plan._sandbox()})
    (place,) = (n for n, line in enumerate(lines) if line.startswith("  HumanEval "))
    assert lines[place] == "  HumanEval     yes  Linux namespaces (6.1)"
    assert lines[place + 1].strip() == "try: apt-get install bubblewrap, which is used where it works"


def test_the_same_for_people_and_as_json() -> None:
    shown = CliRunner().invoke(app, ["doctor", "--device", "cpu"])
    assert shown.exit_code == 0, shown.output
    last = shown.output.splitlines()[-1]
    assert last.startswith("fastest here: engine fast, kernel ") and "; to get more: " in last
    assert "; None" not in shown.output
    for expected in ("engine:", "kernel:", "attention:", "sandbox", "dequantise    yes", "torch "):
        assert expected in shown.output
    packages = shown.output.partition("optional packages:\n")[2].partition("\n\n")[0].splitlines()
    assert len({re.search(r" (yes|no ) ", line).start() for line in packages}) == 1  # in one column
    told = json.loads(CliRunner().invoke(app, ["doctor", "--device", "cpu", "--json"]).output)
    assert told["device"] == "cpu"
    assert all(package["version"] or package["get"] for package in told["optional"])
