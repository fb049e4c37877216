"""When to ask a server again, and how long to wait before. Imports no HTTP library: whichever huggingface_hub uses."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")
STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})  # those that another try may not meet
TRIES = 8  # that get no further, before it is given up
FIRST_WAIT = 0.5  # seconds; each is twice the one before, up to the longest
LONGEST_WAIT = 30.0
LONGEST_TOLD = 600.0  # seconds that a server may ask to wait


def patiently(call: Callable[[], T], tries: int = TRIES) -> T:
    """What `call` gives, called again where it raises what may pass. Raises what the last call raised."""
    for number in range(tries):
        try:
            return call()
        except Exception as error:
            found = passing(error)
            if found is None or number == tries - 1 or (_unconnected(found) and number >= 2):
                raise
            told = told_wait(getattr(getattr(found, "response", None), "headers", {}))
            time.sleep(wait(number, told))
    raise AssertionError("no tries")


def wait(number: int, told: float | None) -> float:
    """Seconds to wait after failure `number`, counted from 0; `told` is what the server asks for."""
    if told is not None:
        return min(told, LONGEST_TOLD)
    # Not all threads at once.
    return min(LONGEST_WAIT, FIRST_WAIT * 2.0 ** min(number, 16)) * random.uniform(0.7, 1.0)


def told_wait(headers: Mapping[str, Any]) -> float | None:
    """Seconds that an answer asks to wait, by `Retry-After`; None where it does not say or names a date."""
    text = str(headers.get("retry-after") or headers.get("Retry-After") or "").strip()
    return float(text) if text.isascii() and text.isdigit() else None


def passing(error: BaseException | None) -> BaseException | None:
    """The cause of `error` that may pass by itself: an answer with such a status, or a connection that broke; None
    where there is none."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None:
            return error if status in STATUSES else None
        if is_transport(error):
            return error
        error = error.__cause__ or error.__context__
    return None


def is_transport(error: BaseException) -> bool:
    """Whether a connection could not be made, or broke."""
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    library = sys.modules.get(type(error).__module__.partition(".")[0])
    kinds = (getattr(library, name, None) for name in ("TransportError", "RequestException"))
    return any(isinstance(kind, type) and isinstance(error, kind) for kind in kinds)


def _unconnected(error: BaseException) -> bool:
    """Whether there was no connection at all, which few tries tell as well as many."""
    return isinstance(error, ConnectionRefusedError) or type(error).__name__ in ("ConnectError", "ConnectionError")
