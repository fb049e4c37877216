"""The files beside the weights: config.json, the tokenizer, the chat template. No torch, and never a line of code."""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergekit_lite.checkpoint.inside import inside
from mergekit_lite.checkpoint.meta import DTYPE_CODES, DTYPE_NAMES, Checkpoint
from mergekit_lite.errors import InputError, StoppedError
from mergekit_lite.limits import hint_for

# What transformers and the tokenizers write and read. Weights and code (*.py) are not among them.
_WANTED = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "normalizer.json", "*.model", "*.spm", "*.tiktoken", "tekken.json",
    "chat_template.json", "chat_template.jinja", "preprocessor_config.json", "processor_config.json",
    "image_processor_config.json", "video_preprocessor_config.json", "video_processor_config.json",
)  # fmt: skip
_TEMPLATES = "additional_chat_templates"
# The dtypes that transformers can build a model in. A config that names another, such as FP8, cannot be loaded.
_MODEL_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})
_MAX_NESTING = 8


def output_config(config: Mapping[str, Any], dtype: str | None) -> dict[str, Any]:
    """A copy of a model's `config` that names `dtype`, a safetensors code or torch name, as the dtype of its weights.

    transformers 5 writes the key `dtype`, older versions wrote `torch_dtype`, and 5 reads both: whichever key the
    config has is updated, also inside its `*_config` objects (text_config, vision_config), save for
    quantization_config. Where none has either, `dtype` is added, as transformers writes it today. An empty config stays
    empty. With `dtype` None or one that no model can be built in (FP8, integers), the keys stay as they are.
    """
    code = DTYPE_CODES.get(dtype, dtype) if dtype is not None else None
    if code not in _MODEL_DTYPES or not config:
        return dict(config)
    made, found = _with_dtype(config, DTYPE_NAMES[code], _MAX_NESTING)
    return made if found else {**made, "dtype": DTYPE_NAMES[code]}


def _with_dtype(config: Mapping[str, Any], name: str, depth: int) -> tuple[dict[str, Any], bool]:
    """The copy, and whether either key was found in it."""
    made: dict[str, Any] = {}
    found = False
    for key, value in config.items():
        if key in ("dtype", "torch_dtype"):
            made[key], found = name, True
        elif depth and key.endswith("_config") and key != "quantization_config" and isinstance(value, Mapping):
            made[key], inner = _with_dtype(value, name, depth - 1)
            found = found or inner
        else:
            made[key] = value
    return made, found


def copy_extras(donor: Checkpoint, to: Path, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Writes `config` as config.json into the folder `to`, and copies the donor's tokenizer and similar files there.

    Returns the names of the files, sorted, relative to `to`; without config.json where `config` is empty. Each file is
    on the disk when this returns. Raises InputError for a file of the donor that cannot be read or is a link out of its
    folder, before anything is written, and StoppedError where writing fails.
    """
    sources = {} if donor.folder is None else {name: inside(donor.folder, name) for name in _names(donor.folder)}
    for name, path in sources.items():
        if not stat.S_ISREG(_mode(path)):
            raise InputError(f"`{path}` is not a regular file", hint=f"remove it, or put the donor's {name} there")
    try:
        if config:
            text = json.dumps(config, indent=2) + "\n"
            with open(to / "config.json", "wb") as file:
                file.write(text.encode("utf-8"))
                file.flush()
                os.fsync(file.fileno())
        for name, path in sources.items():
            _copy(path, to / name)
    except OSError as error:
        raise StoppedError(f"cannot write into `{to}`: {error.strerror}", hint=hint_for(error)) from error
    return tuple(sorted([*sources, *(["config.json"] if config else [])]))


def _names(folder: Path) -> list[str]:
    """The wanted files that the folder has, relative to it."""
    try:
        names = [n for n in sorted(os.listdir(folder)) if any(fnmatch.fnmatchcase(n, glob) for glob in _WANTED)]
        if (folder / _TEMPLATES).is_dir():
            templates = sorted(os.listdir(inside(folder, _TEMPLATES)))
            names += [f"{_TEMPLATES}/{n}" for n in templates if n.endswith(".jinja")]
    except OSError as error:
        raise InputError(f"cannot read the folder `{folder}`: {error.strerror}") from error
    return names


def _mode(path: Path) -> int:
    try:
        return path.stat().st_mode
    except OSError as error:
        raise InputError(f"cannot read `{path}`: {error.strerror}", hint="download the file again") from error


def _copy(source: Path, target: Path) -> None:
    """Copies the content, not the link, nor the source's permissions."""
    target.parent.mkdir(exist_ok=True)
    try:
        fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise InputError(f"cannot read `{source}`: {error.strerror}", hint="download the file again") from error
    with open(fd, "rb") as read, open(target, "wb") as write:
        shutil.copyfileobj(read, write, 2**20)
        write.flush()
        os.fsync(write.fileno())
