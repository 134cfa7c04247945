"""Records the check that `qwenq quantize` made of a model, as rows of a run folder.

``python -m qwenq.run.recorded MODEL RUN COMMAND``, the last for the rows: what made the model.
"""

from __future__ import annotations

import sys
from pathlib import Path

from qwenq.errors import QwenqError
from qwenq.results import Model, Row


def record(model: Path, run: Path, command: str) -> list[Row]:
    """The rows of the check, also appended to the run folder that does not have them yet.

    Args:
        command: that quantised it.

    Raises:
        CorruptFileError: the folder has no manifest, or one without a check, or its bytes are others.
    """
    from qwenq.evals.recorded import record_check

    return record_check(model, _identity(model), run, command)


def _identity(model: Path) -> Model:
    """As the rows of evaluation and profile name it."""
    import torch

    from qwenq.models.checkpoint import open_checkpoint
    from qwenq.models.identity import result_model

    return result_model(open_checkpoint(model), torch.float32, str(model))


if __name__ == "__main__":
    try:
        record(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
    except QwenqError as failure:
        sys.exit(f"qwenq: {failure}")
