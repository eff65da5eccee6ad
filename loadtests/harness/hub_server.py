"""The Hugging Face Hub's HTTP API on this machine, as far as a model repo is made, listed, read and committed to.

    with HubServer(tokens={"hf_ada": User("ada")}) as hub:
        HfApi(endpoint=hub.url, token="hf_ada").create_repo("ada/edits")
        hub.repos["ada/edits"].commit({"note.txt": b"written by its owner, past every check of the API"})

It answers what huggingface_hub 2.4 asks, and keeps its side honestly: commits form a history, a commit names its parent
or is refused with 412, large files are uploaded by LFS and their digest is checked, tokens decide who sees and writes
what. Large files lie on a second address, as on a CDN, that refuses whoever shows it a token. Not there: Xet, multipart
uploads, pull requests, copying and deleting, gated repos, limits of rate.
"""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import json
import re
import secrets
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import parse_qs, quote, unquote, urlsplit

import yaml

GITATTRIBUTES = b"*.bin filter=lfs diff=lfs merge=lfs -text\n*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
LFS_THRESHOLD = 10 << 20
MAX_SECONDS = 30
POLL_SECONDS = 0.02


@dataclass(frozen=True)
class User:
    """Who holds a token, and whether it may write."""

    name: str
    may_write: bool = True


@dataclass(frozen=True)
class Blob:
    """A file in a tree: its bytes, or of a large one the pointer that git keeps, with the digest it points to."""

    data: bytes
    lfs: str | None = None
    size: int | None = None
    """what a large file announces"""

    @property
    def oid(self) -> str:
        return git_oid(self.data)

    def as_listed(self, path: str) -> dict[str, Any]:
        size = len(self.data) if self.size is None else self.size
        entry: dict[str, Any] = {"type": "file", "oid": self.oid, "size": size, "path": path}
        if self.lfs is not None:
            entry["lfs"] = {"oid": self.lfs, "size": size, "pointerSize": len(self.data)}
        return entry


Tree = Mapping[str, Blob]


@dataclass(frozen=True)
class Commit:
    """A state of a branch."""

    oid: str
    parent: str | None
    title: str
    description: str
    author: str
    tree: Tree


def git_oid(data: bytes) -> str:
    """The name that git gives to these bytes."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def pointer(digest: str, size: int) -> bytes:
    """What git keeps of a large file."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {size}\n".encode()


@dataclass
class Repo:
    """A repo: commits by oid, branches by name, and the large files that were uploaded to it."""

    name: str
    private: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def __post_init__(self) -> None:
        self.branches["main"] = self._add(None, {".gitattributes": Blob(GITATTRIBUTES)}, "initial commit", "", "system")

    def head(self, branch: str = "main") -> Commit:
        return self.commits[self.branches[branch]]

    def history(self, branch: str = "main") -> list[Commit]:
        """Newest first."""
        found = [self.head(branch)]
        while (parent := found[-1].parent) is not None:
            found.append(self.commits[parent])
        return found

    def resolve(self, revision: str) -> Commit | None:
        return self.commits.get(self.branches.get(revision, revision))

    def content(self, path: str, branch: str = "main") -> bytes:
        blob = self.head(branch).tree[path]
        return blob.data if blob.lfs is None else self.large[blob.lfs]

    def commit(
        self, changes: Mapping[str, bytes | Blob | None], branch: str = "main", title: str = "by hand", author: str = ""
    ) -> Commit:
        """Change files directly, as somebody with git and no scruples does. None deletes."""
        with self.lock:
            tree = dict(self.head(branch).tree)
            for path, change in changes.items():
                if change is None:
                    del tree[path]
                elif isinstance(change, Blob):
                    tree[path] = change
                else:
                    tree[path] = self.large_file(change) if self.is_large(path, len(change)) else Blob(change)
            self.branches[branch] = self._add(self.branches[branch], tree, title, "", author)
            return self.head(branch)

    def large_file(self, data: bytes) -> Blob:
        digest = hashlib.sha256(data).hexdigest()
        self.large[digest] = data
        return Blob(pointer(digest, len(data)), lfs=digest, size=len(data))

    def is_large(self, path: str, size: int) -> bool:
        attributes = self.head().tree[".gitattributes"].data.decode().splitlines()
        patterns = [line.split()[0] for line in attributes if "filter=lfs" in line]
        return size > LFS_THRESHOLD or any(fnmatch.fnmatch(path.rpartition("/")[2], pattern) for pattern in patterns)

    def ignores(self, path: str, branch: str) -> bool:
        ignored = self.head(branch).tree.get(".gitignore")
        rules = ignored.data.decode().split() if ignored else []
        return any(fnmatch.fnmatch(path, rule) or fnmatch.fnmatch(path.rpartition("/")[2], rule) for rule in rules)

    def append(self, branch: str, tree: Tree, header: Mapping[str, str], author: str) -> Commit:
        """A commit on the branch; Moved when the parent that its header names is not the head."""
        with self.lock:
            if not self.branches[branch].startswith(header.get("parentCommit", "")):
                raise Moved
            described = (header["summary"], header["description"], author)
            self.branches[branch] = self._add(self.branches[branch], tree, *described)
            return self.head(branch)

    def _add(self, parent: str | None, tree: Tree, title: str, description: str, author: str) -> str:
        listed = [(path, blob.oid) for path, blob in sorted(tree.items())]
        made = json.dumps([parent, listed, title, description, author, len(self.commits)])
        oid = hashlib.sha1(made.encode(), usedforsecurity=False).hexdigest()
        self.commits[oid] = Commit(oid, parent, title, description, author, dict(tree))
        return oid


class Moved(Exception):
    """The branch is not where the committer believed it to be."""


@dataclass(frozen=True)
class HubRequest:
    """What a client sent, for tests to look at."""

    method: str
    path: str
    body: bytes


@dataclass
class HubAnswer:
    """What is answered to a request."""

    status: int = 200
    body: Any = b""
    headers: dict[str, str] = field(default_factory=dict)


class Refused(Exception):
    """An answer that is no success."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.answer = HubAnswer(status, {"error": message}, headers)


class HubServer:
    """The Hub at `url`, and its large files at another address. A context manager: it serves inside."""

    def __init__(self, tokens: Mapping[str, User], *, page: int = 1000) -> None:
        self.tokens = dict(tokens)
        self.repos: dict[str, Repo] = {}
        self.requests: list[HubRequest] = []
        self.page = page
        """how many entries a listing answers at once"""
        self.before: Callable[[HubRequest], None] = lambda _: None
        """told of a request before it is looked at: the place for somebody else to be faster"""
        self.fail: Callable[[HubRequest], HubAnswer | None] = lambda _: None
        """may answer in place of the Hub"""
        self.lose: Callable[[HubRequest], bool] = lambda _: False
        """whether the answer to a request, although it was done, gets lost on the way"""
        self._uploads: dict[str, tuple[Repo, str, int]] = {}
        self._hub = _serve(self._answer_hub, self._loses)
        self._cdn = _serve(self._answer_cdn, self._loses)

    @property
    def url(self) -> str:
        return _url(self._hub)

    @property
    def cdn_url(self) -> str:
        """By another host name: the client keeps its token to itself where the host is not the Hub's."""
        return _url(self._cdn).replace("127.0.0.1", "localhost")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for server in (self._hub, self._cdn):
            server.shutdown()
            server.server_close()

    def add(self, name: str, *, private: bool = False) -> Repo:
        self.repos[name] = Repo(name, private)
        return self.repos[name]

    def sent(self, method: str, pattern: str) -> list[HubRequest]:
        """Requests whose method and path fit regular expressions."""
        return [each for each in self.requests if re.fullmatch(method, each.method) and re.search(pattern, each.path)]

    def _loses(self, request: HubRequest) -> bool:
        return self.lose(request)

    # -- answers -------------------------------------------------------------------------------------------------------

    def _answer_hub(self, request: HubRequest, headers: Mapping[str, str]) -> HubAnswer:
        self.requests.append(request)
        self.before(request)
        failure = self.fail(request)
        if failure is not None:
            return failure
        user = self._user(headers)
        address = urlsplit(request.path)
        parts = [unquote(part) for part in address.path.strip("/").split("/")]
        query = {key: values[0] for key, values in parse_qs(address.query).items()}
        if request.method == "POST" and address.path == "/api/repos/create":
            return self._create(json.loads(request.body), user)
        if request.method == "POST" and address.path == "/api/validate-yaml":
            return _validate_yaml(json.loads(request.body)["content"])
        if request.method == "POST" and address.path.endswith(".git/info/lfs/objects/batch"):
            return self._batch(self._writable(f"{parts[0]}/{parts[1].removesuffix('.git')}", user), request)
        if request.method == "POST" and parts[:2] == ["api", "lfs-verify"]:
            return self._verify(json.loads(request.body), parts[2])
        if parts[:2] == ["api", "models"] and len(parts) > 3:
            return self._model(request, f"{parts[2]}/{parts[3]}", parts[4:], query, user)
        if parts[:2] == ["api", "resolve-cache"]:
            repo = self._readable(f"{parts[3]}/{parts[4]}", user)
            return self._file(repo, parts[5], "/".join(parts[6:]))
        if len(parts) > 4 and parts[2] == "resolve" and request.method in ("GET", "HEAD"):
            repo = self._readable(f"{parts[0]}/{parts[1]}", user)
            return self._resolve(repo, parts[3], "/".join(parts[4:]))
        raise Refused(404, f"the stand-in has no {request.method} {address.path}")

    def _model(
        self, request: HubRequest, name: str, rest: list[str], query: dict[str, str], user: User | None
    ) -> HubAnswer:
        match request.method, rest:
            case "GET", ["revision", revision]:
                repo = self._readable(name, user)
                commit = _commit(repo, revision)
                siblings = [{"rfilename": path} for path in commit.tree]
                return HubAnswer(body={
                    "id": name, "modelId": name, "sha": commit.oid, "private": repo.private, "siblings": siblings,
                    "tags": [], "downloads": 0, "likes": 0, "gated": False, "disabled": False,
                })  # fmt: skip
            case "GET", ["tree", revision]:
                return self._tree(_commit(self._readable(name, user), revision), request.path, query)
            case "GET", ["refs"]:
                repo = self._readable(name, user)
                branches = [
                    {"name": branch, "ref": f"refs/heads/{branch}", "targetCommit": oid}
                    for branch, oid in repo.branches.items()
                ]
                return HubAnswer(body={"branches": branches, "converts": [], "tags": []})
            case "POST", ["branch", branch]:
                repo = self._writable(name, user)
                start = json.loads(request.body or b"{}").get("startingPoint", "main")
                repo.branches[branch] = _commit(repo, start).oid
                return HubAnswer()
            case "POST", ["preupload", branch]:
                repo = self._writable(name, user)
                return self._preupload(repo, _branch(repo, branch), json.loads(request.body)["files"])
            case "POST", ["commit", branch]:
                repo = self._writable(name, user)
                return self._commit(repo, _branch(repo, branch), request.body, user)
        raise Refused(404, f"the stand-in has no {request.method} {request.path}")

    def _create(self, wanted: dict[str, Any], user: User | None) -> HubAnswer:
        if user is None:
            raise Refused(401, "Invalid username or password.")
        owner = wanted.get("organization") or user.name
        if owner != user.name or not user.may_write:
            raise Refused(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
        name = f"{owner}/{wanted['name']}"
        if name in self.repos:
            return HubAnswer(409, {"error": "You already created this model repo", "url": f"{self.url}/{name}"})
        self.add(name, private=wanted.get("visibility") == "private")
        return HubAnswer(body={"url": f"{self.url}/{name}", "name": name, "id": secrets.token_hex(12)})

    def _tree(self, commit: Commit, path: str, query: dict[str, str]) -> HubAnswer:
        """A page of a commit's files and folders, and where the next one is."""
        folders = {file.rsplit("/", depth)[0] for file in commit.tree for depth in range(1, file.count("/") + 1)}
        entries = [{"type": "directory", "oid": git_oid(each.encode()), "size": 0, "path": each} for each in folders]
        entries += [blob.as_listed(file) for file, blob in commit.tree.items()]
        entries.sort(key=lambda entry: str(entry["path"]))
        start = int(query.get("cursor", 0))
        headers = {}
        if start + self.page < len(entries):
            address = path.partition("?")[0]
            headers["Link"] = f'<{self.url}{address}?recursive=true&cursor={start + self.page}>; rel="next"'
        return HubAnswer(body=entries[start : start + self.page], headers=headers)

    def _preupload(self, repo: Repo, branch: str, files: list[dict[str, Any]]) -> HubAnswer:
        answers = []
        for file in files:
            present = repo.head(branch).tree.get(file["path"])
            answers.append({
                "path": file["path"],
                "uploadMode": "lfs" if repo.is_large(file["path"], file["size"]) else "regular",
                "shouldIgnore": repo.ignores(file["path"], branch),
                "oid": None if present is None else present.lfs or present.oid,
            })  # fmt: skip
        return HubAnswer(body={"files": answers})

    def _batch(self, repo: Repo, request: HubRequest) -> HubAnswer:
        """Where large files are to be put: nowhere, where the repo has them."""
        objects: list[dict[str, Any]] = []
        for wanted in json.loads(request.body)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in repo.large:
                ticket = secrets.token_hex(16)
                self._uploads[ticket] = (repo, wanted["oid"], wanted["size"])
                entry["actions"] = {
                    "upload": {"href": f"{self.cdn_url}/cdn/upload/{ticket}"},
                    "verify": {"href": f"{self.url}/api/lfs-verify/{ticket}"},
                }
            objects.append(entry)
        return HubAnswer(body={"transfer": "basic", "objects": objects})

    def _verify(self, told: dict[str, Any], ticket: str) -> HubAnswer:
        repo, digest, size = self._uploads[ticket]
        stored = repo.large.get(digest)
        if stored is None or len(stored) != size or (told["oid"], told["size"]) != (digest, size):
            raise Refused(400, "the uploaded file has another digest or size")
        return HubAnswer(body={"success": True})

    def _commit(self, repo: Repo, branch: str, body: bytes, user: User | None) -> HubAnswer:
        lines = [json.loads(line) for line in body.splitlines()]
        header = lines[0]["value"]
        tree = dict(repo.head(branch).tree)
        for line in lines[1:]:
            value = line["value"]
            path = value["path"]
            if ".." in path.split("/") or path.startswith("/") or not path:
                raise Refused(400, f"Invalid path: {path}")
            if line["key"] == "file":
                tree[path] = Blob(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                if value["oid"] not in repo.large:
                    raise Refused(400, f"LFS object {value['oid']} was not uploaded")
                tree[path] = repo.large_file(repo.large[value["oid"]])
            else:
                raise Refused(400, f"the stand-in knows no {line['key']}")
        try:
            made = repo.append(branch, tree, header, user.name if user else "")
        except Moved:
            raise Refused(412, "A commit has happened since. Please refresh and try again.") from None
        url = f"{self.url}/{repo.name}/commit/{made.oid}"
        return HubAnswer(body={"success": True, "commitOid": made.oid, "commitUrl": url, "hookOutput": ""})

    def _resolve(self, repo: Repo, revision: str, path: str) -> HubAnswer:
        """Where a file is: a large one on the CDN, another in the Hub's cache."""
        commit = _commit(repo, revision)
        blob = commit.tree.get(path)
        if blob is None:
            raise Refused(404, "Entry not found", "EntryNotFound")
        headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        if blob.lfs is None:
            location = f"/api/resolve-cache/models/{repo.name}/{commit.oid}/{quote(path)}"
            return HubAnswer(307, b"", headers | {"Location": location, "ETag": f'"{blob.oid}"'})
        linked = {"X-Linked-Size": str(blob.size), "X-Linked-Etag": f'"{blob.lfs}"'}
        location = f"{self.cdn_url}/cdn/{repo.name}/{blob.lfs}"
        return HubAnswer(302, b"", headers | linked | {"Location": location})

    def _file(self, repo: Repo, revision: str, path: str) -> HubAnswer:
        commit = _commit(repo, revision)
        blob = commit.tree[path]
        return HubAnswer(body=blob.data, headers={"ETag": f'"{blob.oid}"', "X-Repo-Commit": commit.oid})

    def _answer_cdn(self, request: HubRequest, headers: Mapping[str, str]) -> HubAnswer:
        """Large files by digest, and uploads by ticket: an address is the permission, a token beside it is too much."""
        self.requests.append(request)
        failure = self.fail(request)
        if failure is not None:
            return failure
        if headers.get("Authorization"):
            raise Refused(400, "Only one auth mechanism allowed")
        parts = request.path.strip("/").split("/")
        if request.method == "PUT" and parts[1] == "upload":
            repo, digest, size = self._uploads[parts[2]]
            if len(request.body) != size or hashlib.sha256(request.body).hexdigest() != digest:
                raise Refused(400, "BadDigest")
            repo.large[digest] = request.body
            return HubAnswer()
        data = self.repos["/".join(parts[1:3])].large[parts[3]]
        return HubAnswer(body=data, headers={"ETag": f'"{parts[3]}"'})

    # -- who may -------------------------------------------------------------------------------------------------------

    def _user(self, headers: Mapping[str, str]) -> User | None:
        shown = headers.get("Authorization")
        if shown is None:
            return None
        user = self.tokens.get(shown.removeprefix("Bearer "))
        if user is None:
            raise Refused(401, "Invalid credentials in Authorization header")
        return user

    def _readable(self, name: str, user: User | None) -> Repo:
        repo = self.repos.get(name)
        if repo is not None and (not repo.private or (user and user.name == name.partition("/")[0])):
            return repo
        if user is None:
            raise Refused(401, "Invalid username or password.")
        raise Refused(404, "Repository not found", "RepoNotFound")

    def _writable(self, name: str, user: User | None) -> Repo:
        repo = self._readable(name, user)
        if user is None:
            raise Refused(401, "Invalid username or password.")
        if user.name != name.partition("/")[0] or not user.may_write:
            raise Refused(403, "you must use a write token to write to a repository.")
        return repo


def _commit(repo: Repo, revision: str) -> Commit:
    commit = repo.resolve(revision)
    if commit is None:
        raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    return commit


def _branch(repo: Repo, name: str) -> str:
    if name not in repo.branches:
        raise Refused(404, f"Invalid rev id: {name}", "RevisionNotFound")
    return name


def _validate_yaml(content: str) -> HubAnswer:
    """What the Hub says of a card's front matter, of what it is known to say."""
    found = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
    if found is None:
        return HubAnswer(body={"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]})
    try:
        metadata = yaml.safe_load(found[1])
    except yaml.YAMLError as error:
        return HubAnswer(400, {"errors": [{"message": f"bad yaml: {error}"}], "warnings": []})
    bases = metadata.get("base_model", [])
    wrong = [
        {"message": f'"base_model" with value "{base}" is not valid. Use a model id from https://hf.co/models.'}
        for base in ([bases] if isinstance(bases, str) else bases)
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base)
    ]
    return HubAnswer(400 if wrong else 200, {"errors": wrong, "warnings": []})


def _serve(
    answer: Callable[[HubRequest, Mapping[str, str]], HubAnswer], lose: Callable[[HubRequest], bool]
) -> ThreadingHTTPServer:
    """A server of its own on a free port, answering in threads."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = MAX_SECONDS
        disable_nagle_algorithm = True  # else headers and body, sent apart, cost 40 ms an answer

        def answer(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = self._chunks() if self.headers.get("Transfer-Encoding") == "chunked" else self.rfile.read(length)
            request = HubRequest(self.command, self.requestline.split()[1], body)  # `path` is mended by http.server
            try:
                answered = answer(request, {name.title(): value for name, value in self.headers.items()})
            except Refused as refused:
                answered = refused.answer
            except KeyError as missing:
                answered = Refused(404, f"no {missing}", "EntryNotFound").answer
            if lose(request):
                self.close_connection = True
                return
            data = answered.body if isinstance(answered.body, bytes) else json.dumps(answered.body).encode()
            self.send_response(answered.status)
            kind = "application/octet-stream" if isinstance(answered.body, bytes) else "application/json"
            for name, value in {"Content-Type": kind, **answered.headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def _chunks(self) -> bytes:
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)

        do_GET = do_HEAD = do_POST = do_PUT = answer  # noqa: N815  the names that http.server calls

        def log_message(self, *_: object) -> None:
            """Tests look at `requests`."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=[POLL_SECONDS], daemon=True).start()
    return server


def _url(server: ThreadingHTTPServer) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}"
