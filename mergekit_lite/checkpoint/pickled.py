"""Sees a checkpoint of `torch.save` as a header: names, shapes, dtypes and offsets of tensors.

Only where the user asks for it. The pickle is unpacked by torch's `weights_only` unpickler, which knows tensors and
plain data and runs no code, into tensors without memory (`FakeTensorMode`), which say where in the file their bytes
lie. From there a merge streams them as from a safetensors file.
"""

from __future__ import annotations

import hashlib
import os
import stat
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from mergekit_lite.checkpoint.header import MAX_HEADER_BYTES, Header
from mergekit_lite.checkpoint.meta import DTYPE_CODES, ShardFile, TensorMeta
from mergekit_lite.errors import InputError, Problem, printable

_LOCAL_HEADER = 30  # bytes in front of the name in a zip file's local header
_AGAIN = "download it again, or convert it: load it with transformers and save it with `save_pretrained(...)`"
_OLD = "load it with `torch.load(..., weights_only=True)` and save it again with `torch.save`, or as safetensors"


def read_pickled(path: Path, shown: str) -> Header:
    """The header of the file at `path`, a dictionary of tensors that `torch.save` wrote (torch >= 1.6), with the
    tensors in the order of their offsets. A dictionary under the key `state_dict` is taken for the whole.

    `shown` is how messages name the file. Two names may share bytes. Raises InputError for a file that cannot be read,
    that holds anything but tensors and plain data, or tensors that do not lie in it in one piece.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(fd, "rb") as file:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode):
                raise InputError(f"`{shown}` is not a regular file", hint="name a file that `torch.save` wrote")
            records, text = _records(file, shown)
            file.seek(0)
            state = _unpickle(file, shown)
    except OSError as error:
        raise InputError(f"cannot read `{shown}`: {error.strerror}") from error
    tensors: list[TensorMeta] = []
    problems: list[Problem] = []
    for name, value in state.items():
        try:
            tensors.append(_tensor(name, value, records, str(path), shown))
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)
    tensors.sort(key=lambda meta: (meta.start, meta.start + meta.nbytes))
    digest = hashlib.sha256(text).hexdigest()
    return Header(tuple(tensors), {}, ShardFile(str(path), found.st_size, found.st_mtime_ns, digest))


def _records(file: IO[bytes], shown: str) -> tuple[dict[int, int], bytes]:
    """The sizes of the records of the zip file by the offset of their first byte, and the pickled part."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise InputError(f"`{shown}` is compressed, which `torch.save` does not do", hint=_AGAIN)
            pickles = [entry for entry in entries if entry.filename.split("/")[1:] == ["data.pkl"]]
            if len(pickles) != 1:
                raise InputError(f"`{shown}` is no checkpoint of `torch.save`", hint=_AGAIN)
            if pickles[0].file_size > MAX_HEADER_BYTES:
                raise InputError(f"the pickled part of `{shown}` has {pickles[0].file_size:,} bytes", hint=_AGAIN)
            for entry in entries:
                if entry.filename.split("/")[1:] == ["byteorder"] and archive.read(entry) != sys.byteorder.encode():
                    raise InputError(f"`{shown}` was written on a machine of the other byte order", hint=_OLD)
            text = archive.read(pickles[0])
        return {_first_byte(file, entry): entry.file_size for entry in entries}, text
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError) as error:
        message = f"`{shown}` is damaged, or of a kind that torch wrote before 1.6"
        raise InputError(message, hint=_OLD) from error


def _first_byte(file: IO[bytes], entry: zipfile.ZipInfo) -> int:
    """Where a record's bytes begin: behind its local header, whose extra field no directory tells."""
    file.seek(entry.header_offset)
    head = file.read(_LOCAL_HEADER)
    if len(head) < _LOCAL_HEADER or not head.startswith(b"PK\3\4"):
        raise zipfile.BadZipFile
    name, extra = int.from_bytes(head[26:28], "little"), int.from_bytes(head[28:], "little")
    return entry.header_offset + _LOCAL_HEADER + name + extra


def _unpickle(file: IO[bytes], shown: str) -> dict[Any, Any]:
    import pickle
    import warnings

    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    # Up to torch 2.5 the unpickler could be made to run code (CVE-2025-32434).
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6):
        raise InputError(f"`{shown}` can be read with torch 2.6 or newer only", hint="install a newer torch")
    try:
        with FakeTensorMode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as that typed storages are deprecated
            state = torch.load(file, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        hint = "it may run code when it is loaded: use it only if you trust whoever made it, and convert it yourself"
        raise InputError(f"`{shown}` holds more than tensors and plain data", hint=hint) from error
    except Exception as error:  # a damaged pickle may raise anything
        raise InputError(f"`{shown}` cannot be unpickled ({type(error).__name__})", hint=_AGAIN) from error
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping):
        raise InputError(f"`{shown}` holds no dictionary of tensors", hint="save the model's `state_dict()`")
    return dict(state)


def _tensor(name: Any, value: Any, records: Mapping[int, int], file: str, shown: str) -> TensorMeta:
    import torch

    if not isinstance(name, str) or not name:
        raise InputError(f"a tensor in `{shown}` has no name", hint=_OLD)
    named = f"`{printable(name[:200])}` in `{shown}`"
    if not isinstance(value, torch.Tensor):
        raise InputError(f"{named} is no tensor", hint="save the model's `state_dict()` alone")
    dtype = DTYPE_CODES.get(str(value.dtype).removeprefix("torch."))
    if dtype is None or value.layout != torch.strided or value.is_quantized or value.is_conj() or value.is_neg():
        raise InputError(f"{named} is of a kind that safetensors cannot store ({value.dtype})", hint=_OLD)
    if not value.is_contiguous():
        raise InputError(f"{named} does not lie in one piece", hint="call `.contiguous()` on it and save it again")
    nbytes = value.numel() * value.element_size()
    offset = getattr(value.untyped_storage(), "_checkpoint_offset", None)
    if offset is None:
        raise InputError(f"{named}: this torch does not tell where tensors lie", hint="install a newer torch")
    start = value.storage_offset() * value.element_size()
    if start + nbytes > records.get(offset, -1):
        raise InputError([Problem(f"{named} reaches beyond its record", None, _AGAIN)])
    return TensorMeta(name, tuple(value.shape), dtype, file, offset + start, nbytes)
