"""A local server that speaks the hub's URL layout, and clients of it: processes of their own."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha1
from pathlib import Path
from urllib.parse import unquote, urlsplit

import torch
from hub_server import COMMIT, HubHandler, hub_client, serving
from safetensors.torch import save

REPO = "tiny/llama"
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


class Handler(HubHandler):
    hub: Hub

    def get(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        hub.asked.append((self.command, path, self.headers.get("Range", "")))
        if hub.gated_token and self.headers.get("Authorization") != f"Bearer {hub.gated_token}":
            self.reply(403, headers={"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"})
        elif hub.status != 200:
            self.reply(hub.status)
        elif path.startswith("/api/models/refuse/"):
            status, _, code = path.removeprefix("/api/models/refuse/").split("/")[0].partition("-")
            self.reply(int(status), headers={"X-Error-Code": code} if code else {})
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
            self.file(path.rsplit("/", 1)[1], body=self.command == "GET")
        else:
            self.reply(404, headers={"X-Error-Code": "RepoNotFound"})

    def file(self, name: str, *, body: bool) -> None:
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
        self.reply(206 if start else 200, whole, headers)
        if body:
            self.hub.sent.append(name)


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
    with serving(Handler, hub=served) as served.port:
        yield served


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
    """What a process of its own gets."""
    printed, _ = hub_client(CLIENT, repos, f"http://127.0.0.1:{hub.port}", home, **extra)
    return [json.loads(line) for line in printed.splitlines()]
