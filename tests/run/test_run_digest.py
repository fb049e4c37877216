"""Digests of whole files: the same as the library's, whoever forms them, and never far ahead of the merge."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
from blake3 import blake3

from mergekit_lite.errors import InputError
from mergekit_lite.run import digest
from mergekit_lite.run.digest import Digests, file_digests


@pytest.fixture
def files(tmp_path: Path) -> dict[str, bytes]:
    """Files of many sizes, an empty one among them."""
    made = {}
    for number, size in enumerate((0, 1, 1000, 70_000, 300_000, 1 << 20, (1 << 20) + 1)):
        path = tmp_path / f"{number}.safetensors"
        path.write_bytes(random.Random(number).randbytes(size))
        made[str(path)] = path.read_bytes()
    return made


def test_file_digests(files: dict[str, bytes]) -> None:
    expected = {path: blake3(data).hexdigest() for path, data in files.items()}
    for threads in (1, 3):
        assert file_digests(map(Path, files), threads) == expected


@pytest.mark.parametrize("seed", range(6))
def test_digests_in_any_order_of_parts(files: dict[str, bytes], seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "PIECE", 10_000)
    monkeypatch.setattr(digest, "CHUNK", 4096)
    draw = random.Random(seed)
    wanted = [(path, draw.randint(0, len(data))) for path, data in files.items() for _ in range(8)]
    draw.shuffle(wanted)
    with Digests(wanted, files, draw.choice([0, 50_000, 1 << 30])) as digests:
        digests.advance(draw.randint(0, 100_000))
        assert digests.result(draw.randint(1, 3)) == {path: blake3(data).hexdigest() for path, data in files.items()}


def test_no_further_ahead_than_the_lead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "PIECE", 1000)
    path = tmp_path / "a"
    path.write_bytes(bytes(100_000))
    with Digests([(str(path), stop) for stop in range(1000, 100_001, 1000)], [str(path)], 5000) as digests:
        reached = digests._files[str(path)]
        for merged in (0, 20_000, 60_000):
            digests.advance(merged)
            deadline = time.monotonic() + 20
            while reached.at < merged + 5000 and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(0.02)
            assert reached.at == merged + 5000
        assert digests.result(1) == {str(path): blake3(bytes(100_000)).hexdigest()}


def test_a_file_that_is_gone(files: dict[str, bytes], tmp_path: Path) -> None:
    gone = str(tmp_path / "gone.safetensors")
    with pytest.raises(InputError, match=r"gone\.safetensors"):
        file_digests([Path(gone)], 2)
    with Digests([], [*files, gone]) as digests, pytest.raises(InputError, match=r"gone\.safetensors"):
        digests.result(2)


def test_leaving_stops_the_thread(files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "PIECE", 1000)
    parts = [(path, stop) for path, data in files.items() for stop in range(1000, len(data), 1000)]
    with Digests(parts, files, 2000) as digests:
        pass
    assert not digests._thread.is_alive()
