"""How a recipe writes names, and where checkpoints lie."""

from __future__ import annotations

import re

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_HUB_ID = re.compile(r"(?P<id>[^/@~.][^/@]*/[^/@]+)@(?P<revision>refs/.*|[^/]*)")


def split_location(text: str) -> tuple[str, str | None]:
    """`org/name@revision` as its two parts; any other text is a location without a revision."""
    match = _HUB_ID.fullmatch(text)
    return (match["id"], match["revision"]) if match else (text, None)
