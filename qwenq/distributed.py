"""Several processes as one: what torchrun started, computing one result together.

There is no launcher here. ``torchrun --nproc-per-node 4 -m qwenq quantize …`` starts the same command four
times and says so in the environment (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT). Rank 0, the
leader, alone talks to the user and writes files. Tensors go over NCCL on GPUs and over gloo on CPUs. What the
leader has to say between two steps goes over torchrun's key-value store, where nobody waits in vain: who
waits looks every few seconds whether somebody has stopped.

Without torchrun a process is ``ALONE``: everything here then does nothing, and loads no torch.
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
"""For one exchange of tensors: others may have to wait for the longest step that one rank does by itself."""
_FIRST_LOOK, _LOOK = 0.005, 0.2  # seconds between two looks into the store, while the wait grows
_LAST_PORT, _DIGITS = 65_535, 9
STOPPED = "stopped"
TOLD = 128 + signal.SIGTERM
"""Exit code of who was told to stop: torchrun makes a SIGTERM of whatever stops it."""
RESUME = "look above, and in torchrun's summary, for which one; the same command goes on where it stopped"


class LostError(QwenqError):
    """An exchange failed: some other process is gone."""


class StoppedError(QwenqError):
    """Another process was told to stop; this one has to end as it did."""

    exit_code = TOLD


@dataclass
class Team:
    """The processes of one command.

    Attributes:
        rank: this one, from 0 on.
        world: how many there are.
        local_rank: this one among those on the same machine.
        launched: torchrun started it, perhaps alone: results must not depend on how many there are.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    launched: bool = False
    _store: Any = field(default=None, repr=False)
    _told: int = field(default=0, repr=False)
    _waited: int = field(default=0, repr=False)

    @property
    def leads(self) -> bool:
        """Whether this one writes, and talks to the user."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """This rank's of ``count`` things, dealt out like cards: the first ranks may have one more.

        Args:
            count: at least 0.
        """
        return range(self.rank, count, self.world)

    def add(self, tensor: Tensor) -> None:
        """Put the sum over all ranks into ``tensor``, in an order of the library's choice."""
        self._exchange(lambda group: group.all_reduce(tensor, op=group.ReduceOp.SUM))

    def largest(self, tensor: Tensor) -> None:
        """Put the element-wise maximum over all ranks into ``tensor``."""
        self._exchange(lambda group: group.all_reduce(tensor, op=group.ReduceOp.MAX))

    def copy(self, tensor: Tensor, source: int = 0) -> None:
        """Put what ``source`` has in ``tensor`` into everybody's; same shape and dtype everywhere."""
        self._exchange(lambda group: group.broadcast(tensor, src=source))

    def wait(self) -> None:
        """Go on once all have come here; waits as long as that takes."""
        if self.world == 1:
            return
        self._waited += 1
        here, all_here = f"here/{self._waited}", f"all/{self._waited}"
        if self._ask(lambda store: store.add(here, 1)) == self.world:
            self._ask(lambda store: store.set(all_here, ""))
        self._await(all_here)

    def tell(self, value: Any = None) -> Any:
        """What the leader says here, for all; waits as long as that takes.

        Args:
            value: the leader's, as JSON can hold it; the others' is not looked at.
        """
        if self.world == 1:
            return value
        self._told += 1
        name = f"told/{self._told}"
        if self.leads:
            self._ask(lambda store: store.set(name, json.dumps(value)))
            return value
        self._await(name)
        return json.loads(self._ask(lambda store: store.get(name)))

    def _await(self, name: str) -> None:
        """Wait for a key, and look now and then whether somebody has stopped.

        The store's own wait would write to the terminal each time that it was in vain.
        """
        pause = _FIRST_LOOK
        while True:
            said = self._ask(lambda store: store.check([name]))
            if self._ask(lambda store: store.check([STOPPED])):
                raise LostError("another process has stopped")
            if said:
                return
            time.sleep(pause)
            pause = min(2 * pause, _LOOK)

    def _ask(self, question: Callable[[Any], Any]) -> Any:
        try:
            return question(self._store)
        except RuntimeError as error:
            raise LostError("torchrun's store does not answer any more") from error

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
        """Say that this process stops the run; None: it is the first, else that one's exit code.

        Raises:
            LostError: the store is gone.
        """
        mine = json.dumps([self.rank, code])
        first = self._ask(lambda store: store.compare_set(STOPPED, "", mine)).decode()
        if self.leads:  # wakes those who wait for its next word
            self._ask(lambda store: store.set(f"told/{self._told + 1}", "null"))
        return None if first == mine else int(json.loads(first)[1])


ALONE = Team()


def described(environment: Mapping[str, str] = os.environ) -> Team:
    """What torchrun's variables say; ``ALONE`` where there are none.

    Raises:
        UsageError: some are missing or are no sound numbers.
    """
    world = _number(environment, "WORLD_SIZE", "1")
    if world == 1:
        return Team(launched=True) if environment.get("WORLD_SIZE") else ALONE
    rank, local = _number(environment, "RANK"), _number(environment, "LOCAL_RANK")
    if rank >= world:
        raise _no_torchrun(f"RANK is {rank} and WORLD_SIZE {world}")
    if not environment.get("MASTER_ADDR"):
        raise _no_torchrun("MASTER_ADDR is nothing")
    if (port := _number(environment, "MASTER_PORT")) > _LAST_PORT:
        raise _no_torchrun(f"MASTER_PORT is {port}")
    return Team(rank, world, local, launched=True)


def _number(environment: Mapping[str, str], name: str, default: str = "nothing") -> int:
    text = environment.get(name) or default
    sound = text.isascii() and text.isdigit() and len(text) <= _DIGITS
    if not sound or (name == "WORLD_SIZE" and int(text) == 0):
        raise _no_torchrun(f"{name} is {text}")
    return int(text)


def _no_torchrun(what: str) -> UsageError:
    return UsageError(
        f"the environment speaks of several processes, but {what}",
        hint="start with `torchrun --nproc-per-node N -m qwenq …`, or unset WORLD_SIZE",
    )


@contextmanager
def assembled(device: str = "auto", *, tensors: bool = True, meeting: str = "") -> Iterator[Team]:
    """Join the other processes of this command; on an error, see to it that all end and one says why.

    Args:
        device: as ``--device``: "auto" and "cuda" stand for the GPU with the number of the local rank.
        tensors: False: only words will be exchanged, and no GPU is touched.
        meeting: a name that sets several meetings of the same ranks apart, of one process each after another
            or of their children.

    Raises:
        UsageError: see ``described``; a GPU named for all, or fewer GPUs than processes on this machine.
        QwenqError: the others could not be met, or one is gone.
        SystemExit: another process stops the run, and says why.
    """
    team = described()
    if team.world == 1:
        yield team
        return
    _join(team, _gpu_of(team, device) if tensors else None, tensors, meeting)
    try:
        yield team
    except BaseException as error:
        _stop(team, error)
    else:
        from torch import distributed

        if tensors:
            distributed.destroy_process_group()


def _gpu_of(team: Team, device: str) -> torch.device | None:
    """The GPU of this rank, made torch's current one, or None."""
    import torch

    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return None
    if device not in ("auto", "cuda"):
        if not team.leads:
            raise SystemExit(UsageError.exit_code)  # the leader says it
        raise UsageError(
            f"--device {device} with {team.world} processes: each needs one of its own",
            where="--device",
            hint="leave it out, or say cuda: each process takes the GPU with its local rank's number",
        )
    if team.local_rank >= torch.cuda.device_count():
        raise UsageError(
            f"local rank {team.local_rank} has no GPU: there are {torch.cuda.device_count()}",
            where="torchrun --nproc-per-node",
            hint="start as many processes as there are GPUs, or use --device cpu",
        )
    torch.cuda.set_device(team.local_rank)
    return torch.device("cuda", team.local_rank)


def _join(team: Team, gpu: torch.device | None, tensors: bool, meeting: str) -> None:
    # Its functions hold for ever what the default group is when it is loaded, as transformers does: beyond
    # destroy_process_group, so that gloo's threads would run into the end of the interpreter, which aborts.
    import torch.distributed.nn  # noqa: F401
    from torch import distributed
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    try:
        store, _, _ = next(rendezvous("env://", timeout=TIMEOUT))
        if tensors:
            distributed.init_process_group(
                "cpu:gloo,cuda:nccl" if gpu is not None else "gloo",
                store=PrefixStore(f"{meeting}tensors", store),
                rank=team.rank,
                world_size=team.world,
                timeout=TIMEOUT,
                device_id=gpu,
            )
    except RuntimeError as error:
        raise QwenqError(
            f"rank {team.rank} could not meet the others: {str(error).splitlines()[0]}",
            where=f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}",
            hint="see that all machines reach this address, and that nothing else uses the port",
        ) from error
    team._store = PrefixStore(f"{meeting}qwenq", store)


def _stop(team: Team, error: BaseException) -> NoReturn:
    """Only who stops first explains itself; whoever stops because of that ends without a word.

    Unless it was a signal: the process that had it has nothing to explain, so the leader says how to go on.
    """
    try:
        known = team.claim_stop(_exit_code(error))
    except LostError:
        known = None
    if known is not None and not isinstance(error, KeyboardInterrupt):
        if team.leads and known == TOLD:
            raise StoppedError("another process was told to stop", hint=RESUME) from error
        raise SystemExit(known) from error
    if isinstance(error, LostError):
        raise QwenqError(
            f"one of the {team.world} processes ended without a word: it was killed, or had no memory left",
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
        return TOLD
    return error.exit_code if isinstance(error, QwenqError) else 1
