"""A local server that speaks the hub's URL layout, and clients of it: processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import torch
from safetensors.torch import save

REPO = "tiny/llama"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = save({"model.embed_tokens.weight": torch.arange(1 << 18, dtype=torch.float32).reshape(512, 512)})
CONFIG = json.dumps({"model_type": "llama"}).encode()


@dataclass
class Hub:
    """What the server serves, how it misbehaves, and what it was asked."""

    files: dict[str, bytes]
    port: int = 0
    status: int = 200
    gated_token: str = ""
    cut_file: str = "model.safetensors"
    cuts: int = 0  # that many responses of this file end half way
    down: bool = False  # stays cut: every later request for weights fails at once
    asked: list[tuple[str, str, str]] = field(default_factory=list)  # method, path, Range
    sent: list[str] = field(default_factory=list)  # files whose bytes were sent whole

    def sent_all_but(self, name: str) -> bool:
        """Whether everything else that is wanted is on its way out."""
        wanted = {one for one in self.files if not one.endswith((".py", ".bin"))}
        return wanted - {name} <= set(self.sent)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None: ...

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        hub.asked.append((self.command, path, self.headers.get("Range", "")))
        if hub.gated_token and self.headers.get("Authorization") != f"Bearer {hub.gated_token}":
            self.reply(403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"})
        elif hub.status != 200:
            self.reply(hub.status, b"", {})
        elif path.startswith("/api/models/refuse/"):
            status, _, code = path.removeprefix("/api/models/refuse/").split("/")[0].partition("-")
            self.reply(int(status), b"", {"X-Error-Code": code} if code else {})
        elif path in (f"/api/models/{REPO}", f"/api/models/{REPO}/revision/main"):
            siblings = [{"rfilename": name} for name in hub.files]
            self.reply_json({"id": REPO, "modelId": REPO, "sha": COMMIT, "siblings": siblings})
        elif path == f"/api/models/{REPO}/tree/{COMMIT}":
            self.reply_json(
                [
                    {"type": "file", "path": name, "size": len(data), "oid": sha1(data).hexdigest()}
                    for name, data in hub.files.items()
                ]
            )
        elif path.startswith(f"/{REPO}/resolve/{COMMIT}/"):
            self.file(path.rsplit("/", 1)[1], body)
        else:
            self.reply(404, b"", {"X-Error-Code": "RepoNotFound"})

    def file(self, name: str, body: bool) -> None:
        data = self.hub.files[name]
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        headers = {"ETag": f'"{sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        whole = data[start:]
        if body and name == self.hub.cut_file and self.hub.down:
            for _ in range(200):  # until all other files have been sent
                if self.hub.sent_all_but(name):
                    break
                time.sleep(0.05)
            self.hub.status = 503  # from now on nothing works: the machine behind it died
        if body and name == self.hub.cut_file and self.hub.cuts:
            self.hub.cuts -= 1
            self.head(206 if start else 200, len(whole), headers)
            self.wfile.write(whole[: len(whole) // 2])
            self.close_connection = True
            return
        self.reply(206 if start else 200, whole if body else b"", headers, len(whole))
        if body:
            self.hub.sent.append(name)

    def reply_json(self, value: object) -> None:
        self.reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def head(self, status: int, length: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def reply(self, status: int, data: bytes, headers: dict[str, str], length: int | None = None) -> None:
        self.head(status, len(data) if length is None else length, headers)
        self.wfile.write(data)


@contextmanager
def serve() -> Iterator[Hub]:
    served = Hub(
        {
            "config.json": CONFIG,
            "model.safetensors": WEIGHTS,
            "tokenizer.json": b"{}",
            "LICENSE": b"Apache",
            "modeling_tiny.py": b"raise SystemExit('remote code ran')",
            "pytorch_model.bin": b"never fetched beside safetensors",
        }
    )
    handler = type("TinyHandler", (Handler,), {"hub": served})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    served.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()


CLIENT = """
import json, sys
from qwenq.errors import QwenqError
from qwenq.models.opening import resolve_model
for repo in sys.argv[1:]:
    try:
        found = resolve_model(repo)
        print(json.dumps({"folder": str(found.folder), "notices": found.notices}))
    except QwenqError as error:
        print(json.dumps({"error": type(error).__name__, "text": str(error)}))
"""


def client(hub: Hub, home: Path, **extra: str) -> dict[str, object]:
    """What one process gets for the tiny repository."""
    return clients(hub, home, [REPO], **extra)[0]


def clients(hub: Hub, home: Path, repos: list[str], **extra: str) -> list[dict[str, object]]:
    """What a process of its own gets: the hub's library reads its environment when it is imported."""
    keep = {key: os.environ[key] for key in ("PATH", "SYSTEMROOT", "LD_LIBRARY_PATH") if key in os.environ}
    env = keep | {
        "HF_HOME": str(home),
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.port}",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "HOME": str(home),
        "NO_PROXY": "127.0.0.1",
        **extra,
    }
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, *repos], env=env, cwd=home, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]
