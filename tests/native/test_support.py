"""Whether code can be compiled here, and what is said where it cannot."""

from __future__ import annotations

import importlib.util
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from native.native_functions import needs_native

from qwenq.native import support


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Answers are kept; not between these tests."""
    support.why_not.cache_clear()
    yield
    support.why_not.cache_clear()


def test_without_llvmlite_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "find_spec", lambda name: None)
    assert support.why_not() == ("llvmlite, which compiles it, is not installed (pip install 'qwenq[cpu]')")


@pytest.mark.parametrize("found", ["0.43.0", "0.45.1rc1", "0+unknown"])
def test_an_llvmlite_that_is_too_old_says_which_is_not(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "find_spec", lambda name: name)
    monkeypatch.setattr(support, "version", lambda name: found)
    said = support.why_not("avx512f")
    assert said == (
        f"llvmlite, which compiles it, is {found} and has to be 0.46 or newer (pip install 'qwenq[cpu]')"
    )


def test_the_package_asks_for_the_same_llvmlite() -> None:
    pyproject = Path(__file__).parents[2] / "pyproject.toml"
    extra = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["optional-dependencies"]["cpu"]
    asked = [line for line in extra if line.startswith("llvmlite>=")]
    assert [line.split(";")[0] for line in asked] == [f"llvmlite>={'.'.join(map(str, support.OLDEST))}"]


def test_other_threads_than_gnu_openmp_are_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("llvmlite") is None:
        pytest.skip("llvmlite is not installed")

    def missing() -> None:
        raise OSError("no such library")

    monkeypatch.setattr(support, "openmp", missing)
    assert support.why_not() == "the threads of this torch are not GNU OpenMP's"


@needs_native
def test_a_feature_that_the_cpu_lacks_is_named() -> None:
    assert support.why_not("avx512vnni", "warp-drive") == "this CPU has no warp-drive"
    assert support.why_not("avx512vnni") is None
