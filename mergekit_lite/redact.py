"""Secrets, taken out of everything that is shown or written. Imports nothing of ours.

What counts as a secret: a Hugging Face token, the user and password of a URL, what an Authorization header or the query
of a signed URL holds, and the values that this process was given: tokens in its environment, passwords in the addresses
of proxies and mirrors, and what `learn` was told.
"""

from __future__ import annotations

import functools
import io
import os
import re
import urllib.parse
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

HIDDEN = "***"
TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN")
ADDRESSES = ("HF_ENDPOINT", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
SHORTEST = 8  # characters of a value that is hidden wherever it stands: shorter ones are words of other texts too

# A token is random: a lower-case word behind `hf_`, such as a part of a tensor's name, is none.
_TOKEN = re.compile(r"(?<![A-Za-z0-9])(?:hf|api_org|hf_oauth|hf_jwt)_(?:(?=[a-z]*[A-Z0-9])[A-Za-z0-9]{8,}|[a-z]{20,})")
_LOGIN = re.compile(r"([A-Za-z][A-Za-z0-9+.-]{0,20}:/{1,2})[^\s/@\"'`]*@")
_HEADER = re.compile(r"(authorization[\"']?\s*[:=]\s*[\"']?(?:(?:bearer|basic|token)\s+)?)[^\s\"',}]+", re.IGNORECASE)
_QUERY = re.compile(
    r"([?&](?:access_token|token|auth|api_key|password|signature|x-amz-[a-z-]+|sig|key-pair-id|policy)=)[^&\s\"'`<>]+",
    re.IGNORECASE,
)
# Keys of a configuration that hold a secret, and nothing that a model needs.
_KEYS = frozenset({"use_auth_token", "_auth_token", "auth_token", "hf_token", "access_token", "api_key"})

_learned: set[str] = set()


def learn(value: str | None) -> None:
    """Hide `value` from now on, wherever it stands; nothing where it is too short to be told from other text."""
    if value is not None and len(value) >= SHORTEST:
        _learned.add(value)
        refresh()


def refresh() -> None:
    """Look at the environment anew, where it may have changed."""
    _values.cache_clear()


def redact(text: str) -> str:
    """`text` with `***` in place of every secret."""
    for value in _values():
        text = text.replace(value, HIDDEN)
    if "_" in text:
        text = _TOKEN.sub(HIDDEN, text)
    if "/" in text:
        text = _LOGIN.sub(rf"\1{HIDDEN}@", text)
    if "=" in text or ":" in text:
        text = _QUERY.sub(rf"\1{HIDDEN}", _HEADER.sub(rf"\1{HIDDEN}", text))
    return text


def stream(to: TextIO) -> TextIO:
    """The stream `to`, with every text that is written to it redacted; `to` itself where it is no file."""
    if not isinstance(to, io.TextIOWrapper):
        return to
    return _Redacting(to.buffer, to.encoding, to.errors, line_buffering=True, write_through=True)


class _Redacting(io.TextIOWrapper):
    def write(self, text: str) -> int:
        super().write(redact(text))
        return len(text)


def secret(text: str) -> bool:
    """Whether `text` holds a secret."""
    return redact(text) != text


def cleaned(value: Any, path: str = "") -> tuple[Any, list[str]]:
    """A copy of JSON data without secrets, and the dotted paths of the entries that were left out for one."""
    if isinstance(value, Mapping):
        made: dict[str, Any] = {}
        found: list[str] = []
        for key, entry in value.items():
            here = f"{path}.{key}" if path else str(key)
            if secret(str(key)) or (isinstance(entry, str) and entry and (key in _KEYS or secret(entry))):
                found.append(redact(here))
                continue
            made[key], inner = cleaned(entry, here)
            found += inner
        return made, found
    if isinstance(value, list):
        pairs = [cleaned(entry, f"{path}[{place}]") for place, entry in enumerate(value)]
        return [entry for entry, _ in pairs], [name for _, names in pairs for name in names]
    if isinstance(value, str) and secret(value):
        return HIDDEN, [path]
    return value, []


@functools.cache
def _values() -> tuple[str, ...]:
    """What is hidden wherever it stands, the longest first: one may hold another."""
    return tuple(sorted({*_learned, *_given()}, key=len, reverse=True))


def _given() -> Iterator[str]:
    """The secrets in this process's environment, as they stand there and as a URL decodes them."""
    for name in TOKENS:
        value = os.environ.get(name, "").strip()
        if len(value) >= SHORTEST:
            yield value
    for name in ADDRESSES:
        for address in (os.environ.get(name), os.environ.get(name.lower())):
            login = _LOGIN.search(address or "")
            if login is None:
                continue
            _, _, password = login[0].removesuffix("@").rpartition("/")[2].partition(":")
            for value in (password, urllib.parse.unquote(password)):
                if len(value) >= SHORTEST:
                    yield value
