"""Run code that a model wrote, and judge it by the benchmark's tests, although it may be hostile.

    run         finds a sandbox (bubblewrap, Linux namespaces, or with --unsafe-code none), runs programs
    namespaces  a script that enters Linux namespaces
    inside/     the code that runs in the sandbox; standard library only

**Two processes a program.** One holds the model's code and answers calls; the other holds the benchmark's
tests and makes the calls. Each is in a sandbox of its own, and between them go plain values only (numbers,
text, lists, tuples, dicts, sets). The verdict is written by the process that never runs a line of the
model's code. So nothing that the model's code prints, exits with, patches, reads or finds in memory can be
a verdict: all it can do is answer calls, rightly or wrongly. openai/human-eval, with otherwise the same
verdicts, runs both parts in one process, where the code can reach the verdict's record.

**How it is confined:** namespaces without network, without other processes, without the home folder; the
system's libraries and Python's standard library read-only; an empty /tmp of 16 MiB; no capability; a
seccomp filter that refuses new processes and programs, signals, sockets, mounts, tracing and other calls that
no solution needs; limits on memory (1 GiB of address space), processor time, open files and the size of a
file; output goes to /dev/null; both processes are killed together, from outside.

**What it does not cover:**

- Holes of the kernel. It is not a virtual machine; the filter narrows what can be reached, no more.
- Reading what is world-readable in the system's library folders and the interpreter's own.
- Measuring: processor caches, clocks and load can be observed, and the two cores be kept busy until time is
  up.
- Weak tests. A solution sees each call's arguments, and may pass without solving the task in general.
- Values other than plain ones. A function that returns an object of its own class fails here; in one
  process the object's own ``==`` would be asked. Of mutated arguments only plain lists, dicts and sets
  travel back.
- Packages: solutions have the standard library only, no numpy, even where the user has it.
- ``--unsafe-code``: filter and limits stay, but the code sees the user's files and may write to them.
"""
