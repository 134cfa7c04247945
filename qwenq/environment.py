"""Describe the machine of a measurement: versions, processor, memory, GPUs; nothing that names its owner.

Nothing heavy is loaded for it: torch is asked for its threads only where the process has it already. Unknown
facts are left out, never guessed.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

_PACKAGES = ("qwenq", "torch", "transformers", "triton", "safetensors", "tokenizers", "numpy")


def versions() -> dict[str, str]:
    """Return package name → version, Python included; packages that are absent are left out."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


# Flags of /proc/cpuinfo that decide how fast a CPU multiplies.
FEATURES = (
    "avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16",
    "amx_tile", "amx_bf16", "amx_int8", "neon", "asimd", "asimddp", "sve", "i8mm", "bf16",
)  # fmt: skip

MACHINE = "machine"
"""Key of a row's ``settings``: its machine. A run may be continued on another one."""
_OF_MACHINE = ("cpu", "memory_bytes", "gpus")
UNKNOWN = "unknown"


def environment() -> dict[str, Any]:
    """Return plain JSON values.

    Keys: ``versions``, ``python``, ``os``, ``cpu``, ``memory_bytes``, ``gpus``, ``date``.
    ``gpus`` is None where the driver does not answer, and empty without a GPU.
    """
    import psutil

    found = versions()
    return {
        "date": date.today().isoformat(),
        "versions": {name: number for name, number in found.items() if name != "python"},
        "python": found["python"],
        "os": _system(),
        "cpu": _cpu(),
        "memory_bytes": int(psutil.virtual_memory().total),
        "gpus": _gpus(),
    }


def machine(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of an ``environment`` that a row keeps under ``MACHINE``."""
    return {name: found.get(name) for name in _OF_MACHINE}


def measured_on(folder: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the environment of a row: its folder's, with the machine of its ``settings``, if any."""
    known = settings.get(MACHINE)
    own = {name: known[name] for name in _OF_MACHINE if name in known} if isinstance(known, dict) else {}
    return {**folder, **own}


def decisive(found: Mapping[str, Any], device: object = None, threads: object = None) -> dict[str, str]:
    """Return the facts that decide speed and memory, as text; a missing one is ``unknown``.

    Args:
        found: an ``environment``, perhaps from a foreign file: any JSON values.
        device: that computed; with ``cpu`` the GPUs are left out.
        threads: of the row itself; None: those of ``found``.
    """
    cpu, gpus = found.get("cpu"), found.get("gpus")
    facts = cpu if isinstance(cpu, dict) else {"model": cpu}
    features = facts.get("features")
    named = {
        "processor": _text(facts.get("model")),
        "cores": _text(facts.get("cores")),
        "threads": _text(facts.get("threads") if threads is None else threads),
        "instruction sets": " ".join(sorted(map(str, features))) if isinstance(features, list) else UNKNOWN,
    }
    if not str(device).startswith("cpu"):
        named["GPUs"] = "; ".join(map(_gpu_text, gpus)) or "none" if isinstance(gpus, list) else UNKNOWN
    return named


def difference(before: Mapping[str, str], after: Mapping[str, str]) -> str:
    """Return ``cores 4 instead of 2`` for facts of ``decisive`` that differ; empty where none does."""
    differing = (key for key in {**before, **after} if before.get(key) != after.get(key))
    facts = (f"{key} {after.get(key, UNKNOWN)} instead of {before.get(key, UNKNOWN)}" for key in differing)
    return ", ".join(facts)


def _gpu_text(gpu: Any) -> str:
    if not isinstance(gpu, dict):
        return _text(gpu)
    size = gpu.get("memory_bytes")
    return f"{gpu.get('name')}{f' of {size} bytes' if size else ''}"


def _text(value: Any) -> str:
    return UNKNOWN if value is None else str(value)


def _system() -> str:
    """Return name and version number; suffixes of a kernel's version may name a machine."""
    number = re.match(r"[0-9.]*", platform.release())
    return f"{platform.system()} {number[0] if number else ''}".strip()


def _cpu() -> dict[str, Any]:
    """Return model, features that matter for arithmetic, usable cores, and threads of torch."""
    torch = sys.modules.get("torch")
    flags = (_cpu_line("flags") or _cpu_line("Features") or "").split()
    return {
        "model": _cpu_line("model name") or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "features": [name for name in FEATURES if name in flags],
        # that this process may use: containers and ``taskset`` may allow fewer
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads() if torch is not None else None,
    }


def _cpu_line(name: str) -> str | None:
    """Return the first value of that name in /proc/cpuinfo, where there is such a file."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == name:
                return value.strip()
    return None


def _gpus() -> list[dict[str, Any]] | None:
    """Return name, memory in bytes, compute capability and driver of each GPU, as nvidia-smi has them."""
    import subprocess

    fields = "name,memory.total,compute_cap,driver_version"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
        return [
            {"name": name, "memory_bytes": int(mib) << 20, "capability": capability, "driver": driver}
            for name, mib, capability, driver in (line.split(", ") for line in said.splitlines())
        ]
    except FileNotFoundError:
        return []
    except (OSError, subprocess.SubprocessError, ValueError):  # a driver that does not work
        return None
