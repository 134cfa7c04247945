"""A plugin of pytest that records calls of C kernels, to run them again on another machine.

``python -m pytest -p compute.record_calls --record-calls FOLDER tests/…`` writes ``calls.bin``, which
``arm_main.c`` reads, ``expected.bin``, what memory held after each call here, and ``calls.json``, which says what
is in them. A call is recorded with all the memory that it can reach: the arguments are compared with the addresses of all
tensors of the process, and so is every number of an int64 tensor that is found this way.
"""

from __future__ import annotations

import bisect
import ctypes
import gc
import json
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qwenq.compute import cpu

MOST_CALLS = 10  # of a kernel in one test
MOST_BYTES = 2**21  # of a call
FIRST_ADDRESS = 2**32  # numbers below it are counts, sizes and the bits of a float32

Args = ctypes.Array[ctypes.c_int64]


class Memory:
    """The storages of all tensors of this process."""

    def __init__(self) -> None:
        found: dict[int, tuple[int, str]] = {}
        for held in gc.get_objects():
            if (
                type(held) in {torch.Tensor, torch.nn.Parameter}
                and held.device.type == "cpu"
                and held.layout is torch.strided
            ):
                storage = held.untyped_storage()
                size, dtype = found.get(storage.data_ptr(), (0, ""))
                name = str(held.dtype).removeprefix("torch.")
                if dtype not in {"", "uint8", name}:
                    name = dtype if name == "uint8" else "bytes"
                found[storage.data_ptr()] = max(size, storage.nbytes()), name
        self._found = found
        self._starts = sorted(found)

    def holds(self, address: int) -> tuple[int, int, str] | None:
        """Start, size and dtype of the storage that an address lies in."""
        place = bisect.bisect_right(self._starts, address) - 1
        if address < FIRST_ADDRESS or place < 0:
            return None
        start = self._starts[place]
        size, dtype = self._found[start]
        return (start, size, dtype) if address < start + max(size, 1) else None


class Call:
    """A kernel's arguments and all memory that they lead to, before it runs."""

    def __init__(self, args: Args) -> None:
        self._memory = Memory()
        self.starts: list[int] = []
        self.objects: list[dict[str, Any]] = []
        self.before: list[bytes] = []
        self._add(ctypes.addressof(args), ctypes.sizeof(args), "args")

    def _add(self, start: int, size: int, dtype: str) -> int:
        if start in self.starts:
            return self.starts.index(start)
        content = ctypes.string_at(start, size)
        places: list[tuple[int, int, int]] = []
        if dtype in {"args", "int64"}:
            for at in range(0, size, 8):
                (number,) = struct.unpack_from("<q", content, at)
                if target := self._memory.holds(number):
                    places.append((at, self._add(*target), number - target[0]))
                else:
                    assert dtype != "args" or number < FIRST_ADDRESS, f"argument {at // 8} leads to no tensor"
        self.starts.append(start)
        self.before.append(content)
        self.objects.append({"size": size, "dtype": dtype, "places": places})
        return len(self.starts) - 1

    def key(self, name: str) -> str:
        """Calls of one key have arguments of the same sizes."""
        numbers = struct.unpack(f"<{self.objects[-1]['size'] // 8}q", self.before[-1])
        sizes = [(one["size"], one["dtype"]) for one in self.objects]
        return f"{name} {[n for n in numbers if n < FIRST_ADDRESS]} {sizes}"

    def written(self, name: str) -> Iterator[bytes]:
        """Pieces of the file that ``arm_main.c`` reads."""
        yield name.encode().ljust(64, b"\0")
        yield struct.pack("<q", len(self.objects))
        for held, content in zip(self.objects, self.before, strict=True):
            yield struct.pack("<q", held["size"]) + content
            yield struct.pack("<q", len(held["places"]))
            yield from (struct.pack("<3q", *place) for place in held["places"])

    def after(self) -> Iterator[bytes]:
        """What the same memory holds now."""
        sizes = (held["size"] for held in self.objects)
        return (ctypes.string_at(start, size) for start, size in zip(self.starts, sizes, strict=True))


class Recorder:
    """Stands before every kernel that is called."""

    def __init__(self, folder: Path) -> None:
        self._calls, self._expected = (folder / "calls.bin").open("wb"), (folder / "expected.bin").open("wb")
        self._list, self._about = folder / "calls.json", list[dict[str, Any]]()
        self._keys: set[str] = set()
        self._test, self._count = "", Counter[str]()
        self._kernel = cpu._kernel
        cpu._kernel = self.kernel  # type: ignore[assignment]

    def begin(self, test: str) -> None:
        self._test, self._count = test, Counter()

    def kernel(self, library: cpu.Library, name: str) -> Callable[[Args], None]:
        run = self._kernel(library, name)

        def recorded(args: Args) -> None:
            numbers = f"{name} {[number for number in args if number < FIRST_ADDRESS]}"
            if self._count[name] >= MOST_CALLS or self._count[numbers]:
                return run(args)  # to find all memory takes a tenth of a second
            self._count.update((name, numbers))
            call = Call(args)
            run(args)
            key = call.key(name)
            if key not in self._keys and sum(map(len, call.before)) <= MOST_BYTES:
                self._keys.add(key)
                self._calls.writelines(call.written(name))
                self._expected.writelines(call.after())
                self._about.append({"kernel": name, "test": self._test, "objects": call.objects})

        return recorded

    def close(self) -> None:
        cpu._kernel = self._kernel
        self._calls.close()
        self._expected.close()
        self._list.write_text(json.dumps(self._about))


_recorder = pytest.StashKey[Recorder]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record-calls", metavar="FOLDER", type=Path, required=True)


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_recorder] = Recorder(config.getoption("--record-calls"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    item.config.stash[_recorder].begin(item.nodeid)


def pytest_unconfigure(config: pytest.Config) -> None:
    config.stash[_recorder].close()
