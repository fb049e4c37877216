"""One model's tokenizer: the ids of its tokens, read through the `tokenizers` library. No code of a repository runs."""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mergekit_lite.checkpoint.inside import inside, read_object
from mergekit_lite.checkpoint.meta import Checkpoint
from mergekit_lite.errors import InputError

TOKENIZER, SETTINGS = "tokenizer.json", "tokenizer_config.json"
# What transformers writes of a token that was added to a tokenizer's own, beside its text and its id.
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
MOST_TOKENS = 1 << 24  # an id beyond this is a fault of the file: the output would have a row for every id below it
_MAX_BYTES = 1 << 28
_SLOW = ("tokenizer.model", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model")


@dataclass(frozen=True, slots=True)
class Tokens:
    """A model's tokenizer: `ids` by token, `added` the settings of tokens that were added to the model's own, `data`
    the content of tokenizer.json, `settings` that of tokenizer_config.json. `stored` tells that tokenizer.json is a
    file of the model and was not made here."""

    name: str
    ids: Mapping[str, int]
    added: Mapping[str, Mapping[str, Any]]
    data: Mapping[str, Any]
    settings: Mapping[str, Any]
    stored: bool = True

    @property
    def size(self) -> int:
        """Rows that the tokenizer needs: the largest id and one."""
        return max(self.ids.values(), default=-1) + 1


class Reader:
    """Reads tokenizers; models with the same file share what was read."""

    def __init__(self) -> None:
        self._known: dict[str, Tokens] = {}

    def read(self, name: str, checkpoint: Checkpoint) -> Tokens | None:
        """The tokenizer of the model `name`, None where its folder has none. Raises InputError where one cannot be
        read, or could only be read by code of the repository."""
        folder = checkpoint.folder
        if folder is None:
            return None
        text = _text(folder, TOKENIZER)
        settings = read_object(inside(folder, SETTINGS), _MAX_BYTES) if (folder / SETTINGS).is_file() else {}
        stored = text is not None
        if text is None:
            slow = next((file for file in _SLOW if (folder / file).is_file()), None)
            if slow is None:
                return None
            text = _converted(folder, slow)
        digest = hashlib.sha256(text)
        digest.update(json.dumps(settings, sort_keys=True).encode())
        found = self._known.get(digest.hexdigest())
        if found is None:
            found = self._known[digest.hexdigest()] = _parsed(name, folder / TOKENIZER, text, settings, stored)
        return replace(found, name=name, stored=stored)


def _text(folder: Path, name: str) -> bytes | None:
    path = inside(folder, name)
    if not path.is_file():
        return None
    try:
        with open(path, "rb") as file:
            if not stat.S_ISREG(path.stat().st_mode):
                raise InputError(f"`{path}` is not a regular file")
            text = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise InputError(f"cannot read `{path}`: {error.strerror}", hint="download the file again") from error
    if len(text) > _MAX_BYTES:
        raise InputError(f"`{path}` is larger than {_MAX_BYTES >> 20} MiB", hint="is it another file?")
    return text


def _converted(folder: Path, slow: str) -> bytes:
    """What transformers makes of a tokenizer that is stored in another form than tokenizer.json."""
    hint = (
        f"make the file once, where you trust the model: `AutoTokenizer.from_pretrained({str(folder)!r})"
        f".save_pretrained({str(folder)!r})`"
    )
    try:
        from transformers import AutoTokenizer
    except ImportError:
        message = f"`{folder}` has a {slow} and no {TOKENIZER}; transformers, which could convert it, is not installed"
        raise InputError(message, hint=f"`pip install transformers`, or {hint}") from None
    try:
        made = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        text: str = made.backend_tokenizer.to_str()
    except Exception as fault:
        message = f"`{folder}` has a {slow} and no {TOKENIZER}, and transformers cannot convert it: {_short(fault)}"
        raise InputError(message, hint=hint) from None
    return text.encode()


def _parsed(name: str, path: Path, text: bytes, settings: Mapping[str, Any], stored: bool) -> Tokens:
    from tokenizers import Tokenizer

    try:
        data = json.loads(text)
        ids = Tokenizer.from_str(text.decode("utf-8")).get_vocab(with_added_tokens=True)
        added = {entry["content"]: _flags(entry) for entry in data.get("added_tokens") or ()}
        # transformers adds these to the tokenizer when it reads it.
        for number, entry in (settings.get("added_tokens_decoder") or {}).items():
            if entry["content"] not in ids:
                ids[entry["content"]] = int(number)
            if entry["content"] not in added:
                added[entry["content"]] = _flags(entry)
    except Exception as fault:  # the library raises nothing more exact
        raise InputError(f"`{path}` is no tokenizer: {_short(fault)}", hint="download the file again") from None
    if not ids:
        raise InputError(f"`{path}` has no tokens", hint="download the file again")
    token = max(ids, key=lambda one: ids[one])
    if ids[token] >= MOST_TOKENS or min(ids.values()) < 0:
        raise InputError(f"`{path}` gives a token the id {ids[token]}", hint="download the file again")
    return Tokens(name, ids, added, data, settings, stored)


def _flags(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {"content": str(entry["content"]), **{flag: bool(entry.get(flag, False)) for flag in FLAGS}}


def _short(fault: Exception) -> str:
    text = " ".join(str(fault).split()) or type(fault).__name__
    return text if len(text) <= 200 else text[:199] + "…"
