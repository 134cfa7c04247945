"""Rows of the check that a quantised model's manifest holds."""

from __future__ import annotations

from qwenq.evals.rows import _check_rows
from qwenq.results import Model


def test_rows_of_a_check_are_those_of_the_manifest() -> None:
    check = {
        "kl": {"value": 0.1, "low": 0.08, "high": 0.12},
        "same_top": {"value": 0.8, "low": 0.7, "high": 0.9},
        "perplexity_ratio": {"value": None, "low": None, "high": None},
        "sequences": 8, "seq_len": 64, "tokens": 504, "dtype": "float32", "device": "cpu",
        "modules": [{"name": "model.layers.0.mlp.up_proj", "error": 0.01, "rtn_error": 0.02}],
        "kl_by_position": [
            {"first": 1, "last": 32, "n": 256, "value": 0.15, "low": 0.1, "high": 0.2},
            {"first": 33, "last": 63, "n": 248, "value": 0.05, "low": None, "high": None},
        ],
    }  # fmt: skip
    calibration = {"source": "self", "tokens": "abc"}
    manifest = {"check": check, "calibration": calibration, "made_by": "qwenq 1", "recipe": {}}
    kl, same, ratio = _check_rows(manifest, Model("m", "f", "int4", "m"), "qwenq quantize m")
    assert (kl.metric, kl.value, kl.low, kl.high, kl.n) == ("kl", 0.1, 0.08, 0.12, 504)
    assert same.details == {"command": "qwenq quantize m"}
    assert kl.details == {
        "command": "qwenq quantize m",
        "modules": check["modules"],
        "positions": [16.5, 48.0], "values": [0.15, 0.05], "counts": [256, 248],
        "lows": [0.1, None], "highs": [0.2, None],
    }  # fmt: skip
    assert (same.metric, same.value) == ("same_top", 0.8)
    assert (ratio.metric, ratio.status, ratio.reason) == ("perplexity.ratio", "failed", "not finite")
