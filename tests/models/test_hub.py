"""The real hub client against a local server that speaks the hub's URL layout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
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


@pytest.fixture
def hub() -> Iterator[Hub]:
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
    yield served
    server.shutdown()
    server.server_close()


CLIENT = """
import json, sys
from qwenq.errors import QwenqError
from qwenq.models.resolve import resolve_model
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


def names_in(answer: dict[str, object]) -> set[str]:
    return {path.name for path in Path(str(answer["folder"])).iterdir()}


def test_downloads_what_a_model_needs_and_no_code(hub: Hub, tmp_path: Path) -> None:
    answer = client(hub, tmp_path)
    assert names_in(answer) == {"config.json", "model.safetensors", "tokenizer.json", "LICENSE"}
    folder = Path(str(answer["folder"]))
    assert folder.is_relative_to(tmp_path)  # HF_HOME is honoured
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert COMMIT[:12] in str(answer["notices"])


def test_second_time_offline_comes_from_the_cache(hub: Hub, tmp_path: Path) -> None:
    first = client(hub, tmp_path)
    hub.asked.clear()
    second = client(hub, tmp_path, HF_HUB_OFFLINE="1")
    assert second["folder"] == first["folder"]
    assert hub.asked == []
    assert "HF_HUB_OFFLINE" in str(second["notices"])


def test_offline_without_a_copy_says_what_to_unset(hub: Hub, tmp_path: Path) -> None:
    answer = client(hub, tmp_path, HF_HUB_OFFLINE="1")
    assert answer["error"] == "HubError"
    assert "unset HF_HUB_OFFLINE" in str(answer["text"])


def test_pickle_is_fetched_only_without_safetensors(hub: Hub, tmp_path: Path) -> None:
    del hub.files["model.safetensors"]
    answer = client(hub, tmp_path)
    assert names_in(answer) == {"config.json", "pytorch_model.bin", "tokenizer.json", "LICENSE"}
    assert client(hub, tmp_path, HF_HUB_OFFLINE="1")["folder"] == answer["folder"]


def test_a_repository_without_weights_is_named(hub: Hub, tmp_path: Path) -> None:
    hub.files = {"config.json": CONFIG, "model.gguf": b"GGUF"}
    assert "no weights" in str(client(hub, tmp_path)["text"])


def test_refusals_say_what_to_do(hub: Hub, tmp_path: Path) -> None:
    says = {
        "refuse/404-RepoNotFound": "check the spelling",
        "refuse/401": "HF_TOKEN",
        "refuse/403": "no access to refuse/403",
        "refuse/403-GatedRepo": "gated",
        "refuse/503": "out of order (503)",
        "refuse/418": "refused (418)",
    }
    answers = clients(hub, tmp_path, list(says))
    for answer, expected in zip(answers, says.values(), strict=True):
        assert answer["error"] == "HubError"
        assert expected in str(answer["text"])
        assert f"127.0.0.1:{hub.port}" in str(answer["text"])


def test_a_token_opens_a_gated_repository(hub: Hub, tmp_path: Path) -> None:
    hub.gated_token = "hf_open"
    assert "gated" in str(client(hub, tmp_path)["text"])
    assert "model.safetensors" in names_in(client(hub, tmp_path, HF_TOKEN="hf_open"))


def test_a_hub_out_of_order_uses_the_cache_aloud(hub: Hub, tmp_path: Path) -> None:
    first = client(hub, tmp_path)
    hub.status = 503
    second = client(hub, tmp_path)
    assert second["folder"] == first["folder"]
    assert "out of order (503)" in str(second["notices"])


def test_no_network_is_said(hub: Hub, tmp_path: Path) -> None:
    answer = client(hub, tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert answer["error"] == "HubError"
    assert "could not be reached" in str(answer["text"])


def test_a_dropped_connection_resumes_within_the_run(hub: Hub, tmp_path: Path) -> None:
    hub.cuts = 1
    hub.files["model.safetensors"] = WEIGHTS * 24  # the library keeps what came in chunks of 10 MB
    answer = client(hub, tmp_path)
    assert (Path(str(answer["folder"])) / "model.safetensors").read_bytes() == WEIGHTS * 24
    gets = [(path, wanted) for method, path, wanted in hub.asked if method == "GET"]
    ranges = [wanted for path, wanted in gets if path.endswith("model.safetensors")]
    assert len(ranges) == 2
    assert ranges[1].startswith("bytes=") and ranges[1] != "bytes=0-"  # the second half alone


def test_a_download_that_died_continues_with_the_next_run(hub: Hub, tmp_path: Path) -> None:
    hub.cuts, hub.down = 1, True
    answer = client(hub, tmp_path)
    assert answer["error"] == "HubError"
    assert "broke off" in str(answer["text"]) and "run the same command again" in str(answer["text"])
    hub.status, hub.down = 200, False
    before = set(hub.sent)
    hub.sent.clear()
    again = client(hub, tmp_path)
    assert (Path(str(again["folder"])) / "model.safetensors").read_bytes() == WEIGHTS
    assert not before & set(hub.sent)  # what was whole is not fetched twice


def broken_off(hub: Hub, home: Path, file: str) -> None:
    """A run whose download dies in the middle of this file, when all others are there."""
    hub.cut_file, hub.cuts, hub.down = file, 1, True
    answer = client(hub, home)
    assert "broke off" in str(answer["text"])
    assert hub.sent_all_but(file)


def make_two_shards(hub: Hub) -> None:
    parts = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    del hub.files["model.safetensors"]
    for number, part in enumerate(parts):
        hub.files[part] = save({f"model.layers.{number}.weight": torch.full((64, 64), float(number))})
    owners = {f"model.layers.{number}.weight": part for number, part in enumerate(parts)}
    hub.files["model.safetensors.index.json"] = json.dumps({"weight_map": owners}).encode()


@pytest.mark.parametrize(
    "file",
    [
        "model-00002-of-00002.safetensors",
        "tokenizer.json",
        pytest.param("model.safetensors", marks=pytest.mark.slow),
        pytest.param("config.json", marks=pytest.mark.slow),
    ],
)
def test_what_a_broken_download_left_is_never_taken_for_the_model(
    hub: Hub, tmp_path: Path, file: str
) -> None:
    """Not offline, and not while the hub is out of order; then it goes on where it broke."""
    if "-of-" in file:
        make_two_shards(hub)
    broken_off(hub, tmp_path, file)
    hub.down = False
    for said, environment in (
        ("not (wholly) in the cache", {"HF_HUB_OFFLINE": "1"}),
        ("out of order (503)", {}),
    ):
        answer = client(hub, tmp_path, **environment)
        assert answer.get("error") == "HubError", answer
        assert said in str(answer["text"])
        assert f"what is in the cache is not whole: 1 file(s) are missing ({file})" in str(answer["text"])
    hub.status = 200
    whole = Path(str(client(hub, tmp_path)["folder"]))
    assert (whole / file).read_bytes() == hub.files[file]


@pytest.mark.parametrize("lost", ["config.json", "model-00001-of-00002.safetensors", "the index and a shard"])
def test_what_another_program_left_is_judged_by_what_its_files_say(
    hub: Hub, tmp_path: Path, lost: str
) -> None:
    make_two_shards(hub)
    folder = Path(str(client(hub, tmp_path)["folder"]))
    gone = ["model.safetensors.index.json", "model-00001-of-00002.safetensors"] if " " in lost else [lost]
    for name in gone:
        (folder / name).unlink()
    shutil.rmtree(folder.parents[1] / "trees")  # older versions of the library keep no list
    answer = client(hub, tmp_path, HF_HUB_OFFLINE="1")
    assert answer.get("error") == "HubError", answer
    assert "not whole" in str(answer["text"])


def test_a_file_of_the_cache_that_was_cut_is_not_a_model(hub: Hub, tmp_path: Path) -> None:
    folder = Path(str(client(hub, tmp_path)["folder"]))
    shutil.rmtree(folder.parents[1] / "trees")
    os.truncate((folder / "model.safetensors").resolve(), len(WEIGHTS) // 2)
    answer = client(hub, tmp_path, HF_HUB_OFFLINE="1")
    assert "cut off" in str(answer["text"])
