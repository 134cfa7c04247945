"""One model on two processes through transformers' own plan: one process's answers, clear refusals."""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from runtime.quantised_models import quantised_model
from teams import free_port
from tiny_families import write_family

from qwenq.distributed import Team, process_group
from qwenq.errors import UnsupportedError
from qwenq.models.checkpoint import open_checkpoint
from qwenq.models.gptq_config import QuantConfig
from qwenq.runtime.engine import Engine, load
from qwenq.runtime.tensor_parallel import LeadingEngine, SplitEngine, follow, refuse_unsplittable

PROMPTS = [[5, 17, 99, 3, 250], [7, 7], list(range(40, 60))]


def on_ranks(world: int, work: Callable[[Team], None]) -> list[int]:
    """Exit statuses of forked processes that meet as torchrun's do."""
    port = str(free_port())
    pids = []
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                os.environ |= {
                    "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                }  # fmt: skip
                torch.set_num_threads(1)
                with process_group("cpu") as team:
                    work(team)
                    team.barrier()
                status = 0
            except BaseException:
                traceback.print_exc()
                raise
            finally:
                os._exit(status)
        pids.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def answers(engine: Engine) -> dict[str, object]:
    """Greedy tokens of a ragged batch, of each prompt alone, and every token's logits of one."""
    together = engine.generate(PROMPTS, 12, exact_tokens=True)
    alone = [engine.generate([prompt], 12, exact_tokens=True).answers[0].ids for prompt in PROMPTS]
    (logits,) = engine.logits([PROMPTS[0]])
    return {
        "together": [list(answer.ids) for answer in together.answers],
        "alone": [list(ids) for ids in alone],
        "logits": logits.tolist(),
    }


@pytest.mark.parametrize(
    ("family", "changes"),
    [("qwen2", {}), ("qwen3", {}), ("llama", {"tie_word_embeddings": False, "num_key_value_heads": 4})],
)
def test_two_processes_answer_as_one(tmp_path: Path, family: str, changes: dict[str, object]) -> None:
    model = write_family(tmp_path / "tiny", family, **changes)
    expected = answers(load(model, device="cpu", dtype="float32", engine="transformers"))

    def work(team: Team) -> None:
        checkpoint = open_checkpoint(model)
        if team.is_rank0:
            engine = LeadingEngine(checkpoint, team, "cpu", "float32", "sdpa")
            (tmp_path / "answers.json").write_text(json.dumps(answers(engine)))
            (tmp_path / "name.txt").write_text(engine.implementation)
            engine.close()
        else:
            split = SplitEngine(checkpoint, team, "cpu", "float32", "sdpa")
            follow(split, team)
            weight = split._model.base_model.layers[0].mlp.up_proj.weight
            (tmp_path / "rows.txt").write_text(str(weight.to_local().shape[0]))

    assert on_ranks(2, work) == [0, 0]
    found = json.loads((tmp_path / "answers.json").read_text())
    assert found["together"] == expected["together"]
    assert found["alone"] == expected["alone"]
    torch.testing.assert_close(
        torch.tensor(found["logits"]), torch.tensor(expected["logits"]), rtol=1e-4, atol=1e-4
    )
    assert "2 processes" in (tmp_path / "name.txt").read_text()
    assert (tmp_path / "rows.txt").read_text() == "48", "half of the 96 rows: nobody holds the whole matrix"


def test_models_that_cannot_be_sharded_are_refused(tmp_path: Path) -> None:
    plain = open_checkpoint(write_family(tmp_path / "tiny"))
    refuse_unsplittable(plain, 2)
    with pytest.raises(UnsupportedError, match="num_attention_heads cannot be divided evenly among 3"):
        refuse_unsplittable(plain, 3)
    with pytest.raises(UnsupportedError, match="2 num_key_value_heads cannot be divided evenly among 4"):
        refuse_unsplittable(plain, 4)
    with pytest.raises(UnsupportedError, match="packed GPTQ weights cannot be split"):
        refuse_unsplittable(quantised_model("llama", QuantConfig(bits=4, group_size=32)), 2)
