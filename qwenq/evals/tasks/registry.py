"""List the benchmarks by name."""

from __future__ import annotations

import difflib

from qwenq.errors import UsageError
from qwenq.evals.task import Task
from qwenq.evals.tasks import bbh, ceval, cmmlu, gpqa, gsm8k, humaneval, ifeval, math, mbpp, mmlu, mmlu_pro

_TASKS: dict[tuple[str, str], Task] = {
    (task.name, task.protocol): task
    for module in (mmlu, ceval, gsm8k, humaneval, cmmlu, mbpp, math, bbh, mmlu_pro, gpqa, ifeval)
    for task in module.PROTOCOLS
}


def task_names() -> list[str]:
    """Return the names of all benchmarks."""
    return list(dict.fromkeys(name for name, _ in _TASKS))


def protocol_names(task: str) -> list[str]:
    """Return the protocols of a benchmark."""
    if task not in task_names():
        close = difflib.get_close_matches(task.lower(), task_names(), n=1)
        raise UsageError(
            f"no benchmark is called {task!r}",
            where="--tasks",
            hint=f"did you mean {close[0]}?" if close else f"there are {', '.join(task_names())}",
        )
    return [protocol for name, protocol in _TASKS if name == task]


def get_task(name: str, protocol: str) -> Task:
    """Return a benchmark under a protocol."""
    protocols = protocol_names(name)
    if protocol in protocols:
        return _TASKS[name, protocol]
    raise UsageError(
        f"{name} has no {protocol} protocol",
        where="--protocol",
        hint=f"it has {', '.join(protocols)}: --protocol {protocols[-1]}",
    )
