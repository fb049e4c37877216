"""A Hub on loopback that speaks the HTTP interface as `huggingface_hub` calls it, with faults at will.

    with Hub() as hub:
        repo = hub.add("org/name", {"config.json": b"{}", "model.safetensors": data})
        hub.faults.append(Fault(r"/resolve/", status=503, share=0.2))
        ...                          # HF_ENDPOINT=hub.address, HF_HUB_DISABLE_XET=1
        sum(r.sent for r in hub.log)

As on the real Hub, `resolve` redirects: a large file to a signed address on another origin (here another port), a
small one to an address on the same. What is uploaded lies in `hub.repos[id]`. What it answers
to those who read is in reads.py, to those who write in uploads.py, to clients of Xet, with `hub.xet = True`, in xet.py,
and the repositories are in store.py.
"""

from __future__ import annotations

import json
import random
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from reads import READS
from store import File, Refused, Repo, Store
from uploads import UPLOADS
from xet import XET


@dataclass
class Fault:
    """Something that goes wrong with the requests whose path and query `path` matches (a regular expression).

    Of those, with `method` (None: any), the first `after` go well, then `times` (None: all) are struck, each with the
    probability `share`. What happens: `status` answers that, with `headers` and `code` (X-Error-Code); `cut` sends so
    many bytes of the body and hangs up, `delay` waits so many seconds first, `whole` ignores the Range header,
    `shift` gives bytes and a Content-Range that lie so much further on, `etag` gives this ETag, `garble` flips bits of
    the last byte, `size` tells so many bytes in all. `hit` counts.
    """

    path: str = ""
    method: str | None = None
    share: float = 1.0
    after: int = 0
    times: int | None = None
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    code: str | None = None
    cut: int | Callable[[random.Random, int], int] | None = None
    delay: float = 0.0
    whole: bool = False
    shift: int = 0
    etag: str | None = None
    garble: bool = False
    size: int | None = None
    seen: int = 0
    hit: int = 0


@dataclass(frozen=True)
class Request:
    """One request as it was answered. `sent` counts bytes of the body; `connection` tells connections apart."""

    method: str
    path: str
    range: str | None
    status: int
    sent: int
    token: str | None
    connection: int
    headers: dict[str, str] = field(compare=False)


class Hub(Store):
    """The server; use it as a context manager. `address` is what HF_ENDPOINT is set to."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.log: list[Request] = []
        self.faults: list[Fault] = []
        self.part_size: int | None = None  # bytes; with it, LFS objects that are larger are uploaded in parts
        self.xet = False  # whether large files lie in Xet
        self.xorbs: dict[str, list[bytes]] = {}
        self.connections = 0
        self.signature = secrets.token_hex(8)
        self._random = random.Random(seed)
        self._servers = [_Server(("127.0.0.1", 0), _Handler) for _ in range(2)]
        for server in self._servers:
            server.hub = self
        self.address, self.cdn = (f"http://127.0.0.1:{server.server_address[1]}" for server in self._servers)
        self._threads = [
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True) for server in self._servers
        ]

    def __enter__(self) -> Hub:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for server, thread in zip(self._servers, self._threads, strict=True):
            server.shutdown()
            server.server_close()
            thread.join()

    def expire(self) -> None:
        """From now on, signed addresses that were given out before are answered with 403."""
        self.signature = secrets.token_hex(8)

    def sent(self, path: str = "") -> int:
        """Bytes of bodies that were sent for requests whose path `path`, a regular expression, matches."""
        return sum(request.sent for request in list(self.log) if re.search(path, request.path))

    def environment(self, home: Any, token: str | None = None) -> dict[str, str]:
        """What a process needs to use this Hub alone, with a cache under `home` and no token but this one."""
        return {
            "HF_ENDPOINT": self.address, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "" if self.xet else "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
            "HF_TOKEN": token or "", "HUGGING_FACE_HUB_TOKEN": "",
            "HF_HUB_DISABLE_TELEMETRY": "1", "HF_XET_XORB_COMPRESSION_POLICY": "none", "HF_XET_TELEMETRY_ENABLED": "0",
        }  # fmt: skip

    def fault_for(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if not re.search(fault.path, path) or fault.method not in (None, method):
                    continue
                fault.seen += 1
                if fault.seen <= fault.after or (fault.times is not None and fault.hit >= fault.times):
                    continue
                if self._random.random() < fault.share:
                    fault.hit += 1
                    return fault
        return None

    def cut_after(self, fault: Fault, length: int) -> int:
        with self.lock:
            return fault.cut(self._random, length) if callable(fault.cut) else fault.cut or 0


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64
    hub: Hub


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def setup(self) -> None:
        super().setup()
        with self.server.hub.lock:
            self.server.hub.connections += 1
            self.number = self.server.hub.connections

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except ConnectionError:
            self.close_connection = True

    def do_GET(self) -> None:
        hub = self.hub = self.server.hub
        self.body = self._read_body()
        address = urlsplit(self.path)
        self.query = {key: values[-1] for key, values in parse_qs(address.query, keep_blank_values=True).items()}
        self.fault = hub.fault_for(self.command, self.path)
        if self.fault is not None and self.fault.delay:
            time.sleep(self.fault.delay)
        if self.fault is not None and self.fault.status is not None:
            code = {"X-Error-Code": self.fault.code} if self.fault.code else {}
            return self.answer(self.fault.status, b'{"error": "a fault"}', {**code, **self.fault.headers})
        # Split first: a revision may hold an escaped `/`.
        parts = [unquote(part) for part in address.path.strip("/").split("/")]
        try:
            self._route(parts)
        except Refused as refused:
            headers = {"X-Error-Message": refused.message, "X-Error-Code": refused.code or ""}
            self.answer_json({"error": refused.message}, refused.status, {k: v for k, v in headers.items() if v})

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _read_body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    @property
    def token(self) -> str | None:
        kind, _, token = self.headers.get("Authorization", "").partition(" ")
        return token if kind == "Bearer" else None

    @property
    def user(self) -> str | None:
        """Who asks. Raises Refused for a token that is nobody's."""
        if self.token is None:
            return None
        if self.token not in self.hub.users:
            raise Refused(401, None, "Invalid credentials in Authorization header")
        return self.hub.users[self.token]

    def repo(self, name: str, *, write: bool = False) -> Repo:
        repo = self.hub.find(name, self.user)
        if write and self.user is None:
            raise Refused(401, None, "Invalid username or password.")
        if write and repo.writers and self.user not in repo.writers:
            raise Refused(403, None, "You don't have the rights to write to this repository")
        return repo

    def _route(self, parts: list[str]) -> None:
        for pattern, method, handle in (*READS, *UPLOADS, *XET):
            if method is not None and self.command not in method:
                continue
            found = _match(pattern, parts)
            if found is not None:
                return handle(self, *found)
        raise Refused(404, None, f"no such address: {self.command} {self.path}")

    def answer_json(self, data: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.answer(status, json.dumps(data).encode(), {"Content-Type": "application/json", **(headers or {})})

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        fault, sent = self.fault, 0
        cut = None
        if fault is not None and fault.cut is not None and body:
            cut = min(len(body), max(0, self.hub.cut_after(fault, len(body))))
        # Noted before the last byte is out: whoever got the answer finds its request in the log.
        if self.command != "HEAD":
            sent = len(body) if cut is None else cut
        with self.hub.lock:
            self.hub.log.append(
                Request(self.command, self.path, self.headers.get("Range"), status, sent, self.token, self.number,
                        dict(self.headers))
            )  # fmt: skip
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body if cut is None else body[:cut])
        if cut is not None:
            self.close_connection = True
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)

    def answer_file(self, file: File, headers: dict[str, str]) -> None:
        """The file, or the part that the Range header names, as a store of objects answers."""
        fault = self.fault or Fault()
        etag = f'"{fault.etag or file.etag}"'
        headers = {"ETag": etag, "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream", **headers}
        size = file.size if fault.size is None else fault.size
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked is None or fault.whole:
            if self.command == "HEAD":
                return self.answer(200, b"", {**headers, "Content-Length": str(size)})
            return self.answer(200, self._spoilt(file.read(0, file.size), fault), headers)
        start, stop = int(asked[1]), min(int(asked[2]) + 1 if asked[2] else file.size, file.size)
        if start >= file.size or stop <= start:
            return self.answer(416, b"", {"Content-Range": f"bytes */{size}"})
        start, stop = start + fault.shift, stop + fault.shift
        body = self._spoilt(file.read(start, stop), fault)
        self.answer(206, body, {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{size}"})

    @staticmethod
    def _spoilt(body: bytes, fault: Fault) -> bytes:
        return body[:-1] + bytes([body[-1] ^ 0x55]) if fault.garble and body else body


def _match(pattern: str, parts: list[str]) -> list[str] | None:
    """What stands for the `*` of `pattern`, each one part of the path, `**` the rest; None where it does not match."""
    wanted, found = pattern.strip("/").split("/"), []
    for number, want in enumerate(wanted):
        if want == "**":
            return [*found, "/".join(parts[number:])] if len(parts) > number else None
        if number >= len(parts):
            return None
        head, star, tail = want.partition("*")
        if not star:
            if want != parts[number]:
                return None
        elif parts[number].startswith(head) and parts[number].endswith(tail):
            found.append(parts[number][len(head) : len(parts[number]) - len(tail)])
        else:
            return None
    return found if len(parts) == len(wanted) else None
