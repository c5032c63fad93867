"""A Hub on 127.0.0.1, in memory: as much of its HTTP interface as huggingface_hub needs to publish, fetch and search.

Faults can be asked for beforehand: the next request that fits one fails in the way it says.
"""

import base64
import hashlib
import json
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from _hub_state import KINDS, LARGE, Hub, RefusalError, Repository, described, git_hash


@contextmanager
def serving() -> Iterator[Hub]:
    """A Hub that answers, inside."""
    hub = Hub()
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Silent about a client that has gone: some tests make it go."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or every answer waits 40 ms for the other side

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def _serve(self) -> None:
        parts = urlsplit(self.path)
        self.query = parse_qs(parts.query)
        self.hub.requests.append((self.command, self.path))
        self.fault = self.hub.take_fault(self.command, self.path)
        kind = self.fault.kind if self.fault else ""
        if kind == "cut":
            return self._cut(half_read=True)
        body = self._body()
        if self.fault is not None and kind == "slow":
            time.sleep(self.fault.seconds)
        try:
            if self.fault is not None and kind == "status":
                raise RefusalError(self.fault.status, f"asked to answer {self.fault.status}")
            with self.hub.lock:
                handler, groups = self._route(parts.path)
                answer = handler(self, body, *groups)
        except RefusalError as refusal:
            headers = {"X-Error-Message": str(refusal)} | ({"X-Error-Code": refusal.code} if refusal.code else {})
            return self._answer(json.dumps({"error": str(refusal)}).encode(), headers, refusal.status)
        if kind == "lost":
            return self._cut()
        if isinstance(answer, tuple):
            return self._file(*answer)
        self._answer(json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _route(self, path: str) -> tuple[Callable[..., Any], list[str]]:
        for method, pattern, handler in ROUTES:
            found = re.fullmatch(pattern, path)
            if found and method == self.command:
                return handler, [unquote(group) for group in found.groups()]
        raise RefusalError(404, f"no such route: {self.command} {path}")

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _cut(self, half_read: bool = False) -> None:
        if half_read:
            self.rfile.read(int(self.headers.get("Content-Length") or 0) // 2)
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _answer(self, content: bytes, headers: dict[str, str], status: int = 200, length: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _file(self, content: bytes, headers: dict[str, str]) -> None:
        """With ranges, and with the faults that a download can have."""
        kind = self.fault.kind if self.fault else ""
        whole, status = content, 200
        if kind == "short":
            content = content[: len(content) // 2]
        if kind == "wrong":
            middle = len(content) // 2
            content = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked and kind != "no ranges":
            start, status = int(asked[1]), 206
            stop = min(int(asked[2] or len(whole)) + 1, len(whole))
            headers = {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(whole)}"}
            content = content[start:stop]
        self.hub.sent.append((self.path, len(content)))
        if kind == "half":
            self._answer(content[: len(content) // 2], headers, status, len(content))
            return self._cut()
        self._answer(content, headers, status)

    def who(self) -> dict[str, Any] | None:
        """Whose token came along."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.tokens:
            raise RefusalError(401, "Invalid credentials in Authorization header")
        return self.hub.tokens.get(token)

    def may_write(self, owner: str, proposal: bool = False) -> None:
        """Refuse who may not."""
        who = self.who()
        if who is None:
            raise RefusalError(401, "Invalid username or password.")
        own = owner in (who["name"], *(org["name"] for org in who["orgs"] if org["roleInOrg"] != "read"))
        if who["auth"]["accessToken"]["role"] == "read" or not (own or proposal):
            raise RefusalError(403, f"You don't have the rights to write to {owner}")

    def repository(self, kind: str, owner: str, name: str) -> Repository:
        """One that the asker may see."""
        who = self.who()
        found = self.hub.repositories.get((KINDS[kind], f"{owner}/{name}"))
        if found is None or (found.private and (who is None or who["name"] != owner)):
            raise RefusalError(401 if who is None else 404, "Repository not found", "RepoNotFound")
        return found

    def at(self, kind: str, owner: str, name: str, revision: str) -> tuple[Repository, str]:
        """A repository and a commit of it."""
        found = self.repository(kind, owner, name)
        sha = found.resolve(revision)
        if sha is None:
            raise RefusalError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found, sha


def _whoami(ask: _Handler, body: bytes) -> Any:
    who = ask.who()
    if who is None:
        raise RefusalError(401, "Invalid username or password.")
    return who


def _create(ask: _Handler, body: bytes) -> Any:
    wanted = json.loads(body)
    owner = wanted.get("organization") or (ask.who() or {}).get("name", "")
    ask.may_write(owner)
    name, kind = f"{owner}/{wanted['name']}", wanted.get("type") or "model"
    if (kind, name) in ask.hub.repositories:
        raise RefusalError(409, f"You already created this {kind} repo")
    ask.hub.add(name, kind, private=wanted.get("visibility") == "private" or bool(wanted.get("private")))
    return {"url": f"{ask.hub.url}/{name}", "name": name}


def _validate(ask: _Handler, body: bytes) -> Any:
    licence = yaml.safe_load(json.loads(body)["content"].split("---")[1]).get("license")
    if licence == "no-such-licence":
        raise RefusalError(400, '"license" must be one of [apache-2.0, mit, ...]')
    return {"errors": [], "warnings": []}


def _info(ask: _Handler, body: bytes, kind: str, owner: str, name: str, revision: str = "main") -> Any:
    found, sha = ask.at(kind, owner, name, revision)
    siblings = [
        {"rfilename": path, "size": found.sizes.get(path, len(data))} for path, data in found.commits[sha].items()
    ]
    return {"id": found.name, "sha": sha, "private": found.private, "tags": found.card_tags(), "siblings": siblings}


def _list(ask: _Handler, body: bytes) -> Any:
    search, tags = ask.query.get("search", [""])[0].lower(), set(ask.query.get("filter", []))
    return [
        {
            "id": found.name,
            "tags": found.card_tags(),
            "downloads": len(found.commits),
            "likes": 0,
            "lastModified": "2025-01-02T03:04:05.000Z",
        }
        for (kind, name), found in ask.hub.repositories.items()
        if kind == "model" and not found.private and search in name.lower() and tags <= set(found.card_tags())
    ][: int(ask.query.get("limit", ["1000"])[0])]


def _tree(ask: _Handler, body: bytes, kind: str, owner: str, name: str, revision: str) -> Any:
    found, sha = ask.at(kind, owner, name, revision)
    return [described(path, content) for path, content in found.commits[sha].items()]


def _refs(ask: _Handler, body: bytes, kind: str, owner: str, name: str) -> Any:
    found = ask.repository(kind, owner, name)

    def listed(refs: dict[str, str], prefix: str = "") -> list[dict[str, str]]:
        return [{"name": ref, "ref": prefix + ref, "targetCommit": sha} for ref, sha in refs.items()]

    branches = {ref: sha for ref, sha in found.refs.items() if not ref.startswith("refs/")}
    requests = {ref: sha for ref, sha in found.refs.items() if ref.startswith("refs/")}
    heads, tags = listed(branches, "refs/heads/"), listed(found.tags, "refs/tags/")
    return {"branches": heads, "converts": [], "tags": tags, "pullRequests": listed(requests)}


def _branch(ask: _Handler, body: bytes, kind: str, owner: str, name: str, branch: str) -> Any:
    ask.may_write(owner)
    found = ask.repository(kind, owner, name)
    if branch in found.refs:
        raise RefusalError(409, "Reference already exists")
    found.refs[branch] = found.refs["main"]
    return {}


def _preupload(ask: _Handler, body: bytes, kind: str, owner: str, name: str, revision: str) -> Any:
    ask.may_write(owner, proposal="create_pr" in ask.query)
    found, sha = ask.at(kind, owner, name, revision)
    files = []
    for wanted in json.loads(body)["files"]:
        path, old = wanted["path"], found.commits[sha].get(wanted["path"])
        mode = "lfs" if path.endswith(LARGE) else "regular"
        oid = None if old is None else described(path, old).get("lfs", {}).get("oid", git_hash(old))
        files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
    return {"files": files}


def _batch(ask: _Handler, body: bytes, owner: str, name: str) -> Any:
    ask.may_write(owner, proposal=True)
    objects = []
    for wanted in json.loads(body)["objects"]:
        entry = {"oid": wanted["oid"], "size": wanted["size"]}
        if wanted["oid"] not in ask.hub.objects:
            upload = {"href": f"{ask.hub.url}/storage/{wanted['oid']}", "header": {}}
            entry["actions"] = {"upload": upload, "verify": {"href": f"{ask.hub.url}/storage/verify"}}
        objects.append(entry)
    return {"transfer": "basic", "objects": objects}


def _store(ask: _Handler, body: bytes, oid: str) -> Any:
    if hashlib.sha256(body).hexdigest() != oid:
        raise RefusalError(400, "The object is not what it was announced as")
    ask.hub.objects[oid] = body
    return {}


def _verify(ask: _Handler, body: bytes) -> Any:
    wanted = json.loads(body)
    if len(ask.hub.objects.get(wanted["oid"], b"")) != wanted["size"]:
        raise RefusalError(404, "Object not found")
    return {}


def _commit(ask: _Handler, body: bytes, kind: str, owner: str, name: str, revision: str) -> Any:
    proposal = "create_pr" in ask.query
    ask.may_write(owner, proposal)
    found, sha = ask.at(kind, owner, name, revision)
    files, header = dict(found.commits[sha]), {}
    for line in map(json.loads, body.splitlines()):
        value = line["value"]
        if line["key"] == "header":
            header = value
        elif line["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            if value["oid"] not in ask.hub.objects:
                raise RefusalError(400, f"LFS object {value['oid']} was never uploaded")
            files[value["path"]] = ask.hub.objects[value["oid"]]
        elif line["key"] == "deletedFile":
            del files[value["path"]]
    if header.get("parentCommit", sha) != sha:
        raise RefusalError(412, "A commit has happened since. Please refresh and try again.")
    number = 1 + sum(ref.startswith("refs/pr/") for ref in found.refs)
    made = found.commit(f"refs/pr/{number}" if proposal else revision, files, header["summary"])
    pull_request = {"pullRequestUrl": f"{ask.hub.url}/{found.name}/discussions/{number}"} if proposal else {}
    return {"commitUrl": f"{ask.hub.url}/{found.name}/commit/{made}", "commitOid": made, **pull_request}


def _resolve(ask: _Handler, body: bytes, owner: str, name: str, revision: str, path: str) -> Any:
    found, sha = ask.at("models", owner, name, revision)
    content = found.commits[sha].get(path)
    if content is None:
        raise RefusalError(404, "Entry not found", "EntryNotFound")
    entry = described(path, content)
    headers = {"ETag": f'"{entry["oid"]}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
    if "lfs" in entry:
        headers |= {"X-Linked-Etag": f'"{entry["lfs"]["oid"]}"', "X-Linked-Size": str(len(content))}
    return content, headers


_REPO = r"/api/(models|datasets|spaces)/([^/]+)/([^/]+)"
ROUTES: list[tuple[str, str, Callable[..., Any]]] = [
    ("GET", "/api/whoami-v2", _whoami),
    ("POST", "/api/repos/create", _create),
    ("POST", "/api/validate-yaml", _validate),
    ("GET", "/api/models", _list),
    ("GET", _REPO, _info),
    ("GET", _REPO + "/revision/([^/]+)", _info),
    ("GET", _REPO + "/tree/([^/]+)", _tree),
    ("GET", _REPO + "/refs", _refs),
    ("POST", _REPO + "/branch/([^/]+)", _branch),
    ("POST", _REPO + "/preupload/([^/]+)", _preupload),
    ("POST", _REPO + "/commit/([^/]+)", _commit),
    ("POST", r"/([^/]+)/([^/]+)\.git/info/lfs/objects/batch", _batch),
    ("PUT", "/storage/([0-9a-f]{64})", _store),
    ("POST", "/storage/verify", _verify),
    ("GET", "/([^/]+)/([^/]+)/resolve/([^/]+)/(.+)", _resolve),
    ("HEAD", "/([^/]+)/([^/]+)/resolve/([^/]+)/(.+)", _resolve),
]
