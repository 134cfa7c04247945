"""A server on this machine that speaks the part of the hub's protocol by which folders are uploaded."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any
from urllib.parse import unquote, urlsplit

from hub_server import HubHandler, serving


@dataclass
class UploadHub:
    """Repositories by name and branch, how the server misbehaves, and what reached it."""

    repos: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    stored: dict[str, bytes] = field(default_factory=dict)  # LFS objects by sha256
    uploads: list[str] = field(default_factory=list)  # sha256 of each object as it came
    commits: list[str] = field(default_factory=list)
    may_write: bool = True
    token: str = "hf_test"  # the only one that it knows
    first: str = "f" * 40  # the commit that made a repository
    first_files: dict[str, bytes] = field(default_factory=dict)  # of that commit
    cut_commits: int = 0  # that many commits are answered with 500
    cut_uploads: int = 0  # that many objects are read by half, and the connection is closed
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


class _Handler(HubHandler):
    hub: UploadHub

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def get(self) -> None:
        path = unquote(urlsplit(self.path).path)
        found = re.fullmatch(
            r"/api/models/([^/]+/[^/]+)(?:/(refs|tree|revision|commits)(?:/([^/]+))?.*)?", path
        )
        repo = found[1] if found else ""
        if repo not in self.hub.repos:
            return self.reply(404, headers={"X-Error-Code": "RepoNotFound"})
        branches = self.hub.repos[repo]
        kind, branch = found[2], found[3] or "main"  # type: ignore[index]
        if kind == "refs":
            refs = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": "0" * 40} for n in branches]
            return self.reply_json({"branches": refs, "tags": [], "converts": []})
        if kind == "commits":
            commits = [self.hub.first, *(f"{number:040}" for number in range(len(self.hub.commits)))]
            facts = {"title": "a commit", "date": "2026-01-01T00:00:00.000Z", "message": "", "authors": []}
            return self.reply_json([{"id": commit, **facts} for commit in reversed(commits)])
        if kind == "tree":
            files = branches[branch]
            listed = [
                {"type": "file", "path": name, "size": len(data), "oid": "0" * 40}
                for name, data in files.items()
            ]
            return self.reply_json(listed)
        files = branches[branch]
        siblings = [{"rfilename": name} for name in files]
        return self.reply_json({"id": repo, "sha": "0" * 40, "siblings": siblings})

    def post(self) -> None:
        path, body = unquote(urlsplit(self.path).path), self.body()
        if self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self.reply_json({"error": "unknown token"}, 401)
        if not self.hub.may_write:
            return self.reply_json({"error": "this token may not write"}, 403)
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            self.hub.repos[name] = {"main": {".gitattributes": b""}}
            if asked.get("private") or asked.get("visibility") == "private":
                self.hub.private.add(name)
            return self.reply_json({"url": f"{self.hub.url}/{name}"})
        if path == "/api/validate-yaml":
            return self.reply_json({"errors": [], "warnings": []})
        if found := re.fullmatch(r"/api/models/(.+)/branch/(.+)", path):
            branches = self.hub.repos[found[1]]
            started = json.loads(body or b"{}").get("startingPoint")
            branches[found[2]] = (
                {".gitattributes": b"", **self.hub.first_files}
                if started == self.hub.first
                else {**branches["main"]}
            )
            return self.reply_json({})
        if re.fullmatch(r"/api/models/(.+)/preupload/(.+)", path):
            files = json.loads(body)["files"]
            modes = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for f in files
            ]
            return self.reply_json({"files": modes})
        if path.endswith("/info/lfs/objects/batch"):
            objects = []
            for one in json.loads(body)["objects"]:
                entry: dict[str, Any] = {"oid": one["oid"], "size": one["size"]}
                if one["oid"] not in self.hub.stored:
                    entry["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{one['oid']}"}}
                objects.append(entry)
            return self.reply_json({"transfer": "basic", "objects": objects})
        if found := re.fullmatch(r"/api/models/(.+)/commit/(.+)", path):
            return self.commit(found[1], found[2], body)
        return self.reply_json({"error": path}, 404)

    def commit(self, repo: str, branch: str, body: bytes) -> None:
        if self.hub.cut_commits:
            self.hub.cut_commits -= 1
            return self.reply_json({"error": "later"}, 500)
        files = self.hub.repos[repo][branch]
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                self.hub.commits.append(value["summary"])
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.stored[value["oid"]]
        return self.reply_json({"commitUrl": f"{self.hub.url}/{repo}/commit/1", "commitOid": "1" * 40})

    def put(self) -> None:
        if self.hub.cut_uploads:
            self.hub.cut_uploads -= 1
            self.rfile.read(int(self.headers["Content-Length"]) // 2)
            self.close_connection = True
            return
        data = self.body()
        digest = sha256(data).hexdigest()
        assert self.path.endswith(digest)
        self.hub.stored[digest] = data
        self.hub.uploads.append(digest)
        self.reply(200)


@contextmanager
def serve_uploads() -> Iterator[UploadHub]:
    """Yield the state of a server that runs until the block ends."""
    hub = UploadHub()
    with serving(_Handler, hub=hub) as hub.port:
        yield hub
