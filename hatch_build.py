"""Compile the C kernels while a wheel or an editable install is built.

A wheel holds the variants of its platform; its tag says the platform, and any Python 3. Where no compiler works,
the install goes on without the libraries: everything then runs in torch, and ``qwenq doctor`` says why.

``QWENQ_WHEEL_PLATFORM`` builds a wheel for another platform, or for older systems than this one: its tag, such as
manylinux_2_17_aarch64 (``make wheels`` builds all). Without its libraries there is no such wheel.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

TARGET = "QWENQ_WHEEL_PLATFORM"
ZIG = "ziglang>=0.13"


class KernelsBuildHook(BuildHookInterface[Any]):
    """Compile every variant of a platform."""

    def dependencies(self) -> list[str]:
        """Return what the build needs: a compiler as a wheel, where the system has none for the platform."""
        builder = _builder(Path(self.root))
        if os.environ.get(TARGET):
            return [ZIG]
        try:
            builder.find_compiler()
        except builder.BuildError:
            return [ZIG]
        return []

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, then add the libraries to the wheel."""
        builder = _builder(Path(self.root))
        if tag := os.environ.get(TARGET):
            folder = Path(self.root, "build", "kernels", tag)
            paths = builder.build(folder, builder.platform_of(tag))
            inside = {str(path): f"qwenq/compute/lib/{path.name}" for path in paths}
            build_data["force_include"].update(inside)
        else:
            tag = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            try:
                paths = builder.build()
            except builder.BuildError as error:
                if os.environ.get("QWENQ_REQUIRE_KERNELS"):
                    raise
                self.app.display_warning(f"C kernels are not compiled: {error}")
                return
            build_data["artifacts"] += [f"/qwenq/compute/lib/{path.name}" for path in paths]
        if paths:
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{tag}"


def _builder(root: Path) -> Any:
    """Load ``qwenq/compute/build.py`` without importing the package, whose dependencies are absent here."""
    spec = importlib.util.spec_from_file_location("qwenq_build", root / "qwenq" / "compute" / "build.py")
    if spec is None or spec.loader is None:
        raise RuntimeError(f"there is no qwenq/compute/build.py in {root}")
    module = importlib.util.module_from_spec(spec)
    sys.modules["qwenq_build"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
