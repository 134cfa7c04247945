"""A local server that speaks the hub's URL layout for data sets, and a client in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
Files = Mapping[str, Mapping[str, bytes]]  # by data set, by path


class Handler(BaseHTTPRequestHandler):
    """Answers about COMMIT, whatever revision is asked for."""

    protocol_version = "HTTP/1.1"
    files: Files

    def log_message(self, *_: object) -> None: ...

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def do_POST(self) -> None:
        """Facts of the paths in the request."""
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        name = "/".join(urlsplit(self.path).path.split("/")[3:5])
        wanted = json.loads(raw)["paths"] if raw.startswith("{") else parse_qs(raw).get("paths", [])
        self.reply_json([one for one in self.entries(name) if one["path"] in wanted])

    def answer(self, *, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        parts = path.strip("/").split("/")
        is_api = parts[0] == "api"
        name = "/".join(parts[2:4] if is_api else parts[1:3])
        if name not in self.files:
            self.reply(404, b"", {"X-Error-Code": "RepoNotFound"})
        elif is_api and parts[4:5] == ["tree"]:
            root = PurePosixPath(*parts[6:])
            self.reply_json([one for one in self.entries(name) if PurePosixPath(one["path"]).parent == root])
        elif is_api:
            siblings = [{"rfilename": one} for one in self.files[name]]
            self.reply_json({"id": name, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []})
        else:
            self.file(self.files[name].get("/".join(parts[5:])), body=body)

    def entries(self, name: str) -> list[dict[str, Any]]:
        """Every file, and every folder that one lies in."""
        found = [
            {"type": "file", "path": path, "size": len(data), "oid": sha1(data).hexdigest()}
            for path, data in self.files[name].items()
        ]
        folders = {str(folder) for path in self.files[name] for folder in PurePosixPath(path).parents}
        return found + [{"type": "directory", "path": one, "oid": COMMIT} for one in folders - {"."}]

    def file(self, data: bytes | None, *, body: bool) -> None:
        if data is None:
            self.reply(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        headers = {"ETag": f'"{sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
        self.reply(200, data if body else b"", headers, len(data))

    def reply_json(self, value: object) -> None:
        self.reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def reply(self, status: int, data: bytes, headers: dict[str, str], length: int | None = None) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def serve(files: Files) -> Iterator[str]:
    """The address of a hub that holds these files."""
    handler = type("FilesHandler", (Handler,), {"files": files})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


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
    """The last item of each TASK:PROTOCOL:SUBJECT, as the libraries of the hub give them; and what they said.

    A process of its own: these libraries read their environment when they are imported.
    """
    keep = {key: os.environ[key] for key in ("PATH", "SYSTEMROOT", "LD_LIBRARY_PATH") if key in os.environ}
    env = keep | {
        "HF_HOME": str(home),
        "HF_ENDPOINT": address,
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": os.pathsep.join(
            [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
        ),
        "HOME": str(home),
        "NO_PROXY": "127.0.0.1",
    }
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, *asked], env=env, cwd=home, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr
