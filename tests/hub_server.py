"""A Hugging Face Hub on the loopback interface: the part of its HTTP interface that push and pull need, and faults.

Large files (`*.safetensors`) are stored by their SHA-256, and a request for one is redirected to the store, as on the
real Hub; the others are part of a commit. Writing needs the token `TOKEN`, and so does reading a private repository.
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

TOKEN = "hf_loopback"


class Fault:
    """How the server misbehaves in requests whose "METHOD path" the pattern is found in.

    Attributes:
        kind: An HTTP status; or "close" (no answer), "truncate" (the connection ends half-way), "short" (half of the
            content, announced as the whole), "corrupt" (a bit of the content is flipped), "etag" (the SHA-256 of
            something else is announced), "hang" (no answer until the server ends).
        times: For how many requests; None: for all.
    """

    def __init__(self, pattern: str, kind: int | str, times: int | None = None):
        self.pattern, self.kind, self.times = pattern, kind, times

    def strikes(self, request: str) -> bool:
        if self.times == 0 or not re.search(self.pattern, request):
            return False
        if self.times is not None:
            self.times -= 1
        return True


class File(NamedTuple):
    content: bytes
    large: bool

    @property
    def etag(self) -> str:
        return hashlib.sha256(self.content).hexdigest() if self.large else hashlib.sha1(self.content).hexdigest()


class Repository:
    def __init__(self, private: bool):
        self.private = private
        self.branches = {"main": "0" * 40}
        self.commits: dict[str, dict[str, File]] = {"0" * 40: {}}

    def files(self, revision: str) -> dict[str, File] | None:
        return self.commits.get(self.branches.get(revision, revision))

    def commit(self, branch: str, files: dict[str, File]) -> str:
        number = hashlib.sha1(f"{len(self.commits)} {branch}".encode()).hexdigest()
        self.commits[number] = {**self.commits[self.branches[branch]], **files}
        self.branches[branch] = number
        return number


class HubServer(ThreadingHTTPServer):
    """Attributes: `repositories` by ORG/NAME, `requests` so far as "METHOD path", `faults` that may be added to."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.faults: list[Fault] = []
        self.ended = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address) -> None:
        """Clients that hang up are part of the tests."""


@contextlib.contextmanager
def hub_server() -> Iterator[HubServer]:
    """A server that runs in a `with` block."""
    with HubServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.ended.set()
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        body = self._read_body()
        path = self.path.split("?")[0]
        request = f"{self.command} {path}"
        self.server.requests.append(request)
        fault = next((fault.kind for fault in self.server.faults if fault.strikes(request)), None)
        if fault == "hang":
            self.server.ended.wait()
        if fault in ("hang", "close"):
            self.close_connection = True
        elif isinstance(fault, int):
            self._answer(
                fault, {"error": "as the test wants it"}, {"X-Error-Code": "GatedRepo"} if fault == 403 else {}
            )
        else:
            for pattern, method in self._ROUTES:
                if match := re.fullmatch(pattern, path):
                    method(self, body, fault, *match.groups())
                    return
            self._answer(404, {"error": f"unknown: {request}"})

    do_HEAD = do_POST = do_PUT = do_GET

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(
        self, status: int, value=None, headers=None, content: bytes | None = None, sent: int | None = None
    ) -> None:
        """Send JSON, or `content`, or only its first `sent` bytes."""
        content = json.dumps(value).encode() if content is None else content
        self.send_response(status)
        for name, text in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:sent])
        if sent is not None:
            self.close_connection = True

    def _authorised(self, write: bool = False, private: bool = False) -> bool:
        if not (write or private) or self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self._answer(401, {"error": "not allowed"}, {} if write else {"X-Error-Code": "RepoNotFound"})
        return False

    def _create(self, body, fault) -> None:
        wanted = json.loads(body)
        name = f"{wanted['organization']}/{wanted['name']}"
        if self._authorised(write=True):
            new = name not in self.server.repositories
            if new:
                self.server.repositories[name] = Repository(
                    wanted.get("private") or wanted.get("visibility") == "private"
                )
            self._answer(200 if new else 409, {"url": f"{self.server.url}/{name}", "name": name, "id": name})

    def _create_branch(self, body, fault, name, branch) -> None:
        if self._authorised(write=True):
            branches = self.server.repositories[name].branches
            new = branches.setdefault(branch, branches["main"]) and self.server.requests.count(f"POST {self.path}") == 1
            self._answer(200 if new else 409, {})

    def _check_card(self, body, fault) -> None:
        fields = re.findall(r"^([a-z_]+):", json.loads(body)["content"].split("---")[1], re.MULTILINE)
        missing = {"license", "tags"} - set(fields)
        self._answer(200, {"errors": [{"message": f"without {missing}"}] if missing else [], "warnings": []})

    def _announce_files(self, body, fault, name, branch) -> None:
        modes = [
            {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular"}
            for file in json.loads(body)["files"]
        ]
        self._answer(200, {"files": [{**mode, "shouldIgnore": False} for mode in modes]})

    def _announce_large(self, body, fault, name) -> None:
        objects = [
            {**wanted, "actions": {"upload": {"href": f"{self.server.url}/large/{wanted['oid']}", "header": {}}}}
            for wanted in json.loads(body)["objects"]
        ]
        content_type = {"Content-Type": "application/vnd.git-lfs+json"}
        self._answer(200, {"transfer": "basic", "objects": objects}, content_type)

    def _commit(self, body, fault, name, branch) -> None:
        if not self._authorised(write=True):
            return
        files = {}
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), large=False)
            elif entry["key"] == "lfsFile":
                files[value["path"]] = File(self.server.large[value["oid"]], large=True)
        number = self.server.repositories[name].commit(branch, files)
        url = f"{self.server.url}/{name}/commit/{number}"
        self._answer(200, {"success": True, "commitOid": number, "commitUrl": url, "hookOutput": ""})

    def _file(self, body, fault, name, revision, path) -> None:
        repository = self.server.repositories.get(name)
        if repository is None:
            self._answer(404, {}, {"X-Error-Code": "RepoNotFound"})
        elif not self._authorised(private=repository.private):
            return
        elif (files := repository.files(revision)) is None:
            self._answer(404, {}, {"X-Error-Code": "RevisionNotFound"})
        else:
            commit = {"X-Repo-Commit": repository.branches.get(revision, revision)}
            if path not in files:
                self._answer(404, {}, {"X-Error-Code": "EntryNotFound", **commit})
            elif files[path].large:
                file = files[path]
                etag = hashlib.sha256(b"something else").hexdigest() if fault == "etag" else file.etag
                linked = {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(file.content))}
                # By another name: clients take what the redirecting answer says of a file on another host.
                location = {"Location": f"http://localhost:{self.server.server_port}/large/{file.etag}"}
                self._answer(302, headers={**commit, **linked, **location})
            else:
                self._send(files[path].content, fault, {"ETag": f'"{files[path].etag}"', **commit})

    def _large(self, body, fault, oid) -> None:
        if self.command == "PUT":
            if hashlib.sha256(body).hexdigest() != oid:
                self._answer(400, {"error": "another SHA-256"})
                return
            self.server.large[oid] = body
            self._answer(200, {})
        else:
            self._send(self.server.large[oid], fault, {})

    def _send(self, content: bytes, fault: int | str | None, headers: dict[str, str]) -> None:
        if fault == "corrupt":
            middle = len(content) // 2
            content = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        if fault == "short":
            content = content[: len(content) // 2]
        status, total = 200, len(content)
        if start := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            content = content[int(start[1]) :]
            status, headers = 206, {**headers, "Content-Range": f"bytes {start[1]}-{total - 1}/{total}"}
        self._answer(status, None, headers, content, len(content) // 2 if fault == "truncate" else None)

    _REPOSITORY = r"([^/]+/[^/]+)"
    _ROUTES = [
        (r"/api/repos/create", _create),
        (r"/api/validate-yaml", _check_card),
        (rf"/api/models/{_REPOSITORY}/branch/([^/]+)", _create_branch),
        (rf"/api/models/{_REPOSITORY}/preupload/([^/]+)", _announce_files),
        (rf"/api/models/{_REPOSITORY}/commit/([^/]+)", _commit),
        (rf"/{_REPOSITORY}\.git/info/lfs/objects/batch", _announce_large),
        (rf"/{_REPOSITORY}/resolve/([^/]+)/(.+)", _file),
        (r"/large/(\w+)", _large),
    ]
