"""Hold the Triton kernels: alternative implementations of operations, for GPUs."""

from __future__ import annotations
