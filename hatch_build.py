"""Compile the C kernels while a wheel or an editable install is built.

A wheel holds the variants of its platform; its tag says the platform, and any Python 3. Where no compiler
works, the
install goes on without the libraries: everything then runs in torch, and ``qwenq doctor`` says why.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class KernelsBuildHook(BuildHookInterface[Any]):
    """Compile every variant of this machine."""

    def dependencies(self) -> list[str]:
        """Return what the build needs: a compiler as a wheel, where the system has none."""
        try:
            _builder(Path(self.root)).find_compiler()
        except RuntimeError:
            return ["ziglang>=0.13"]
        return []

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, then add the libraries to the wheel."""
        builder = _builder(Path(self.root))
        try:
            paths = builder.build()
        except builder.BuildError as error:
            if os.environ.get("QWENQ_REQUIRE_KERNELS"):
                raise
            self.app.display_warning(f"C kernels are not compiled: {error}")
            return
        if paths:
            build_data["pure_python"] = False
            platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            build_data["tag"] = f"py3-none-{platform}"
            build_data["artifacts"] += [f"/qwenq/compute/lib/{path.name}" for path in paths]


def _builder(root: Path) -> Any:
    """Load ``qwenq/compute/build.py`` without importing the package, whose dependencies are absent here."""
    spec = importlib.util.spec_from_file_location("qwenq_build", root / "qwenq" / "compute" / "build.py")
    assert spec is not None and spec.loader is not None  # noqa: S101  # the file is there
    module = importlib.util.module_from_spec(spec)
    sys.modules["qwenq_build"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
