"""Upload a checked folder to the hub: `qwenq push`.

One commit holds all files: huggingface_hub sends the weights first, skips those that an upload before a cut
had brought there, and makes the commit last, so that a repository never has half of a model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qwenq.errors import HubError, UsageError, VerificationError
from qwenq.models.folders import CARD, MANIFEST
from qwenq.models.hub import network_errors
from qwenq.models.integrity import verify_files
from qwenq.publishing.model_card import write_model_card
from qwenq.storage import readable_bytes

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_OURS = {".gitattributes", CARD, MANIFEST}


@dataclass(frozen=True)
class Upload:
    """What is, or would be, published.

    Attributes:
        repo: owner/name.
        branch: of the repository.
        private: whether a new repository is private.
        files: name → bytes, of all that goes there.
        url: of the commit; None: nothing was sent.
        notices: what else was done, one line each.
    """

    repo: str
    branch: str
    private: bool
    files: dict[str, int]
    url: str | None = None
    notices: tuple[str, ...] = ()

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
) -> Upload:
    """Upload a folder that passed its check, with its model card, as one commit.

    Args:
        folder: what `qwenq quantize` made.
        repo: owner/name on the hub; it is made where it is missing.
        private: make a new repository private.
        branch: of the repository; it is made where it is missing.
        dry_run: say what would be published, and send nothing.
        base: folder of the base, for the card's licence and languages.

    Raises:
        UsageError: no owner/name; or the repository holds files of something else.
        ModelError: the folder was not written by qwenq, or a file is not as it was written.
        VerificationError: the folder was never compared with its base, or is broken.
        HubError: no network, no token, or a token that may not write; says what would have been uploaded.
    """
    if not _REPO.fullmatch(repo):
        raise UsageError(f"{repo!r} is no OWNER/NAME", where="push", hint="like my-name/Qwen3-0.6B-GPTQ-Int4")
    names = [*verify_files(folder), MANIFEST]
    _require_check(folder)
    if not (folder / CARD).exists():
        write_model_card(folder, base)
    files = {name: (folder / name).stat().st_size for name in sorted({*names, CARD})}
    planned = Upload(repo, branch, private, files)
    if dry_run:
        return planned
    from huggingface_hub import HfApi

    api = HfApi()
    with _explained(planned):
        notices = _prepare(api, planned)
        done = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            revision=branch,
            allow_patterns=[_literal(name) for name in files],
            commit_message=f"{folder.name}, quantised with qwenq",
        )
    return Upload(repo, branch, private, files, str(done.commit_url), tuple(notices))


def _prepare(api: HfApi, planned: Upload) -> list[str]:
    """Make the repository and the branch where they are missing; refuse files of something else."""
    notices = []
    if not api.repo_exists(planned.repo):
        api.create_repo(planned.repo, private=planned.private)
        notices.append(f"made the {'private' if planned.private else 'public'} repository {planned.repo}")
    branches = {ref.name for ref in api.list_repo_refs(planned.repo).branches}
    if planned.branch not in branches:
        api.create_branch(planned.repo, branch=planned.branch)
        notices.append(f"made the branch {planned.branch}")
    there = set(api.list_repo_files(planned.repo, revision=planned.branch))
    other = sorted(there - _OURS - set(planned.files))
    if other:
        shown = ", ".join(other[:5]) + (f" and {len(other) - 5} more" if len(other) > 5 else "")
        raise UsageError(
            f"{planned.repo} holds other files on {planned.branch}: {shown}",
            where="push",
            hint="nothing was uploaded; choose another name, or a branch of its own with --branch",
        )
    return notices


@contextmanager
def _explained(planned: Upload) -> Iterator[None]:
    """Turn what the hub's client raises into one message that says what was, or was not, published."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    size = readable_bytes(planned.nbytes)
    nothing = f"nothing was published; it would have been {len(planned.files)} files, {size}"
    login = "log in with `hf auth login`, or set HF_TOKEN, with a token that may write there"
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise HubError(f"no token for the hub; {nothing}", where=planned.repo, hint=login) from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        if status in (401, 403):
            raise HubError(
                f"the hub does not let this token write ({status}); {nothing}", where=planned.repo, hint=login
            ) from error
        raise HubError(
            f"the hub answered {status}; {nothing}",
            where=planned.repo,
            hint="run the same command again: files that reached the hub are not sent twice",
        ) from error
    except network_errors() as error:
        raise HubError(
            f"the hub cannot be reached ({type(error).__name__}); {nothing}",
            where=planned.repo,
            hint="run the same command again: files that reached the hub are not sent twice",
        ) from error


def _require_check(folder: Path) -> None:
    check = json.loads((folder / MANIFEST).read_text(encoding="utf-8")).get("check")
    if not check:
        raise VerificationError(
            "this folder was never compared with the model it was made from",
            where=folder,
            hint="only a checked model is published: quantise real weights, without --weights random",
        )
    if check.get("broken"):
        raise VerificationError("its check found this model broken", where=folder, hint="quantise it again")


def _literal(name: str) -> str:
    """Return a pattern of fnmatch that matches this name alone."""
    return re.sub(r"([*?\[])", r"[\1]", name)
