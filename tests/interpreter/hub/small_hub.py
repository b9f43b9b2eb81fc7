"""A small hub on this computer: the HTTP protocol that huggingface_hub speaks, with repositories in memory.

Tests can make it fail: see the attributes of :class:`SmallHub`.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_test"


def git_sha1(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Repository:
    """Branches of commits; a commit is a dictionary of files, path -> bytes."""

    def __init__(self, private=False):
        self.private, self.license = private, None
        self.commits = {}
        self.branches = {}
        self.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})

    def commit(self, branch, files):
        before = self.branches.get(branch, "")
        sha = hashlib.sha1(repr((before, sorted(files.items()))).encode()).hexdigest()
        self.commits[sha], self.branches[branch] = dict(files), sha
        return sha

    def change(self, files, branch="main"):
        """A commit that changes files by path; None deletes one."""
        now = self.commits[self.branches[branch]] | files
        return self.commit(branch, {path: content for path, content in now.items() if content is not None})

    def find(self, revision):
        return self.branches.get(revision, revision if revision in self.commits else None)

    @property
    def files(self):
        return self.commits[self.branches["main"]]


class SmallHub:
    """The files of the server, the requests that it got, and its faults.

    Attributes:
        repositories: by OWNER/NAME.
        requests: (method, path) of each request.
        sent: bytes of each file that were sent, by path.
        fail: path pattern -> (status, headers) of every answer to it.
        broken_json: answers of the API are no JSON.
        cut: path of a file -> bytes after which an answer breaks off; later ones are errors.
        forgives: answers after one that broke off are no errors.
        forged: path of a file -> what is sent in its place.
        claims: path of a file -> entries that replace those of its listing.
    """

    def __init__(self):
        self.repositories, self.requests, self.sent = {}, [], {}
        self.fail, self.cut, self.forged, self.claims = {}, {}, {}, {}
        self.broken_json = self.forgives = False
        self.large = {}  # uploaded contents by SHA-256

    def well_again(self):
        for faults in (self.fail, self.cut, self.forged, self.claims):
            faults.clear()
        self.broken_json = False


def is_large(path):
    return path.endswith((".safetensors", ".bin"))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: SmallHub

    def log_message(self, *about):
        pass

    def handle_any(self):
        hub, url = self.hub, urlsplit(self.path)
        self.path_, self.query = unquote(url.path), parse_qs(url.query)
        hub.requests.append((self.command, self.path_))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        for pattern, (status, headers) in hub.fail.items():
            if re.search(pattern, self.path_):
                return self.answer(status, {"error": "as told"}, headers)
        for pattern, answer in ROUTES:
            if match := re.fullmatch(pattern, f"{self.command} {self.path_}"):
                return answer(self, body, *match.groups())
        return self.answer(404, {"error": f"no such address: {self.path_}"})

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def answer(self, status, content, headers=None):
        data = b"<html>not JSON" if self.hub.broken_json else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def repository(self, name):
        repository = self.hub.repositories.get(name)
        knows = self.headers.get("authorization") == f"Bearer {TOKEN}"
        if repository is None or (repository.private and not knows):
            self.answer(404 if knows else 401, {"error": "not found"}, {"X-Error-Code": "RepoNotFound"})
            return None
        return repository

    def may_write(self):
        if self.headers.get("authorization") == f"Bearer {TOKEN}":
            return True
        self.answer(403, {"error": "no right to write"})
        return False

    def info(self, body, name, revision="main"):
        if (repository := self.repository(name)) is None:
            return None
        commit = repository.find(revision)
        if commit is None:
            return self.answer(404, {"error": "no revision"}, {"X-Error-Code": "RevisionNotFound"})
        siblings = []
        for path, content in repository.commits[commit].items():
            entry = {"rfilename": path, "size": len(content), "blobId": git_sha1(content)}
            if is_large(path):
                sha = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"sha256": sha, "size": len(content), "pointerSize": 130}
            siblings.append(entry | self.hub.claims.get(path, {}))
        about = {"id": name, "sha": commit, "private": repository.private, "siblings": siblings}
        if "README.md" in repository.files:
            license = re.search(r"^license: (.*)$", repository.files["README.md"].decode(), re.MULTILINE)
            about["cardData"] = {"license": license[1] if license else None}
        return self.answer(200, about)

    def tree(self, body, name, revision):
        if (repository := self.repository(name)) is None:
            return None
        entries = []
        for path, content in repository.commits[repository.find(revision)].items():
            entry = {"type": "file", "path": path, "size": len(content), "oid": git_sha1(content)}
            if is_large(path):
                entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
            entries.append(entry)
        return self.answer(200, entries)

    def resolve(self, body, name, revision, path):
        if (repository := self.repository(name)) is None:
            return None
        commit = repository.find(revision)
        content = repository.commits.get(commit, {}).get(path)
        if content is None:
            return self.answer(404, {"error": "no file"}, {"X-Error-Code": "EntryNotFound"})
        content = self.hub.forged.get(path, content)
        start = 0
        if asked := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(asked[1])
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest() if is_large(path) else git_sha1(content)}"')
        self.end_headers()
        if self.command == "HEAD":
            return None
        part = content[start:]
        if (end := self.hub.cut.get(path)) is not None:
            part = part[:end]
        self.wfile.write(part)
        self.hub.sent[path] = self.hub.sent.get(path, 0) + len(part)
        if len(part) < len(content) - start:
            self.close_connection = True
            if not self.hub.forgives:
                self.hub.fail[f"/resolve/.*/{re.escape(path)}"] = (503, {})
        return None

    def create(self, body):
        if not self.may_write():
            return None
        about = json.loads(body)
        name = f"{about['organization']}/{about['name']}"
        if name in self.hub.repositories:
            return self.answer(409, {"error": "it exists"})
        self.hub.repositories[name] = Repository(private=about.get("visibility") == "private")
        return self.answer(200, {"url": f"{self.address}/{name}"})

    def branch(self, body, name, branch):
        if (repository := self.repository(name)) is None or not self.may_write():
            return
        repository.branches[branch] = repository.find(json.loads(body or b"{}").get("startingPoint", "main"))
        self.answer(200, {})

    def validate(self, body):
        license = re.search(r"^license: (.*)$", json.loads(body)["content"], re.MULTILINE)
        if license and license[1] == "nonsense":
            return self.answer(400, {"errors": [{"message": '"license" must be one of [apache-2.0, …]'}]})
        return self.answer(200, {"warnings": []})

    def preupload(self, body, name, revision):
        if (repository := self.repository(name)) is None or not self.may_write():
            return
        now = repository.commits[repository.find(revision)]
        files = []
        for file in json.loads(body)["files"]:
            path, large = file["path"], is_large(file["path"])
            oid = None
            if path in now:
                oid = hashlib.sha256(now[path]).hexdigest() if large else git_sha1(now[path])
            mode = "lfs" if large else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.answer(200, {"files": files})

    def batch(self, body, name):
        objects = []
        for file in json.loads(body)["objects"]:
            entry = dict(file)
            if file["oid"] not in self.hub.large:
                entry["actions"] = {
                    "upload": {"href": f"{self.address}/lfs/{file['oid']}", "header": {}},
                    "verify": {"href": f"{self.address}/lfs-verify", "header": {}},
                }
            objects.append(entry)
        self.answer(200, {"transfer": "basic", "objects": objects})

    def upload(self, body, oid):
        if hashlib.sha256(body).hexdigest() != oid:
            return self.answer(400, {"error": "wrong hash"})
        self.hub.large[oid] = body
        return self.answer(200, {})

    def verify(self, body):
        self.answer(200 if json.loads(body)["oid"] in self.hub.large else 404, {})

    def commit(self, body, name, branch):
        if (repository := self.repository(name)) is None or not self.may_write():
            return None
        lines = [json.loads(line) for line in body.decode().splitlines()]
        files = dict(repository.commits[repository.branches[branch]])
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                if value.get("parentCommit") not in (None, repository.branches[branch]):
                    return self.answer(412, {"error": "A commit has happened since. Please refresh and try again."})
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            else:
                assert line["key"] == "deletedFile", line
                del files[value["path"]]
        sha = repository.commit(branch, files)
        return self.answer(200, {"commitUrl": f"{self.address}/{name}/commit/{sha}", "commitOid": sha})


NAME = r"([^/]+/[^/]+)"
ROUTES = [
    (rf"GET /api/models/{NAME}/revision/(.+)", Handler.info),
    (rf"GET /api/models/{NAME}", Handler.info),
    (rf"GET /api/models/{NAME}/tree/([^/]+)", Handler.tree),
    (rf"(?:GET|HEAD) /{NAME}/resolve/([^/]+)/(.+)", Handler.resolve),
    (r"POST /api/repos/create", Handler.create),
    (rf"POST /api/models/{NAME}/branch/(.+)", Handler.branch),
    (r"POST /api/validate-yaml", Handler.validate),
    (rf"POST /api/models/{NAME}/preupload/(.+)", Handler.preupload),
    (rf"POST /{NAME}\.git/info/lfs/objects/batch", Handler.batch),
    (r"PUT /lfs/(\w+)", Handler.upload),
    (r"POST /lfs-verify", Handler.verify),
    (rf"POST /api/models/{NAME}/commit/(.+)", Handler.commit),
]


@contextmanager
def serving(hub):
    """The address of a server of this hub, while the block runs."""
    handler = type("HandlerOfThisHub", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    handler.address = f"http://127.0.0.1:{server.server_port}"
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield handler.address
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
