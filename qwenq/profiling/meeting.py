"""What the parents of a point's processes tell each other: that one of those has ended, and why.

Processes that hold a model together wait for each other, and may do so without end: one that is killed while
it loads tells nobody. Its parent sees it end, and says so here, in the store that torchrun holds for all.
"""

from __future__ import annotations

import json
import os
from datetime import timedelta

from qwenq.results import Status

_ANSWER = timedelta(seconds=20)
_WORD = "ended"


class Meeting:
    """Of one point.

    Args:
        name: of the point's meeting, the same on every rank.
        rank: this parent's.
    """

    def __init__(self, name: str, rank: int) -> None:
        # A connection of its own: it is asked from a thread.
        from torch.distributed import TCPStore  # type: ignore[attr-defined]  # exported, though not by __all__
        from torch.distributed.distributed_c10d import PrefixStore

        place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self.name, self._rank = name, rank
        store = TCPStore(*place, is_master=False, wait_for_workers=False, timeout=_ANSWER)
        self._store = PrefixStore(f"{name}parents", store)

    def say(self, status: Status, reason: str) -> None:
        """This one's process has ended before the point was over; the first who says so is heard."""
        told = reason if reason.startswith("rank ") else f"rank {self._rank}: {reason}"
        try:
            self._store.compare_set(_WORD, "", json.dumps([status, told]))
        except RuntimeError:  # the store went with torchrun: nobody is left to hear it
            return

    def ended(self) -> tuple[Status, str] | None:
        """Status and reason of whose process ended first; None: nobody has said so."""
        try:
            if not self._store.check([_WORD]):
                return None
            status, reason = json.loads(self._store.get(_WORD))
        except RuntimeError:
            return "failed", "torchrun's store does not answer any more"
        return status, reason
