"""Coded masks: every bit comes back from any part, and nothing that a file says of itself is believed."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_lite.checkpoint.coded import FRAME, TOGETHER, frames_of, groups_of, tasks_in
from mergekit_lite.checkpoint.frames import Frames, encode, joined, most
from mergekit_lite.checkpoint.meta import BIT, Coded, TensorMeta
from mergekit_lite.errors import InputError


@dataclass
class Bytes:
    """The stored tensors of one file, by where they start. `largest` is the most that was asked for at once."""

    tensors: dict[int, bytes]
    largest: int = 0

    def read_bytes(self, meta: TensorMeta, start: int, stop: int, buffer: memoryview) -> None:
        assert 0 <= start <= stop <= meta.nbytes
        self.largest = max(self.largest, stop - start)
        buffer[:] = self.tensors[meta.start][start:stop]


def stored(bits: list[np.ndarray]) -> tuple[Bytes, list[TensorMeta]]:
    """Masks of several tasks as a file has them, and a tensor for each task."""
    numel = len(bits[0])
    frames = [encode(joined([one[at : at + FRAME] for one in bits])) for at in range(0, numel, FRAME)]
    return file_of(frames, len(bits), numel)


def file_of(
    frames: list[bytes], tasks: int, numel: int, sizes: list[int] | None = None
) -> tuple[Bytes, list[TensorMeta]]:
    ends = np.array([len(frame) for frame in frames] if sizes is None else sizes, dtype="<u4").tobytes()
    data = b"".join(frames)
    told = TensorMeta("a+b:frames/w", (frames_of(numel),), "U32", "store/masks", 0, len(ends))
    meta = TensorMeta("a+b/w", (numel,), BIT, "store/masks", 1, len(data))
    return Bytes({0: ends, 1: data}), [replace(meta, coded=Coded(told, tasks, place)) for place in range(tasks)]


SIZES = st.one_of(st.integers(0, 70), st.sampled_from([FRAME - 1, FRAME, FRAME + 1, FRAME + 13, 2 * FRAME + 5]))


@settings(max_examples=60, deadline=None)
@given(
    tasks=st.integers(1, TOGETHER),
    numel=SIZES,
    density=st.sampled_from([0.0, 1e-4, 0.1, 0.5, 0.97, 1.0]),
    seed=st.integers(0, 2**32 - 1),
    cut=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_every_part_comes_back(tasks: int, numel: int, density: float, seed: int, cut: tuple[float, float]) -> None:
    rng = np.random.default_rng(seed)
    bits = [(rng.random(numel) < density).astype(np.uint8) for _ in range(tasks)]
    source, metas = stored(bits)
    start, stop = sorted(int(place * numel) for place in cut)
    reader = Frames(source)
    for one, meta in zip(bits, metas, strict=True):
        assert np.array_equal(reader.bits(meta, start, stop), one[start:stop])
        assert np.array_equal(reader.bits(meta, 0, numel), one)
    # One frame at a time, whatever the tensor's size.
    assert source.largest <= max(most(FRAME), 4 * frames_of(numel))


@given(st.integers(0, 40))
def test_tasks_are_put_together_in_few_files_of_like_size(count: int) -> None:
    tasks = [f"t{number}" for number in range(count)]
    groups = groups_of(tasks)
    assert [task for group in groups for task in group] == tasks
    assert len(groups) == (count + TOGETHER - 1) // TOGETHER
    sizes = {len(group) for group in groups}
    assert not sizes or (max(sizes) <= TOGETHER and max(sizes) - min(sizes) <= 1)


def test_what_tasks_agree_in_is_stored_once() -> None:
    """The entropy of eight bits that are equal is that of one; each by itself would take eight times as many."""
    one = (np.random.default_rng(1).random(FRAME) < 0.3).astype(np.uint8)
    alike, apart = stored([one] * 8)[1][0].nbytes, stored([one])[1][0].nbytes
    entropy = -(0.3 * np.log2(0.3) + 0.7 * np.log2(0.7)) * FRAME / 8
    assert apart < 1.03 * entropy
    assert alike < 2 * entropy  # a code for whole symbols takes a bit for each at least, and seven tasks cost nothing


@pytest.mark.parametrize("text", ["", "a+/w", "a+a/w", "../x/w", "+".join("abcdefghi") + "/w", "a b/w"])
def test_names_that_tell_of_no_tasks(text: str) -> None:
    assert tasks_in(text) == []


def test_names_of_tasks() -> None:
    assert tasks_in("a+b.c/model.w:x/y+z") == tasks_in("a+b.c:frames/w") == ["a", "b.c"]


NUMEL = FRAME + 1000


def sound() -> list[bytes]:
    rng = np.random.default_rng(3)
    bits = [(rng.random(NUMEL) < 0.2).astype(np.uint8) for _ in range(5)]
    return [encode(joined([one[at : at + FRAME] for one in bits])) for at in range(0, NUMEL, FRAME)]


def test_every_damaged_byte_is_noticed() -> None:
    """Bytes changed and frames cut short, at many places: one error that names file and tensor."""
    first, last = sound()
    noticed = 0
    places = [*range(24), *range(24, len(last), 37), *range(len(last) - 8, len(last))]
    for place in places:
        for damaged in (last[:place] + bytes([last[place] ^ 0x15]) + last[place + 1 :], last[:place]):
            source, metas = file_of([first, damaged], 5, NUMEL)
            with pytest.raises(InputError, match=r"`a\+b/w` in `store/masks`.*frame 1"):
                Frames(source).bits(metas[0], FRAME, NUMEL)
            assert Frames(source).bits(metas[0], 0, FRAME).shape == (FRAME,)  # the other frame is whole
            noticed += 1
    assert noticed == 2 * len(places)


def says(frames: list[bytes], sizes: list[int] | None = None) -> str:
    source, metas = file_of(frames, 5, NUMEL, sizes)
    with pytest.raises(InputError) as caught:
        Frames(source).bits(metas[0], 0, NUMEL)
    assert source.largest <= most(FRAME)
    (problem,) = caught.value.problems
    assert "store/masks" in problem.message and problem.hint
    return problem.message


def test_frames_that_would_give_more_than_is_planned() -> None:
    """Gigabytes out of kilobytes, with and without saying so; windows of memory; several frames in one."""
    first, last = sound()
    huge = bytes(1 << 28)
    plain = zstandard.ZstdCompressor(level=1)
    assert "says that it holds 268435456 bytes" in says([plain.compress(huge), last])
    unsaid = zstandard.ZstdCompressor(level=1, write_content_size=False)
    assert "any number of" in says([unsaid.compress(huge), last])
    assert "any number of" in says([unsaid.compress(bytes(FRAME)), last])
    # A frame that says less than it holds.
    lying = bytearray(zstandard.ZstdCompressor(level=1).compress(bytes(2 * FRAME)))
    place = bytes(lying).index((2 * FRAME).to_bytes(4, "little"))
    lying[place : place + 4] = FRAME.to_bytes(4, "little")
    assert "frame 0" in says([bytes(lying), last])
    # A header that says what it holds and asks for a window of 128 MiB; then one block of a repeated byte, the last.
    wide = b"\x28\xb5\x2f\xfd" + bytes([0x80, 17 << 3]) + FRAME.to_bytes(4, "little") + bytes([0x03, 0, 0, 7])
    assert zstandard.get_frame_parameters(wide).window_size == 1 << 27
    assert zstandard.frame_content_size(wide) == FRAME
    assert "frame 0 cannot be decoded" in says([wide, last])
    assert "frame 0" in says([first + first, last])
    skipped = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"abcd"
    assert "frame 0" in says([skipped, last])
    assert "frame 0" in says([b"", last])


def test_sizes_are_held_against_the_bytes_that_are_there() -> None:
    first, last = sound()
    for sizes in ([len(first), len(last) + 1], [2**32 - 1, 2**32 - 1], [0, 0]):
        assert "its frames take" in says([first, last], sizes)
    assert "frame 0" in says([first, last], [len(first) + 1, len(last) - 1])
    # Larger than what so many entries can take: refused before it is read.
    assert "frame 0 takes" in says([bytes(most(FRAME) + 1), last])
