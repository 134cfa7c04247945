"""Wheels for other platforms are built here by Zig; the one for this platform is installed and runs."""

from __future__ import annotations

import os
import re
import struct
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from zipfile import ZipFile

import pytest

from qwenq.compute import build, cpu

ROOT = Path(__file__).parents[2]
ELF_MACHINES = {"x86_64": 62, "aarch64": 183}
MACH_O_ARM64 = struct.pack("<II", 0xFEEDFACF, 0x0100000C)
GLIBC = (2, 17)
SYSTEM_LIBRARIES = {
    b"libc.so.6",
    b"libm.so.6",
    b"libpthread.so.0",
    b"ld-linux-x86-64.so.2",
    b"ld-linux-aarch64.so.1",
}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel of every platform."""
    if not find_spec("ziglang"):
        pytest.skip("needs ziglang")
    folder = tmp_path_factory.mktemp("dist")
    isolated = (
        [] if find_spec("hatchling") is None else ["--no-build-isolation"]
    )  # what is installed is enough
    for known in build.PLATFORMS:
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", *isolated]
        run = subprocess.run(
            [*command, "--wheel-dir", str(folder), str(ROOT)],
            env={**os.environ, "QWENQ_WHEEL_PLATFORM": known.tag},
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode == 0, run.stdout + run.stderr
    return folder


@pytest.mark.parametrize("known", build.PLATFORMS, ids=lambda known: known.tag)
def test_a_wheel_holds_the_variants_of_its_platform(dist: Path, known: build.Platform) -> None:
    (path,) = dist.glob(f"*-py3-none-{known.tag}.whl")
    with ZipFile(path) as wheel:
        libraries = {Path(name).name: wheel.read(name) for name in wheel.namelist() if "/lib/lib" in name}
    variants = [variant.name for variant in build.VARIANTS if variant.machine == known.machine]
    assert set(libraries) == {build.library_name(name, known.suffix) for name in variants}
    for content in libraries.values():
        assert build.sources_hash().encode() in content
        if known.suffix == ".dylib":
            assert content.startswith(MACH_O_ARM64)
            continue
        assert content.startswith(b"\x7fELF")
        assert struct.unpack_from("<H", content, 18) == (ELF_MACHINES[known.machine],)
        needed = re.findall(rb"\0GLIBC_(\d+)\.(\d+)", content)
        assert needed and max((int(one), int(other)) for one, other in needed) <= GLIBC
        named = set(re.findall(rb"\0((?:lib|ld-)[\w.-]+\.so(?:\.\d+)*)(?=\0)", content))
        assert named - {name.encode() for name in libraries} <= SYSTEM_LIBRARIES


def test_a_wheel_is_installed_and_runs_without_a_compiler(dist: Path, tmp_path: Path) -> None:
    tag = f"manylinux_2_17_{build.machine_name(os.uname().machine)}"
    wheels = list(dist.glob(f"*-{tag}.whl")) if sys.platform == "linux" else []
    if not wheels or not cpu.variants_here():
        pytest.skip("no wheel is built for this machine")
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheels[0])]
    subprocess.run(install, check=True)
    (packages,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text("\n".join(path for path in sys.path if "-packages" in path))
    run = subprocess.run(
        [str(python), "-I", "-m", "qwenq", "doctor"],
        cwd=tmp_path, env={"PATH": ""}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    asked = "from qwenq.compute import cpu; print(cpu.__file__, cpu.unsupported_reason(), cpu.variant_name())"
    said = subprocess.run(
        [str(python), "-I", "-c", asked], cwd=tmp_path, env={}, capture_output=True, text=True, check=True
    ).stdout.split()
    assert said == [str(packages / "qwenq" / "compute" / "cpu.py"), "None", cpu.variants_here()[0].name]
