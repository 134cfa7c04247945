"""Load the engine that a point names, in one process or in several."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwenq.distributed import Team
from qwenq.models.checkpoint import Checkpoint
from qwenq.profiling.points import Point

if TYPE_CHECKING:
    from qwenq.runtime.engine import Engine


def checkpoint_of(point: Point) -> Checkpoint:
    """Return the point's model, before it is rounded."""
    from qwenq.models.catalogue import BUNDLED
    from qwenq.models.opening import open_model
    from qwenq.models.precision import resolve_device
    from qwenq.models.random_weights import random_checkpoint

    subject = point.subject
    if subject.weights == "random":  # drawn where they are used
        return random_checkpoint(subject.given or BUNDLED, subject.seed, device=resolve_device(point.device))
    return open_model(subject.given)


def engine_for(point: Point, checkpoint: Checkpoint, team: Team) -> Engine:
    """Return the point's engine; on rank 0 of several processes the one that leads the others.

    Raises:
        QwenqError: it cannot run this model here, or another process could not load its part.
    """
    attention, note = _attention(point)
    if point.tp > 1:
        from qwenq.runtime.tensor_parallel import LeadingEngine

        engine: Engine = LeadingEngine(checkpoint, team, point.device, point.subject.dtype, attention)
        team.wait()  # raises what another process could not load
    else:
        from qwenq.runtime.engine import load

        engine = load(
            checkpoint,
            device=point.device,
            dtype=point.subject.dtype,
            engine=point.engine,
            kernel=point.kernel,
            attention=attention,
        )
    engine.notes = (*engine.notes, *note)
    return engine


def _attention(point: Point) -> tuple[str, tuple[str, ...]]:
    """Return the attention backend that runs, and a note where it is another than was asked for."""
    from qwenq.models.precision import resolve_device
    from qwenq.runtime.attention import of_row
    from qwenq.runtime.engine import find_dtype

    device = resolve_device(point.device)
    name, why = of_row(point.attention, device, find_dtype(point.subject.dtype, device, point.engine))
    return name, (why,) if why else ()


def release(engine: Engine, team: Team) -> None:
    """Let the other processes end; all leave together."""
    from qwenq.runtime.tensor_parallel import LeadingEngine

    assert isinstance(engine, LeadingEngine)  # noqa: S101 - engine_for made it
    engine.close()
    team.wait()


def assist(point: Point, team: Team) -> None:
    """Hold this rank's slice of the model, and compute with rank 0 until it is done.

    Raises:
        QwenqError: it cannot be loaded, or another process has stopped.
    """
    from qwenq.runtime.tensor_parallel import SplitEngine, follow

    engine = SplitEngine(checkpoint_of(point), team, point.device, point.subject.dtype, _attention(point)[0])
    team.wait()
    follow(engine, team)
    team.wait()
