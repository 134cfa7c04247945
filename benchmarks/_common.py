"""What the benchmark scripts share: measured child processes, the environment, the report files.

Standard library only, on purpose: Linux hands the peak memory of a parent down to its child at ``exec``, so a
parent that had loaded torch would hide how little a child took.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
REPORTS = ROOT / "reports" / "benchmarks"
MIB = 2**20

Command = Sequence["str | Path"]


@dataclass(frozen=True)
class Child:
    """A finished child process.

    Attributes:
        wall_s: seconds from start to exit.
        cpu_s: user and system seconds of the process and of the children it waited for.
        peak_rss_mib: largest resident set of any one of these processes.
        output: what it wrote to its standard output.
    """

    wall_s: float
    cpu_s: float
    peak_rss_mib: float
    output: str

    def json(self) -> dict[str, Any]:
        """Return the last line of the output, as JSON."""
        found: dict[str, Any] = json.loads(self.output.strip().splitlines()[-1])
        return found


def run_child(command: Command, threads: int, folder: Path = ROOT) -> Child:
    """Run a command in a folder to its end, with that many threads for its arithmetic, and measure it.

    Raises:
        SystemExit: it failed; shows the end of what it wrote.
    """
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "",  # nobody is to compile his libraries anew at each start
    }
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        start = time.perf_counter()
        process = subprocess.Popen(
            [str(part) for part in command], stdout=out, stderr=err, env=environment, cwd=folder
        )
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        texts = [_text(file) for file in (out, err)]
    if process.returncode:
        tail = "\n".join(text[-3000:] for text in texts)
        sys.exit(f"{tail}\nexit status {process.returncode}: {' '.join(map(str, command))}")
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes there, KiB on Linux
    return Child(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit / MIB, texts[0])


def _text(file: Any) -> str:
    file.seek(0)
    return str(file.read().decode(errors="replace"))


def versions(python: str | Path, packages: Sequence[str]) -> dict[str, str]:
    """Return versions of packages in that interpreter, without those that it lacks."""
    code = (
        "import importlib.metadata as m, json, sys\n"
        "plain = lambda name: name.lower().replace('_', '-')\n"
        "have = {plain(d.metadata['Name']): d.version for d in m.distributions()}\n"
        "print(json.dumps({n: have[plain(n)] for n in sys.argv[1:] if plain(n) in have}))"
    )
    found: dict[str, str] = run_child([python, "-c", code, *packages], threads=1).json()
    return found


def circumstances(python: str | Path, packages: Sequence[str]) -> dict[str, Any]:
    """Return date and versions of a turn: rows of several days may stand in one report."""
    return {
        "date": date.today().isoformat(),
        "cpu": _cpu_model(),
        "versions": versions(python, packages),
    }


Rows = Sequence[Mapping[str, Any]]


def measured_on(rows: Rows, facts: Mapping[str, Any]) -> str:
    """Return the day on which rows were measured, or the first and the last.

    Args:
        facts: the report's environment. Its date stands for rows of old reports, none of which has its own.
    """
    days = sorted({row["date"] for row in rows if "date" in row})
    if not days:
        return str(facts.get("date", "a day that was not recorded"))
    span = " to ".join(dict.fromkeys((days[0], days[-1])))
    return span if all("date" in row for row in rows) else f"{span}, and on days that were not recorded"


def turns_of(facts: Mapping[str, Any]) -> str:
    """How many turns a report's figures are of."""
    return "one turn each" if facts["turns"] == 1 else f"medians of {facts['turns']} alternating turns"


def shared(rows: Rows, facts: Mapping[str, Any], *keys: str) -> str:
    """Return the values of rows at nested keys, joined by "and" where they differ, or the environment's."""
    found = [value for row in rows if (value := _at(row, keys)) is not None] or [_at(facts, keys)]
    return " and ".join(dict.fromkeys(str(value) for value in found if value is not None)) or "(not recorded)"


def _at(tree: Any, keys: Sequence[str]) -> Any:
    for key in keys:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


INSTRUCTIONS = {"avx512f": "AVX-512", "avx2": "AVX2", "asimd": "NEON"}
"""Names of the widest instructions that a CPU has, by its flag."""
_BEFORE = {"AMD EPYC": "AVX-512", "Intel(R) Xeon(R) Processor": "AVX-512"}
"""Of the machines of reports that do not record it: run folders of the same days do (``reports``)."""


def instructions_of(facts: Mapping[str, Any]) -> str:
    """Return the widest instructions of the CPU that a report's figures are of."""
    found = facts.get("instructions") or _BEFORE.get(str(facts.get("cpu")))
    return found or "instructions that were not recorded"


def machine() -> dict[str, Any]:
    """CPU, memory and date; nothing that names the machine or its owner."""
    return {
        "cpu": _cpu_model(),
        "instructions": _instructions(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "os": platform.system(),
        "python": platform.python_version(),
        "date": date.today().isoformat(),
        # A machine that is busy with other work measures that work.
        "load_at_start": round(os.getloadavg()[0], 2),
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _instructions() -> str | None:
    info = Path("/proc/cpuinfo")
    flags = info.read_text().split() if info.exists() else []
    return next((name for flag, name in INSTRUCTIONS.items() if flag in flags), None)


def resolve_bundled() -> Path:
    """Return the bundled model's folder; the first call converts it."""
    code = "from qwenq.models.opening import resolve_model; print(resolve_model(None).folder)"
    return Path(run_child([sys.executable, "-c", code], threads=1).output.strip())


def write_report(name: str, report: Mapping[str, Any], markdown: str, folder: Path = REPORTS) -> None:
    """Write ``NAME.json`` and ``NAME.md``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n")
    (folder / f"{name}.md").write_text(markdown)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a GitHub table: the first column left-aligned, the rest right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows)) + "\n"
