"""The masks of a store, coded once all of them are written.

How many bytes a frame takes is known when it is coded, and a run knows the place of every byte before the first. So
masks are written as bits like any other tensor, and this comes behind: from all masks the coded files are made, each
under a name of its own until it is whole; the journal notes that all are; then the plain ones are removed. A run that
is stopped before the note codes them again, one that is stopped behind it has nothing left to code.
"""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np

from mergekit_lite.checkpoint.coded import FRAME, TOGETHER, coded_file, coded_files, frames_of, groups_of
from mergekit_lite.checkpoint.frames import encode, joined, most
from mergekit_lite.checkpoint.header import PREFIX_BYTES, read_header
from mergekit_lite.checkpoint.masks import mask_file, prefix_of, sizes_name
from mergekit_lite.checkpoint.writer import encode_header
from mergekit_lite.errors import StoppedError
from mergekit_lite.limits import hint_for
from mergekit_lite.plan.model import Output, OutShard, OutTensor, Plan
from mergekit_lite.run.digest import file_digests
from mergekit_lite.run.journal import Journal
from mergekit_lite.run.publish import fsync_folder
from mergekit_lite.run.sink import Files, make_safe, partial

Shards = Mapping[str, Mapping[str, str]]  # digests by output folder and file name


def coded(
    plan: Plan, shards: Shards, sink: Files, journal: Journal, done: bool, threads: int
) -> tuple[Plan, dict[str, dict[str, str]]]:
    """`plan` and the digests of its shards once the masks of every output that asks for it are coded: with the files
    that are there now. `done` says that an earlier run has noted that they are. Raises StoppedError where the disk
    refuses; whatever it leaves behind, `--resume` goes on."""
    outputs = [output for output in plan.outputs if output.compress is not None]
    digests = {to: dict(files) for to, files in shards.items()}
    if not outputs:
        return plan, digests
    try:
        if not done:
            make_safe(sink, journal)  # the plain masks go, so no unit may be in doubt from here on
            for output in outputs:
                for number, tasks in enumerate(groups_of(output.store), start=1):
                    _write(output, tasks, partial(output.to) / coded_file(number), threads)
                fsync_folder(partial(output.to))
            journal.coded()
        for output in outputs:
            for shard in output.shards[output.kept :]:
                (partial(output.to) / shard.file).unlink(missing_ok=True)
            fsync_folder(partial(output.to))
    except OSError as fault:
        message = f"cannot code the masks in `{partial(plan.outputs[0].to)}`: {fault.strerror}"
        raise StoppedError(message, hint=hint_for(fault)) from fault
    made = [_as_it_is(output) for output in plan.outputs]
    for output in made:
        paths = {s.file: partial(output.to) / s.file for s in output.shards if s.file not in digests[output.to]}
        found = file_digests(paths.values(), threads)
        digests[output.to] |= {file: found[str(path)] for file, path in paths.items()}
    written = plan.bytes_written + sum(o.nbytes for o in made) - sum(o.nbytes for o in plan.outputs)
    return replace(plan, outputs=tuple(made), bytes_written=written), digests


def _as_it_is(output: Output) -> Output:
    """The output with its coded files in place of the masks."""
    if output.compress is None:
        return output
    folder = partial(output.to)
    found = [OutShard(file, b"", (folder / file).stat().st_size, ()) for file in coded_files(output.store)]
    return replace(output, shards=(*output.shards[: output.kept], *found), compress=None)


def _write(output: Output, tasks: Sequence[str], path: Path, threads: int) -> None:
    """Code the masks of these tasks into one file, frame by frame. Sizes come before the frames and are as many as the
    shapes say; the header gets the room that it takes at most, and blanks fill it up."""
    shards = {shard.file: shard for shard in output.shards}
    masks = [shards[mask_file(task)] for task in tasks]
    folder, prefix = path.parent, prefix_of(tasks)
    metadata = read_header(folder / masks[0].file, masks[0].file).metadata
    tensors = masks[0].tensors
    per = TOGETHER // len(tasks)
    room = len(encode_header(_rows(prefix, tensors, [_most(tensor, per) for tensor in tensors]), metadata)[0])
    growing = path.with_name(path.name + ".new")
    with ExitStack() as stack:
        files = [_opened(stack, folder / shard.file, os.O_RDONLY) for shard in masks]
        out = _opened(stack, growing, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW)
        pool = stack.enter_context(ThreadPoolExecutor(threads, "code"))
        at = room + 4 * sum(frames_of(tensor.node.numel) for tensor in tensors)
        sizes: list[int] = []
        totals: list[int] = []
        for place in range(len(tensors)):
            before = at
            for frame in _frames([shard.tensors[place] for shard in masks], files, pool.map, 2 * threads):
                _write_all(out, frame, at)
                sizes.append(len(frame))
                at += len(frame)
            totals.append(at - before)
        header = encode_header(_rows(prefix, tensors, totals), metadata)[0]
        text = header[PREFIX_BYTES:].ljust(room - PREFIX_BYTES)
        head = len(text).to_bytes(PREFIX_BYTES, "little") + text
        _write_all(out, head + np.array(sizes, dtype="<u4").tobytes(), 0)
        os.fsync(out)
    os.rename(growing, path)


def _frames(
    masks: Sequence[OutTensor], files: Sequence[int], each: Callable[..., Iterator[bytes]], ahead: int
) -> Iterator[bytes]:
    """The coded frames of one tensor, `ahead` of them at work at once; `masks` are those of the tasks."""

    def frame(number: int) -> bytes:
        numel = min(FRAME, masks[0].node.numel - number * FRAME)
        bits = []
        for tensor, file in zip(masks, files, strict=True):
            nbytes = -(-numel // 8)
            raw = os.pread(file, nbytes, tensor.start + number * (FRAME // 8))
            if len(raw) != nbytes:
                raise OSError(errno.EIO, f"the mask of `{tensor.name}` became shorter")
            bits.append(np.unpackbits(np.frombuffer(raw, dtype=np.uint8), count=numel, bitorder="little"))
        return encode(joined(bits))

    numbers = iter(range(frames_of(masks[0].node.numel)))
    while some := list(itertools.islice(numbers, ahead)):
        yield from each(frame, some)


def _rows(
    prefix: str, tensors: Sequence[OutTensor], totals: Sequence[int]
) -> list[tuple[str, str, tuple[int, ...], int]]:
    """What a coded file holds, in order: all sizes, then all frames, which take `totals` bytes."""
    counts = [frames_of(tensor.node.numel) for tensor in tensors]
    rows: list[tuple[str, str, tuple[int, ...], int]] = []
    rows += [(sizes_name(prefix, t.name), "U32", (n,), 4 * n) for t, n in zip(tensors, counts, strict=True)]
    return rows + [(f"{prefix}/{t.name}", "U8", (n,), n) for t, n in zip(tensors, totals, strict=True)]


def _most(tensor: OutTensor, per: int) -> int:
    whole, rest = divmod(tensor.node.numel, FRAME)
    return whole * most(FRAME // per) + (most(-(-rest // per)) if rest else 0)


def _opened(stack: ExitStack, path: Path, flags: int) -> int:
    file = os.open(path, flags | os.O_CLOEXEC, 0o666)
    stack.callback(os.close, file)
    return file


def _write_all(file: int, data: bytes, at: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(file, view, at)
        view, at = view[count:], at + count
