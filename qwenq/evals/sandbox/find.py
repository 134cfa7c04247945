"""Find a sandbox that works here: each is tried on a program before it is used."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qwenq.errors import QwenqError, UnsupportedError
from qwenq.evals.sandbox import namespaces
from qwenq.evals.sandbox.inside.confine import filterable
from qwenq.evals.sandbox.programs import Limits, Program

_INSIDE = "qwenq/evals/sandbox/inside"
_PACKAGE_ROOT = Path(__file__).parents[3]
_NOBODY = "65534"
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
_HINT = (
    "apt-get install bubblewrap (in a container also: allow user namespaces, such as docker run "
    "--security-opt seccomp=unconfined); or --unsafe-code: the programs then run as you, on your files"
)

Wrap = Callable[[list[str], Limits], list[str]]


@dataclass(frozen=True)
class Sandbox:
    """A way to start a confined process.

    Attributes:
        implementation: its name and version, for the records.
        isolated: False for ``--unsafe-code``.
        wrap: a Python command line → the command that runs it confined.
        package_root: the process's path to ``qwenq/evals/sandbox/inside``.
    """

    implementation: str
    isolated: bool
    wrap: Wrap
    package_root: str

    def command(self, role: str, limits: str, scratch: Limits, *more: str) -> list[str]:
        """Return the command of the process in this role (``inside.__main__``)."""
        module = _INSIDE.replace("/", ".")
        return self.wrap([_python(), "-s", "-S", "-B", "-P", "-m", module, role, limits, *more], scratch)

    @property
    def environment(self) -> dict[str, str]:
        """Return the process's whole environment, with a fixed hash seed for the same verdict each time."""
        return {"PYTHONPATH": self.package_root, "PYTHONHASHSEED": "0", "LANG": "C.UTF-8"}


def find_sandbox(unsafe: bool = False) -> Sandbox:
    """Return the best sandbox that works here: bubblewrap, else Linux namespaces.

    Args:
        unsafe: no sandbox (``--unsafe-code``), but limits and the system-call filter.

    Raises:
        UnsupportedError: neither works.
    """
    if unsafe:
        kept = "limits and system-call filter" if filterable() else "limits"
        return Sandbox(f"none (--unsafe-code; {kept} only)", False, lambda c, _: c, str(_PACKAGE_ROOT))
    reasons = []
    for name, make in (("bubblewrap", _bubblewrap), ("Linux namespaces", _namespaces)):
        try:
            sandbox = make()
            _try(sandbox)
        except QwenqError as error:
            reasons.append(f"{name}: {error.what}")
        else:
            return sandbox
    what = "no sandbox works here for the code that a model wrote"
    raise UnsupportedError(what, where="; ".join(reasons), hint=_HINT)


def _bubblewrap() -> Sandbox:
    """Return bubblewrap as a sandbox, https://github.com/containers/bubblewrap, from 0.7 (``--size``)."""
    _check_filter()
    program = shutil.which("bwrap")
    if program is None:
        raise UnsupportedError("not installed")
    version = subprocess.run(
        [program, "--version"], capture_output=True, text=True, check=False
    ).stdout.strip()

    def wrap(command: list[str], limits: Limits) -> list[str]:
        options = ["--unshare-all", "--unshare-user", "--uid", _NOBODY, "--gid", _NOBODY, "--cap-drop", "ALL"]
        options += ["--die-with-parent", "--new-session", "--size", str(limits.scratch), "--tmpfs", "/tmp"]  # noqa: S108 - of the sandbox
        for source, target in _visible():
            options += ["--ro-bind", source, target]
        for target, link in _links():
            options += ["--symlink", target, link]
        for device in _DEVICES:
            options += ["--dev-bind", device, device]
        return [program, *options, "--remount-ro", "/", "--chdir", "/tmp", "--", *command]  # noqa: S108

    return Sandbox(version or "bubblewrap", True, wrap, "/inside")


def _namespaces() -> Sandbox:
    _check_filter()

    def wrap(command: list[str], limits: Limits) -> list[str]:
        plan = namespaces.Plan(
            visible=_visible(), links=_links(), devices=list(_DEVICES), scratch=limits.scratch
        )
        return [_python(), "-s", "-S", "-B", "-P", namespaces.__file__, plan.to_json(), *command]

    return Sandbox(f"Linux namespaces ({os.uname().release})", True, wrap, "/inside")


def _check_filter() -> None:
    if not filterable():
        raise UnsupportedError(f"no system-call filter for {sys.platform} on {os.uname().machine}")


def _python() -> str:
    """Return the interpreter itself, not a virtual environment's link to it, whose packages stay outside."""
    return os.path.realpath(getattr(sys, "_base_executable", sys.executable))


def _visible() -> list[tuple[str, str]]:
    """Return read-only mounts as (here, there): system libraries, Python, ``inside``."""
    folders = [
        f for f in ("/usr", "/lib", "/lib64", "/lib32") if Path(f).is_dir() and not Path(f).is_symlink()
    ]
    base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}  # not a virtual environment's
    python = [sysconfig.get_path(name, vars=base) for name in ("stdlib", "platstdlib")]
    python += [str(library) for library in Path(sys.base_prefix, "lib").glob("lib*.so*")]
    wanted = [*folders, _python(), *python, "/etc/ld.so.cache"]
    shown: list[str] = []
    for path in wanted:
        if Path(path).exists() and not any(Path(path).is_relative_to(folder) for folder in shown):
            shown.append(path)
    inside = str(_PACKAGE_ROOT / _INSIDE)
    return [*((path, path) for path in shown), (inside, f"/inside/{_INSIDE}")]


def _links() -> list[tuple[str, str]]:
    """Return links at the root, as (target, link), on systems whose /lib is one."""
    roots = (Path(f) for f in ("/lib", "/lib64", "/lib32"))
    return [(str(root.readlink()), str(root)) for root in roots if root.is_symlink()]


def _try(sandbox: Sandbox) -> None:
    """Run a program that looks for files and processes outside.

    Raises:
        QwenqError: it did not start, or found some.
    """
    from qwenq.evals.sandbox.run import run_programs

    home = _home()
    source = (
        "import os\n"
        "def look():\n"
        "    open('/tmp/written', 'w').close()\n"
        f"    ours = os.path.exists({home!r}) and set(os.listdir({home!r}))\n"
        "    return os.listdir('/tmp'), os.access('/', os.W_OK), os.path.exists('/proc/1'), ours\n"
    )
    tests = (
        "found, writable, processes, ours = look()\n"
        "assert found == ['written'], 'its /tmp is not its own'\n"
        "assert not writable, 'it can write to /'\n"
        "assert not processes, 'it sees processes'\n"
        f"assert not ours or ours <= {_parts_of_python(home)!r}, 'it sees the home folder'\n"
    )
    program = Program("probe", source, ("look",), tests)
    (outcome,) = run_programs([program], sandbox=sandbox, jobs=1)
    if not outcome.passed:
        raise UnsupportedError(f"it does not confine: {outcome.detail}")


def _home() -> str:
    """Return the user's home folder; empty where there is none, as for a bare user number in a container."""
    try:
        home = Path.home()
    except RuntimeError:  # neither HOME nor an entry among the users
        return ""
    system = [Path(shown) for _, shown in _visible()]
    own = home.is_absolute() and home != Path("/") and not any(home.is_relative_to(path) for path in system)
    return str(home) if own else ""


def _parts_of_python(home: str) -> set[str]:
    """Return names in the home folder that lead to an interpreter installed there."""
    shown = [Path(path) for path, _ in _visible() if home]
    return {
        path.relative_to(home).parts[0] for path in shown if path.is_relative_to(home) and str(path) != home
    }
