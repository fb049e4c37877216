"""The files beside the weights: config.json, the tokenizer, the chat template. No torch, and never a line of code."""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_lite import redact
from mergekit_lite.checkpoint.clean import cleaned, notes_of, read_config
from mergekit_lite.checkpoint.inside import inside, read_list
from mergekit_lite.checkpoint.meta import DTYPE_CODES, DTYPE_NAMES, Checkpoint
from mergekit_lite.errors import InputError, Problem, StoppedError
from mergekit_lite.limits import hint_for

# What transformers and the tokenizers write and read. Weights and code (*.py) are not among them.
_WANTED = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "normalizer.json", "*.model", "*.spm", "*.tiktoken", "tekken.json",
    "chat_template.json", "chat_template.jinja", "preprocessor_config.json", "processor_config.json",
    "image_processor_config.json", "video_preprocessor_config.json", "video_processor_config.json",
)  # fmt: skip
# Of a component of a pipeline too.
_OF_PARTS = (*_WANTED, "scheduler_config.json")
_CONFIGS = ("*_config.json", "config.json", "model_index.json", "config_sentence_transformers.json")
_TEMPLATES = "additional_chat_templates"
# Those of them that speak of tokens.
_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "*.model", "*.spm", "*.tiktoken", "tekken.json", "chat_template.json",
    "chat_template.jinja", f"{_TEMPLATES}/*",
)  # fmt: skip
Files = Mapping[str, Path | bytes]  # by name: where each is copied from, or what it is to hold
# The dtypes that transformers can build a model in. A config that names another, such as FP8, cannot be loaded.
_MODEL_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})
_MAX_NESTING = 8
_MAX_LIST = 2**20  # bytes of modules.json


def output_config(config: Mapping[str, Any], dtype: str | None) -> dict[str, Any]:
    """A copy of a model's `config` that names `dtype`, a safetensors code or torch name, as the dtype of its weights.

    transformers 5 writes the key `dtype`, older versions wrote `torch_dtype`, and 5 reads both: whichever key the
    config has is updated, also inside its `*_config` objects (text_config, vision_config), save for
    quantization_config. Where none has either, `dtype` is added, as transformers writes it today, but not to those of
    diffusers and timm, which know no such key. An empty config stays empty. With `dtype` None or one that no model can
    be built in (FP8, integers), the keys stay as they are.
    """
    code = DTYPE_CODES.get(dtype, dtype) if dtype is not None else None
    if code not in _MODEL_DTYPES or not config:
        return dict(config)
    made, found = _with_dtype(config, DTYPE_NAMES[code], _MAX_NESTING)
    if found or "_class_name" in config or "pretrained_cfg" in config:
        return made
    return {**made, "dtype": DTYPE_NAMES[code]}


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


@dataclass(frozen=True, slots=True)
class Extras:
    """The files to put beside the weights, by name: where each is copied from, or what it is to hold. `notes` tell what
    of the donor's configurations is left out."""

    files: Files
    notes: tuple[Problem, ...]

    @property
    def nbytes(self) -> int:
        return sum(len(f) if isinstance(f, bytes) else f.stat().st_size for f in self.files.values())

    def write(self, to: Path) -> tuple[str, ...]:
        """Puts the files into the folder `to`, each on the disk when this returns; gives their names, sorted. Raises
        StoppedError where writing fails."""
        try:
            for name, content in self.files.items():
                home = to
                for part in name.split("/")[:-1]:  # not `to` itself, should it be gone
                    home = home / part
                    home.mkdir(exist_ok=True)
                _put(content, to / name)
        except OSError as error:
            raise StoppedError(f"cannot write into `{to}`: {error.strerror}", hint=hint_for(error)) from error
        return tuple(sorted(self.files))


def find_extras(
    donor: Checkpoint,
    config: Mapping[str, Any],
    keep_auto_map: bool = False,
    tokenizer: Files | None = None,
    dtypes: Mapping[str, str] | None = None,
) -> Extras:
    """`config` as config.json, unless it is empty, and the donor's tokenizer and similar files. The files of
    `tokenizer`, where it is given, take the place of the donor's tokenizer. The configurations of a pipeline's
    components name the dtype that `dtypes` has for their folder.

    Entries that name code (`auto_map`), unless `keep_auto_map`, and entries that hold a token or a password are left
    out of every configuration, and so are notes of where files lay. A file with none of these is copied byte for byte.
    Raises InputError for a file of the donor that cannot be read, is a link out of its folder, or is a configuration
    that is no JSON object.
    """
    files: dict[str, Path | bytes] = {}
    coded: list[str] = []
    hidden: list[str] = []

    def clean(name: str, data: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
        made, code, secrets = cleaned(data, keep_auto_map)
        coded.extend(f"{name}: {key}" for key in code)
        hidden.extend(f"{name}: {key}" for key in secrets)
        return made, made != data

    configs = {"config.json": config}
    for part in donor.form.parts if donor.form is not None else ():
        if part.folder:
            configs[f"{part.folder}/config.json"] = output_config(part.config, (dtypes or {}).get(part.folder))
    files |= {name: _json(clean(name, data)[0]) for name, data in configs.items() if data}
    sources: dict[str, Path | bytes] = {}
    if donor.form is not None and donor.folder is not None:
        sources |= {name: inside(donor.folder, name) for name in donor.form.beside}
    elif donor.folder is not None:
        sources |= {name: inside(donor.folder, name) for name in _names(donor.folder)}
    if tokenizer is not None:
        sources = {name: path for name, path in sources.items() if not _is_tokenizer(name)} | dict(tokenizer)
    for name, path in sources.items():
        if isinstance(path, bytes):
            files[name] = path
            if _is_config(name):
                files[name] = _json(clean(name, json.loads(path))[0])
            continue
        if not stat.S_ISREG(_mode(path)):
            raise InputError(f"`{path}` is not a regular file", hint=f"remove it, or put the donor's {name} there")
        files[name] = path
        if name == "modules.json":
            modules, secrets = redact.cleaned(read_list(path, _MAX_LIST))
            hidden.extend(f"{name}: {key}" for key in secrets)
            files[name] = _json(modules)
        elif _is_config(name) and (data := read_config(path)) is not None:
            made, changed = clean(name, data)
            if changed:
                files[name] = _json(made)
    return Extras(files, tuple(notes_of(donor.location, config.get("model_type"), coded, hidden)))


def copy_extras(
    donor: Checkpoint,
    to: Path,
    config: Mapping[str, Any],
    keep_auto_map: bool = False,
    tokenizer: Files | None = None,
    dtypes: Mapping[str, str] | None = None,
) -> tuple[str, ...]:
    """Finds the files of `find_extras` and writes them into the folder `to`; gives their names, sorted. Raises what the
    two raise; where an InputError is raised, nothing has been written."""
    return find_extras(donor, config, keep_auto_map, tokenizer, dtypes).write(to)


def tokenizer_files(checkpoint: Checkpoint) -> dict[str, Path]:
    """The files of a checkpoint that make its tokenizer, chat templates included, by name. Raises InputError for a link
    out of its folder, or a folder that cannot be read."""
    folder = checkpoint.folder
    return {} if folder is None else {name: inside(folder, name) for name in _names(folder) if _is_tokenizer(name)}


def _is_tokenizer(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, glob) for glob in _TOKENIZER)


def is_copied(name: str, more: Sequence[str] = ()) -> bool:
    """Whether the file of this name, without a folder, in a folder of a pipeline or of a model of sentence-transformers
    goes along with its weights; `more` are further patterns."""
    return any(fnmatch.fnmatchcase(name, glob) for glob in (*_OF_PARTS, *more))


def _is_config(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name.rpartition("/")[2], glob) for glob in _CONFIGS)


def _json(data: Any) -> bytes:
    return (json.dumps(data, indent=2) + "\n").encode()


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


def _put(content: Path | bytes, target: Path) -> None:
    """Writes the bytes, or copies a file's content, not the link, nor the file's permissions."""
    if isinstance(content, bytes):
        with open(target, "wb") as write:
            write.write(content)
            write.flush()
            os.fsync(write.fileno())
        return
    try:
        fd = os.open(content, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise InputError(f"cannot read `{content}`: {error.strerror}", hint="download the file again") from error
    with open(fd, "rb") as read, open(target, "wb") as write:
        shutil.copyfileobj(read, write, 2**20)
        write.flush()
        os.fsync(write.fileno())


def is_read_with_a_model(name: str) -> bool:
    """Whether a file of this name in the folder of a model, or of one of its components, changes what a program loads
    from there."""
    home, _, name = name.rpartition("/")
    if home.rpartition("/")[2] == _TEMPLATES:
        return True
    known = any(fnmatch.fnmatchcase(name, glob) for glob in (*_OF_PARTS, *_CONFIGS[1:], "sentence_*_config.json"))
    return known or name in ("modules.json", "adapter_config.json") or name.endswith((".py", ".safetensors.index.json"))
