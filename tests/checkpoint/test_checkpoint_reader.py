from __future__ import annotations

import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from raw_safetensors import entry, put
from safetensors import safe_open
from safetensors.torch import save_file

from mergekit_lite.checkpoint import reader as reader_module
from mergekit_lite.checkpoint.dtype import TORCH_DTYPES
from mergekit_lite.checkpoint.header import Header, read_header
from mergekit_lite.checkpoint.meta import DTYPE_BITS, DTYPE_CODES, DTYPE_NAMES, MERGEABLE, TensorMeta
from mergekit_lite.checkpoint.reader import Reader
from mergekit_lite.errors import InputError

# Dtypes that safetensors itself turns into torch tensors: what is read can be compared with what it reads.
CODES = sorted(TORCH_DTYPES.keys() - {"F8_E8M0"})


def random_file(path: Path, shapes: dict[str, tuple[int, ...]], code: str) -> Header:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in shapes.items():
        count = torch.Size(shape).numel() * TORCH_DTYPES[code].itemsize
        high = 2 if code == "BOOL" else 256
        values = torch.randint(0, high, (count,), generator=generator, dtype=torch.uint8)
        tensors[name] = values.view(TORCH_DTYPES[code]).reshape(shape)
    save_file(tensors, path)
    return read_header(path, path.name)


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.dtype == right.dtype and torch.equal(
        left.contiguous().reshape(-1).view(torch.uint8), right.contiguous().reshape(-1).view(torch.uint8)
    )


def test_dtype_tables_agree() -> None:
    assert {code: 8 * dtype.itemsize for code, dtype in TORCH_DTYPES.items()} == {
        code: DTYPE_BITS[code] for code in TORCH_DTYPES
    }
    assert MERGEABLE <= TORCH_DTYPES.keys() <= DTYPE_NAMES.keys()
    assert DTYPE_BITS.keys() - DTYPE_NAMES.keys() == {code for code, bits in DTYPE_BITS.items() if bits < 8}
    assert DTYPE_CODES["bfloat16"] == "BF16"
    assert {code for code, dtype in TORCH_DTYPES.items() if dtype.is_floating_point} == {
        code for code in TORCH_DTYPES if code.startswith(("F", "BF"))
    }


@pytest.mark.parametrize("code", CODES)
def test_every_dtype_as_the_library_reads_it(code: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    header = random_file(path, {"m": (5, 7), "scalar": (), "empty": (0, 3), "v": (11,)}, code)
    with Reader([header.shard]) as reader, safe_open(path, "pt") as library:
        for meta in header.tensors:
            whole = library.get_tensor(meta.name)
            assert same_bits(reader.read(meta, 0, meta.numel).reshape(meta.shape), whole)
            middle = slice(meta.numel // 3, meta.numel - meta.numel // 4)
            out = torch.empty(middle.stop - middle.start, dtype=TORCH_DTYPES[code])
            assert reader.read(meta, middle.start, middle.stop, out) is out
            assert same_bits(out, whole.reshape(-1)[middle])


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(bounds=st.tuples(st.integers(0, 600), st.integers(0, 600)).map(sorted), limit=st.integers(1, 700))
def test_ranges_read_in_pieces(bounds: list[int], limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a small limit for one system call, as a read of more than 1 GiB meets the real one."""
    content = random.Random(1).randbytes(600)
    path = put(tmp_path / "x.safetensors", {"a": entry("F6_E2M3", [800], [0, 600])}, content)
    header = read_header(path, "x")
    monkeypatch.setattr(reader_module, "_MAX_READ", limit)
    with Reader([header.shard]) as reader:
        buffer = bytearray(bounds[1] - bounds[0])
        reader.read_bytes(header.tensors[0], *bounds, memoryview(buffer))
    assert buffer == content[slice(*bounds)]


def test_many_threads_over_more_files_than_may_be_open(tmp_path: Path) -> None:
    headers = [random_file(tmp_path / f"{i}.safetensors", {"a": (100,), "b": (64,)}, "F32") for i in range(12)]
    metas = [meta for header in headers for meta in header.tensors]
    wanted = {}
    for meta in metas:
        with safe_open(meta.file, "pt") as library:
            wanted[meta] = library.get_tensor(meta.name)
    open_before = len(os.listdir("/dev/fd"))
    most = 0

    def work(seed: int) -> None:
        nonlocal most
        order = random.Random(seed)
        for _ in range(200):
            meta = order.choice(metas)
            start, stop = sorted((order.randint(0, meta.numel), order.randint(0, meta.numel)))
            assert same_bits(reader.read(meta, start, stop), wanted[meta][start:stop])
            most = max(most, len(os.listdir("/dev/fd")) - open_before)

    reader = Reader([header.shard for header in headers], max_open=3)
    with reader, ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    # Three cached and one per thread that reads, and the listings of eight threads themselves.
    assert 3 <= most <= 3 + 8 + 8
    assert len(os.listdir("/dev/fd")) == open_before


def test_file_in_use_is_not_closed_under_the_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread is held inside its read while others evict everything and the reader is closed."""
    headers = [random_file(tmp_path / f"{i}.safetensors", {"a": (10,)}, "U8") for i in range(4)]
    inside, go = threading.Event(), threading.Event()
    preadv = os.preadv

    def held(fd: int, buffers: list[memoryview], offset: int) -> int:
        if threading.current_thread().name == "held":
            inside.set()
            assert go.wait(10)
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", held)
    reader = Reader([header.shard for header in headers], max_open=1)
    found: list[torch.Tensor] = []
    thread = threading.Thread(
        target=lambda: found.append(reader.read(headers[0].tensors[0], 0, 10)), name="held", daemon=True
    )
    thread.start()
    assert inside.wait(10)
    for header in headers[1:]:
        reader.read(header.tensors[0], 0, 10)
    reader.close()
    go.set()
    thread.join(10)
    with safe_open(headers[0].shard.path, "pt") as library:
        assert same_bits(found[0], library.get_tensor("a"))
    with pytest.raises(ValueError, match="closed"):
        reader.read(headers[0].tensors[0], 0, 1)


@pytest.fixture
def one(tmp_path: Path) -> Header:
    return random_file(tmp_path / "x.safetensors", {"a": (100,)}, "F32")


@pytest.mark.parametrize("change", ["mtime", "size", "gone"])
def test_file_changed_since_the_plan(change: str, one: Header) -> None:
    path = one.shard.path
    if change == "mtime":
        os.utime(path, ns=(0, one.shard.mtime_ns + 1))
    elif change == "size":
        with open(path, "ab") as file:
            file.write(b"x")
        os.utime(path, ns=(0, one.shard.mtime_ns))
    else:
        os.unlink(path)
    message = "cannot open" if change == "gone" else "changed since it was planned"
    with Reader([one.shard]) as reader, pytest.raises(InputError, match=message) as caught:
        reader.read(one.tensors[0], 0, 1)
    assert path in str(caught.value)


def test_file_truncated_while_it_is_open(one: Header) -> None:
    with Reader([one.shard]) as reader:
        reader.read(one.tensors[0], 0, 100)
        os.truncate(one.shard.path, one.shard.nbytes - 4)
        reader.read(one.tensors[0], 0, 99)
        with pytest.raises(InputError, match="became shorter while it was read, inside tensor `a`"):
            reader.read(one.tensors[0], 0, 100)


def test_wrong_ranges_and_buffers_are_bugs_of_the_caller(one: Header) -> None:
    meta: TensorMeta = one.tensors[0]
    with Reader([one.shard]) as reader:
        for start, stop in [(-1, 1), (0, 101), (5, 4)]:
            with pytest.raises(ValueError, match="elements"):
                reader.read(meta, start, stop)
        for start, stop in [(-1, 1), (0, 401), (5, 4)]:
            with pytest.raises(ValueError, match="bytes"):
                reader.read_bytes(meta, start, stop, memoryview(bytearray(max(0, stop - start))))
        with pytest.raises(ValueError, match="buffer"):
            reader.read_bytes(meta, 0, 4, memoryview(bytearray(5)))
        for out in [torch.empty(3), torch.empty(4, dtype=torch.float64), torch.empty(8)[::2]]:
            with pytest.raises(ValueError, match="out"):
                reader.read(meta, 0, 4, out)
