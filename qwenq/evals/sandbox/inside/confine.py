"""Set limits and the system-call filter of this process before it runs untrusted code.

Neither can be removed again. Numbers of the calls: the kernel's ``asm/unistd_64.h`` and
``asm-generic/unistd.h``.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import struct
from typing import Any

_ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
"""Audit number, column below."""
_REFUSED: dict[str, tuple[int | None, int | None]] = {
    # new processes and programs; threads are distinguished below
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281),
    # signals
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "pidfd_send_signal": (424, 424),
    # other processes
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "pidfd_open": (434, 434), "pidfd_getfd": (438, 438), "process_madvise": (440, 440),
    # network and memory that no limit counts
    "socket": (41, 198), "socketpair": (53, 199), "memfd_create": (319, 279), "memfd_secret": (447, 447),
    "shmget": (29, 194), "shmat": (30, 196), "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180),
    # the system itself
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
    "unshare": (272, 97), "setns": (308, 268), "open_tree": (428, 428), "move_mount": (429, 429),
    "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433),
    "mount_setattr": (442, 442), "open_by_handle_at": (304, 265), "name_to_handle_at": (303, 264),
    "fanotify_init": (300, 262), "bpf": (321, 280), "perf_event_open": (298, 241), "add_key": (248, 217),
    "request_key": (249, 218), "keyctl": (250, 219), "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "init_module": (175, 105),
    "finit_module": (313, 273), "kexec_load": (246, 104), "reboot": (169, 142), "swapon": (167, 224),
    "acct": (163, 89), "quotactl": (179, 60), "personality": (135, 92), "syslog": (103, 116),
}  # fmt: skip
_CLONE = (56, 220)
_CLONE3 = 435
_CLONE_THREAD = 0x10000
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # BPF: ld abs, jeq, jge, jset, ret
_ALLOW, _REFUSE, _MISSING = 0x7FFF0000, 0x00050001, 0x00050026  # SECCOMP_RET_ALLOW; ERRNO of EPERM and ENOSYS
_X32 = 0x40000000
_SET_SECCOMP, _FILTER, _NO_NEW_PRIVS = 22, 2, 38


def filterable() -> bool:
    """Return whether the filter knows this machine's system calls: Linux, of a listed architecture."""
    return platform.system() == "Linux" and platform.machine() in _ARCHITECTURES


def confine(limits: dict[str, Any]) -> None:
    """Bound memory, files and processor time of this process by ``Limits``, and filter its system calls."""
    used = sum(os.times()[:2])
    seconds = int(used + limits["seconds"]) + 1
    for what, most in (
        (resource.RLIMIT_AS, limits["memory"]),
        (resource.RLIMIT_FSIZE, limits["scratch"]),
        (resource.RLIMIT_NOFILE, limits["open_files"]),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_CPU, seconds),  # soft and hard alike: SIGKILL, which nothing catches
    ):
        resource.setrlimit(what, (most, most))
    if filterable():
        _refuse_calls()


def _refuse_calls() -> None:
    """Install the filter for this process and every thread that it starts."""
    program = _program(*_ARCHITECTURES[platform.machine()])
    buffer = ctypes.create_string_buffer(program, len(program))

    class Filter(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p))

    libc = ctypes.CDLL(None, use_errno=True)
    filter_ = Filter(len(program) // 8, ctypes.addressof(buffer))
    if libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(
        _SET_SECCOMP, _FILTER, ctypes.byref(filter_), 0, 0
    ):
        number = ctypes.get_errno()
        raise OSError(number, f"seccomp: {os.strerror(number)}")


def _program(audit: int, column: int) -> bytes:
    """Classic BPF over ``struct seccomp_data``: number at 0, architecture at 4, arguments at 16."""
    code = [
        (_LOAD, 0, 0, 4),
        (_EQUAL, 1, 0, audit),
        (_RETURN, 0, 0, _REFUSE),
        (_LOAD, 0, 0, 0),
        (_AT_LEAST, 0, 1, _X32),  # x86's second table of calls
        (_RETURN, 0, 0, _REFUSE),
        (_EQUAL, 0, 1, _CLONE3),  # its flags lie behind a pointer; reported missing, libc uses clone
        (_RETURN, 0, 0, _MISSING),
    ]
    for numbers in _REFUSED.values():
        number = numbers[column]
        if number is not None:
            code += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _REFUSE)]
    code += [
        (_EQUAL, 1, 0, _CLONE[column]),
        (_RETURN, 0, 0, _ALLOW),
        (_LOAD, 0, 0, 16),
        (_ANY_BIT, 1, 0, _CLONE_THREAD),
        (_RETURN, 0, 0, _REFUSE),
        (_RETURN, 0, 0, _ALLOW),
    ]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)
