"""Text → `Recipe`: the native language here, mergekit's in `mergekit/`. All structural faults come at once.

A location is `org/name[@revision]` (a Hub id, or a folder of that relative path) or any other path, which has no
revision. A revision holds no `/` unless it starts with `refs/`. A reference is the name of a model or a step, or, where
it holds `/`, a location in place: that makes a model whose name is the text itself. Such a text may also be a key of
`models`, which then says where it lies; lock files pin revisions so.

Methods are unknown here: the plan checks that `use` exists and that settings have sensible values.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from mergekit_lite.errors import InputError, Mark, Problem, RecipeError, did_you_mean, suggest
from mergekit_lite.recipe import override
from mergekit_lite.recipe.holes import Hole, find_holes, unfilled
from mergekit_lite.recipe.links import cycles, ends_of, final_step, mentions, no_single_end, unused_steps
from mergekit_lite.recipe.location import NAME, split_location
from mergekit_lite.recipe.lock import read_lock
from mergekit_lite.recipe.mergekit import is_mergekit, read_mergekit
from mergekit_lite.recipe.model import Model, Recipe, Ref, Step
from mergekit_lite.recipe.node import MapNode, Node, ScalarNode, describe
from mergekit_lite.recipe.save import read_saves
from mergekit_lite.recipe.score import read_scores
from mergekit_lite.recipe.source import MAX_BYTES, load_all
from mergekit_lite.recipe.step import StepReader
from mergekit_lite.redact import redact, secret

__all__ = ["NAME", "final_step", "parse", "read_file", "split_location", "unused_steps"]

TOP_KEYS = ("version", "seed", "compute", "models", "steps", "save", "score", "lock")
COMPUTE = ("float32", "float64")
MODEL_KEYS = ("path", "adapter")


def read_file(path: str | os.PathLike[str]) -> str:
    """The text of the recipe file `path`, at most 1 MiB of UTF-8.

    Raises InputError where the file is missing, a folder or unreadable, RecipeError where it is not such a text.
    """
    path = os.fspath(path)
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise InputError(f"there is no recipe `{path}`", hint=_similar_file(path)) from None
    except IsADirectoryError:
        raise InputError(f"`{path}` is a folder, not a recipe", hint="name the YAML file in it") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"cannot read the recipe `{path}`: {reason}", hint="check its path and its rights") from None
    if len(data) > MAX_BYTES:
        hint = "a recipe is a page or two of YAML; is this another file?"
        raise RecipeError(f"`{path}` is larger than {MAX_BYTES >> 20} MiB", hint=hint)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        before = data[: error.start].decode("utf-8")
        mark = Mark(path, before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1)
        hint = "save the file as UTF-8" + (", not as UTF-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "")
        raise RecipeError(f"the byte 0x{data[error.start]:02x} is not UTF-8", mark=mark, hint=hint) from None


def parse(text: str, file: str, overrides: Sequence[str] = ()) -> tuple[Recipe | None, list[Problem]]:
    """The recipe that `text` writes and everything wrong with it, in the order of the text.

    `file` stands in the marks, `overrides` are `PATH=VALUE` settings that win over the text. None where no recipe can
    be made. A recipe that comes with problems lacks the steps at fault and may refer to things that do not exist: it is
    good for further checks only.
    """
    problems = _secrets(text, file, overrides)
    documents = load_all(text, file, problems, is_mergekit)
    if not documents:
        return None, problems
    if is_mergekit(documents[0]):
        documents = override.apply_each(documents, overrides, problems)
        if _open(documents, problems):
            return None, problems
        recipe = read_mergekit(documents, text, file, tuple(overrides), problems)
        problems.sort(key=_place)
        return recipe, problems
    root = documents[0]
    if not isinstance(root, MapNode):
        hint = "a recipe starts with `version: 1` and has `steps`"
        problems.append(Problem(f"a recipe is a mapping at its top, not {describe(root)}", root.mark, hint))
        return None, problems
    root = override.apply(root, overrides, problems)
    if _open([root], problems):
        return None, problems
    if not any(key in TOP_KEYS for key in root.entries):
        problems.append(_foreign(root))
        return None, problems
    recipe = _Reader(problems).read(root, text, file, tuple(overrides))
    problems.sort(key=_place)
    return recipe, problems


def holes_of(text: str, file: str) -> tuple[list[Hole], list[Problem]]:
    """The holes of the recipe that `text` writes, and what is wrong with them or with the YAML."""
    problems: list[Problem] = []
    documents = load_all(text, file, problems, is_mergekit)
    holes = find_holes(documents[0], problems) if len(documents) == 1 else []
    return holes, problems


def _open(documents: Sequence[Node], problems: list[Problem]) -> bool:
    """Whether a recipe has holes left, which go to `problems`: nothing can be said of the rest."""
    before = len(problems)
    for document in documents:
        problems += unfilled(find_holes(document, problems))
    problems.sort(key=_place)
    return len(problems) > before


class _Reader:
    """Reads the sections of one recipe; `problems` collects what is wrong."""

    def __init__(self, problems: list[Problem]):
        self.problems = problems
        self.models: dict[str, Model] = {}
        self.names: set[str] = set()
        self.refs: list[Ref] = []

    def read(self, root: MapNode, text: str, file: str, overrides: tuple[str, ...]) -> Recipe:
        for key, entry in root.entries.items():
            if key not in TOP_KEYS:
                self.add(f"a recipe has no key `{key}`", entry.mark, suggest(key, TOP_KEYS))
        self.version(root)
        seed = self.seed(root.get("seed"))
        compute = self.compute(root.get("compute"))
        models, step_nodes = self.section(root, "models"), self.section(root, "steps")
        self.names = {*models, *step_nodes}
        for name, (mark, node) in models.items():
            self.model(name, mark, node)
        lock_node = root.get("lock")
        lock = None if lock_node is None else read_lock(lock_node, self.problems)
        sound = len(self.problems)
        steps: dict[str, Step] = {}
        uses: dict[str, list[Ref]] = {}
        for name, (mark, node) in step_nodes.items():
            if name in models:
                hint = f"the model is on line {models[name][0].line}; rename one of the two"
                self.add(f"`{name}` names both a model and a step", mark, hint)
            reader = StepReader(name, mark, self.ref, self.problems)
            step = reader.read(node)
            uses[name] = reader.uses
            if step is not None:
                steps[name] = step
        steps_sound = len(self.problems) == sound
        saves = tuple(read_saves(root.get("save"), root.mark, self.ref, self.problems))
        scores = read_scores(root.get("score"), self.problems)
        self.missing()
        unnamed = next((save.mark for save in saves if save.step is None), None)
        if not self.cycles(uses) and steps_sound and unnamed is not None:
            self.end(uses, steps, unnamed)
        return Recipe(self.models, steps, saves, seed, file, text, 1, compute, overrides, lock, scores=scores)

    def add(self, message: str, mark: Mark, hint: str | None) -> None:
        self.problems.append(Problem(message, mark, hint))

    def version(self, root: MapNode) -> None:
        node = root.get("version")
        if node is None:
            self.add("the recipe does not say its `version`", root.mark, "add `version: 1` as its first line")
        elif not isinstance(node, ScalarNode) or node.value != 1 or type(node.value) is not int:
            self.add(f"`version` must be 1, not {describe(node)}", node.mark, "this program reads `version: 1`")

    def seed(self, node: Node | None) -> int:
        if node is None:
            return 0
        value = node.value if isinstance(node, ScalarNode) else None
        if type(value) is int and 0 <= value < 2**63:
            return value
        hint = "for example `seed: 7`"
        self.add(f"`seed` must be a whole number from 0 to 2**63 - 1, not {describe(node)}", node.mark, hint)
        return 0

    def compute(self, node: Node | None) -> str:
        if node is None:
            return COMPUTE[0]
        if isinstance(node, ScalarNode) and isinstance(node.value, str) and node.value in COMPUTE:
            return node.value
        self.add(f"`compute` must be float32 or float64, not {describe(node)}", node.mark, "leave it out for float32")
        return COMPUTE[0]

    def section(self, root: MapNode, key: str) -> dict[str, tuple[Mark, Node]]:
        """The named parts of `models` or `steps`."""
        node = root.get(key)
        if node is None:
            return {}
        if not isinstance(node, MapNode):
            example = "models: {base: org/base-7b}" if key == "models" else "steps: {merged: {use: linear, of: [a, b]}}"
            self.add(f"`{key}` must map names to {key}, not be {describe(node)}", node.mark, f"for example `{example}`")
            return {}
        for name, entry in node.entries.items():
            inline = key == "models" and "/" in name
            if not inline and not NAME.fullmatch(name):
                hint = "a name is letters, digits, `_`, `-` and `.`, and starts with a letter, a digit or `_`"
                self.add(f"`{name}` cannot be the name of a {key[:-1]}", entry.mark, hint)
        return {name: (entry.mark, entry.value) for name, entry in node.entries.items()}

    def model(self, name: str, mark: Mark, node: Node) -> None:
        value = node.value if isinstance(node, ScalarNode) else None
        if isinstance(value, str) and value.strip():
            self.locate(name, value, mark, node.mark)
            return
        if isinstance(node, MapNode):
            self.adapted(name, mark, node)
            return
        hint = f"for example `{name}: org/name@revision` or `{name}: ./folder`"
        self.add(f"a model must be a path or a Hub id, not {describe(node)}", node.mark, hint)

    def adapted(self, name: str, mark: Mark, node: MapNode) -> None:
        """Add the model `{path: BASE, adapter: ADAPTER}`."""
        texts: dict[str, tuple[str, str | None] | None] = {}
        for key, entry in node.entries.items():
            if key not in MODEL_KEYS:
                self.add(f"a model has no key `{key}`", entry.mark, suggest(key, MODEL_KEYS))
                continue
            part = entry.value
            if isinstance(part, ScalarNode) and isinstance(part.value, str) and part.value.strip():
                texts[key] = self.place(part.value, part.mark)
            else:
                texts[key] = None
                hint = f"for example `{name}: {{path: org/base, adapter: ./lora}}`"
                self.add(f"`{key}` must be a path or a Hub id, not {describe(part)}", part.mark, hint)
        if list(texts) == ["adapter"]:
            alone = texts["adapter"]
            if alone is not None:
                self.models[name] = Model(name, "", None, mark, *alone)
            return
        lacking = next((key for key in MODEL_KEYS if key not in texts), None)
        if lacking is not None:
            hint = f"for example `{name}: {{path: org/base, adapter: ./lora}}`; without an adapter, `{name}: org/base`"
            self.add(f"the model `{name}` does not name its `{lacking}`", node.mark, hint)
            return
        base, adapter = texts["path"], texts["adapter"]
        if base is not None and adapter is not None:
            self.models[name] = Model(name, *base, mark, *adapter)

    def locate(self, name: str, text: str, mark: Mark, place: Mark) -> None:
        """Add the model that `text` locates; `place` is where it is written."""
        found = self.place(text, place)
        if found is not None:
            self.models[name] = Model(name, *found, mark)

    def place(self, text: str, mark: Mark) -> tuple[str, str | None] | None:
        """Location and revision that `text` writes at `mark`; None where it is at fault."""
        location, revision = split_location(text)
        if "\0" in text:
            self.add("a path cannot hold the character U+0000", mark, "check the escapes in this text")
        elif revision == "":
            self.add(
                f"`{text}` has no revision after `@`", mark, f"write `{location}`, or name a commit, tag or branch"
            )
        else:
            return location, revision
        return None

    def ref(self, node: Node, what: str) -> Ref | None:
        """The reference that `node` writes; `what` names it in a message."""
        value = node.value if isinstance(node, ScalarNode) else None
        if not isinstance(value, str) or not value.strip():
            hint = "for example `math`"
            if isinstance(value, int | float):
                spelling = node.mark.text[node.mark.column - 1 :][: node.mark.length]
                hint += f'; quotes make a name of it: `"{spelling}"`'
            self.add(f"{what} must name a model or a step, not {describe(node)}", node.mark, hint)
            return None
        if "/" in value and value not in self.names and value not in self.models:
            self.locate(value, value, node.mark, node.mark)
        ref = Ref(value, node.mark)
        self.refs.append(ref)
        return ref

    def missing(self) -> None:
        """Report every reference to a name that is neither a model nor a step."""
        for ref in self.refs:
            if "/" in ref.name or ref.name in self.names:
                continue
            near = did_you_mean(ref.name, self.names)
            bare, at, _ = ref.name.partition("@")
            if at and bare in self.names:
                hint: str | None = (
                    f"a revision belongs to the model's location: `models: {{{bare}: org/name@revision}}`"
                )
            elif not self.names:
                hint = f"a path or Hub id holds a `/`: `./{ref.name}`"
            else:
                hint = (
                    f"did you mean `{near}`?"
                    if near
                    else f"{suggest(ref.name, sorted(self.names))}; a path holds a `/`"
                )
            self.add(f"there is no model or step `{ref.name}`", ref.mark, hint)

    def cycles(self, uses: dict[str, list[Ref]]) -> bool:
        """Report every circle of steps; whether there is one."""
        found = cycles({name: [ref.name for ref in refs] for name, refs in uses.items()})
        for path in found:
            mark = next(ref.mark for ref in uses[path[0]] if ref.name == path[1])
            way = " -> ".join(path)
            self.add(f"steps use one another in a circle: {way}", mark, "a step cannot need its own result")
        return bool(found)

    def end(self, uses: dict[str, list[Ref]], steps: dict[str, Step], mark: Mark) -> None:
        """Report a save without `step` where more or less than one step is unused by others."""
        names = {name: [ref.name for ref in refs] for name, refs in uses.items()}
        ends = ends_of(names, {name: mentions(step.params) for name, step in steps.items()})
        if len(ends) != 1:
            self.problems.append(no_single_end(ends, mark))


def _secrets(text: str, file: str, overrides: Sequence[str]) -> list[Problem]:
    """A recipe is kept in the output's files and published with them: a finding for each line, or change of one on the
    command line, that holds a token or a password."""
    message = "this holds a secret, and a recipe is copied into every output"
    hint = "take it out, and make a new one if others may have seen it; `hf auth login` keeps a token for the Hub"
    found = [Problem(f"`--set {redact(one)}`: {message}", None, hint) for one in overrides if secret(one)]
    if secret(text):
        lines = enumerate(text.splitlines(), start=1)
        marks = [Mark(file, number, 1, redact(line), len(redact(line))) for number, line in lines if secret(line)]
        found += [Problem(message, mark, hint) for mark in marks] or [Problem(message, None, hint)]
    return found


def _foreign(root: MapNode) -> Problem:
    """The finding for a YAML file that has nothing of a recipe."""
    keys = ", ".join(f"`{key}`" for key in list(root.entries)[:5])
    hint = f"its keys are {keys}; a recipe starts with `version: 1` and has `steps`" if keys else None
    return Problem("this is not a recipe: it has neither `models` nor `steps`", root.mark, hint)


def _place(problem: Problem) -> tuple[bool, int, int]:
    mark = problem.mark
    return (True, 0, 0) if mark is None else (mark.file == override.FILE, mark.line, mark.column)


def _similar_file(path: str) -> str:
    folder = Path(path).parent
    try:
        near = did_you_mean(Path(path).name, sorted(entry.name for entry in folder.iterdir()))
    except OSError:
        return f"there is no folder `{folder}` that can be read either"
    return f"did you mean `{folder / near}`?" if near else f"looked in the folder `{folder.resolve()}`"
