"""``qwenq push``: publish a checked folder on the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qwenq.cli.app import app
from qwenq.cli.printing import note_events, print_json
from qwenq.events import Advance, Event
from qwenq.models.folders import local_path


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

    It goes there with its model card, as one commit; what will be public is listed before anything is sent.
    The token is that of `hf auth login` or of HF_TOKEN. An upload that was cut goes on with the same command.
    """
    from qwenq.publishing.push import Upload
    from qwenq.publishing.push import push as upload
    from qwenq.storage import readable_bytes

    def show(event: Event) -> None:
        note_events(event)
        if not as_json and isinstance(event, Advance) and isinstance(event.result, Upload):
            for name, size in event.result.files.items():
                typer.echo(f"  {readable_bytes(size):>10}  {name}")

    folder = local_path(str(folder), "FOLDER")
    done = upload(folder, repo, private=private, branch=branch, dry_run=dry_run, base=base, listener=show)
    if as_json:
        print_json({"repo": done.repo, "branch": done.branch, "url": done.url, "files": done.files})
        return
    total = f"{len(done.files)} files, {readable_bytes(done.nbytes)}"
    where = f"{done.repo}, branch {done.branch}"
    if done.url is None:
        kind = " (private, if new)" if private else ""
        typer.echo(f"would publish {total} to {where}{kind}; nothing was sent")
    else:
        typer.echo(f"published {total} to {where}: {done.url}")
