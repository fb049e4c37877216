"""Hostile safetensors files, each made of another one: what fuzz_header.py feeds the header reader with.

A file is taken apart into length, JSON and data. Changes are made to the tree that the JSON spells, which keeps keys
that stand in it twice, to its text, to its bytes or to the length. Most changes of the tree are followed by a layout
that fits, so that what was changed is what decides, not the first broken sum.
"""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable
from math import prod
from typing import Any

DTYPES = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F8_E8M0": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4, "C64": 64, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64,
    "U32": 32, "U16": 16, "U8": 8, "BOOL": 8,
}  # fmt: skip
STRANGE_DTYPES = ["f32", "F33", "", "F32 ", "F\u00332", "F32\0", "F128", "\x1b[31mF32", "F32\u202e", "E8M0", "F4_E2M1"]
NAMES = [
    "a", "b", "", "__metadata__", "__metadata__ ", "../x", "/etc/passwd", "a/b\\c", "C:x", "\0", "\x1b[2J", "\x07",
    "\r", "\n", "\u202e", "\x9b31m", "\ufeff", "\ud800", "\udc00", "\U0001f600", "[red]", "dtype", "x" * 300, "é",
]  # fmt: skip
NUMBERS = [
    0, 1, 2, 3, 4, 7, 8, 9, 2**8, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53 + 1, 2**61, 2**62, 2**63 - 1, 2**63,
    2**64 - 1, 2**64, 10**20 - 1, 10**20, -1, -0.0, 0.0, 1.0, 0.5, 1e300, True, False, None, "1", [], [1], {},
]  # fmt: skip
# Texts that json.dumps never writes. Each stands where a number stood.
SPELLINGS = ["-0", "00", "01", "1.", ".5", "1e0", "1E+2", "1e999", "-1e999", "NaN", "Infinity", "-Infinity", "+1",
             "0x1", "1_0", "\u0661", "18446744073709551616", "9" * 25, "1" + "0" * 400, "0e0", "-"]  # fmt: skip
PIECES = [b"{", b"}", b"[", b"]", b",", b":", b'"', b"0", b"9", b"-", b".", b"e", b" ", b"\t", b"\n", b"\r", b"\x0b",
          b"\xc2\xa0", b"\\", b"\\u0000", b"\\ud800", b"\\udc00", b"\\ud83d\\ude00", b"\\x", b"\\/", b"\xc3", b"\xff",
          b"\xed\xa0\x80", b"\xc0\x80", b"\xf4\x90\x80\x80", b"\xef\xbb\xbf", b"\0", b"\x1b", b"\x7f", b"true", b"null",
          b'"a":', b'"__metadata__":', b'"dtype":', b"{}", b"[]", b"//", b"/**/", b"[" * 200,
          b'{"a":' * 130]  # fmt: skip
MOST_DATA = 2048
MOST_TEXT = 4096

Pairs = list[tuple[str, Any]]


class Tree(list[Any]):
    """A JSON object as its pairs, so that a key may stand in it twice."""


class Spelling(str):
    """Text that stands in the JSON as it is."""


def apart(blob: bytes) -> tuple[Tree | None, bytes, bytes]:
    """The tree (None where there is none), the header's text and the data."""
    length = min(int.from_bytes(blob[:8], "little"), max(len(blob) - 8, 0))
    text, data = blob[8 : 8 + length], blob[8 + length :]
    try:
        made = json.loads(text, object_pairs_hook=Tree)
    except (ValueError, RecursionError):
        made = None
    return (made if isinstance(made, Tree) else None), text, data


def spelt(value: Any, r: random.Random, loose: bool) -> str:
    """The value as JSON; `loose` adds white space and escapes that no writer makes."""
    gap = (lambda: r.choice(["", "", " ", "\n", "\t", "\r", "  "])) if loose else (lambda: "")
    if isinstance(value, Spelling):
        return str(value)
    if isinstance(value, Tree):
        pairs = (f"{gap()}{spelt(k, r, loose)}{gap()}:{gap()}{spelt(v, r, loose)}{gap()}" for k, v in value)
        return "{" + ",".join(pairs) + "}"
    if isinstance(value, list):
        return "[" + ",".join(f"{gap()}{spelt(v, r, loose)}{gap()}" for v in value) + "]"
    if isinstance(value, str) and loose and r.random() < 0.3:
        return '"' + "".join(f"\\u{ord(c):04x}" if ord(c) < 0x10000 else c for c in value) + '"'
    return json.dumps(value, ensure_ascii=r.random() < 0.5)


def whole(text: bytes, data: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text + data


def pattern(count: int) -> bytes:
    """Bytes of which no two places look alike."""
    return bytes((i * 7 + i // 251) % 256 for i in range(count))


def sized(entry: Any) -> int | None:
    """The bytes that an entry takes; None where it is none or takes too many."""
    if not isinstance(entry, Tree):
        return None
    fields = dict(entry)
    dtype, shape = fields.get("dtype"), fields.get("shape")
    if not isinstance(dtype, str) or dtype not in DTYPES or not isinstance(shape, list):
        return None
    if not all(type(size) is int and 0 <= size < 2**64 for size in shape):
        return None
    if 0 in shape:
        return 0
    bits = prod(shape) * DTYPES[dtype]
    return bits // 8 if bits % 8 == 0 and bits <= 8 * MOST_DATA else None


def lay_out(tree: Tree, r: random.Random) -> tuple[Tree, bytes]:
    """The tree with offsets that fit the shapes, in an order drawn at random, and data for them."""
    places = list(range(len(tree)))
    r.shuffle(places)
    made, place = Tree(tree), 0
    for i in places:
        name, entry = tree[i]
        size = None if name == "__metadata__" else sized(entry)
        if size is None or place + size > MOST_DATA:
            continue
        fields = Tree((k, v) for k, v in entry if k != "data_offsets")
        fields.insert(r.randrange(len(fields) + 1), ("data_offsets", [place, place + size]))
        made[i] = (name, fields)
        place += size
    return made, pattern(place)


def some_entry(r: random.Random) -> Tree:
    shape = [r.choice([0, 1, 1, 2, 3, 8]) for _ in range(r.choice([0, 1, 1, 2, 3]))]
    fields = [("dtype", r.choice(list(DTYPES))), ("shape", shape), ("data_offsets", [0, 0])]
    r.shuffle(fields)
    return Tree(fields)


def change(tree: Tree, r: random.Random) -> None:
    """One change of the tree, in place."""

    def rename() -> None:
        tree[i] = (r.choice(NAMES), tree[i][1])

    def twice() -> None:
        tree.insert(r.randrange(len(tree) + 1), (tree[i][0] if r.random() < 0.5 else r.choice(NAMES), tree[i][1]))

    def drop() -> None:
        del tree[i]

    def shuffle() -> None:
        r.shuffle(tree)

    def add() -> None:
        tree.insert(r.randrange(len(tree) + 1), (r.choice(NAMES) + str(r.randrange(100)), some_entry(r)))

    def metadata() -> None:
        odd = Spelling(r.choice(SPELLINGS))
        value = Tree((r.choice(NAMES), r.choice([*NAMES, 1, None, []]) if r.random() < 0.2 else "v") for _ in range(2))
        tree.insert(
            r.randrange(len(tree) + 1), ("__metadata__", r.choice([value, value, value, None, [], "x", Tree(), odd]))
        )

    def field() -> None:
        entry = tree[i][1]
        if not isinstance(entry, Tree) or not entry:
            tree[i] = (tree[i][0], some_entry(r))
            return
        j = r.randrange(len(entry))
        key, value = entry[j]
        draw = r.random()
        if draw < 0.1:
            entry.append(entry[j] if r.random() < 0.5 else (r.choice(["strides", "dtype", "Dtype", ""]), value))
        elif draw < 0.2:
            del entry[j]
        elif draw < 0.3:
            entry[j] = (r.choice(["dtype", "shape", "data_offsets", "offsets", *NAMES]), value)
        elif isinstance(value, list):
            sizes = list(value)
            at = r.randrange(len(sizes) + 1)
            new = r.choice(NUMBERS) if r.random() < 0.7 else Spelling(r.choice(SPELLINGS))
            if at == len(sizes) or r.random() < 0.3:
                sizes.insert(at, new)
            elif r.random() < 0.3:
                del sizes[at]
            elif type(sizes[at]) is int and r.random() < 0.5:
                sizes[at] += r.choice([-1, 1, -2, 2, 8, 2**63, -(2**63)])
            else:
                sizes[at] = new
            entry[j] = (key, sizes)
        elif key == "dtype" and draw < 0.9:
            entry[j] = (key, r.choice([*DTYPES, *STRANGE_DTYPES]))
        else:
            entry[j] = (key, r.choice([*NUMBERS, Tree([("F32", None)]), *NAMES]))

    def replace() -> None:
        fields = ["F32", [1], [0, 4]]
        deep: Any = 1
        for _ in range(r.choice([3, 60, 125, 130, 900])):
            deep = [deep]
        tree[i] = (tree[i][0], r.choice([*NUMBERS, fields, Tree(), deep, Spelling(r.choice(SPELLINGS))]))

    if not tree:
        add()
        return
    i = r.randrange(len(tree))
    kinds: list[Callable[[], None]] = [
        rename,
        twice,
        drop,
        shuffle,
        add,
        add,
        metadata,
        field,
        field,
        field,
        field,
        replace,
    ]
    r.choice(kinds)()


def edit(text: bytes, r: random.Random) -> bytes:
    """One change of the bytes."""
    place = r.randrange(len(text) + 1)
    cut = r.choice([0, 0, 1, 1, 2, 8])
    piece = r.choice(PIECES) if r.random() < 0.8 else r.randbytes(r.choice([1, 2, 4]))
    draw = r.random()
    if draw < 0.6:
        return text[:place] + piece + text[place + cut :]
    if draw < 0.7:
        return text[:place] + text[place + cut :]
    if draw < 0.8:
        return text + r.choice([b" ", b"\n", b"\0", b"  \t", b"x", b"{}"])
    if draw < 0.9:
        other = r.randrange(len(text) + 1)
        return text[:place] + text[other : other + r.randrange(40)] + text[place:]
    return bytes(b ^ (1 << r.randrange(8)) if i == place else b for i, b in enumerate(text))


def mutate(blob: bytes, r: random.Random) -> bytes:
    """A file made of `blob` by a few changes."""
    tree, text, data = apart(blob)
    draw = r.random()
    if tree is not None and draw < 0.75:
        for _ in range(r.choice([1, 1, 2, 3])):
            change(tree, r)
        if r.random() < 0.75:
            tree, data = lay_out(tree, r)
        with contextlib.suppress(RecursionError):
            text = spelt(tree, r, r.random() < 0.3).encode("utf-8", "surrogatepass")
        draw = r.random()
        if draw < 0.1:
            text += b" " * r.randrange(1, 9)
        elif draw < 0.25:
            text = edit(text, r)
    elif draw < 0.95:
        for _ in range(r.choice([1, 1, 2, 4])):
            text = edit(text, r)
    text = text[:MOST_TEXT]
    draw = r.random()
    if draw < 0.04:
        data = data[: r.randrange(len(data) + 1)]
    elif draw < 0.08:
        data += r.randbytes(r.choice([1, 2, 8]))
    made = whole(text, data)
    draw = r.random()
    if draw < 0.03:
        limits = [0, 1, 2**31, 2**32, 2**63, 2**64 - 1, 2**64 - 8, 100_000_000, 100_000_001]
        length = r.choice([*limits, len(made), len(text)])
        return (length + r.choice([-1, 0, 1]) & (2**64 - 1)).to_bytes(8, "little") + made[8:]
    return made[: r.randrange(len(made) + 1)] if draw < 0.04 else made


def seeds() -> list[bytes]:
    """Small valid files of every dtype, with and without metadata, white space and empty tensors."""
    r = random.Random(0)
    made = []
    for dtype in DTYPES:
        tree = Tree([("a", Tree([("dtype", dtype), ("shape", [8]), ("data_offsets", [0, 0])]))])
        tree, data = lay_out(tree, r)
        made.append(whole(spelt(tree, r, False).encode(), data))
    for loose in (False, True):
        tree = Tree([("__metadata__", Tree([("format", "pt")]))])
        tree += [(f"layers.{i}.weight", some_entry(r)) for i in range(4)]
        tree, data = lay_out(tree, r)
        made.append(whole(spelt(tree, r, loose).encode(), data))
    return [*made, whole(b"{}", b""), whole(b"{}      ", b"")]
