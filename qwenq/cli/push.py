"""``qwenq push``: publish a checked folder on the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qwenq.cli.app import app
from qwenq.cli.printing import print_json
from qwenq.models.folders import local_path
from qwenq.progress import note


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="What `qwenq quantize` made.")],
    repo: Annotated[str, typer.Argument(help="OWNER/NAME on the hub; made where it is missing.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    branch: Annotated[str, typer.Option(help="Branch of the repository; made where it is missing.")] = "main",
    base: Annotated[
        Path | None, typer.Option(help="Folder of the base, whose card names licence and languages.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would be public, and send nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Upload a checked folder to the hub.

    It goes there with its model card, as one commit.
    The token is that of `hf auth login` or of HF_TOKEN. An upload that was cut goes on with the same command.
    """
    from qwenq.publishing.push import push as upload
    from qwenq.storage import readable_bytes

    folder = local_path(str(folder), "FOLDER")
    done = upload(folder, repo, private=private, branch=branch, dry_run=dry_run, base=base)
    if as_json:
        print_json({"repo": done.repo, "branch": done.branch, "url": done.url, "files": done.files})
        return
    for line in done.notices:
        note(line)
    for name, size in done.files.items():
        typer.echo(f"  {readable_bytes(size):>10}  {name}")
    total = f"{len(done.files)} files, {readable_bytes(done.nbytes)}"
    where = f"{done.repo}, branch {done.branch}"
    if done.url is None:
        kind = " (private, if new)" if private else ""
        typer.echo(f"would publish {total} to {where}{kind}; nothing was sent")
    else:
        typer.echo(f"published {total} to {where}: {done.url}")
