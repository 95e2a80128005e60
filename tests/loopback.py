"""A server on 127.0.0.1 that plays a file host and the Hugging Face hub, for tests without a network."""

import contextlib
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

API = re.compile(r"/api/(?:models/|(datasets/))([^/]+(?:/[^/]+)??)(?:/(revision|tree)/([^/]+)(?:/(.*))?)?")
RESOLVE = re.compile(r"/(datasets/)?([^/]+(?:/[^/]+)?)/(resolve)/([^/]+)/(.+)")


def listing(folder):
    """The files of a folder that plays a repository: {path: bytes}, sorted."""
    files = sorted(p for p in Path(folder).rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def oid(data):
    """Git's name for a blob, which is also its ETag."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def commit(folder):
    """40 hex digits that stand for the file names and contents of a folder."""
    return hashlib.sha1(json.dumps({k: oid(v) for k, v in listing(folder).items()}).encode()).hexdigest()


class Loopback:
    """`with Loopback(files=folder, repos={"owner/name": folder}) as server:` serves both below `server.url`.

    files:      folder behind /files/<path>
    repos:      "owner/name" or "datasets/owner/name" -> folder; its revisions are "main" and commit(folder)
    revisions:  (repo, revision) -> folder, for further ones (and for their commit hashes)
    gated:      repos whose files need `Authorization: Bearer good-token`; the token "invalid" fails anywhere
    cut_after:  body bytes after which a GET of /files/ or of a hub's *.safetensors breaks off, `cuts` times
    no_range:   answer a Range request with the whole file
    requests:   (method, path, headers with lower-case names) of each request so far
    """

    def __init__(self, files=None, repos=None):
        self.files, self.repos, self.revisions, self.gated = files, dict(repos or {}), {}, set()
        self.cut_after, self.cuts, self.no_range = None, 1, False
        self.requests, self.lock = [], threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"owner": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def folder(self, repo, revision):
        """The folder of a revision, or None."""
        known = {"main": self.repos[repo]} | {r: p for (k, r), p in self.revisions.items() if k == repo}
        return known.get(revision) or {commit(p): p for p in known.values()}.get(revision)

    def cut(self):
        """Whether to break off this body; counts down."""
        with self.lock:
            now = self.cut_after is not None and self.cuts > 0
            self.cuts -= now
            return now


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: Loopback

    def do_GET(self):
        headers = {k.lower(): v for k, v in self.headers.items()}
        self.owner.requests.append((self.command, self.path, headers))
        path = urlsplit(self.path).path
        if path.startswith("/files/") and self.owner.files is not None:
            if (data := listing(self.owner.files).get(unquote(path[len("/files/") :]))) is not None:
                return self.file(data, True)
        if not (found := API.fullmatch(path) or RESOLVE.fullmatch(path)):
            return self.error(404, None, "Not Found")
        dataset, repo, what, revision, rest = found.groups()
        self.hub((dataset or "") + repo, what, unquote(revision or "main"), unquote(rest or ""))

    do_HEAD = do_GET
    log_message = staticmethod(lambda *_: None)

    def hub(self, repo, what, revision, path):
        """What the hub answers: facts about a repository, its list of files, or one of them."""
        token = self.headers.get("Authorization")
        if token == "Bearer invalid":
            return self.error(401, None, "Invalid credentials in Authorization header")
        if repo not in self.owner.repos:
            return self.error(404 if token else 401, "RepoNotFound", "Repository not found")
        if what == "resolve" and repo in self.owner.gated and token != "Bearer good-token":
            return self.error(403 if token else 401, "GatedRepo", f"Access to {repo} is restricted.")
        if (folder := self.owner.folder(repo, revision)) is None:
            return self.error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files, sha = listing(folder), {"X-Repo-Commit": commit(folder)}
        if what == "resolve" and path not in files:
            return self.error(404, "EntryNotFound", "Entry not found", sha)
        if what == "resolve":
            return self.file(files[path], path.endswith(".safetensors"), sha)
        if what == "tree":
            facts = [{"type": "file", "path": k, "size": len(v), "oid": oid(v)} for k, v in files.items()]
        else:
            facts = {"id": repo.removeprefix("datasets/"), "sha": commit(folder), "private": False}
            facts |= {"downloads": 0, "likes": 0, "tags": [], "siblings": [{"rfilename": k} for k in files]}
        self.answer(200, json.dumps(facts).encode(), {"Content-Type": "application/json"})

    def file(self, data, may_cut, headers=None):
        """A file or, as a Range request has it, the rest of one."""
        headers = {"ETag": f'"{oid(data)}"', "Accept-Ranges": "bytes"} | (headers or {})
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if self.command == "HEAD" or not asked or self.owner.no_range:
            return self.answer(200, data, headers, may_cut)
        first, last = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
        if first >= len(data):
            return self.answer(416, b"", headers | {"Content-Range": f"bytes */{len(data)}"})
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        self.answer(206, data[first : last + 1], headers, may_cut)

    def error(self, status, code, message, headers=None):
        headers = {"X-Error-Message": message, "X-Error-Code": code} | (headers or {})
        self.answer(status, json.dumps({"error": message}).encode(), headers)

    def answer(self, status, body, headers, may_cut=False):
        sent = (
            body[: self.owner.cut_after] if may_cut and self.command == "GET" and self.owner.cut() else body
        )
        self.send_response(status)
        for name, value in {**headers, "Content-Length": len(body), "Connection": "close"}.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            with contextlib.suppress(ConnectionError):  # a client may leave early
                self.wfile.write(sent)
