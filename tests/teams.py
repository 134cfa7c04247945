"""Commands on several processes, as torchrun starts them but forked: torch is loaded once, not once each."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

TESTS = Path(__file__).parent


class Ended(NamedTuple):
    """What became of a team: by rank."""

    statuses: list[int]
    shown: list[str]


class Launcher:
    """Runs a command of qwenq on several ranks through ``zygote.py``."""

    def __init__(self, folder: Path, server: subprocess.Popen[str]) -> None:
        self.folder, self._server, self._runs = folder, server, 0

    def __call__(
        self,
        world: int,
        *argv: object,
        at: Mapping[int, dict[str, Any]] | None = None,
        folders: Mapping[int, Path] | None = None,
    ) -> Ended:
        """Start ``qwenq ARGV`` on that many ranks; by rank, ``at``: see zygote.py, and where it starts."""
        self._runs += 1
        port = str(free_port())
        outputs = [self.folder / f"run{self._runs}-rank{rank}.txt" for rank in range(world)]
        requests = [
            {
                "argv": [str(argument) for argument in argv],
                "cwd": str((folders or {}).get(rank, self.folder)),
                "output": str(output),
                "at": (at or {}).get(rank),
                "environment": {
                    "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": "True",
                } if world > 1 else {"WORLD_SIZE": "1"},
            }
            for rank, output in enumerate(outputs)
        ]  # fmt: skip
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(requests) + "\n")
        self._server.stdin.flush()
        statuses: list[int] = json.loads(self._server.stdout.readline())
        return Ended(statuses, [output.read_text() for output in outputs])


def torchrun(folder: Path, processes: int, *argv: object, agents: int = 1) -> list[tuple[int, str]]:
    """``qwenq ARGV`` under torchrun itself, as users start it: status and words of each of its agents.

    Args:
        folder: where it is started.
        processes: in all; an agent has its share of them.
        agents: as on that many machines, which meet on a port of this one.
    """
    if agents == 1:
        options = ["--standalone"]
    else:
        options = ["--nnodes", str(agents), "--rdzv-backend", "c10d", "--rdzv-id", "test"]
        options += ["--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--local-addr", "127.0.0.1"]
    options += ["--nproc-per-node", str(processes // agents)]
    command = [sys.executable, "-m", "torch.distributed.run", *options, "-m", "qwenq", *map(str, argv)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "QWENQ_CACHE": str(folder / "cache")}
    environment["PYTHONPATH"] = str(TESTS.parent)
    started = [
        subprocess.Popen(
            command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for _ in range(agents)
    ]
    said = [agent.communicate()[0] for agent in started]
    return [(agent.returncode, words) for agent, words in zip(started, said, strict=True)]


def free_port() -> int:
    """A port that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def launcher(folder: Path, modules: Sequence[str]) -> Iterator[Launcher]:
    """A launcher whose processes have loaded these modules already."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "QWENQ_CACHE": str(folder / "cache")}
    server = subprocess.Popen(
        [sys.executable, TESTS / "zygote.py", *modules],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=TESTS.parent,
    )
    assert server.stdin is not None
    try:
        yield Launcher(folder, server)
    finally:
        server.stdin.close()
        server.wait(timeout=20)
