"""Xet, the store of large files that the real Hub has since 2025, as far as `hf_xet` calls it.

`resolve` tells a client of Xet the file's Xet hash and where to ask for a token, and sends all others to a signed
address on the bridge, which gives ranges (`Link`, `X-Xet-Hash`; https://huggingface.co/docs/xet). Files go up and down
as xorbs: chunks, each behind a header of eight bytes, here never compressed (HF_XET_XORB_COMPRESSION_POLICY=none).
Newer ways of sending them (grants, shards of version 2) are answered with 404, and `hf_xet` then takes these.
"""

from __future__ import annotations

import hashlib
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

from store import File, Refused

CHUNK = 1 << 16  # bytes
TOKEN = "xetTOKENof0123456789"


def hash_of(file: File) -> str:
    """What stands for the file's Xet hash: 64 hexadecimal digits that are not its SHA-256."""
    return hashlib.blake2b(file.sha256.encode(), digest_size=32).hexdigest()


def headers_of(ask: Any, repo: str, commit: str, file: File) -> dict[str, str]:
    """What `resolve` adds for a file in Xet."""
    token = f"{ask.hub.address}/api/models/{repo}/xet-read-token/{commit}"
    map_ = f"{ask.hub.cdn}/v1/reconstructions/{hash_of(file)}"
    return {
        "X-Xet-Hash": hash_of(file),
        "Link": f'<{token}>; rel="xet-auth", <{map_}>; rel="xet-reconstruction-info"',
    }


def bridge_of(ask: Any, repo: str, file: File) -> str:
    """The signed address for those who know nothing of Xet."""
    signed = f"X-Amz-Signature={ask.hub.signature}&X-Xet-Cas-Uid=public&Policy={ask.hub.signature}&Key-Pair-Id=K"
    return f"{ask.hub.cdn}/xet-bridge-us/{repo}/{hash_of(file)}?{signed}"


def _files(ask: Any) -> Iterator[File]:
    for repo in list(ask.hub.repos.values()):
        for commit in list(repo.commits.values()):
            yield from (file for file in commit.files.values() if file.large)


def _found(ask: Any, wanted: str) -> File:
    file = next((file for file in _files(ask) if hash_of(file) == wanted), None)
    if file is None:
        raise Refused(404, None, "no such file")
    return file


def _bridge(ask: Any, org: str, name: str, wanted: str) -> None:
    if ask.query.get("X-Amz-Signature") != ask.hub.signature:
        return ask.answer(403, b"<Error><Code>AccessDenied</Code></Error>", {"Content-Type": "application/xml"})
    ask.answer_file(_found(ask, wanted), {"ETag": f'"{wanted}"'})


def _token(ask: Any, org: str, name: str, revision: str) -> None:
    write = "xet-write-token" in ask.path
    ask.repo(f"{org}/{name}", write=write)
    until = int(time.time()) + 3600
    headers = {"X-Xet-Cas-Url": ask.hub.cdn, "X-Xet-Access-Token": TOKEN, "X-Xet-Token-Expiration": str(until)}
    ask.answer_json({"accessToken": TOKEN, "exp": until, "casUrl": ask.hub.cdn}, headers=headers)


def _allowed(ask: Any) -> None:
    if ask.token != TOKEN:
        raise Refused(401, None, "no token of Xet")


def _xorb(data: bytes) -> bytes:
    """A file as a xorb of its own."""
    parts = [data[at : at + CHUNK] for at in range(0, len(data), CHUNK)]
    return b"".join(_head(len(part)) + part for part in parts)


def _head(size: int) -> bytes:
    return b"\0" + size.to_bytes(3, "little") + b"\0" + size.to_bytes(3, "little")


def _chunks(xorb: bytes) -> list[bytes]:
    found, at = [], 0
    while at + 8 <= len(xorb) and xorb[at] == 0:
        size = int.from_bytes(xorb[at + 1 : at + 4], "little")
        if xorb[at + 4]:
            raise Refused(400, None, "the chunks are compressed")
        found.append(xorb[at + 8 : at + 8 + size])
        at += 8 + size
    return found


def _map(ask: Any, wanted: str) -> None:
    """How a file is put together: all chunks of one xorb."""
    _allowed(ask)
    file = _found(ask, wanted)
    count, size = -(-file.size // CHUNK), file.size + 8 * -(-file.size // CHUNK)
    url, whole = f"{ask.hub.cdn}/xorbs/{wanted}?X-Amz-Signature={ask.hub.signature}", {"start": 0, "end": count}
    ask.answer_json(
        {
            "offset_into_first_range": 0,
            "terms": [{"hash": wanted, "unpacked_length": file.size, "range": whole}],
            "fetch_info": {wanted: [{"range": whole, "url": url, "url_range": {"start": 0, "end": size - 1}}]},
        }
    )


def _get_xorb(ask: Any, wanted: str) -> None:
    if ask.query.get("X-Amz-Signature") != ask.hub.signature:
        return ask.answer(403, b"")
    file = _found(ask, wanted)
    ask.answer_file(File(_xorb(file.read(0, file.size)), True), {})


def _put_xorb(ask: Any, name: str) -> None:
    _allowed(ask)
    new = name not in ask.hub.xorbs
    ask.hub.xorbs[name] = _chunks(ask.body)
    ask.answer_json({"was_inserted": new})


def _put_shard(ask: Any) -> None:
    """Files as lists of runs of chunks, of which the objects of LFS are made."""
    _allowed(ask)
    data, at = ask.body, 48
    while data[at : at + 32] != b"\xff" * 32:
        flags, count = struct.unpack("<II", data[at + 32 : at + 40])
        made, at = b"", at + 48
        for _ in range(count):
            xorb = "".join(f"{part:016x}" for part in struct.unpack("<4Q", data[at : at + 32]))
            _, _, first, last = struct.unpack("<4I", data[at + 32 : at + 48])
            if xorb not in ask.hub.xorbs:
                raise Refused(400, None, f"there is no xorb {xorb}")
            made, at = made + b"".join(ask.hub.xorbs[xorb][first:last]), at + 48
        at += 48 * (count * (flags >> 31) + (flags >> 30 & 1))
        ask.hub.objects[hashlib.sha256(made).hexdigest()] = made
    ask.answer_json({"result": 1})


XET: tuple[tuple[str, tuple[str, ...] | None, Callable[..., None]], ...] = (
    ("/xet-bridge-us/*/*/*", ("GET", "HEAD"), _bridge),
    ("/api/models/*/*/xet-read-token/*", ("GET",), _token),
    ("/api/models/*/*/xet-write-token/*", ("GET",), _token),
    ("/v1/reconstructions/*", ("GET",), _map),
    ("/xorbs/*", ("GET",), _get_xorb),
    ("/v1/xorbs/default/*", ("POST",), _put_xorb),
    ("/v1/shards", ("POST",), _put_shard),
)
