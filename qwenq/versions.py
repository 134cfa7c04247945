"""Find the versions of the packages that decide a result, for manifests."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

__version__ = "0.1.0"

_PACKAGES = ("qwenq", "torch", "transformers", "triton", "safetensors", "tokenizers", "numpy")


def versions() -> dict[str, str]:
    """Return package name → version, Python included; packages that are absent are left out."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
