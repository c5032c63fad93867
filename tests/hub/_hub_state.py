"""What the Hub in `hub_server` holds: users, repositories, large files, and the faults that are still to happen."""

import hashlib
import re
import threading
from dataclasses import dataclass, field
from typing import Any

import yaml

KINDS = {"models": "model", "datasets": "dataset", "spaces": "space"}
LARGE = (".safetensors", ".png", ".bin", ".pkl")


@dataclass
class Fault:
    """What goes wrong with a request.

    Attributes:
        method: of the request.
        path: regular expression that its path has to contain.
        kind: "status" (answered with it), "cut" (no answer; the half of a body has arrived), "lost" (done, but not
            answered), "half" (a download that breaks off), "short" (one that is half as long, and says so), "wrong"
            (one with a flipped bit), or "slow".
        status: for "status".
        seconds: for "slow".
        times: how many requests it hits.
    """

    method: str
    path: str
    kind: str = "status"
    status: int = 500
    seconds: float = 0.0
    times: int = 1


@dataclass
class Repository:
    """One repository: what each commit holds, and what points to it."""

    kind: str
    name: str
    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    titles: dict[str, str] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)  # "main", "refs/pr/1"
    tags: dict[str, str] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)  # of files that are said to be of another size

    def commit(self, ref: str, files: dict[str, bytes], title: str) -> str:
        """All of a new tree at once."""
        sha = hashlib.sha1(repr((self.name, len(self.commits), title, files)).encode()).hexdigest()
        self.commits[sha], self.titles[sha], self.refs[ref] = files, title, sha
        return sha

    def resolve(self, revision: str) -> str | None:
        """The commit of a branch, tag or commit."""
        return self.refs.get(revision) or self.tags.get(revision) or (revision if revision in self.commits else None)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """What is there."""
        return self.commits[self.resolve(revision) or ""]

    @property
    def front(self) -> dict[str, Any]:
        """The card's front matter."""
        text = self.files().get("README.md", b"").decode()
        return yaml.safe_load(text.split("---")[1]) if text.startswith("---") else {}

    def card_tags(self) -> list[str]:
        """As the Hub derives them."""
        front = self.front
        base, relation = front.get("base_model"), front.get("base_model_relation")
        own = [f"base_model:{base}", f"base_model:{relation}:{base}"] if base else []
        return [*front.get("tags", []), *own]


class RefusalError(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.code = status, code


class Hub:
    """The server, and what it holds.

    Attributes:
        tokens: by token, what whoami says of it.
        repositories: by kind and name.
        objects: large files, by SHA-256.
        faults: still to happen.
        sent: path and bytes of each answer with a file, or a part of one.
        requests: method and path of everything that was asked.
    """

    def __init__(self) -> None:
        self.tokens: dict[str, dict[str, Any]] = {}
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.sent: list[tuple[str, int]] = []
        self.requests: list[tuple[str, str]] = []
        self.lock = threading.RLock()
        self.url = ""

    def add_token(self, token: str, name: str, role: str = "write", orgs: dict[str, str] | None = None) -> None:
        """Let somebody in; `orgs` are roles by organisation."""
        self.tokens[token] = {
            "type": "user",
            "name": name,
            "orgs": [{"name": org, "roleInOrg": role_there} for org, role_there in (orgs or {}).items()],
            "auth": {"type": "access_token", "accessToken": {"displayName": "test", "role": role}},
        }

    def add(self, name: str, kind: str = "model", private: bool = False, **files: bytes) -> Repository:
        """A repository that is there already."""
        found = Repository(kind, name, private)
        found.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n", **files}, "initial commit")
        self.repositories[kind, name] = found
        return found

    def model(self, name: str) -> Repository:
        """A model repository."""
        return self.repositories["model", name]

    def fail(self, method: str, path: str, kind: str = "status", **options: Any) -> None:
        """Ask for a fault."""
        self.faults.append(Fault(method, path, kind, **options))

    def take_fault(self, method: str, path: str) -> Fault | None:
        """The fault for this request, if there is one."""
        with self.lock:
            for fault in self.faults:
                if fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    if fault.times <= 0:
                        self.faults.remove(fault)
                    return fault
        return None

    def count(self, method: str, path: str) -> int:
        """How many requests of that kind came."""
        return sum(asked == method and re.search(path, where) is not None for asked, where in self.requests)


def git_hash(content: bytes) -> str:
    """How git names a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def described(path: str, content: bytes) -> dict[str, Any]:
    """A file as the tree and the paths-info of a repository list it."""
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": git_hash(content)}
    if path.endswith(LARGE):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return entry
