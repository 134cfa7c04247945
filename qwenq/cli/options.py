"""Options that several commands have: one type and one line of help each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

DeviceName = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")]
DtypeName = Annotated[Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="To compute in.")]
EngineName = Annotated[
    Literal["fast", "transformers"], typer.Option(help="The lean decoder, or transformers.")
]
AttentionName = Annotated[
    str, typer.Option(help="One that `doctor` lists; auto: grouped on a CPU, else sdpa.")
]
KernelName = Annotated[str, typer.Option(help="Of quantised weights: auto, or one that `doctor` lists.")]
ThinkingWish = Annotated[
    Literal["auto", "on", "off"],
    typer.Option(help="Whether the model thinks before it answers (enable_thinking of its chat template)."),
]
RunFolder = Annotated[Path | None, typer.Option(help="Run folder. [default: runs/MODEL]")]
RowsAsJson = Annotated[bool, typer.Option("--json", help="Print the rows as JSON.")]
RealWeights = Annotated[
    Literal["stored", "random"], typer.Option("--weights", help="random is refused: it has no accuracy.")
]
SeedOfWeights = Annotated[int, typer.Option(min=0, help="Of random weights.")]
