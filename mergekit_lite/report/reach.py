"""Whether the Hugging Face Hub can be used from here: whether it answers, the token is good, models have a place."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_lite import redact, sandbox
from mergekit_lite.checkpoint.hub import is_offline, reason_of
from mergekit_lite.checkpoint.writer import free_bytes
from mergekit_lite.plan.words import size
from mergekit_lite.report.check import Check, fail, ok, warn
from mergekit_lite.report.disk import LITTLE_DISK

TIMEOUT = 10.0  # seconds until an answer has to begin
SLOW = 2.0  # seconds
COUNTED = 2.0  # seconds that the cache is looked through at most
_LOGIN = "run `hf auth login` (older: `huggingface-cli login`)"


@dataclass(frozen=True, slots=True)
class Answer:
    """What the Hub said to "who am I?": the HTTP status, the data, the seconds until it was there."""

    status: int
    data: Any
    seconds: float


def reach(offline: bool) -> Iterator[Check]:
    """The checks. `offline` asks nothing, as do HF_HUB_OFFLINE and a sandbox. No token is in any of them."""
    from huggingface_hub import constants, get_token

    if sandbox.current() is not None:  # where neither the token nor the cache may be looked at
        hint = "leave out `--sandbox` to see whether the Hub can be reached"
        yield warn("hub", "a sandbox has no network: models are folders in it", hint)
        return
    token = get_token()
    redact.learn(token)
    endpoint = re.sub("//[^/@]*@", "//", constants.ENDPOINT)  # a mirror's address may hold a password
    if is_offline(offline):
        flag, hint = "`--offline` is given", "leave it out to see whether the Hub can be reached"
        if not offline:
            flag, hint = "HF_HUB_OFFLINE is set", "unset it to download models"
        yield warn("hub", f"{flag}: {endpoint} is not asked, only models in the cache are found", hint)
        yield ok("token", f"{_origin()}, not checked" if token else "none")
    else:
        answer = _ask(token)
        yield _hub(answer, endpoint)
        yield _token(answer, token, endpoint)
    yield _cache(Path(constants.HF_HUB_CACHE))


def _ask(token: str | None) -> Answer | Exception:
    """The Hub's answer, or why there is none."""
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, get_session  # type: ignore[attr-defined]

    try:
        # Not HfApi.whoami, which knows no limit of time. The library may ask something of its own for its headers.
        headers = build_hf_headers(token=token or False)
        began = time.perf_counter()
        found = get_session().get(f"{constants.ENDPOINT}/api/whoami-v2", headers=headers, timeout=TIMEOUT)
        seconds = time.perf_counter() - began
        status = int(found.status_code)
    except Exception as error:  # of whichever HTTP library this version of huggingface_hub uses
        return error
    try:
        return Answer(status, found.json(), seconds)
    except ValueError:
        return Answer(status, None, seconds)


def _hub(answer: Answer | Exception, endpoint: str) -> Check:
    if isinstance(answer, Exception):
        hint = "check the connection, HF_ENDPOINT and HTTPS_PROXY; with `--offline` the cache alone is used"
        return fail("hub", f"{endpoint} cannot be reached ({reason_of(answer)})", hint)
    detail = f"{endpoint} answers in {answer.seconds:.2f} s"
    if answer.status == 429 or answer.status >= 500:
        return warn("hub", f"{detail}, with {answer.status}", "it has trouble or too many requests: try again later")
    if answer.status == 200 and _name(answer.data) is None:
        hint = "is HF_ENDPOINT a Hub? a network that wants a login first answers in its place"
        return fail("hub", f"{detail}, but not as a Hub does", hint)
    if answer.seconds > SLOW:
        return warn("hub", detail, "that is slow: `--fetch cache` downloads once, `--fetch stream` asks often")
    return ok("hub", detail)


def _token(answer: Answer | Exception, token: str | None, endpoint: str) -> Check:
    if token is None:
        return ok("token", f"none, and public models need none; for others and for pushes {_LOGIN}")
    if isinstance(answer, Exception):
        return warn("token", f"{_origin()}, not checked: the Hub does not answer")
    name = _name(answer.data) if answer.status == 200 else None
    if name is not None:
        role = _role(answer.data)
        return ok("token", f"{_origin()}, valid, of the user `{name}`{f', kind `{role}`' if role else ''}")
    if answer.status in (401, 403):
        place = f"make a new one at {endpoint}/settings/tokens and "
        over = "set HF_TOKEN anew, or unset it" if _origin() == "HF_TOKEN" else _LOGIN
        return fail("token", f"{_origin()}, refused by the Hub with {answer.status}", f"{place}{over}")
    return warn("token", f"{_origin()}, not checked: the Hub answers with {answer.status}")


def _origin() -> str:
    """Where the token comes from."""
    given = next((name for name in redact.TOKENS if os.environ.get(name, "").strip()), None)
    return given or "of `hf auth login`"


def _name(data: Any) -> str | None:
    name = data.get("name") if isinstance(data, Mapping) else None
    return name if isinstance(name, str) else None


def _role(data: Any) -> str | None:
    """`read`, `write` or `fineGrained`."""
    for key in ("auth", "accessToken", "role"):
        data = data.get(key) if isinstance(data, Mapping) else None
    return data if isinstance(data, str) else None


def _cache(folder: Path) -> Check:
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    if not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
        hint = "set HF_HOME to a folder that you may write to; `--fetch stream` needs room for configurations alone"
        return fail("cache", f"`{folder}` cannot be written to", hint)
    free = free_bytes(place)
    held = "empty" if place != folder else _held(folder)
    detail = f"`{folder}`, {held}, {free / 1e9:.1f} GB free"
    if free < LITTLE_DISK:
        hint = "set HF_HOME to a larger disk, `hf cache` removes models, `--fetch stream` keeps no weights"
        return warn("cache", detail, hint)
    return ok("cache", detail)


def _held(folder: Path) -> str:
    """How much lies in the cache, by its files; links are names for files of it."""
    total, stop, places = 0, time.monotonic() + COUNTED, [str(folder)]
    while places:
        if time.monotonic() > stop:
            return f"more than {size(total)} in it"
        try:
            with os.scandir(places.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        places.append(entry.path)
                    elif not entry.is_symlink():
                        total += entry.stat(follow_symlinks=False).st_size
        except OSError:
            continue
    return f"{size(total)} in it"
