"""Makes safetensors files byte by byte, the broken ones too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def raw(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A file's bytes: `header` as JSON, or as it is where it is text or bytes, with `length` as its claimed length."""
    text = header if isinstance(header, (str, bytes)) else json.dumps(header)
    text = text.encode() if isinstance(text, str) else text
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4), **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def put(path: Path, header: Any, data: bytes = b"") -> Path:
    path.write_bytes(raw(header, data))
    return path


def put_floats(path: Path, *names: str) -> Path:
    """A valid file of F32 tensors of one element each; element i is the byte i four times."""
    header = {name: entry(offsets=(4 * i, 4 * i + 4)) for i, name in enumerate(names)}
    return put(path, header, b"".join(bytes([i] * 4) for i in range(len(names))))
