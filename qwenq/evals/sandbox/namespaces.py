"""Run a command in Linux namespaces, without bubblewrap: ``python namespaces.py PLAN COMMAND…``.

Done by hand, as Python 3.11 has no ``os.unshare``: new user, mount, process, network, IPC, host-name and
cgroup namespaces; a root of an empty file system with the plan's folders bound into it read-only; then the
command, as nobody, without a capability. Needs Linux 5.12 (``mount_setattr`` makes a whole tree read-only).
See user_namespaces(7), mount_namespaces(7), pivot_root(2).
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from typing import Any

_NEW_USER, _NEW_MOUNT, _NEW_PID, _NEW_NET = 0x10000000, 0x00020000, 0x20000000, 0x40000000
_NEW_IPC, _NEW_UTS, _NEW_CGROUP = 0x08000000, 0x04000000, 0x02000000
_BIND, _REC, _PRIVATE, _REMOUNT = 0x1000, 0x4000, 0x40000, 0x20
_READ_ONLY, _NO_SUID, _NO_DEV = 1, 2, 4
_DETACH, _CWD, _RECURSIVE = 2, -100, 0x8000
_MOUNT_SETATTR = 442
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_DEATH_SIGNAL, _DROP_BOUNDING, _NO_NEW_PRIVS = 1, 24, 38
_NOBODY = 65534
_STAGE = "/proc"
"""Where the new root is built: no folder that is shown lies in it, and it is always there."""


class _Attributes(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "user_namespace"))


_libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    """Enter the namespaces, start the command as their first process, wait for it, exit as it did."""
    plan, command = json.loads(sys.argv[1]), sys.argv[2:]
    user, group = os.getuid(), os.getgid()
    every = _NEW_USER | _NEW_MOUNT | _NEW_PID | _NEW_NET | _NEW_IPC | _NEW_UTS | _NEW_CGROUP
    _check(_libc.unshare(every), "unshare")
    _write("/proc/self/setgroups", "deny")
    _write("/proc/self/uid_map", f"{_NOBODY} {user} 1")
    _write("/proc/self/gid_map", f"{_NOBODY} {group} 1")
    _check(_libc.prctl(_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0), "prctl")  # unshare may have reset it
    child = os.fork()
    if child == 0:
        try:
            _enter(plan)
            os.execve(command[0], command, dict(os.environ))  # noqa: S606 - no shell is wanted
        except OSError as error:
            os.write(2, f"{error}\n".encode())
        os._exit(126)
    os.closerange(3, 64)  # a descriptor held here would keep the other side from seeing an end
    os.close(0)
    os.close(1)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    os._exit(128 - code if code < 0 else code)


def _enter(plan: dict[str, Any]) -> None:
    """Build the new root, move into it, and drop every capability. Killed with the process outside.

    The plan holds ``visible``, which is read-only, as (here, there); ``links`` as (target, link); files of
    ``devices``; and ``scratch``, the bytes of /tmp.
    """
    _check(_libc.prctl(_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0), "prctl")
    _mount(None, "/", None, _REC | _PRIVATE)
    _mount("tmpfs", _STAGE, "tmpfs", _NO_SUID | _NO_DEV, "mode=755,size=1m")
    for here, there in plan["visible"]:
        target = _STAGE + there
        _make(target, like=here)
        _mount(here, target, None, _BIND | _REC)
        _seal(target)
    for target, link in plan["links"]:
        os.symlink(target, _STAGE + link)  # noqa: PTH211
    for device in plan["devices"]:
        _make(_STAGE + device, like=device)
        _mount(device, _STAGE + device, None, _BIND)
    scratch = _STAGE + "/tmp"  # noqa: S108 - the sandbox's own
    os.mkdir(scratch)  # noqa: PTH102 - pathlib is slow to import, and this runs for every program
    _mount("tmpfs", scratch, "tmpfs", _NO_SUID | _NO_DEV, f"mode=1777,size={plan['scratch']}")
    _mount(None, _STAGE, None, _REMOUNT | _BIND | _READ_ONLY | _NO_SUID | _NO_DEV)
    os.chdir(_STAGE)
    _check(_libc.syscall(_PIVOT_ROOT[os.uname().machine], b".", b"."), "pivot_root")
    _check(_libc.umount2(b".", _DETACH), "umount")
    os.chdir("/tmp")  # noqa: S108 - the sandbox's own
    for capability in range(64):
        _libc.prctl(_DROP_BOUNDING, capability, 0, 0, 0)  # numbers beyond the last one fail, rightly
    _check(_libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")


def _make(path: str, like: str) -> None:
    """Make an empty folder or file to mount on."""
    folder = path if os.path.isdir(like) else os.path.dirname(path)  # noqa: PTH112, PTH120
    os.makedirs(folder, exist_ok=True)  # noqa: PTH103
    if folder != path:
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o444))


def _seal(target: str) -> None:
    """Make it read-only, with all mounts below it."""
    attributes = _Attributes(set=_READ_ONLY | _NO_SUID)
    pointer, size = ctypes.byref(attributes), ctypes.sizeof(attributes)
    _check(_libc.syscall(_MOUNT_SETATTR, _CWD, target.encode(), _RECURSIVE, pointer, size), "mount_setattr")


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    texts = [text.encode() if text is not None else None for text in (source, target, kind, options)]
    done = _libc.mount(texts[0], texts[1], texts[2], ctypes.c_ulong(flags), texts[3])
    _check(done, f"mount {source or ''} on {target}")


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:  # noqa: PTH123 - see above
        file.write(text)


if __name__ == "__main__":
    main()
