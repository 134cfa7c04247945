"""What a team of processes leaves behind."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from teams import TESTS, free_port

from qwenq.distributed import ALONE, Team, _stop, team_from_env
from qwenq.errors import UsageError

TORCHRUN = {
    "WORLD_SIZE": "3", "RANK": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500",
}  # fmt: skip

LEAVES = """
import os, sys
from qwenq.distributed import process_group
def gloo():
    names = [open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task")]
    return sum("gloo" in name for name in names)
with process_group("cpu") as team:
    import torch
    import transformers.modeling_utils
    ones = torch.ones(4)
    team.all_reduce_sum(ones)
    during = gloo()
print(during, gloo(), ones.tolist())
"""


def test_what_torchrun_says_is_a_team() -> None:
    assert team_from_env(TORCHRUN) == Team(rank=2, world=3, local_rank=0, launched=True)
    assert team_from_env({"WORLD_SIZE": "1"}) == Team(launched=True)
    for nobody in ({}, {"WORLD_SIZE": ""}, {"RANK": "7"}):
        assert team_from_env(nobody) is ALONE


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("WORLD_SIZE", "0", "WORLD_SIZE is 0"),
        ("WORLD_SIZE", "00", "WORLD_SIZE is 00"),
        ("WORLD_SIZE", "two", "WORLD_SIZE is two"),
        ("WORLD_SIZE", "9" * 5000, "WORLD_SIZE is 99999"),
        ("RANK", None, "RANK is not set"),
        ("RANK", "3", "RANK is 3 and WORLD_SIZE 3"),
        ("LOCAL_RANK", "-1", "LOCAL_RANK is -1"),
        ("MASTER_ADDR", "", "MASTER_ADDR is not set"),
        ("MASTER_PORT", None, "MASTER_PORT is not set"),
        ("MASTER_PORT", "abc", "MASTER_PORT is abc"),
        ("MASTER_PORT", "99999", "MASTER_PORT is 99999"),
    ],
)
def test_what_torchrun_would_not_say_is_refused_by_name(name: str, value: str | None, says: str) -> None:
    environment = {key: text for key, text in {**TORCHRUN, name: value}.items() if text is not None}
    with pytest.raises(UsageError, match=f"WORLD_SIZE asks for several processes, but {says}") as refused:
        team_from_env(environment)
    assert "torchrun --nproc-per-node N" in str(refused.value.hint)


class EmptyStore:
    """torchrun's, as the first who stops finds it."""

    def compare_set(self, key: str, expected: str, value: str) -> bytes:
        return value.encode()


def test_an_error_that_nobody_foresaw_says_on_which_rank_it_was() -> None:
    team = Team(rank=1, world=2, launched=True, _store=EmptyStore())
    with pytest.raises(ZeroDivisionError) as failed:
        _stop(team, ZeroDivisionError("division by zero"))
    assert failed.value.__notes__ == ["on rank 1"]
    with pytest.raises(UsageError, match="rank 1: wrong"):
        _stop(team, UsageError("wrong"))


def start(script: str) -> list[subprocess.Popen[str]]:
    """Two ranks that run a script."""
    team = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment = os.environ | team | {"PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, "-c", script],
            env=environment | {"RANK": rank, "LOCAL_RANK": rank}, text=True, stdout=subprocess.PIPE,
        )
        for rank in ("0", "1")
    ]  # fmt: skip


def test_no_thread_of_gloo_outlives_the_team() -> None:
    """One that hands a tensor back while the interpreter ends aborts the process: once in six runs it did."""
    for rank in start(LEAVES):
        said, _ = rank.communicate(timeout=120)
        during, after, total = said.split(maxsplit=2)
        assert (rank.returncode, int(after), total.strip()) == (0, 0, "[2.0, 2.0, 2.0, 2.0]"), said
        assert int(during) > 0


TOLD = """
import signal, sys
from qwenq.cli.app import _sigterm_as_ctrl_c
from qwenq.distributed import process_group
from qwenq.errors import QwenqError
with _sigterm_as_ctrl_c():
    try:
        with process_group("cpu") as team:
            team.barrier()
            if team.rank == 1:
                signal.raise_signal(signal.SIGTERM)
            team.barrier()
    except QwenqError as error:
        print(error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(143)
"""


def test_a_rank_that_alone_gets_sigterm_stops_all_with_143_and_the_leader_says_how_to_go_on() -> None:
    """Outside of what is finished first: as while the model is opened."""
    ended = []
    for rank in start(TOLD):
        said, _ = rank.communicate(timeout=120)
        ended.append((rank.returncode, said))
    assert [code for code, _ in ended] == [143, 143], ended
    assert ended[0][1].startswith("another process was asked to stop\n")
    assert "the same command continues where it stopped" in ended[0][1]
    assert ended[1][1] == ""
