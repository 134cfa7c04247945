"""What the protocol's generation is made of: the checkpoint's sampling, and its ends kept out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from brief_profiles import profile_briefly

from qwenq.models.checkpoint import Checkpoint
from qwenq.profiling.measure import measure
from qwenq.profiling.spec import Point
from qwenq.runtime.sampling import end_ids, protocol_sampling


def checkpoint(folder: Path, config: dict[str, Any], generation: object = None) -> Checkpoint:
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return Checkpoint(folder, config, None)  # type: ignore[arg-type] - no tensor is read


@pytest.mark.parametrize(
    ("config", "generation", "ends"),
    [
        ({"eos_token_id": 2}, None, (2,)),
        ({"eos_token_id": 2}, {"eos_token_id": [151645, 151643]}, (151643, 151645)),
        ({"eos_token_id": 2}, {"eos_token_id": None}, (2,)),
        ({"eos_token_id": 2}, {"eos_token_id": 0}, (0,)),
        ({"eos_token_id": 2}, ["no", "object"], (2,)),
        ({}, {"eos_token_id": "none"}, ()),
    ],
)
def test_ends_are_those_that_transformers_would_take(
    tmp_path: Path, config: dict[str, Any], generation: object, ends: tuple[int, ...]
) -> None:
    assert end_ids(checkpoint(tmp_path, config, generation)) == ends


def test_a_model_on_no_disk_has_no_ends_from_a_folder(tmp_path: Path) -> None:
    made = replace(checkpoint(tmp_path, {"eos_token_id": 2}, {"eos_token_id": 5}), on_disk=False)
    assert end_ids(made) == (2,)


def test_sampling_is_the_checkpoints(tmp_path: Path) -> None:
    made = checkpoint(tmp_path, {}, {"do_sample": True, "top_p": 0.8, "repetition_penalty": 1.1})
    sampling, phrase = protocol_sampling(made)
    assert (sampling.top_p, sampling.temperature, sampling.seed) == (0.8, 1.0, 1024)
    assert "repetition penalty 1.1 not applied" in phrase


@pytest.mark.parametrize(("settings", "says"), [
    ({"temperature": -1}, "greedy: generation_config.json: the temperature -1.0 is not a number from 0 up"),
    ({"top_p": 2}, "greedy: generation_config.json: top-p 2.0 is not above 0 and at most 1"),
    ({"top_k": 1e999}, "greedy: generation_config.json holds no numbers"),
])  # fmt: skip
def test_settings_that_nobody_can_sample_by_take_no_point_away(
    tmp_path: Path, settings: dict[str, Any], says: str
) -> None:
    made = checkpoint(tmp_path, {}, {"do_sample": True, **settings})
    sampling, phrase = protocol_sampling(made)
    assert (sampling.greedy, phrase) == (True, says)


def test_the_row_says_which_ends_were_suppressed(
    points: list[Point], monkeypatch: pytest.MonkeyPatch
) -> None:
    profile_briefly(monkeypatch)
    monkeypatch.setattr("qwenq.profiling.measure.end_ids", lambda checkpoint: (3, 5))
    rows = {row.metric: row for row in measure(next(p for p in points if not p.encodes))}
    assert rows["speed.protocol"].settings["end_of_text"] == "suppressed in the logits: 3, 5"
