"""Upload a checked folder to the hub: `qwenq push`.

One commit holds all files: huggingface_hub sends the weights first, skips those that an upload before a cut
had brought there, and makes the commit last, so that a repository never has half of a model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from qwenq.errors import HubError, ModelError, UsageError, VerificationError
from qwenq.events import Advance, Listener, Notice, notify, silent
from qwenq.models.folders import CARD, MANIFEST
from qwenq.models.hub import network_errors
from qwenq.models.integrity import verify_files
from qwenq.publishing.model_card import write_model_card
from qwenq.recipe import HUB_ID
from qwenq.storage import read_json, readable_bytes

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_OURS = {".gitattributes", CARD, MANIFEST}
_IMAGE = re.compile(r"!\[[^\]\n]*\]\(([^)\s]+)\)|<img[^>]+src=[\"']([^\"']+)[\"']", re.IGNORECASE)
_IMAGES = {".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp"}


@dataclass(frozen=True)
class Upload:
    """What is, or would be, published."""

    repo: str
    branch: str
    private: bool
    files: dict[str, int]  # name → bytes, of all that goes there
    url: str | None = None  # of the commit; None: nothing was sent
    notices: tuple[str, ...] = ()  # what else was done, or has to be known, one line each

    @property
    def nbytes(self) -> int:
        """Return the bytes of all files."""
        return sum(self.files.values())


def push(
    folder: Path,
    repo: str,
    *,
    private: bool = False,
    branch: str = "main",
    dry_run: bool = False,
    base: Path | None = None,
    listener: Listener = silent,
) -> Upload:
    """Upload a folder that passed its check, with its model card, as one commit.

    Args:
        folder: what `qwenq quantize` made.
        repo, branch: owner/name on the hub, and a branch there; they are made where they are missing.
        private: make a new repository private.
        dry_run: return what would be published, and send nothing.
        base: folder of the base, for the card's licence and languages.
        listener: receives what will be public as an ``Upload``, before anything is sent.
    """
    if not HUB_ID.fullmatch(repo):
        raise UsageError(f"{repo!r} is no OWNER/NAME", where="push", hint="like my-name/Qwen3-0.6B-GPTQ-Int4")
    names = [*verify_files(folder), MANIFEST]
    manifest = read_json(folder / MANIFEST)
    if not (check := manifest.get("check")):
        raise VerificationError(
            "this folder was never compared with the model it was made from",
            where=folder,
            hint="only a checked model is published: quantise real weights, without --weights random",
        )
    if check.get("broken"):
        raise VerificationError("its check found this model broken", where=folder, hint="quantise it again")
    if not (folder / CARD).exists():
        write_model_card(folder, base)
    names += [CARD, *_images(folder)]
    files = {name: (folder / name).stat().st_size for name in sorted(set(names))}
    paths = _local_paths(manifest)
    notices = [f"{MANIFEST} holds paths of this machine: {', '.join(sorted(paths))}"] if paths else []
    planned = Upload(repo, branch, private, files, None, tuple(notices))
    notify(listener, notices)
    listener(Advance("push", result=planned))
    if dry_run:
        return planned
    from huggingface_hub import HfApi

    api, made = HfApi(), list[str]()
    with _explained(planned, made):
        _prepare(api, planned, made, listener)
        done = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            revision=branch,
            allow_patterns=[re.sub(r"([*?\[])", r"[\1]", name) for name in files],  # these names alone
            commit_message=f"{folder.name}, quantised with qwenq",
        )
    return Upload(repo, branch, private, files, str(done.commit_url), (*notices, *made))


def _local_paths(manifest: dict[str, Any]) -> set[str]:
    """Return the absolute paths that were typed when the model was quantised."""
    recipe, base = manifest.get("recipe", {}), manifest.get("base", {})
    calibration = [recipe.get("calibration", {}), manifest.get("calibration", {})]
    typed = [recipe.get("model"), base.get("model"), *(each.get("source") for each in calibration)]
    return {text for text in typed if isinstance(text, str) and Path(text).expanduser().is_absolute()}


def _images(folder: Path) -> Iterator[str]:
    """Yield the images in the folder that the card shows."""
    text = (folder / CARD).read_text(encoding="utf-8", errors="replace")
    shown = {unquote(one or other) for one, other in _IMAGE.findall(text)}
    for name in sorted(name for name in shown if not re.match(r"[a-z][a-z0-9+.-]*:|/", name, re.IGNORECASE)):
        file = folder / name
        inside = file.is_file() and file.resolve().is_relative_to(folder.resolve())
        if not inside or file.suffix.lower() not in _IMAGES:
            raise ModelError(
                f"{CARD} shows {name}, which is not an image in this folder",
                where=folder / CARD,
                hint="put it there, make it anew with `qwenq report`, or remove it from the card",
            )
        yield file.resolve().relative_to(folder.resolve()).as_posix()


def _prepare(api: HfApi, planned: Upload, made: list[str], listener: Listener) -> None:
    """Make the repository and the branch where they are missing; refuse files of something else."""
    repo, branch = planned.repo, planned.branch

    def say(line: str) -> None:
        made.append(line)
        listener(Notice(line))

    if not api.repo_exists(repo):
        api.create_repo(repo, private=planned.private)
        say(f"made the {'private' if planned.private else 'public'} repository {repo}")
    if branch not in {ref.name for ref in api.list_repo_refs(repo).branches}:
        first = api.list_repo_commits(repo)[-1].commit_id  # else it would begin with the files of main
        api.create_branch(repo, branch=branch, revision=first)
        say(f"made the branch {branch}")
    there = set(api.list_repo_files(repo, revision=branch)) - _OURS - set(planned.files)
    other = sorted(name for name in there if Path(name).suffix.lower() not in _IMAGES)  # of earlier cards
    if other:
        shown = ", ".join(other[:5]) + (f" and {len(other) - 5} more" if len(other) > 5 else "")
        raise UsageError(
            f"{repo} holds other files on {branch}: {shown}",
            where="push",
            hint=f"nothing was uploaded{_besides(made)}; choose another name, or another --branch",
        )


def _besides(made: Sequence[str]) -> str:
    """Return what was made although nothing was published, as the end of a sentence."""
    return f", but it {' and '.join(made)}" if made else ""


@contextmanager
def _explained(planned: Upload, made: Sequence[str]) -> Iterator[None]:
    """Turn what the hub's client raises into one message that says what was, or was not, published."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    known: tuple[type[Exception], ...] = (LocalTokenNotFoundError, *network_errors())
    try:
        yield
    except known as error:
        login = "log in with `hf auth login`, or set HF_TOKEN, with a token that may write there"
        hint = "run the same command again: files that reached the hub are not sent twice"
        if isinstance(error, LocalTokenNotFoundError):
            why, hint = "no token for the hub", login
        elif isinstance(error, HfHubHTTPError):
            status = error.response.status_code if error.response is not None else 0
            refused = {
                401: "the hub asks for a valid token (401)",
                403: "the hub does not let this token write (403)",
            }
            why, hint = (
                refused.get(status, f"the hub answered {status}"),
                login if status in refused else hint,
            )
        else:
            why = f"the hub cannot be reached ({type(error).__name__})"
        files = f"{len(planned.files)} files, {readable_bytes(planned.nbytes)}"
        what = f"{why}; nothing was published{_besides(made)}; it would have been {files}"
        raise HubError(what, where=planned.repo, hint=hint) from error
