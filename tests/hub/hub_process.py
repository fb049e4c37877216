"""Commands as processes that use a loopback Hub."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from server import Hub

ROOT = Path(__file__).parents[2]
TOKEN = "hf_loopbackTOKEN0123456789"


@dataclass(frozen=True)
class Ran:
    """What a command left: exit code, stdout, stderr."""

    code: int
    out: str
    err: str


def environ(hub: Hub, home: Path, **more: str) -> dict[str, str]:
    """This process's environment, where `hub` is the only Hub and the cache lies in `home`."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING_FACE_"))}
    return kept | hub.environment(home) | {"PYTHONPATH": str(ROOT), "NO_COLOR": "1", "COLUMNS": "120"} | more
