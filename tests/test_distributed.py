"""What a team of processes leaves behind."""

from __future__ import annotations

import os
import subprocess
import sys

from teams import TESTS, free_port

LEAVES = """
import os, sys
from qwenq.distributed import assembled
def gloo():
    names = [open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task")]
    return sum("gloo" in name for name in names)
with assembled("cpu") as team:
    import torch
    import transformers.modeling_utils
    ones = torch.ones(4)
    team.add(ones)
    during = gloo()
print(during, gloo(), ones.tolist())
"""


def test_no_thread_of_gloo_outlives_the_team() -> None:
    """One that hands a tensor back while the interpreter ends aborts the process: once in six runs it did."""
    team = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment = os.environ | team | {"PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", LEAVES],
            env=environment | {"RANK": rank, "LOCAL_RANK": rank}, text=True, stdout=subprocess.PIPE,
        )
        for rank in ("0", "1")
    ]  # fmt: skip
    for rank in started:
        said, _ = rank.communicate(timeout=120)
        during, after, total = said.split(maxsplit=2)
        assert (rank.returncode, int(after), total.strip()) == (0, 0, "[2.0, 2.0, 2.0, 2.0]"), said
        assert int(during) > 0
