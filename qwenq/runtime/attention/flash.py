"""Compute attention by flash kernels on GPUs: ``v2`` of a package or torch, our own ``v1`` and ``split``."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module, metadata

import torch
from torch import Tensor

from qwenq.compute import gpu
from qwenq.compute.gpu import triton_label
from qwenq.runtime.attention.plain import attend, refused
from qwenq.runtime.cache import Span

# Run FlashAttention-2 of the package or of torch behind `Attention`: ``v2``.
#
# Such a kernel has one mask: none, or causal with the last query at the last key; other passes are
# several calls. FlashAttention-2: Dao, arXiv 2307.08691.


FlashKernel = Callable[[Tensor, Tensor, Tensor, bool], Tensor]
"""(queries [b, heads, t, d], keys, values [b, key/value heads, n, d], causal) → [b, heads, t, d].

Causal: query i sees the keys up to n - t + i. Key/value heads divide the heads.
"""

StepKernel = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(queries [heads, t, d], keys, values [heads, n, d], length int32 [1]) → [heads, t, d].

All queries see the first ``length`` keys; how many those are is read on the device.
"""


class Flash:
    """A flash kernel over the cache, and one for a token of rows whose length only the device knows.

    Rows of unequal length that begin behind a prefix are computed one by one: such a kernel has no mask for
    them. With a step kernel decode steps read nothing back from the device: they are ``capturable``.
    """

    def __init__(
        self, name: str, implementation: str, kernel: FlashKernel, step_kernel: StepKernel | None = None
    ) -> None:
        self.name, self.implementation = name, implementation
        self._kernel, self._step_kernel = kernel, step_kernel
        self.capturable = step_kernel is not None
        self._starts: tuple[Span, list[int]] | None = None

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor, span: Span) -> Tensor:
        """See `Attention`."""
        batch, heads, tokens, d = queries.shape
        shared = keys.shape[1]
        if tokens == 1 and span.mask is not None and self._step_kernel is not None:
            return self._step(queries, keys, values, span, self._step_kernel)
        if span.start is None and not span.causal:
            return self._row_by_row(queries, keys, values, span)
        if tokens == 1:
            # The heads of a group are queries of one product: no key is read twice.
            grouped = queries.reshape(batch, shared, heads // shared, d)
            return self._kernel(grouped, keys, values, False).reshape(batch, heads, 1, d)
        return self._kernel(queries, keys, values, True)

    def _step(self, queries: Tensor, keys: Tensor, values: Tensor, span: Span, kernel: StepKernel) -> Tensor:
        batch, heads, _, d = queries.shape
        grouped = queries.reshape(batch, keys.shape[1], -1, d)  # a group's heads are one product's queries
        lengths = (span.positions[:, 0] + 1).to(torch.int32).expand(batch)
        rows = zip(grouped, keys, values, lengths.split(1), strict=True)
        return torch.stack([kernel(*row) for row in rows]).reshape(batch, heads, 1, d)

    def _row_by_row(self, queries: Tensor, keys: Tensor, values: Tensor, span: Span) -> Tensor:
        mixed, tokens = torch.zeros_like(queries), queries.shape[2]
        for row, start in enumerate(self._first_slots(span)):
            end = min(start + tokens, span.end)  # behind it a row has padding only
            mixed[row, :, : end - start] = self._kernel(
                queries[row : row + 1, :, : end - start],
                keys[row : row + 1, :, :end],
                values[row : row + 1, :, :end],
                True,
            )[0]
        return mixed

    def _first_slots(self, span: Span) -> list[int]:
        """Return where each row's new tokens begin, read from the device once per pass, not per layer."""
        known = self._starts  # of another thread's pass, perhaps
        if known is None or known[0] is not span:
            known = self._starts = span, span.positions[:, 0].tolist()
        return known[1]


def flash_v2(device: torch.device, dtype: torch.dtype) -> Flash:
    """Return FlashAttention-2: the ``flash-attn`` 2 package where it is installed, else torch's build."""
    check_flash("v2", device, dtype)
    version = package_version("flash-attn")
    if version is not None and version.startswith("2."):
        return Flash("v2", f"flash-attn {version}", _package_kernel())
    if not torch.backends.cuda.is_flash_attention_available():
        raise refused(
            "v2",
            f"torch {torch.__version__} is built without FlashAttention",
            "install flash-attn 2 or a torch with CUDA, or use --attention off",
        )
    label = f"torch {torch.__version__} SDPA, flash kernel (FlashAttention-2)"
    return Flash("v2", label, _torch_flash, _torch_step)


def check_flash(name: str, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse hardware and dtypes that cannot run flash kernels."""
    if device.type != "cuda":
        raise refused(
            name,
            f"it is made for NVIDIA GPUs, and this is a {device.type}",
            "use --attention sdpa (on a CPU torch has a kernel that tiles in the same way) or off",
        )
    check_half(name, dtype)
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        why = f"it needs compute capability 8.0, this GPU has {major}.{minor}"
        raise refused(name, why, "use --attention sdpa or off")


def check_half(name: str, dtype: torch.dtype) -> None:
    """Refuse dtypes that flash kernels do not take."""
    if dtype not in (torch.float16, torch.bfloat16):
        why = f"its kernels compute in float16 and bfloat16, not in {str(dtype).removeprefix('torch.')}"
        raise refused(name, why, "use --dtype bfloat16, or --attention off")


def package_version(name: str) -> str | None:
    """Return the installed version of a package; None where there is none."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _package_kernel() -> FlashKernel:
    try:
        function: Callable[..., Tensor] = import_module("flash_attn").flash_attn_func
    except (ImportError, OSError) as error:
        raise refused(
            "v2",
            f"flash-attn is installed but cannot be imported: {error}",
            "install a build for this torch, or remove it: torch's own then runs",
        ) from error

    def kernel(queries: Tensor, keys: Tensor, values: Tensor, causal: bool) -> Tensor:
        # flash-attn wants [b, tokens, heads, d]; it takes any strides but the last.
        moved = (x.transpose(1, 2) for x in (queries, keys, values))
        return function(*moved, causal=causal).transpose(1, 2)

    return kernel


def _torch_flash(queries: Tensor, keys: Tensor, values: Tensor, causal: bool) -> Tensor:
    # The operator behind SDPA: called by name it raises where it cannot run, and nothing replaces it.
    mixed: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(
        queries, keys, values, 0.0, causal, scale=queries.shape[-1] ** -0.5
    )[0]
    return mixed


def _torch_step(queries: Tensor, keys: Tensor, values: Tensor, length: Tensor) -> Tensor:
    # The kernel for a varying length, which it reads on the device.
    tokens, slots = queries.shape[1], keys.shape[1]
    ends = [torch.arange(2, dtype=torch.int32, device=queries.device) * n for n in (tokens, slots)]
    moved = (x.transpose(0, 1) for x in (queries, keys, values))  # [t or n, heads, d]
    mixed: Tensor = torch.ops.aten._flash_attention_forward(
        *moved, *ends, tokens, slots, 0.0, False, False, scale=queries.shape[-1] ** -0.5, seqused_k=length
    )[0]
    return mixed.transpose(0, 1)


# Run our Triton kernels behind `Attention`: FlashAttention as first published, and split-KV decoding.


class FlashV1:
    """FlashAttention (arXiv 2205.14135, Algorithm 1), work split over batch × heads only."""

    name = "v1"

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        _check(self.name, device, dtype)
        self.implementation = f"qwenq FlashAttention-1 forward kernel ({triton_label()})"

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor, span: Span) -> Tensor:
        """See `Attention`."""
        from qwenq.compute.triton.attention import flash_v1

        return flash_v1(queries, keys, values, span.positions)


class Split:
    """Decode steps: the cache split over programs (flash-decoding). Longer inputs: torch's SDPA."""

    name = "split"

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        _check(self.name, device, dtype)
        self.implementation = (
            f"decode: qwenq split-KV kernel ({triton_label()}); prefill: torch {torch.__version__} SDPA"
        )

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor, span: Span) -> Tensor:
        """See `Attention`."""
        from qwenq.compute.triton.attention import split_decode

        if queries.shape[2] > 1:
            return attend(queries, keys, values, span)
        positions = span.positions[:, 0].expand(len(queries)).contiguous()  # [batch]
        return split_decode(queries, keys, values, positions)


def _check(name: str, device: torch.device, dtype: torch.dtype) -> None:
    # The interpreter is no GPU but runs the kernels all the same; the label names it.
    if gpu.interpreting():
        check_half(name, dtype)
    else:
        check_flash(name, device, dtype)
    if reason := gpu.unsupported_reason(device):
        raise refused(name, reason, "use --attention sdpa or off")
