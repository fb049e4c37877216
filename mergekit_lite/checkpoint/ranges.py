"""Ranges of a file on the Hub, over HTTP, through huggingface_hub's own session: its proxies, endpoint and token hold.

A large file's address on the Hub leads to a signed one in another place, which is asked from then on, without the
token, until it refuses. A connection that breaks is taken up where it broke. Every answer has to be of the file that
was planned: its size in each, what the Hub tells its versions apart by in each redirect, one ETag at each address.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import urljoin, urlsplit

from mergekit_lite.checkpoint.hub import explained, reason_of
from mergekit_lite.checkpoint.meta import Remote
from mergekit_lite.checkpoint.retry import STATUSES, TRIES, is_transport, told_wait, wait
from mergekit_lite.errors import InputError

_REDIRECTS = 5
_CHUNK = 1 << 16  # bytes taken from a connection at once, where the library asks for a number
_CLOSED = (401, 403, 404, 410)  # what an address answers that is no longer good


class _Passing(Exception):
    """An answer that the next try may better. `told` are seconds that it asks to wait."""

    def __init__(self, reason: str, told: float | None = None, moved: bool = False):
        super().__init__(reason)
        self.reason, self.told, self.moved = reason, told, moved


class RangeFile:
    """A file of `nbytes` on the Hub. For any number of threads. `stop`, once set, ends what waits."""

    def __init__(self, remote: Remote, nbytes: int, stop: threading.Event | None = None):
        self.remote, self.nbytes = remote, nbytes
        self._stop = stop or threading.Event()
        self._address: str | None = None
        self._etags: dict[str, str | None] = {}  # by address without its signature
        self._lock = threading.Lock()
        self.fetched = 0  # bytes of bodies, those of answers that broke off included

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fills `buffer` with the file's bytes from `start` on. Raises InputError where they cannot be had, or are no
        longer of the file that was planned."""
        at, failures = 0, 0
        while at < len(buffer):
            reached = at
            try:
                for chunk in self._chunks(start + at, start + len(buffer)):
                    buffer[at : at + len(chunk)] = chunk
                    at += len(chunk)
                if at < len(buffer):
                    raise _Passing("the connection was cut")
            except InputError:
                raise
            except Exception as error:
                failures = failures + 1 if at == reached else 1
                self._pause(error, failures)

    def check(self) -> None:
        """Raises InputError where the Hub no longer has the file as it was planned, or does not let this user have it.
        Fetches its last byte."""
        if self.nbytes:
            self.read_into(self.nbytes - 1, memoryview(bytearray(1)))

    def _pause(self, error: Exception, failures: int) -> None:
        """Wait before the next try, or raise InputError where there is to be none."""
        passing = error if isinstance(error, _Passing) else None
        if passing is None and not is_transport(error):
            raise error
        if passing is not None and passing.moved:
            self._address = None
        if failures >= TRIES:
            reason = passing.reason if passing is not None else reason_of(error)
            hint = (
                "try again later; a run goes on with `--resume`; with `--fetch cache` the Hub's own client downloads it"
            )
            raise InputError(f"`{self.remote.path}` cannot be read from the Hub: {reason}", hint=hint) from error
        if not (passing is not None and passing.moved and failures == 1):
            self._stop.wait(wait(failures - 1, passing.told if passing is not None else None))
        if self._stop.is_set():
            raise self._aborted()

    def _chunks(self, start: int, stop: int) -> Iterator[Any]:
        """Bytes [start, stop), as far as one answer gives them. Raises _Passing, InputError and what a broken
        connection raises."""
        url = self._address or self._first()
        for _ in range(_REDIRECTS):
            with _get(url, {"Range": f"bytes={start}-{stop - 1}", **self._headers(url)}) as (response, body):
                if response.status_code in (301, 302, 303, 307, 308):
                    self._check_version(response.headers)
                    url = urljoin(url, response.headers.get("Location", ""))
                    continue
                self._check_answer(url, response, start, stop)
                yield from self._counted(body, stop - start)
                return
        raise _Passing("it redirects in a circle", moved=True)

    def _counted(self, body: Iterator[bytes], most: int) -> Iterator[bytes]:
        """The chunks of an answer, `most` bytes in all at most."""
        came = 0
        try:
            for chunk in body:
                came += len(chunk)
                if came > most:
                    raise _Passing("the server gave more than was asked for", moved=True)
                yield chunk
                if self._stop.is_set():
                    raise self._aborted()
        finally:
            with self._lock:
                self.fetched += came

    def _aborted(self) -> InputError:
        return InputError(f"`{self.remote.path}` is no longer read", hint="the run is at its end")

    def _first(self) -> str:
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self.remote.repo, self.remote.file, revision=self.remote.commit)

    def _headers(self, url: str) -> dict[str, str]:
        """With the token only for the Hub itself."""
        from huggingface_hub import constants
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        ours = _origin(url) == _origin(constants.ENDPOINT)
        headers: dict[str, str] = build_hf_headers() if ours else build_hf_headers(token=False)
        return {**headers, "Accept-Encoding": "identity"}

    def _check_version(self, headers: Mapping[str, str]) -> None:
        """Raises InputError where an answer of the Hub is about another version of the file than the planned one."""
        etag, size = headers.get("X-Linked-ETag"), headers.get("X-Linked-Size")
        commit = headers.get("X-Repo-Commit")
        if (
            (etag is not None and _plain(etag) != self.remote.etag)
            or (size is not None and size != str(self.nbytes))
            or (commit is not None and commit != self.remote.commit)
        ):
            raise self._changed()

    def _changed(self) -> InputError:
        hint = "let nobody rewrite the repository during a run, and plan again"
        return InputError(f"`{self.remote.path}` changed on the Hub since it was planned", hint=hint)

    def _check_answer(self, url: str, response: Any, start: int, stop: int) -> None:
        """Whether these are the bytes that were asked for. Keeps the address if they are."""
        status, headers = response.status_code, response.headers
        if status in STATUSES:
            raise _Passing(f"the Hub answered {status}", told_wait(headers))
        if status in _CLOSED and url != self._first():  # signed for some time only, which may be over already
            raise _Passing(f"its address answered {status}", moved=True)
        if status == 416:
            raise self._changed()
        if status >= 400:
            self._refuse(response)
        if status == 200 and not (start == 0 and stop == self.nbytes):
            raise _Passing("the server gives no ranges", moved=True)
        if status == 206 and headers.get("Content-Range") != f"bytes {start}-{stop - 1}/{self.nbytes}":
            found = re.fullmatch(r"bytes \d+-\d+/(\d+)", headers.get("Content-Range") or "")
            if found is not None and int(found[1]) != self.nbytes:
                raise self._changed()
            raise _Passing("the server gave another range than the one asked for", moved=True)
        if status not in (200, 206):
            raise _Passing(f"the Hub answered {status}", moved=True)
        self._check_version(headers)
        etag = headers.get("ETag")
        with self._lock:
            if self._etags.setdefault(url.partition("?")[0], etag) != etag:
                raise self._changed()
            self._address = url

    def _refuse(self, response: Any) -> None:
        """Raises InputError for an answer that no other try betters."""
        from huggingface_hub.utils import hf_raise_for_status  # type: ignore[attr-defined]

        with explained(self.remote.repo, self.remote.commit):
            hf_raise_for_status(response)


@contextmanager
def _get(url: str, headers: Mapping[str, str]) -> Iterator[tuple[Any, Iterator[bytes]]]:
    """The answer, its body still to come, redirects not followed."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session  # type: ignore[attr-defined]

    session: Any = get_session()
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    if hasattr(session, "stream"):
        with session.stream("GET", url, headers=headers, follow_redirects=False, timeout=timeout) as response:
            yield response, response.iter_raw()  # as they come: what fills no chunk when it breaks is not lost
        return
    # huggingface_hub before 1.0 has a session of `requests`.
    with session.get(url, headers=headers, allow_redirects=False, timeout=timeout, stream=True) as response:
        yield response, response.iter_content(_CHUNK)


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _plain(etag: str) -> str:
    """An ETag without quotes and the mark of a weak one."""
    return etag.removeprefix("W/").strip('"')
