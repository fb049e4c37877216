from __future__ import annotations

import errno
import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save

from mergekit_lite.checkpoint import writer as writer_module
from mergekit_lite.checkpoint.dtype import TORCH_DTYPES
from mergekit_lite.checkpoint.header import read_header
from mergekit_lite.checkpoint.meta import DTYPE_BITS
from mergekit_lite.checkpoint.writer import ShardFileWriter, encode_header, free_bytes
from mergekit_lite.errors import RecipeError, StoppedError

HEADER, STARTS = encode_header([("a", "U8", (100,), 100), ("b", "U8", (50,), 50)], {"format": "pt"})
NBYTES = len(HEADER) + 150

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
tensors = st.dictionaries(
    text.filter(lambda name: name not in ("", "__metadata__")),
    st.tuples(st.sampled_from(sorted(DTYPE_BITS)), st.lists(st.integers(0, 5), max_size=3)),
    max_size=5,
)


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tensors=tensors, metadata=st.dictionaries(text, text, max_size=3))
def test_what_is_written_the_library_reads(
    tensors: dict[str, tuple[str, list[int]]], metadata: dict[str, str], tmp_path: Path
) -> None:
    planned, contents = [], []
    for name, (code, shape) in tensors.items():
        count = 1
        for size in shape:
            count *= size
        if count * DTYPE_BITS[code] % 8:
            shape, count = [*shape, 8], count * 8
        contents.append(os.urandom(count * DTYPE_BITS[code] // 8))
        planned.append((name, code, tuple(shape), len(contents[-1])))
    header, starts = encode_header(planned, metadata)
    nbytes = len(header) + sum(map(len, contents))
    path = tmp_path / "x.safetensors"
    with ShardFileWriter.create(path, header, nbytes) as writer:
        for start, content in random.sample(list(zip(starts, contents, strict=True)), len(contents)):
            writer.write(start, content)
    assert len(header) % 8 == 0 and path.stat().st_size == nbytes
    read = dict(safetensors.deserialize(path.read_bytes()))
    assert {(n, t["dtype"], tuple(t["shape"]), bytes(t["data"])) for n, t in read.items()} == {
        (name, code, shape, content) for (name, code, shape, _), content in zip(planned, contents, strict=True)
    }
    with safe_open(path, "pt") as library:
        assert (library.metadata() or {}) == metadata
    ours = {meta.name: meta.start for meta in read_header(path, "x").tensors}
    assert ours == {name: start for (name, *_), start in zip(planned, starts, strict=True)}


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_same_bytes_as_the_library_writes(metadata: dict[str, str] | None) -> None:
    import torch

    # The library puts wider dtypes first and sorts by name; in that order the files are equal.
    made = {"ä": torch.zeros(3, 2), "b": torch.zeros(1), "c": torch.zeros(5, dtype=torch.bfloat16)}
    codes = {dtype: code for code, dtype in TORCH_DTYPES.items()}
    blob = save(made, metadata)
    order = [name for name, _ in safetensors.deserialize(blob)]
    order.sort(key=lambda name: (-made[name].dtype.itemsize, name.encode()))
    planned = [(name, codes[made[name].dtype], tuple(made[name].shape), made[name].nbytes) for name in order]
    header, _ = encode_header(planned, metadata or {})
    assert header == blob[: len(header)]


@pytest.mark.parametrize(
    "tensor",
    [("a", "F32", (2,), 7), ("", "F32", (1,), 4), ("__metadata__", "F32", (1,), 4), ("a", "F4", (1,), 0)],
)
def test_tensors_that_cannot_be_stored_are_bugs_of_the_caller(tensor: tuple[str, str, tuple[int, ...], int]) -> None:
    with pytest.raises(ValueError, match="can be stored"):
        encode_header([tensor], {})


def test_name_twice_and_header_over_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="can be stored"):
        encode_header([("a", "U8", (1,), 1)] * 2, {})
    monkeypatch.setattr(writer_module, "MAX_HEADER_BYTES", 1000)
    with pytest.raises(RecipeError, match="safetensors allows 1000"):
        encode_header([], {"a": "x" * 1000})


def test_threads_write_their_parts_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "_MAX_WRITE", 7)
    content = random.Random(3).randbytes(150)
    path = tmp_path / "x.safetensors"
    with ShardFileWriter.create(path, HEADER, NBYTES) as writer, ThreadPoolExecutor(4) as pool:
        pieces = [(i, content[i : i + 15]) for i in range(0, 150, 15)]
        list(pool.map(lambda piece: writer.write(len(HEADER) + piece[0], memoryview(piece[1])), pieces))
        writer.sync()
    assert path.read_bytes() == HEADER + content


def test_resuming_keeps_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with ShardFileWriter.create(path, HEADER, NBYTES) as writer:
        writer.write(STARTS[0], b"a" * 100)
    with ShardFileWriter.open(path, NBYTES) as writer:
        writer.write(STARTS[1], b"b" * 50)
    assert path.read_bytes() == HEADER + b"a" * 100 + b"b" * 50
    with pytest.raises(StoppedError, match=f"has {NBYTES} bytes where the plan has {NBYTES + 1}"):
        ShardFileWriter.open(path, NBYTES + 1)
    with pytest.raises(StoppedError, match="No such file"):
        ShardFileWriter.open(tmp_path / "gone", NBYTES)


def test_writes_outside_the_file_are_bugs_of_the_caller(tmp_path: Path) -> None:
    with ShardFileWriter.create(tmp_path / "x", HEADER, NBYTES) as writer:
        for offset in (-1, NBYTES - 1, NBYTES + 5):
            with pytest.raises(ValueError, match="of a file of"):
                writer.write(offset, b"ab")


def test_blocks_are_reserved_when_the_file_is_made(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with ShardFileWriter.create(path, HEADER, 2**20):
        assert path.stat().st_size == 2**20
        assert path.stat().st_blocks * 512 >= 2**20


def test_disk_too_small_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(StoppedError, match=r"No space left|File too large") as caught:
        ShardFileWriter.create(path, HEADER, 2**60)
    assert not path.exists()
    hint = caught.value.problems[0].hint or ""
    assert f"{2**60:,} bytes" in hint and "are free" in hint


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EINVAL])
def test_file_system_without_preallocation(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, offset: int, length: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with ShardFileWriter.create(tmp_path / "x", HEADER, NBYTES):
        assert (tmp_path / "x").read_bytes() == HEADER + bytes(150)


def test_disk_that_fills_up_or_fails_stops_the_run(tmp_path: Path) -> None:
    """A descriptor opened for reading stands for any failure of the write call."""
    path = tmp_path / "x"
    path.write_bytes(bytes(NBYTES))
    with ShardFileWriter(path, os.open(path, os.O_RDONLY), NBYTES) as writer:
        with pytest.raises(StoppedError, match=r"cannot write .* Bad file descriptor") as caught:
            writer.write(0, b"x")
        assert "--resume" in str(caught.value)
    full = Path("/dev/full")
    if full.exists():
        writer = ShardFileWriter(full, os.open(full, os.O_RDWR), 10)
        with writer, pytest.raises(StoppedError, match="No space left"):
            writer.write(0, b"x")


def test_a_link_in_the_place_of_the_file_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("keep")
    (tmp_path / "x").symlink_to(tmp_path / "precious")
    with pytest.raises(StoppedError, match="cannot create"):
        ShardFileWriter.create(tmp_path / "x", HEADER, NBYTES)
    with pytest.raises(StoppedError, match="cannot open"):
        ShardFileWriter.open(tmp_path / "x", 4)
    assert (tmp_path / "precious").read_text() == "keep"


def test_free_bytes_of_a_folder_yet_to_be_made(tmp_path: Path) -> None:
    found = os.statvfs(tmp_path)
    assert abs(free_bytes(tmp_path / "a/b/c") - found.f_bavail * found.f_frsize) < 2**30
