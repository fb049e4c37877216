"""Chat templates: those of the parents, those known by name, and the files that hold one."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from mergekit_lite.checkpoint.inside import inside, read_object
from mergekit_lite.errors import InputError

JINJA, JSON = "chat_template.jinja", "chat_template.json"
_MAX_BYTES = 1 << 22


def known(name: str) -> str:
    """The template that is known by this name."""
    file = resources.files("mergekit_lite.vocabulary").joinpath("templates", f"{name}.jinja")
    return file.read_text(encoding="utf-8")


def template_of(folder: Path | None) -> str | None:
    """The chat template of the model in `folder`, the one called `default` where there are several. Raises InputError
    for a file that cannot be read."""
    if folder is None:
        return None
    path = inside(folder, JINJA)
    if path.is_file():
        try:
            with open(path, encoding="utf-8") as file:
                return file.read(_MAX_BYTES)
        except (OSError, UnicodeDecodeError) as fault:
            raise InputError(f"cannot read `{path}`: {fault}", hint="download the file again") from None
    for name in ("tokenizer_config.json", JSON):
        path = inside(folder, name)
        found = _default(read_object(path, 1 << 28).get("chat_template")) if path.is_file() else None
        if found is not None:
            return found
    return None


def _default(value: Any) -> str | None:
    if isinstance(value, list):  # of {name, template}, as transformers writes several
        value = {e.get("name"): e.get("template") for e in value if isinstance(e, Mapping)}
    if isinstance(value, Mapping):
        value = value.get("default")
    return value if isinstance(value, str) and value.strip() else None


def commonest(templates: Sequence[str | None]) -> str | None:
    """The template that most have, blanks around it aside; of several equally common ones the first."""
    counts = Counter(template.strip() for template in templates if template is not None and template.strip())
    return counts.most_common(1)[0][0] if counts else None


def with_template(files: Mapping[str, Path | bytes], template: str) -> dict[str, Path | bytes]:
    """A tokenizer's `files` with this chat template: in a file of its own, and in tokenizer_config.json, where versions
    of transformers before 4.52 look for it."""
    made = {name: content for name, content in files.items() if name != JSON}
    made[JINJA] = template.encode()
    held = made.get("tokenizer_config.json")
    settings = {} if held is None else json.loads(held if isinstance(held, bytes) else held.read_bytes())
    settings["chat_template"] = template
    made["tokenizer_config.json"] = (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode()
    return made
