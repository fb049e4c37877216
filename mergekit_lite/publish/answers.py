"""What the Hub's refusals, and a network that fails, mean to someone who pushes. No message holds a token or a URL."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from mergekit_lite.checkpoint.retry import LONGEST_TOLD, told_wait
from mergekit_lite.errors import InputError, MergeError, StoppedError

T = TypeVar("T")
WAITS = (1.0, 2.0, 4.0)  # seconds before an answer that may change is asked for again
_PASSING = frozenset({408, 429, 500, 502, 503, 504})
_LOGIN = "run `hf auth login` with a token of the kind `write`, or set HF_TOKEN"
_TOLD = re.compile(r"HTTP status (?:client|server) error \((\d{3})\b")
_AGAIN = "`merge push` again sends only what is missing"
_TRANSPORT = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")


def status_of(error: BaseException) -> int | None:
    """The status of the Hub's answer behind an error of its client; None where there was no answer."""
    for one in _chain(error):
        status = getattr(getattr(one, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
        # hf_xet, which the client sends large files with, has the status in its words alone.
        told = _TOLD.search(str(one)) if isinstance(one, ConnectionError | RuntimeError) else None
        if told is not None:
            return int(told[1])
    return None


def wait_of(error: BaseException) -> float | None:
    """Seconds that the Hub asks to wait before the next request; None where it does not say."""
    told = (told_wait(getattr(getattr(one, "response", None), "headers", {})) for one in _chain(error))
    return next((seconds for seconds in told if seconds is not None), None)


def is_cut(error: BaseException) -> bool:
    """Whether the connection failed, so that nobody knows what has happened at the other end."""
    return status_of(error) is None and any(
        isinstance(one, ConnectionError | TimeoutError) or type(one).__module__.partition(".")[0] in _TRANSPORT
        for one in _chain(error)
    )


def patiently(action: Callable[[], T], *, cut: bool = True) -> T:
    """What `action` gives, tried again where the Hub is busy or, with `cut`, the connection fails; not before the time
    that the Hub asks to wait."""
    for wait in WAITS:
        try:
            return action()
        except Exception as error:
            if status_of(error) not in _PASSING and not (cut and is_cut(error)):
                raise
            time.sleep(max(wait, min(wait_of(error) or 0.0, LONGEST_TOLD)))
    return action()


def explained(error: BaseException, repo: str) -> MergeError:
    """The error as this program tells it: InputError (4) where token, rights or names are at fault, StoppedError (5)
    where the same command may go well later."""
    status = status_of(error)
    if status == 401:
        return InputError(f"the Hub does not accept the token for `{repo}`", hint=_LOGIN)
    if status == 403:
        hint = f"it must be yours, or an organisation's in which you may write, and the token must allow it: {_LOGIN}"
        return InputError(f"the token may not write to `{repo}`", hint=hint)
    if status == 404:
        hint = "check owner, name and branch; a private repository of others looks as if it were not there"
        return InputError(f"the Hub finds no `{repo}` that you may write to", hint=hint)
    if status in (409, 412):
        hint = "someone else has pushed meanwhile: look at the repository, then push again"
        return StoppedError(f"`{repo}` has changed during the push", hint=hint)
    if status == 429:
        seconds = wait_of(error)
        while_ = "some minutes" if seconds is None else f"{seconds:.0f} seconds, as it asks"
        return StoppedError("the Hub asks for fewer requests", hint=f"wait {while_}; {_AGAIN}")
    if status is not None and status >= 500:
        hint = f"it may be better in a while (status.huggingface.co tells); {_AGAIN}"
        return StoppedError(f"the Hub has a fault of its own: it answered {status}", hint=hint)
    if status is not None:
        said = _said(error)
        return InputError(f"the Hub refuses the push to `{repo}`: it answered {status}{said}", hint=_LOGIN)
    if is_cut(error):
        kind = type(next(reversed(list(_chain(error))))).__name__
        return StoppedError(f"the connection to the Hub failed: {kind}", hint=f"check the network; {_AGAIN}")
    if isinstance(error, OSError) and error.strerror:
        return StoppedError(f"the push to `{repo}` failed: {error.strerror}", hint=_AGAIN)
    return StoppedError(f"the push to `{repo}` failed: {type(error).__name__}{_said(error)}", hint=_AGAIN)


def _said(error: BaseException) -> str:
    """The words of an error that hold no address, which may be a signed one."""
    words = str(getattr(error, "server_message", None) or error).partition("\n")[0]
    return f" ({words[:200]})" if words and not re.search(r"https?:|//", words) else ""


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        yield error
        error = error.__cause__ or error.__context__
