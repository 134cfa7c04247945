"""A server on loopback that streams completions, and misbehaves in the ways of real ones."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Body = dict[str, Any]


class Server(ThreadingHTTPServer):
    """Streams as many tokens as it is asked for, one a chunk.

    Attributes:
        first, between: seconds before the first token and between two.
        trouble: what goes wrong with streamed requests, in order; the last one "…" repeats the one before.
        refuses: options that it answers with status 400.
        usage: what it reports for (prompt tokens, tokens): see ``honest``.
        beginning: tokens that it counts in a prompt besides its words.
        owner: who owns the models, by their list.
        ends_at: tokens after which its model ends, where the request does not ignore that.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.first, self.between = 0.002, 0.0005
        self.owner: str | None = "vllm"
        self.trouble: list[str] = []
        self.refuses: tuple[str, ...] = ()
        self.usage: Any = honest
        self.beginning = 1
        self.ends_at: int | None = None
        self.ignores_eos = True
        self.streamed: list[Body] = []
        self.probes: list[Body] = []
        self.keys: set[str | None] = set()
        self.busy = self.most_busy = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def next_trouble(self) -> str:
        if self.trouble[1:] == ["…"]:
            return self.trouble[0]
        return self.trouble.pop(0) if self.trouble else ""

    def handle_error(self, *_: Any) -> None:
        """A client that gave up is no news."""


def honest(prompt: int, tokens: int) -> Body | None:
    return {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.0"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._send(200, {"data": [{"id": "big/model-GPTQ-Int4", "owned_by": self.server.owner}]})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.keys.add(self.headers.get("Authorization"))
            trouble = server.next_trouble() if asked["stream"] else ""
            (server.streamed if asked["stream"] else server.probes).append(asked)
            self.counted = asked["stream"]
            server.busy += self.counted
            server.most_busy = max(server.most_busy, server.busy)
        try:
            self._reply(asked, trouble)
        finally:
            self._done()

    def _done(self) -> None:
        with self.server.lock:
            self.server.busy -= self.counted
            self.counted = False

    def _reply(self, asked: Body, trouble: str) -> None:
        prompt = len(asked["prompt"].split()) + self.server.beginning
        if unknown := [name for name in self.server.refuses if name in asked]:
            self._send(400, {"error": {"message": f"Extra inputs are not permitted: {unknown[0]}"}})
        elif trouble.isdigit():
            self._send(int(trouble), {"error": {"message": f"trouble {trouble}"}})
        elif trouble == "json" or not asked["stream"]:
            usage = self.server.usage(prompt, 1)
            self._send(200, {"choices": [{"text": "a"}], **({"usage": usage} if usage else {})})
        elif trouble == "hang up":
            self.connection.close()
        else:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream; charset=utf-8")
            self.end_headers()
            for data in self._events(asked, prompt, trouble):
                self.wfile.write(b"data: " + data.encode() + b"\r\n\r\n")
                self.wfile.flush()

    def _events(self, asked: Body, prompt: int, trouble: str) -> Iterator[str]:
        count = asked["max_tokens"]
        if self.server.ends_at is not None and not (asked.get("ignore_eos") and self.server.ignores_eos):
            count = min(count, self.server.ends_at)
        if trouble == "forever":
            count = 10**6
        time.sleep(self.server.first)
        for number in range(count):
            if trouble == "stall" and number == 2:
                time.sleep(2)
            if trouble == "drop" and number == 2:
                return
            if trouble == "error" and number == 2:
                yield json.dumps({"error": {"message": "out of memory"}})
                return
            if trouble == "garbage" and number == 2:
                yield "{half"
            yield json.dumps({"choices": [{"index": 0, "text": " a", "finish_reason": None}], "usage": None})
            time.sleep(self.server.between if trouble != "forever" else 0)
        yield json.dumps({"choices": [{"index": 0, "text": "", "finish_reason": "length"}]})
        usage = self.server.usage(prompt, count)
        if usage and (asked.get("stream_options") or {}).get("include_usage"):
            yield json.dumps({"choices": [], "usage": usage})
        self._done()  # before the end is sent: whoever has it may ask again at once
        yield "[DONE]"

    def _send(self, status: int, content: Any) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
