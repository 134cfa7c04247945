"""A server on loopback with OpenAI's interface, which misbehaves in every way a real one does."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from qwenq import http
from qwenq.evals.endpoint import CONCURRENCY, RemoteModel
from qwenq.evals.task import Write

FINISHED = "stop"


class Server(ThreadingHTTPServer):
    """Answers a chat with its last message in capitals; ``trouble`` says what goes wrong, in order."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.trouble: list[str] = []
        self.seen: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.keys: list[str | None] = []
        self.busy = self.most_busy = 0
        self.pause = 0.0
        self.retry_after = ""
        self.refuses: tuple[str, ...] = ()
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, *_: Any) -> None:
        """A client that gave up is no news."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._send(200, {"data": [{"id": "big/model"}]})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.seen.append(asked)
            self.server.paths.append(self.path)
            self.server.keys.append(self.headers.get("Authorization"))
            self.server.busy += 1
            self.server.most_busy = max(self.server.most_busy, self.server.busy)
            trouble = self.server.trouble.pop(0) if self.server.trouble else ""
        time.sleep(self.server.pause)
        with self.server.lock:  # before the answer: whoever has it may ask again at once
            self.server.busy -= 1
        self._answer(asked, trouble)

    def _answer(self, asked: dict[str, Any], trouble: str) -> None:
        if unknown := [name for name in self.server.refuses if name in asked]:
            self._send(400, {"error": {"message": f"Unrecognized request argument supplied: {unknown[0]}"}})
        elif trouble.isdigit():
            self._send(int(trouble), {"error": {"message": f"trouble {trouble}"}})
        elif trouble == "silent":
            time.sleep(1.0)
        elif trouble == "hang up":
            self.connection.close()
        elif trouble == "half":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices": [{"mess')
        elif trouble == "no json":
            self._send(200, "<html>")
        elif trouble == "no answer":
            self._send(200, {"choices": []})
        elif trouble == "parts":
            parts = [{"type": "text", "text": "YES"}]
            self._send(200, _reply({"message": {"role": "assistant", "content": parts}}))
        elif trouble == "redirect":
            self.send_response(302)
            self.send_header("Location", "http://127.0.0.1:9/elsewhere")
            self.end_headers()
        elif "messages" in asked:
            text = asked["messages"][-1]["content"].upper()
            self._send(200, _reply({"message": {"role": "assistant", "content": text}}))
        else:
            self._send(200, _reply({"text": asked["prompt"].upper()}))

    def _send(self, status: int, content: Any) -> None:
        body = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        self.send_response(status)
        if status == 429 and self.server.retry_after:
            self.send_header("Retry-After", self.server.retry_after)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _reply(choice: dict[str, Any]) -> dict[str, Any]:
    usage = {"prompt_tokens": 7, "completion_tokens": 3}
    return {"choices": [{"finish_reason": FINISHED, **choice}], "usage": usage}


def at(
    server: Server, *, model: str = "big/model", concurrency: int = CONCURRENCY, **changes: Any
) -> RemoteModel:
    found = http.Server(server.url, **{"timeout": 0.3, "pause": 0.001, **changes})
    return RemoteModel(found, model, concurrency)


def chat(text: str) -> Write:
    return Write(({"role": "user", "content": text},), 32)
