"""What the safetensors library says of a file's bytes, against what our reader says. No torch."""

from __future__ import annotations

import json
from pathlib import Path

import safetensors

from mergekit_lite.checkpoint import header
from mergekit_lite.errors import InputError


class Disagreement(AssertionError):
    """The two readers do not say the same, or ours did what it must never do."""


def library_accepts(blob: bytes) -> bool:
    try:
        safetensors.deserialize(blob)
    except safetensors.SafetensorError:
        return False
    return True


def stricter_reason(blob: bytes) -> bool:
    """True where the header is one of the documented cases that only the library accepts."""
    text = blob[8 : 8 + int.from_bytes(blob[:8], "little")]
    found = [not text.startswith(b"{")]

    def pairs(items: list[tuple[str, object]]) -> dict[str, object]:
        found.append(len(dict(items)) < len(items))
        return dict(items)

    for name, value in json.loads(text, object_pairs_hook=pairs).items():
        if name == "__metadata__":
            continue
        found.append(name == "" or not isinstance(value, dict))
        found.append(isinstance(value, dict) and value.keys() != {"dtype", "shape", "data_offsets"})
        found.append(isinstance(value, dict) and isinstance(value.get("dtype"), dict))  # {"F32": null}
    return any(found)


def compare(blob: bytes, path: Path, metadata: bool = False) -> bool:
    """Whether our reader accepts `blob`, which is written to `path`. With `metadata` that of accepted files is compared
    too, which takes the library longer. Raises Disagreement where the library says otherwise, save for what is
    documented, and where a message of ours could drive a terminal."""
    path.write_bytes(blob)
    header._KNOWN.clear()  # or a header that was seen before would not be parsed
    try:
        ours = header.read_header(path, "x.safetensors")
    except InputError as error:
        said = str(error)
        raw = sorted({c for c in said if c != "\n" and not c.isprintable()})
        if raw or len(said) > 3000 or "x.safetensors" not in said:
            raise Disagreement(f"a message of {len(said)} characters, {raw} among them: {said!r}") from error
        if library_accepts(blob) and not stricter_reason(blob):
            raise Disagreement(f"only the library accepts it: {said}") from error
        return False
    try:
        theirs = dict(safetensors.deserialize(blob))
    except safetensors.SafetensorError as error:
        raise Disagreement(f"only we accept it, the library says: {error}") from error
    if [meta.name for meta in ours.tensors] != list(dict.fromkeys(meta.name for meta in ours.tensors)):
        raise Disagreement("a name twice")
    if {meta.name for meta in ours.tensors} != theirs.keys():
        raise Disagreement(f"names: {[meta.name for meta in ours.tensors]} and {list(theirs)}")
    place = 8 + int.from_bytes(blob[:8], "little")
    for meta in ours.tensors:
        their = theirs[meta.name]
        if (meta.dtype, list(meta.shape)) != (their["dtype"], list(their["shape"])):
            raise Disagreement(f"{meta} and {their}")
        if meta.start != place or blob[place : place + meta.nbytes] != bytes(their["data"]):
            raise Disagreement(f"bytes of {meta}")
        place += meta.nbytes
    if place != len(blob) or ours.shard.nbytes != place:
        raise Disagreement(f"{place} of {len(blob)} bytes are taken")
    if metadata:
        with safetensors.safe_open(path, framework="np") as file:
            if (file.metadata() or {}) != ours.metadata:
                raise Disagreement(f"metadata: {ours.metadata} and {file.metadata()}")
    return True
