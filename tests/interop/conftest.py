"""Quantised folders to be loaded by other people's libraries; run by the Python of `make interop`."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

# Two cores: GPTQModel's thread pool fails with the one worker that it would choose there.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Its plain kernel compiles each of 210 modules by itself: minutes, for a few forward passes.
os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")

# Enough to make a sound checkpoint, and no more: loading is tested here, not how good the weights are.
QUICK = ("--samples", "16", "--seq-len", "256", "--group-size", "64")


@dataclass(frozen=True)
class Quantised:
    """A folder that qwenq wrote, and the same weights in float32 without any client's kernel."""

    folder: Path
    bits: int

    @cached_property
    def reference(self) -> Any:
        """A plain float32 model that holds the oracle's dequantised weights."""
        import torch
        from oracle import dequantised_state
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(self.folder)
        del config.quantization_config
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        missing, unexpected = model.load_state_dict(dequantised_state(self.folder), strict=False)
        assert not unexpected
        assert set(missing) <= {"lm_head.weight"}
        model.tie_weights()
        return model.eval()


@pytest.fixture(scope="session", params=[4, 8], ids=["Int4", "Int8"])
def quantised(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Quantised:
    """$QWENQ_INTEROP_INT4 or $QWENQ_INTEROP_INT8 where set, else the bundled model, quantised now."""
    pytest.importorskip("gptqmodel", reason="needs the environment of `make interop`")
    given = os.environ.get(f"QWENQ_INTEROP_INT{request.param}")
    if given:
        return Quantised(Path(given).resolve(), request.param)
    folder = tmp_path_factory.mktemp("interop") / f"int{request.param}"
    command = [sys.executable, "-m", "qwenq", "quantize", "--bits", str(request.param), "--out", str(folder)]
    done = subprocess.run([*command, *QUICK], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return Quantised(folder, request.param)
