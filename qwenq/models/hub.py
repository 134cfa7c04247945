"""Fetch models from the hub or its cache through ``huggingface_hub``, with errors that say what to do.

Environment, as that library documents it: HF_HOME, HF_HUB_CACHE, HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE.
A connection that drops is resumed by that library within the run; what was whole is kept for the next run.
No ``*.py`` is ever fetched.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from qwenq.errors import HubError
from qwenq.storage import guard_storage

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

_SAFETENSORS = ["*.safetensors", "*.safetensors.index.json"]
_PICKLE = ["pytorch_model*.bin", "*.bin.index.json"]
_LICENCES = [
    f"*{spelt}*"  # as ``companions`` copies them: "Tongyi Qianwen LICENSE AGREEMENT.txt"
    for word in ("license", "licence", "notice", "copying")
    for spelt in (word, word.title(), word.upper())
]
_BESIDE_WEIGHTS = [
    "*.json", "*.jinja", "*.tiktoken", "*.model", "merges.txt", "vocab.txt",
    "README.md", *_LICENCES,
]  # fmt: skip
_NEVER = ["*.py", "*/*"]
_OR_LOCAL = "or download the model elsewhere and name its folder"


def fetch(repo_id: str) -> tuple[Path, str]:
    """Download what a model needs, or find it in the cache; return its folder, and a line on how it was got.

    Safetensors are preferred; pickle weights are fetched only where there are no others. When the hub cannot
    be reached or is out of order, a whole copy in the cache is used, and the line says so.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if constants.is_offline_mode():
        return _from_cache(repo_id, None)
    try:
        info = HfApi().model_info(repo_id)
    except HFValidationError as error:
        raise HubError(f"{repo_id} is no hub id: {error}", hint="hub ids look like owner/name") from error
    except HfHubHTTPError as error:
        problem = _explain(error, repo_id)
        if error.response.status_code < 500:
            raise problem from error
        return _from_cache(repo_id, problem)
    except network_errors() as error:
        problem = HubError(
            f"the hub could not be reached for {repo_id}: {error}",
            where=constants.ENDPOINT,
            hint=f"check the network, HF_ENDPOINT and the proxy settings, {_OR_LOCAL}",
        )
        return _from_cache(repo_id, problem)
    return _snapshot(repo_id, [file.rfilename for file in info.siblings or []])


def network_errors() -> tuple[type[Exception], ...]:
    """Return what the hub's HTTP library raises below HTTP: no route, refused, cut off, timed out."""
    from huggingface_hub import errors

    # The library is httpx or a successor, by version: its transport errors are found by the class they share.
    http_error = next(base for base in errors.HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")
    xet_error = getattr(errors, "XetDownloadError", http_error)  # since huggingface_hub 2
    return (http_error, xet_error, ConnectionError, TimeoutError)


def _snapshot(repo_id: str, names: list[str]) -> tuple[Path, str]:
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError

    # OSError is the library's own check of the size.
    broken: tuple[type[Exception], ...] = (*network_errors(), OSError)
    try:
        with guard_storage(Path(constants.HF_HUB_CACHE)):
            folder = _call_library(repo_id, names, offline=False)
    except broken as error:
        if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
            raise _explain(error, repo_id) from error
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        raise HubError(
            f"the download of {repo_id} broke off: {first_line}",
            hint=f"run the same command again: files that came whole are kept; {_OR_LOCAL}",
        ) from error
    return folder, f"{repo_id} at {folder.name[:12]} from {constants.ENDPOINT}, in {folder}"


def _call_library(repo_id: str, names: list[str], *, offline: bool) -> Path:
    """Call ``snapshot_download`` by the branch's name, so that the cache answers to it offline, too.

    What it fetches is decided by the kind of weights among the files' names.
    """
    from huggingface_hub import snapshot_download

    top = [name for name in names if "/" not in name]
    if any(name.endswith(".safetensors") for name in top):
        weights, others = _SAFETENSORS, _PICKLE
    elif any(name.endswith(".bin") for name in top):
        weights, others = _PICKLE, _SAFETENSORS
    else:
        raise HubError(
            f"{repo_id} holds no weights that can be read: no *.safetensors and no pytorch_model*.bin",
            hint="GGUF, ONNX and others are not read; name the repository of the original model",
        )
    allow, ignore = [*weights, *_BESIDE_WEIGHTS], [*_NEVER, *others]
    return Path(
        snapshot_download(repo_id, allow_patterns=allow, ignore_patterns=ignore, local_files_only=offline)
    )


def _from_cache(repo_id: str, problem: HubError | None) -> tuple[Path, str]:
    """Return a snapshot of the cache, where the hub did not answer (``problem``) or is not asked.

    The library refuses one that lacks a file of its list; opening one without a list finds what is missing.
    """
    from huggingface_hub.errors import IncompleteSnapshotError, LocalEntryNotFoundError

    partly = ""
    for weights in ("model.safetensors", "pytorch_model.bin"):
        try:
            folder = _call_library(repo_id, [weights], offline=True)
        except IncompleteSnapshotError as gaps:
            found = re.search(r"\d+ file\(s\) are missing \(.*?\)", str(gaps))
            partly = partly or (found[0] if found else "files are missing")
            continue
        except LocalEntryNotFoundError:
            continue
        if not any(folder.glob("*" + Path(weights).suffix)):
            continue
        why = "HF_HUB_OFFLINE is set" if problem is None else problem.what
        return folder, f"{repo_id} at {folder.name[:12]} from the cache, {folder}: {why}"
    gap = f"; what is in the cache is not whole: {partly}" if partly else ""
    if problem is not None:
        problem.what += gap
        raise problem
    raise HubError(
        f"{repo_id} is not (wholly) in the cache, and HF_HUB_OFFLINE forbids to download it{gap}",
        where="HF_HUB_OFFLINE",
        hint=f"unset HF_HUB_OFFLINE and run again, {_OR_LOCAL}",
    )


_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN to a token that may read it"
_ANSWERS: dict[int, tuple[str, str]] = {
    401: (
        "{id} does not exist, or is private and you are not known",
        f"check the spelling; {_LOG_IN}",
    ),
    403: ("no access to {id}", _LOG_IN),
    404: ("{id} was not found", f"check the spelling, {_OR_LOCAL}"),
    429: ("the hub asks to slow down", f"wait some minutes; {_LOG_IN}"),
}


def _explain(error: HfHubHTTPError, repo_id: str) -> HubError:
    """Build the ``HubError`` for an HTTP answer of the hub."""
    from huggingface_hub.errors import GatedRepoError

    status = error.response.status_code
    if isinstance(error, GatedRepoError):
        what = "{id} is gated: its owner gives access on request"
        hint = f"accept its terms on its page, then {_LOG_IN}"
    elif status >= 500:
        what, hint = f"the hub is out of order ({status})", f"run the same command again later, {_OR_LOCAL}"
    else:
        refused = (f"the hub refused ({status})", f"check the id and the token, {_OR_LOCAL}")
        what, hint = _ANSWERS.get(status, refused)
    return HubError(what.replace("{id}", repo_id), where=str(error.response.url), hint=hint)
