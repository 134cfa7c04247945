"""Compute one result with the processes that torchrun started.

There is no launcher here. ``torchrun --nproc-per-node 4 -m qwenq quantize …`` starts the same command four
times, with RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT in the environment. Rank 0 alone talks
to the user and writes files. Tensors go over NCCL on GPUs and over gloo on CPUs; objects go over torchrun's
key-value store, where a rank that waits looks regularly whether another one has stopped.

Without torchrun the team is ``ALONE``: its methods do nothing, and torch is not loaded.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn

from qwenq.errors import QwenqError, UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

TIMEOUT = timedelta(hours=1)
"""Of one collective operation: ranks may wait for the longest step that one of them does by itself."""
_FIRST_LOOK, _LOOK = 0.005, 0.2  # seconds between two looks into the store, while the wait grows
_LAST_PORT, _DIGITS = 65_535, 9
STOPPED = "stopped"
STOPPED_BY_SIGTERM = 128 + signal.SIGTERM
"""Exit code of a process that was asked to stop: torchrun sends SIGTERM, whatever stopped it."""
RESUME = "look above, and in torchrun's summary, for which one; the same command continues where it stopped"


class LostError(QwenqError):
    """A collective operation failed: another process is gone."""


class StoppedError(QwenqError):
    """Another process was asked to stop; this one ends with the same exit code."""

    exit_code = STOPPED_BY_SIGTERM


@dataclass
class Team:
    """The processes of one command."""

    rank: int = 0  # of this process
    world: int = 1  # number of processes
    local_rank: int = 0  # of this process among those of its machine
    launched: bool = False  # by torchrun, perhaps as the only one: results must not depend on their number
    _store: Any = field(default=None, repr=False)
    _published: int = field(default=0, repr=False)
    _waited: int = field(default=0, repr=False)

    @property
    def is_rank0(self) -> bool:
        """Return whether this process writes files and talks to the user."""
        return self.rank == 0

    def shard(self, count: int) -> range:
        """Return this rank's indices of ``count`` items: every ``world``-th."""
        return range(self.rank, count, self.world)

    def all_reduce_sum(self, tensor: Tensor) -> None:
        """Put the sum over all ranks into ``tensor``; the order of summation is the library's."""
        self._exchange(lambda group: group.all_reduce(tensor, op=group.ReduceOp.SUM))

    def all_reduce_max(self, tensor: Tensor) -> None:
        """Put the element-wise maximum over all ranks into ``tensor``."""
        self._exchange(lambda group: group.all_reduce(tensor, op=group.ReduceOp.MAX))

    def broadcast(self, tensor: Tensor, source: int = 0) -> None:
        """Copy ``tensor`` of rank ``source`` into that of all others; same shape and dtype everywhere."""
        self._exchange(lambda group: group.broadcast(tensor, src=source))

    def barrier(self) -> None:
        """Wait until all ranks have come here, however long that takes."""
        if self.world == 1:
            return
        self._waited += 1
        here, all_here = f"here/{self._waited}", f"all/{self._waited}"
        if self._ask(lambda store: store.add(here, 1)) == self.world:
            self._ask(lambda store: store.set(all_here, ""))
        self._await(all_here)

    def broadcast_object(self, value: Any = None) -> Any:
        """Return rank 0's object on all ranks; wait as long as that takes.

        Args:
            value: an object that JSON can hold; that of other ranks is ignored.
        """
        if self.world == 1:
            return value
        self._published += 1
        name = f"broadcast/{self._published}"
        if self.is_rank0:
            self._ask(lambda store: store.set(name, json.dumps(value)))
            return value
        self._await(name)
        return json.loads(self._ask(lambda store: store.get(name)))

    def _await(self, name: str) -> None:
        """Wait for a key, and look regularly whether another rank has stopped.

        The store's own wait would write to the terminal at each time-out.
        """
        pause = _FIRST_LOOK
        while True:
            there = self._ask(lambda store: store.check([name]))
            if self._ask(lambda store: store.check([STOPPED])):
                raise LostError("another process has stopped")
            if there:
                return
            time.sleep(pause)
            pause = min(2 * pause, _LOOK)

    def _ask(self, question: Callable[[Any], Any]) -> Any:
        try:
            return question(self._store)
        except RuntimeError as error:
            raise LostError("torchrun's key-value store does not answer") from error

    def _exchange(self, step: Callable[[Any], object]) -> None:
        if self.world == 1:
            return
        import torch
        from torch import distributed

        try:
            step(distributed)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # gloo's and NCCL's: connection closed, time out
            raise LostError(f"rank {self.rank} lost another process") from error

    def claim_stop(self, code: int) -> int | None:
        """Record that this process stops the run; return the exit code of one that did before, or None.

        Raises:
            LostError: the store is gone.
        """
        mine = json.dumps([self.rank, code])
        first = self._ask(lambda store: store.compare_set(STOPPED, "", mine)).decode()
        if self.is_rank0:  # wakes ranks that wait for its next object
            self._ask(lambda store: store.set(f"broadcast/{self._published + 1}", "null"))
        return None if first == mine else int(json.loads(first)[1])


ALONE = Team()


def team_from_env(environment: Mapping[str, str] = os.environ) -> Team:
    """Return the team that torchrun's variables describe; ``ALONE`` where there are none.

    Raises:
        UsageError: some are missing, or are not whole numbers.
    """
    world = _number(environment, "WORLD_SIZE", "1")
    if world == 1:
        return Team(launched=True) if environment.get("WORLD_SIZE") else ALONE
    rank, local = _number(environment, "RANK"), _number(environment, "LOCAL_RANK")
    if rank >= world:
        raise _no_torchrun(f"RANK is {rank} and WORLD_SIZE {world}")
    if not environment.get("MASTER_ADDR"):
        raise _no_torchrun("MASTER_ADDR is not set")
    if (port := _number(environment, "MASTER_PORT")) > _LAST_PORT:
        raise _no_torchrun(f"MASTER_PORT is {port}")
    return Team(rank, world, local, launched=True)


def _number(environment: Mapping[str, str], name: str, default: str = "not set") -> int:
    text = environment.get(name) or default
    sound = text.isascii() and text.isdigit() and len(text) <= _DIGITS
    if not sound or (name == "WORLD_SIZE" and int(text) == 0):
        raise _no_torchrun(f"{name} is {text}")
    return int(text)


def _no_torchrun(what: str) -> UsageError:
    return UsageError(
        f"WORLD_SIZE asks for several processes, but {what}",
        hint="start with `torchrun --nproc-per-node N -m qwenq …`, or unset WORLD_SIZE",
    )


@contextmanager
def process_group(device: str = "auto") -> Iterator[Team]:
    """Join the other processes of this command; on an error, end all of them, and let one explain it.

    ``device`` is as ``--device``: "auto" and "cuda" stand for the GPU with the number of the local rank.

    Raises:
        UsageError: torchrun's variables contradict each other, or this machine has fewer GPUs than processes.
        QwenqError: the others could not be reached, or one is gone.
        SystemExit: another process stops the run, and explains it.
    """
    team = team_from_env()
    if team.world == 1:
        yield team
        return
    _join(team, _gpu_of(team, device))
    try:
        yield team
    except BaseException as error:
        _stop(team, error)
    else:
        from torch import distributed

        distributed.destroy_process_group()


def _gpu_of(team: Team, device: str) -> torch.device | None:
    """Return the GPU of this rank, made torch's current one; None: it computes on the CPU."""
    import torch

    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return None
    if device not in ("auto", "cuda"):
        if not team.is_rank0:
            raise SystemExit(UsageError.exit_code)  # rank 0 explains it
        raise UsageError(
            f"--device {device} with {team.world} processes: each needs one of its own",
            where="--device",
            hint="leave it out, or use cuda: each process takes the GPU with its local rank's number",
        )
    if team.local_rank >= torch.cuda.device_count():
        raise UsageError(
            f"local rank {team.local_rank} has no GPU: there are {torch.cuda.device_count()}",
            where="torchrun --nproc-per-node",
            hint="start as many processes as there are GPUs, or use --device cpu",
        )
    torch.cuda.set_device(team.local_rank)
    return torch.device("cuda", team.local_rank)


def _join(team: Team, gpu: torch.device | None) -> None:
    # Loaded before the group exists: its functions keep the default group of that moment for ever. Loaded
    # later, as transformers does, it would let gloo's threads outlive destroy_process_group, and these abort
    # the end of the interpreter.
    import torch.distributed.nn  # noqa: F401
    from torch import distributed
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    try:
        store, _, _ = next(rendezvous("env://", timeout=TIMEOUT))
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if gpu is not None else "gloo",
            store=PrefixStore("tensors", store),
            rank=team.rank,
            world_size=team.world,
            timeout=TIMEOUT,
            device_id=gpu,
        )
    except RuntimeError as error:
        raise QwenqError(
            f"rank {team.rank} could not reach the others: {str(error).splitlines()[0]}",
            where=f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}",
            hint="see that all machines reach this address, and that nothing else uses the port",
        ) from error
    team._store = PrefixStore("qwenq", store)


def _stop(team: Team, error: BaseException) -> NoReturn:
    """End this process: the first to stop explains why, the others end silently.

    Where the first was stopped by a signal, rank 0 says how to continue.
    """
    try:
        known = team.claim_stop(_exit_code(error))
    except LostError:
        known = None
    if known is not None and not isinstance(error, KeyboardInterrupt):
        if team.is_rank0 and known == STOPPED_BY_SIGTERM:
            raise StoppedError("another process was asked to stop", hint=RESUME) from error
        raise SystemExit(known) from error
    if isinstance(error, LostError):
        raise QwenqError(
            f"one of the {team.world} processes disappeared: it was killed, or ran out of memory",
            where=f"noticed by rank {team.rank}",
            hint=RESUME,
        ) from error
    if isinstance(error, QwenqError) and team.rank:
        error.what = f"rank {team.rank}: {error.what}"
    elif team.rank:
        error.add_note(f"on rank {team.rank}")
    raise error


def _exit_code(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return STOPPED_BY_SIGTERM
    return error.exit_code if isinstance(error, QwenqError) else 1
