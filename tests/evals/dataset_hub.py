"""A local server that speaks the hub's URL layout for data sets, and a client in a process of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha1
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from hub_server import COMMIT, HubHandler, hub_client, serving

Files = Mapping[str, Mapping[str, bytes]]  # by data set, by path


class Handler(HubHandler):
    """Answers about COMMIT, whatever revision is asked for."""

    files: Files

    def post(self) -> None:
        """Facts of the paths in the request."""
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        name = "/".join(urlsplit(self.path).path.split("/")[3:5])
        wanted = json.loads(raw)["paths"] if raw.startswith("{") else parse_qs(raw).get("paths", [])
        self.reply_json([one for one in self.entries(name) if one["path"] in wanted])

    def get(self) -> None:
        path = unquote(urlsplit(self.path).path)
        parts = path.strip("/").split("/")
        is_api = parts[0] == "api"
        name = "/".join(parts[2:4] if is_api else parts[1:3])
        if name not in self.files:
            self.reply(404, headers={"X-Error-Code": "RepoNotFound"})
        elif is_api and parts[4:5] == ["tree"]:
            root = PurePosixPath(*parts[6:])
            self.reply_json([one for one in self.entries(name) if PurePosixPath(one["path"]).parent == root])
        elif is_api:
            siblings = [{"rfilename": one} for one in self.files[name]]
            self.reply_json({"id": name, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []})
        else:
            self.file(self.files[name].get("/".join(parts[5:])))

    def entries(self, name: str) -> list[dict[str, Any]]:
        """Every file, and every folder that one lies in."""
        found = [
            {"type": "file", "path": path, "size": len(data), "oid": sha1(data).hexdigest()}
            for path, data in self.files[name].items()
        ]
        folders = {str(folder) for path in self.files[name] for folder in PurePosixPath(path).parents}
        return found + [{"type": "directory", "path": one, "oid": COMMIT} for one in folders - {"."}]

    def file(self, data: bytes | None) -> None:
        if data is None:
            self.reply(404, headers={"X-Error-Code": "EntryNotFound"})
            return
        headers = {"ETag": f'"{sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
        self.reply(200, data, headers)


@contextmanager
def serve(files: Files) -> Iterator[str]:
    """The address of a hub that holds these files."""
    with serving(Handler, files=files) as port:
        yield f"http://127.0.0.1:{port}"


CLIENT = """
import json, sys
from qwenq.errors import QwenqError
from qwenq.evals.task import DataSource
from qwenq.evals.tasks.registry import get_task
for asked in sys.argv[1:]:
    name, protocol, subject = asked.split(":")
    try:
        items = get_task(name, protocol).items(DataSource(), [subject] if subject else [])
        last = items[-1]
        print(json.dumps({"items": len(items), "id": last.id, "data": last.data, "shots": len(last.shots)}))
    except QwenqError as error:
        print(json.dumps({"error": type(error).__name__, "text": str(error)}))
"""


def ask(address: str, home: Path, asked: list[str]) -> tuple[list[dict[str, Any]], str]:
    """The last item of each TASK:PROTOCOL:SUBJECT, as the hub's libraries give them; and what they said."""
    printed, said = hub_client(CLIENT, asked, address, home)
    return [json.loads(line) for line in printed.splitlines()], said
