"""Whatever a program does, it harms nothing, does not pass unless it is right, and the run goes on."""

from __future__ import annotations

import gzip
import json
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from qwenq.errors import QwenqError, UnsupportedError
from qwenq.evals.sandbox import run
from qwenq.evals.sandbox.inside.confine import filterable
from qwenq.evals.sandbox.run import Outcome, Program, Sandbox, find_sandbox, run_programs

GOOD = "def double(x):\n    return 2 * x\n"
TESTS = "assert double(3) == 6\nassert double('ab') == 'abab'\n"

WAYS: dict[str, Callable[[], Sandbox]] = {"bubblewrap": run._bubblewrap, "namespaces": run._namespaces}


@pytest.fixture(scope="module", params=sorted(WAYS))
def sandbox(request: pytest.FixtureRequest) -> Sandbox:
    try:
        made = WAYS[request.param]()
        run._try(made)
    except QwenqError as error:
        pytest.skip(f"{request.param}: {error.what}")
    return made


@pytest.fixture(scope="module")
def outcomes(sandbox: Sandbox) -> dict[str, Outcome]:
    """Of every hostile program, all in one run, with good ones between them."""
    hostile = {**FORGED, **{name: source for name, (source, _) in HARM.items()}}
    programs = []
    for name, source in hostile.items():
        programs.append(Program(name, source, ("double",), TESTS))
        programs.append(Program(f"good beside {name}", GOOD, ("double",), TESTS))
    found = run_programs(programs, sandbox=sandbox, jobs=6, timeout=1)
    return {program.id: outcome for program, outcome in zip(programs, found, strict=True)}


def outcome(sandbox: Sandbox, source: str, tests: str = TESTS, timeout: float = 3) -> Outcome:
    (found,) = run_programs([Program("one", source, ("double",), tests)], sandbox=sandbox, timeout=timeout)
    return found


def test_a_right_solution_passes_and_a_wrong_one_fails(sandbox: Sandbox) -> None:
    assert outcome(sandbox, GOOD) == Outcome(True, "passed")
    wrong = outcome(sandbox, "def double(x):\n    return 3 * x\n")
    assert (wrong.passed, wrong.reason) == (False, "failed")
    assert "line 1 of the tests" in wrong.detail
    assert outcome(sandbox, "def double(x)\n").reason == "raised"
    assert outcome(sandbox, "def other(x): return x\n").detail == "NameError: name 'double' is not defined"


FORGED = {
    "prints passed": "print('passed', flush=True)\nprint('{\"passed\": true}', flush=True)\n",
    "writes to every descriptor": (
        "import os\nfor n in range(64):\n"
        '  try: os.write(n, b\'{"passed": true, "reason": "passed", "detail": ""}\\n\')\n'
        "  except OSError: pass\n"
    ),
    "exits well": "import sys\nsys.exit(0)\n",
    "ends well": "import os\nos._exit(0)\n",
    "exits when called": "import os\ndef double(x):\n    os._exit(0)\n",
    "raises SystemExit when called": "def double(x):\n    raise SystemExit(0)\n",
    "patches the language": (
        "import builtins, atexit, os\nbuiltins.AssertionError = ValueError\nbuiltins.len = lambda x: 1\n"
        "atexit.register(os._exit, 0)\ndef double(x):\n    return None\n"
    ),
    "equals everything": (
        "class Any(int):\n    __eq__ = lambda self, other: True\n    __hash__ = None\n"
        "def double(x):\n    return Any(0)\n"
    ),
    "equals everything, no number": (
        "class Any:\n    __eq__ = lambda self, other: True\ndef double(x):\n    return Any()\n"
    ),
    "walks the stack": (
        "import sys, gc\ndef double(x):\n"
        "    frame = sys._getframe()\n"
        "    while frame:\n"
        "        for value in list(frame.f_locals.values()) + list(frame.f_globals.values()):\n"
        "            if isinstance(value, dict) and 'passed' in value: value['passed'] = True\n"
        "        frame = frame.f_back\n"
        "    for thing in gc.get_objects():\n"
        "        if isinstance(thing, dict) and 'reason' in thing: thing.update(passed=True)\n"
    ),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_verdict_cannot_be_forged(name: str, outcomes: dict[str, Outcome]) -> None:
    assert not outcomes[name].passed
    assert outcomes[f"good beside {name}"].passed


def test_tests_that_swallow_exceptions_do_not_pass_a_dead_solution(sandbox: Sandbox) -> None:
    lenient = "try:\n    double(3)\nexcept BaseException:\n    pass\n"
    assert outcome(sandbox, "import os\ndef double(x):\n    os._exit(0)\n", lenient).reason == "died"
    assert outcome(sandbox, "def double(x):\n    raise ValueError(x)\n", lenient).passed


def test_it_reads_no_file_of_the_user_and_writes_none(sandbox: Sandbox, tmp_path: Path) -> None:
    secret, target = tmp_path / "secret", tmp_path / "written"
    secret.write_text("6")
    folders = [str(Path.home()), str(Path(__file__).parents[2]), "/tmp", "/var", "/etc"]
    source = (
        "import os\ndef double(x):\n"
        f"    try: return int(open({str(secret)!r}).read())\n"
        "    except OSError: pass\n"
        f"    for path in [{str(target)!r}, '/usr/written', '/written', '/inside/written', os.__file__]:\n"
        "        try: open(path, 'w')\n"
        "        except OSError: continue\n"
        "        return f'wrote {path}'\n"
        "    seen = []\n"
        f"    for path in {folders!r}:\n"
        "        try: seen += [os.path.join(path, name) for name in os.listdir(path)]\n"
        "        except OSError: pass\n"
        "    return sorted(seen)\n"
    )
    home = run._parts_of_python(str(Path.home()))
    shown = sorted([*(str(Path.home() / name) for name in home), "/etc/ld.so.cache"])
    tests = f"seen = double(3)\nassert seen == {shown!r}, seen\n"
    assert outcome(sandbox, source, tests) == Outcome(True, "passed")
    assert not target.exists()


def test_it_sees_neither_network_nor_processes_nor_environment(sandbox: Sandbox) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        source = (
            "import os, socket\ndef double(x):\n"
            f"    try: socket.create_connection(('127.0.0.1', {port}), 1)\n"
            "    except OSError as error: refused = error.errno\n"
            "    return refused, os.path.exists('/proc/self'), sorted(os.environ)\n"
        )
        names = ["LANG", "PYTHONHASHSEED", "PYTHONPATH", "PWD"]
        tests = (
            f"*seen, names = double(3)\nassert seen == [1, False], seen\nassert set(names) <= {{*{names}}}\n"
        )
        assert outcome(sandbox, source, tests) == Outcome(True, "passed")


ENDED = {"raised", "memory", "timeout"}  # whichever limit is met first
HARM = {
    "fork bomb": ("import os\nwhile True:\n    os.fork()\n", {"raised"}),
    "patient fork bomb": (
        "import os, time\nwhile True:\n    try: os.fork()\n    except OSError: pass\n",
        {"timeout"},
    ),
    "starts a program": ("import os\nos.execv('/bin/sh', ['sh'])\n", {"raised"}),
    "thread bomb": (
        "import threading, time\nwhile True:\n    threading.Thread(target=time.sleep, args=(9,)).start()\n",
        {"raised", "memory", "died"},
    ),
    "ten gigabytes of memory": ("keep = bytearray(10 ** 10)\n", {"memory"}),
    "memory without end": ("keep = []\nwhile True:\n    keep.append(bytearray(2 << 20))\n", ENDED),
    "ten gigabytes of output": (
        "import os\nfor _ in range(10_000):\n    os.write(1, bytes(1 << 20))\nimport sys\nsys.exit()\n",
        {"raised", "timeout"},
    ),
    "ten gigabytes of answer": ("def double(x):\n    return 'x' * (1 << 28)\n", ENDED),
    "a full disk": (
        "import itertools\nfor n in itertools.count():\n    open(f'/tmp/{n}', 'wb').write(bytes(1 << 20))\n",
        {"raised"},
    ),
    "endless loop": ("while True:\n    pass\n", {"timeout"}),
    "endless sleep": ("import time\ntime.sleep(10 ** 6)\n", {"timeout"}),
    "ignores signals": (
        "import signal\nfor s in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:\n"
        "    signal.signal(s, signal.SIG_IGN)\nwhile True:\n    pass\n",
        {"timeout"},
    ),
    "kills its parent": ("import os\nos.kill(os.getppid(), 9)\n", {"raised"}),
    "kills everyone": ("import os\nos.kill(-1, 9)\n", {"raised"}),
    "breaks the interpreter": ("import ctypes\nctypes.string_at(0)\n", {"died"}),
    "recursion": ("def double(x):\n    return double(x)\n", {"raised"}),
    "lies about lengths": (
        "import os\nfor n in range(3, 9):\n    try: os.write(n, b'\\xff' * 99)\n    except OSError: pass\n",
        {"died"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HARM)
def test_harm_is_bounded_and_the_run_goes_on(name: str, outcomes: dict[str, Outcome]) -> None:
    assert not outcomes[name].passed
    assert outcomes[name].reason in HARM[name][1], outcomes[name]
    assert outcomes[f"good beside {name}"].passed


def test_nothing_stays_behind(sandbox: Sandbox) -> None:
    """Every process of the sandbox goes, sleeping ones too; they are known by their limit."""
    limit = 0.2 + time.time_ns() % 10**6 / 1e8
    assert outcome(sandbox, "import time\ntime.sleep(10 ** 6)\n", timeout=limit).reason == "timeout"
    deadline = time.monotonic() + 20
    while alive := [
        path for path in Path("/proc").glob("[0-9]*/cmdline") if str(limit) in (_read(path) or "")
    ]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.05)


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None


def test_arguments_changed_in_place_come_back(sandbox: Sandbox) -> None:
    source = "def double(x):\n    x.extend(x)\n"
    assert outcome(sandbox, source, "x = [1, 2]\nassert double(x) is None\nassert x == [1, 2, 1, 2]\n").passed


def test_an_answer_too_large_to_travel_is_no_death(sandbox: Sandbox) -> None:
    """However fast the machine: the hostile one above may be out of time before."""
    found = outcome(sandbox, "def double(x):\n    return 'x' * (1 << 26)\n", timeout=9)
    assert found.reason == "raised" and found.detail.startswith("ValueError: a value of 67")


def test_outcomes_come_in_order_and_are_told_in_the_callers_thread(sandbox: Sandbox) -> None:
    programs = [
        Program(str(n), GOOD if n % 2 else "def double(x): return x", ("double",), TESTS) for n in range(5)
    ]
    told: list[tuple[str, bool, threading.Thread]] = []
    outcomes = run_programs(
        programs,
        sandbox=sandbox,
        jobs=2,
        on_done=lambda p, o: told.append((p.id, o.passed, threading.current_thread())),
    )
    assert [o.passed for o in outcomes] == [False, True, False, True, False]
    assert sorted((i, p) for i, p, _ in told) == [
        (p.id, o.passed) for p, o in zip(programs, outcomes, strict=True)
    ]
    assert {thread for _, _, thread in told} == {threading.current_thread()}


def test_an_interrupt_ends_the_run_at_once(sandbox: Sandbox) -> None:
    def interrupt(program: Program, outcome: Outcome) -> None:
        raise KeyboardInterrupt

    endless = [Program(str(n), "import time\ntime.sleep(10 ** 6)\n", ("double",), TESTS) for n in range(4)]
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_programs(
            [Program("good", GOOD, ("double",), TESTS), *endless],
            sandbox=sandbox,
            jobs=2,
            timeout=30,
            on_done=interrupt,
        )
    assert time.monotonic() - began < 60  # not the 120 s by the clock of an endless one


def test_a_sandbox_that_does_not_start_is_no_verdict() -> None:
    broken = Sandbox("broken", lambda command, limits: [sys.executable, "-c", "raise SystemExit('no')"], "/")
    with pytest.raises(QwenqError, match="the sandbox did not start: no"):
        run_programs([Program("good", GOOD, ("double",), TESTS)], sandbox=broken)


def test_without_any_sandbox_it_refuses_and_says_the_ways_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Sandbox:
        raise UnsupportedError("user namespaces are forbidden")

    monkeypatch.setattr(run.shutil, "which", lambda name: None)
    monkeypatch.setattr(run, "_namespaces", missing)
    with pytest.raises(UnsupportedError) as caught:
        find_sandbox()
    text = str(caught.value)
    assert "bubblewrap: not installed; Linux namespaces: user namespaces are forbidden" in text
    assert "apt-get install bubblewrap" in text
    assert "--unsafe-code" in text


def test_unsafe_is_only_by_wish_and_named() -> None:
    sandbox = find_sandbox(unsafe=True)
    assert "--unsafe-code" in sandbox.implementation
    assert outcome(sandbox, GOOD).passed
    assert not outcome(sandbox, FORGED["ends well"]).passed
    assert outcome(sandbox, "while True: pass\n", timeout=0.1).reason == "timeout"


def test_a_leaky_sandbox_is_not_used() -> None:
    leaky = Sandbox("leaky", find_sandbox(unsafe=True).wrap, str(Path(__file__).parents[2]))
    with pytest.raises(UnsupportedError, match="it does not confine"):
        run._try(leaky)


@pytest.mark.parametrize("home", ["/", "/usr", "/usr/sbin", "", None])
def test_a_user_without_a_home_of_its_own_has_a_sandbox(
    sandbox: Sandbox, home: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container that runs under a bare number: its home is /, or nobody knows one."""
    if home is None:
        monkeypatch.setattr(run.Path, "home", _homeless)
    else:
        monkeypatch.setenv("HOME", home)
    run._try(sandbox)


def _homeless() -> Path:
    raise RuntimeError("Could not determine home directory.")


def test_the_filter_is_for_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    """Macs with Intel's processors call their machine x86_64, too."""
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr("platform.system", lambda: "Linux")
    assert filterable()
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    assert not filterable()


@pytest.mark.slow
def test_canonical_solutions_pass(sandbox: Sandbox, shared_data: Path) -> None:
    programs = []
    items = shared_data / "humaneval" / "HumanEval.jsonl.gz"
    for line in gzip.decompress(items.read_bytes()).decode().splitlines():
        row = json.loads(line)
        tests = f"{row['test']}\ncheck({row['entry_point']})"
        source = row["prompt"] + row["canonical_solution"]
        programs.append(Program(row["task_id"], source, (row["entry_point"],), tests, row["prompt"]))
    outcomes = run_programs(programs, sandbox=sandbox)
    assert len(outcomes) == 164
    assert [p.id for p, o in zip(programs, outcomes, strict=True) if not o.passed] == []
