"""Whether code can be compiled here, and what is said where it cannot."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

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
