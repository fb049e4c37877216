from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from header_oracle import library_accepts, stricter_reason
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from raw_safetensors import entry, raw

from mergekit_lite.checkpoint.dtype import TORCH_DTYPES
from mergekit_lite.checkpoint.header import read_header
from mergekit_lite.checkpoint.meta import DTYPE_BITS
from mergekit_lite.errors import InputError

FOUR = b"1234"


def verdict(folder: Path, blob: bytes) -> str | None:
    """What is wrong with the file, or None where it is accepted."""
    path = folder / "x.safetensors"
    path.write_bytes(blob)
    try:
        read_header(path, "shown.safetensors")
    except InputError as error:
        return str(error)
    return None


BROKEN = {
    "empty file": (b"", "has 0 bytes"),
    "shorter than the length": (b"\x02\0\0", "has 3 bytes"),
    "truncated header": (raw({"a": entry()}, b"")[:20], r"truncated inside its header: \d+ bytes are missing"),
    "truncated data": (raw({"a": entry()}, b"12"), "truncated: 2 of 73 bytes are missing"),
    "bytes after the end": (raw({"a": entry()}, b"123456"), "2 bytes after its last tensor"),
    "length over the limit": (raw("{}", length=100_000_001), "claims a header of 100000001 bytes"),
    "length of 2**64-1": (raw("{}", length=2**64 - 1), "claims a header of 18446744073709551615"),
    "length beyond the file": (raw("{}", length=1000), "998 bytes are missing"),
    "length too small": (raw({"a": entry()}, FOUR, length=10), "is not JSON"),
    "length zero": (raw("{}", length=0), "does not start with"),
    "not UTF-8": (raw(b'{"\xff": 1}'), "not UTF-8 at byte 2"),
    "byte order mark": (raw("\ufeff{}"), "does not start with"),
    "an array": (raw([]), "does not start with"),
    "deep JSON": (raw('{"a":' + "[" * 200_000), "nested too deeply"),
    "deep objects": (raw('{"a":' * 200_000), "nested too deeply"),
    "what the library writes of nothing": (raw('{},"__metadata__":{}}   '), "is not JSON"),
    "text after the object": (raw("{} x"), "is not JSON"),
    "NaN": (raw('{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', FOUR), "`NaN` is not JSON"),
    "half a surrogate pair": (raw('{"a\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', FOUR), "surrogate"),
    "metadata not text": (raw({"__metadata__": {"a": 1}}), "maps `a`"),
    "metadata not an object": (raw({"__metadata__": []}), "not an object"),
    "metadata surrogate": (raw('{"__metadata__": {"a": "\\udc00"}}'), "surrogate"),
    "entry not an object": (raw({"a": 3}), "tensor `a` in `shown.safetensors`: its entry"),
    "no dtype": (raw({"a": {"shape": [1], "data_offsets": [0, 4]}}, FOUR), "`dtype` is missing"),
    "no offsets": (raw({"a": {"shape": [1], "dtype": "F32"}}, FOUR), "`data_offsets` is missing"),
    "unknown dtype": (raw({"a": entry("F33")}, FOUR), "tensor `a` .* no dtype `F33`"),
    "dtype in small letters": (raw({"a": entry("bf16")}, FOUR), "no dtype `bf16`"),
    "dtype a number": (raw({"a": entry(32)}, FOUR), "dtype is not text"),
    "shape a number": (raw({"a": entry(shape=1)}, FOUR), "its shape"),
    "shape a float": (raw({"a": entry(shape=[1.0])}, FOUR), "its shape"),
    "shape a bool": (raw({"a": entry(shape=[True])}, FOUR), "its shape"),
    "shape minus zero": (raw('{"a":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}'), "its shape"),
    "shape negative": (raw({"a": entry(shape=[-1])}, FOUR), "its shape"),
    "shape over 64 bits": (raw({"a": entry(shape=[2**64, 0], offsets=[0, 0])}), "its shape"),
    "shape of 5000 digits": (raw('{"a":{"dtype":"F32","shape":[1%s]}}' % ("0" * 5000)), "`data_offsets` is missing"),
    "product over 64 bits": (raw({"a": entry(shape=[2**63, 2, 0], offsets=[0, 0])}), "overflows 64 bits"),
    "bits over 64 bits": (raw({"a": entry(shape=[2**62])}, FOUR), "overflows 64 bits"),
    "offsets bool": (raw({"a": entry(offsets=[False, 4])}, FOUR), "its data_offsets"),
    "three offsets": (raw({"a": entry(offsets=[0, 4, 4])}, FOUR), "its data_offsets"),
    "offsets backwards": (raw({"a": entry(shape=[0], offsets=[4, 0])}, FOUR), "ends at byte 0, before"),
    "size too small": (raw({"a": entry(shape=[2])}, FOUR), "takes 8 bytes, but its data_offsets span 4"),
    "size too large": (raw({"a": entry(shape=[0])}, FOUR), "takes 0 bytes, but its data_offsets span 4"),
    "half a byte": (raw({"a": entry("F4", [1], [0, 1])}, b"1"), "does not fill whole bytes"),
    "hole at the start": (raw({"a": entry(offsets=[4, 8])}, b"12345678"), "leaves a hole after the header"),
    "hole between": (raw({"a": entry(), "b": entry(offsets=[8, 12])}, bytes(12)), "`b` .* leaves a hole after the ten"),
    "overlap": (raw({"a": entry(), "b": entry(offsets=[2, 6])}, bytes(6)), "`b` .* overlaps the tensor before"),
    "same bytes twice": (raw({"a": entry(), "b": entry()}, FOUR), "overlaps"),
    "zero-size inside another": (
        raw({"a": entry(), "z": entry(shape=[0], offsets=[2, 2])}, FOUR),
        "overlaps",
    ),
}  # fmt: skip


@pytest.mark.parametrize("blob, message", BROKEN.values(), ids=BROKEN.keys())
def test_broken_file_is_rejected_by_the_library_and_by_us(blob: bytes, message: str, tmp_path: Path) -> None:
    assert not library_accepts(blob)
    path = tmp_path / "x.safetensors"
    path.write_bytes(blob)
    with pytest.raises(InputError, match=message) as caught:
        read_header(path, "shown.safetensors")
    assert "shown.safetensors" in str(caught.value)
    assert caught.value.problems[0].hint


VALID = json.dumps(entry())
STRICTER = {
    "tensor twice": (f'{{"a":{VALID},"a":{VALID}}}', "`a` stands in it twice"),
    "metadata key twice": (f'{{"__metadata__":{{"k":"1","k":"2"}},"a":{VALID}}}', "`k` stands in it twice"),
    "unknown field": ({"a": entry(strides=[1])}, "unknown field `strides`"),
    "entry as an array": ({"a": ["F32", [1], [0, 4]]}, "its entry is not an object"),
    "empty name": ({"": entry()}, "empty name"),
    "white space first": (" " + json.dumps({"a": entry()}), "does not start with"),
}


@pytest.mark.parametrize("header, message", STRICTER.values(), ids=STRICTER.keys())
def test_documented_cases_where_the_library_is_laxer(header: object, message: str, tmp_path: Path) -> None:
    blob = raw(header, FOUR)
    assert library_accepts(blob)
    assert message in (verdict(tmp_path, blob) or "accepted")


def test_hostile_names_cannot_drive_the_terminal(tmp_path: Path) -> None:
    said = verdict(tmp_path, raw({"\x1b[2J\u202e" + "n" * 10_000: entry("F33")}, FOUR))
    assert said is not None and "\x1b" not in said and "\u202e" not in said and len(said) < 1000


def test_pipe_and_missing_file_are_errors_and_do_not_wait(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="not a regular file"):
        read_header(tmp_path / "pipe", "pipe")
    with pytest.raises(InputError, match="cannot read `gone`: No such file"):
        read_header(tmp_path / "gone", "gone")
    with pytest.raises(InputError, match=r"cannot read|not a regular file"):
        read_header(tmp_path, "folder")


def test_identity_and_order(tmp_path: Path) -> None:
    header = {
        "last": entry("U8", [3], [4, 7]),
        "__metadata__": {"format": "pt"},
        "empty": entry("I64", [0, 5], [4, 4]),
        "first": entry(shape=[]),
    }
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw(header, bytes(7)))
    found = read_header(path, "x")
    text = json.dumps(header).encode()
    assert [meta.name for meta in found.tensors] == ["first", "empty", "last"]
    assert [(meta.start, meta.nbytes, meta.shape) for meta in found.tensors] == [
        (8 + len(text), 4, ()),
        (8 + len(text) + 4, 0, (0, 5)),
        (8 + len(text) + 4, 3, (3,)),
    ]
    assert found.metadata == {"format": "pt"}
    assert found.shard.header_sha256 == hashlib.sha256(text).hexdigest()
    assert (found.shard.nbytes, found.shard.mtime_ns) == (path.stat().st_size, path.stat().st_mtime_ns)


def assert_same(folder: Path, blob: bytes) -> None:
    """The header read by us says what the library's own parser says of the same bytes."""
    path = folder / "x.safetensors"
    path.write_bytes(blob)
    ours = read_header(path, "x")
    theirs = dict(safetensors.deserialize(blob))
    assert {meta.name for meta in ours.tensors} == theirs.keys()
    for meta in ours.tensors:
        their = theirs[meta.name]
        assert (meta.dtype, list(meta.shape)) == (their["dtype"], list(their["shape"]))
        assert blob[meta.start : meta.start + meta.nbytes] == bytes(their["data"])
    starts = [meta.start for meta in ours.tensors]
    assert starts == sorted(starts)


quick = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(lambda n: n != "__metadata__")
shapes = st.lists(st.integers(0, 4), max_size=4)


@settings(quick, max_examples=100)
@given(
    tensors=st.dictionaries(names, st.tuples(st.sampled_from(sorted(TORCH_DTYPES)), shapes), max_size=6),
    metadata=st.none() | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), st.just("ü")),
)
def test_files_of_the_library_are_read_alike(
    tensors: dict[str, tuple[str, list[int]]], metadata: dict[str, str] | None, tmp_path: Path
) -> None:
    # Of no tensors and empty metadata, safetensors 0.8.0 writes `{},"__metadata__":{}}`, which it does not read itself
    # (the case "what the library writes of nothing" above).
    assume(tensors or metadata != {})
    made = {n: torch.zeros(s, dtype=torch.uint8).to(TORCH_DTYPES[d]) for n, (d, s) in tensors.items()}
    blob = safetensors.torch.save(made, metadata)
    assert_same(tmp_path, blob)
    found = read_header(tmp_path / "x.safetensors", "x")
    assert {meta.name: (meta.dtype, list(meta.shape)) for meta in found.tensors} == tensors
    assert found.metadata == (metadata or {})


@settings(quick, max_examples=50)
@given(data=st.data(), codes=st.lists(st.sampled_from(sorted(DTYPE_BITS)), min_size=1, max_size=5))
def test_every_dtype_the_sub_byte_ones_too(data: st.DataObject, codes: list[str], tmp_path: Path) -> None:
    header, place = {}, 0
    for i, code in enumerate(codes):
        shape = data.draw(shapes)
        bits = DTYPE_BITS[code] * torch.Size(shape).numel()
        if bits % 8:
            shape, bits = [8], DTYPE_BITS[code] * 8
        header[f"t{i}"] = entry(code, shape, [place, place + bits // 8])
        place += bits // 8
    order = data.draw(st.permutations(list(header)))
    assert_same(tmp_path, raw({name: header[name] for name in order}, os.urandom(place)))


SEEDS = [
    raw({"a": entry(), "b": entry("BF16", [2, 1], [4, 8])}, bytes(8)),
    raw({"__metadata__": {"k": "v"}, "a": entry("U8", [0], [0, 0]), "b": entry("F4", [2], [0, 1])}, b"1"),
    raw({"x": entry("I8", [], [0, 1]), "y": entry("BOOL", [1, 1, 1], [1, 2])}, b"12"),
]
# As the library writes them: without white space, which is read by a shorter way.
SEEDS += [
    raw(json.dumps(header, separators=(",", ":")), data)
    for header, data in (
        ({"a": entry(), "b": entry("BF16", [2, 1], [4, 8])}, bytes(8)),
        ({"__metadata__": {"k": "v"}, "a": entry("U8", [0], [0, 0]), "é": entry("I8", [2], [0, 2])}, b"12"),
    )
]
pieces = st.sampled_from(
    [b"{", b"}", b"[", b"]", b",", b":", b'"', b"0", b"1", b"9", b"-", b".", b"e", b" ", b"\n", b"\\", b"\\ud800",
     b"\xc3", b"true", b"null", b'"a":', b'"__metadata__":', b"{}", b"18446744073709551616", b"F32", b"\0"]
)  # fmt: skip
edits = st.lists(
    st.tuples(st.integers(0, 160), st.integers(0, 3), pieces | st.binary(min_size=0, max_size=2)),
    min_size=1,
    max_size=3,
)


@settings(quick, max_examples=1500)
@given(seed=st.sampled_from(SEEDS), edits=edits, keep_length=st.booleans())
def test_same_verdict_as_the_library_on_mutated_files(
    seed: bytes, edits: list[tuple[int, int, bytes]], keep_length: bool, tmp_path: Path
) -> None:
    start = 0 if keep_length else 8
    blob = seed
    for place, cut, piece in edits:
        place = start + place % (len(blob) - start)
        blob = blob[:place] + piece + blob[place + cut :]
    if not keep_length:  # the length follows the edit, so that the JSON itself is what differs
        length = int.from_bytes(seed[:8], "little") + len(blob) - len(seed)
        blob = max(length, 0).to_bytes(8, "little") + blob[8:]
    reason = verdict(tmp_path, blob)
    if not library_accepts(blob):
        assert reason is not None
    elif reason is None:
        assert_same(tmp_path, blob)
    else:
        assert stricter_reason(blob), reason


def test_files_with_one_header_are_told_apart(tmp_path: Path) -> None:
    blob = raw({"a": entry(), "b": entry("BF16", [2, 1], [4, 8])}, bytes(8))
    (tmp_path / "one").mkdir()
    (tmp_path / "other").mkdir()
    for folder in ("one", "other"):
        (tmp_path / folder / "x.safetensors").write_bytes(blob)
    one, other = (read_header(tmp_path / folder / "x.safetensors", folder) for folder in ("one", "other"))
    assert {meta.file for meta in other.tensors} == {str(tmp_path / "other" / "x.safetensors")}
    assert [(t.name, t.start, t.nbytes) for t in other.tensors] == [(t.name, t.start, t.nbytes) for t in one.tensors]
    assert (other.shard.path, other.shard.header_sha256) == (other.tensors[0].file, one.shard.header_sha256)
    assert "truncated: 3 of" in str(verdict(tmp_path, blob[:-3]))
    assert "2 bytes after" in str(verdict(tmp_path, blob + b"12"))
