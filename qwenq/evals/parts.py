"""Share a task among ranks, and merge their logs.

Each rank writes a log beside that of rank 0, which merges them at the end, or at the beginning of the next
run, whatever its number of ranks. The run folder has to be on a disk that all ranks share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwenq.distributed import Team
from qwenq.errors import StorageError
from qwenq.evals.records import Record, Records, read_records
from qwenq.evals.requests import prompt_text
from qwenq.evals.task import Choose, Request
from qwenq.storage import guard_storage

CHARACTERS_A_TOKEN = 4  # roughly: shares need not be exact
TITLE = 100  # characters, so that a long file name keeps its rank
DECODE_COST = 8  # a new token, in tokens of a prompt: these go through the model together


def cost(request: Request) -> int:
    """Return the rough cost of a request, in tokens of a prompt."""
    prompt = len(prompt_text(request.prompt)) // CHARACTERS_A_TOKEN
    return prompt + (
        len(request.choices) if isinstance(request, Choose) else DECODE_COST * request.max_new_tokens
    )


def deal(costs: Sequence[int], ranks: int) -> list[list[int]]:
    """Return indexes for each rank: the costliest first, each to the rank with the least so far."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for index in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
        rank = loads.index(min(loads))
        shares[rank].append(index)
        loads[rank] += costs[index]
    return [sorted(share) for share in shares]


def title_of(title: str, team: Team) -> str:
    """Return the title of this rank's log."""
    return title if team.leads else f"{title[:TITLE]}.rank{team.rank}"


def take_parts(records: Records, run: Path, title: str, key: Mapping[str, Any]) -> list[Record]:
    """Merge the logs of other ranks, of this run or an earlier one, into rank 0's; return the new records."""
    found: list[Record] = []
    for path in Records.parts(run, f"{title[:TITLE]}.rank", key):
        new = [one for one in read_records(path) if records.find(one.id, one.asked) is None]
        records.append(*new)
        found += new
        with guard_storage(path):
            path.unlink()
    return found


def require_all(missing: int, team: Team, run: Path) -> None:
    """Refuse a run folder that the ranks do not share.

    Raises:
        StorageError: records of other ranks are missing.
    """
    if missing and team.world > 1:
        raise StorageError(
            f"{missing} answers of other processes are missing",
            where=run,
            hint="name a run folder with --out on a disk that all machines share",
        )
