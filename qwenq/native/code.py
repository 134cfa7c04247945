"""Machine code for this very CPU: written with llvmlite's builder, run on the threads that torch has.

Products that torch lacks are small functions of a few loops. LLVM compiles one when it is first called; there
is no compiler to install and nothing on disk. Threads are those of torch's GNU OpenMP: a second pool would
fight with the first for the cores. Import this where ``support.why_not`` is None.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir

from qwenq.native.support import OPENMP, openmp

LANES = 16
"""32-bit numbers in a register."""

BYTE, SHORT, WORD, LONG = (ir.IntType(bits) for bits in (8, 16, 32, 64))
FLOAT, HALF, NOTHING, POINTER = ir.FloatType(), ir.HalfType(), ir.VoidType(), ir.PointerType()
_ENGINES: list[object] = []  # compiled code lives as long as its engine


def _long(value: ir.Value | int) -> ir.Value:
    return LONG(value) if isinstance(value, int) else value


def vector(kind: ir.Type, lanes: int = LANES) -> ir.VectorType:
    """The type of so many numbers side by side."""
    return ir.VectorType(kind, lanes)


def same(kind: ir.Type, value: float, lanes: int = LANES) -> ir.Constant:
    """A constant in all lanes."""
    return ir.Constant(vector(kind, lanes), [value] * lanes)


class Code(ir.IRBuilder):  # type: ignore[misc]  # llvmlite has no types
    """The builder of a function that returns nothing; pointers are opaque, offsets count units.

    Args:
        module: where the function belongs.
        name: its name there.
        arguments: types of its arguments, which are ``self.function.args``.
    """

    def __init__(self, module: ir.Module, name: str, *arguments: ir.Type) -> None:
        function = ir.Function(module, ir.FunctionType(NOTHING, arguments), name)
        super().__init__(function.append_basic_block())

    def run(self, name: str, result: ir.Type, *arguments: ir.Value) -> ir.Value:
        """Call an intrinsic of LLVM, a function of OpenMP, or one of this module by its name."""
        kind = ir.FunctionType(result, [argument.type for argument in arguments])
        found = self.module.globals.get(name) or ir.Function(self.module, kind, name)
        return self.call(found, arguments)

    def local(self, value: ir.Value) -> ir.Value:
        """A variable that has this value whenever it is passed; optimised into a register."""
        with self.goto_entry_block():
            place = self.alloca(value.type)
        place.type = POINTER
        self.store(value, place)
        return place

    def read(self, base: ir.Value, offset: ir.Value | int, kind: ir.Type, unit: ir.Type) -> ir.Value:
        """What lies ``offset`` units behind ``base``."""
        return self.load(self.gep(base, [_long(offset)], source_etype=unit), typ=kind, align=1)

    def write(self, value: ir.Value, base: ir.Value, offset: ir.Value | int, unit: ir.Type) -> None:
        """Store it ``offset`` units behind ``base``."""
        self.store(value, self.gep(base, [_long(offset)], source_etype=unit), align=1)

    def behind(self, base: ir.Value, offset: ir.Value | int, unit: ir.Type) -> ir.Value:
        """The address ``offset`` units behind another."""
        return self.gep(base, [_long(offset)], source_etype=unit)

    def spread(self, value: ir.Value) -> ir.Value:
        """A scalar in all lanes."""
        kind = vector(value.type)
        first = self.insert_element(ir.Constant(kind, ir.Undefined), value, WORD(0))
        return self.shuffle_vector(first, first, same(WORD, 0))

    def update(
        self, place: ir.Value, kind: ir.Type, change: Callable[..., ir.Value], *others: ir.Value
    ) -> None:
        """Make a variable what ``change`` says of it and others."""
        self.store(change(self.load(place, typ=kind), *others), place)

    def plus(self, first: ir.Value | int, *rest: ir.Value | int) -> ir.Value:
        """A sum of 64-bit integers."""
        total = _long(first)
        for value in rest:
            total = self.add(total, _long(value))
        return total

    def times(self, first: ir.Value | int, *rest: ir.Value | int) -> ir.Value:
        """A product of 64-bit integers."""
        total = _long(first)
        for value in rest:
            total = self.mul(total, _long(value))
        return total

    def total(self, lanes: ir.Value) -> ir.Value:
        """The sum of a register of float32."""
        add = "llvm.vector.reduce.fadd.v16f32"
        kind = ir.FunctionType(FLOAT, [FLOAT, lanes.type])
        found = self.module.globals.get(add) or ir.Function(self.module, kind, add)
        return self.call(found, [FLOAT(0.0), lanes], fastmath=("reassoc",))

    def thread(self) -> ir.Value:
        """Number of the calling thread."""
        return self.sext(self.run("omp_get_thread_num", WORD), LONG)

    def threads(self) -> ir.Value:
        """How many threads run this."""
        return self.sext(self.run("omp_get_num_threads", WORD), LONG)

    def wait(self) -> None:
        """Until all threads are here."""
        self.run("GOMP_barrier", NOTHING)

    @contextmanager
    def each(self, start: ir.Value | int, end: ir.Value | int, step: int = 1) -> Iterator[ir.Value]:
        """A loop; what is built inside is its body."""
        head, body, done = (self.function.append_basic_block() for _ in range(3))
        before = self.block
        self.branch(head)
        self.position_at_end(head)
        index = self.phi(LONG)
        index.add_incoming(_long(start), before)
        self.cbranch(self.icmp_signed("<", index, _long(end)), body, done)
        self.position_at_end(body)
        yield index
        index.add_incoming(self.add(index, LONG(step)), self.block)
        self.branch(head)
        self.position_at_end(done)

    def share(self, count: ir.Value | int) -> tuple[ir.Value, ir.Value]:
        """First and last + 1 of so many things: those that the calling thread has to do."""
        me, all_threads = self.thread(), self.threads()
        first, end = (self.sdiv(self.times(count, thread), all_threads) for thread in (me, self.plus(me, 1)))
        return first, end


def on_all_threads(module: ir.Module, name: str, thread: str, count: int) -> None:
    """Add a function that hands ``count`` arguments, as an array of 64 bits each, to every thread.

    One more argument says how many threads there may be: what they write to has room for so many.
    """
    code = Code(module, name, *(LONG,) * (count + 1))
    job = code.alloca(ir.ArrayType(LONG, count))
    job.type = POINTER
    *arguments, threads = code.function.args
    for place, argument in enumerate(arguments):
        code.write(argument, job, place, LONG)
    code.run("GOMP_parallel", NOTHING, module.globals[thread], job, code.trunc(threads, WORD), WORD(0))
    code.ret_void()


def compiled(module: ir.Module, name: str, arguments: int) -> Any:
    """A function of a module over so many 64-bit integers, called without Python's lock."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    for symbol in OPENMP:
        llvm.add_symbol(symbol, ctypes.cast(getattr(openmp(), symbol), ctypes.c_void_p).value)
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3
    )
    parsed = llvm.parse_assembly(str(module))
    parsed.verify()
    passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=2))
    passes.getModulePassManager().run(parsed, passes)
    engine = llvm.create_mcjit_compiler(parsed, machine)
    engine.finalize_object()
    _ENGINES.append(engine)
    return ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * arguments)(engine.get_function_address(name))
