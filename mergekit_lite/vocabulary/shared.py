"""Which tokens two tokenizers share: those that stand for the same text, however each writes it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache

from mergekit_lite.vocabulary.tokens import Tokens
from mergekit_lite.vocabulary.union import kind_of

ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def shared_tokens(lead: Tokens, other: Tokens) -> dict[int, int]:
    """By the id of a token of `lead`: the id of the token of `other` that is the same.

    A special token is the one of the same text, else the one of the same role (`eos_token` and so on). Any other token
    is the one of the same text: as it is written where both tokenizers write tokens alike, else by the bytes that it
    stands for, a leading blank included.
    """
    alike = kind_of(lead)[1:] == kind_of(other)[1:]
    known: dict[bytes, int] = {}
    theirs, mine = _Texts(other), _Texts(lead)
    for token, number in sorted(other.ids.items(), key=lambda item: item[1]):
        if not theirs.special(token) and (text := theirs.text(token)) is not None:
            known.setdefault(text, number)
    found: dict[int, int] = {}
    for token, number in lead.ids.items():
        same: int | None
        if mine.special(token):
            same = other.ids.get(token)
            if same is None:
                named = [theirs.roles[role] for role in ROLES if mine.roles.get(role) == token and role in theirs.roles]
                same = next((other.ids[one] for one in named if one in other.ids), None)
        else:
            same = other.ids.get(token) if alike else None
            if same is None and (text := mine.text(token)) is not None:
                same = known.get(text)
        if same is not None:
            found[number] = same
    return found


class _Texts:
    """What the tokens of one tokenizer stand for."""

    def __init__(self, tokens: Tokens):
        self._ids, self._added = tokens.ids, tokens.added
        kind = kind_of(tokens)
        self._words = "WordPiece" if kind[0] == "WordPiece" else kind[1]
        self._prefix = tokens.data["model"].get("continuing_subword_prefix") or "##"
        self.roles: dict[str, str] = {}
        for role in ROLES:
            value = tokens.settings.get(role)
            text = value.get("content") if isinstance(value, Mapping) else value
            if isinstance(text, str):
                self.roles[role] = text

    def special(self, token: str) -> bool:
        return bool(self._added.get(token, {}).get("special"))

    def text(self, token: str) -> bytes | None:
        """The text of a token, a blank before a word included; None for a byte that is never taken, since there is a
        token of that character."""
        if token in self._added:
            return token.encode()
        if self._words == "byte-level":
            table = _table()
            return bytes([table[c] for c in token]) if all(c in table for c in token) else token.encode()
        if self._words == "SentencePiece":
            byte = _BYTE.fullmatch(token)
            if byte is None:
                return token.replace("▁", " ").encode()
            value = int(byte[1], 16)
            plain = "▁" if value == 0x20 else chr(value)
            return None if value < 0x80 and plain in self._ids else bytes([value])
        if self._words == "WordPiece":
            if token.startswith(self._prefix) and token != self._prefix:
                return token[len(self._prefix) :].encode()
            return (" " + token if token[:1].isalnum() else token).encode()
        return token.encode()


@cache
def _table() -> Mapping[str, int]:
    """Characters by which byte-level tokenizers write bytes: visible ones of Latin-1 for themselves, then those from
    U+0100 on for the others, in their order."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in visible]
    return {chr(b): b for b in visible} | {chr(0x100 + place): b for place, b in enumerate(others)}
