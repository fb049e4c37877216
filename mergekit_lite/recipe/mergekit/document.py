"""One document of mergekit's language: its slices of sources and their parameters, as written. All keys are checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mergekit_lite.errors import Mark, Problem, suggest
from mergekit_lite.recipe.location import NAME
from mergekit_lite.recipe.mergekit.reference import Key, Reference, read_reference
from mergekit_lite.recipe.node import Entry, ListNode, MapNode, Node, ScalarNode, describe

DTYPES = ("float32", "float16", "bfloat16")
_DTYPE_HINT = "one of `float32`, `float16`, `bfloat16`"
TOP_KEYS = (
    "name", "merge_method", "models", "slices", "modules", "base_model", "parameters", "dtype", "out_dtype",
    "tokenizer_source", "tokenizer", "chat_template", "compat",
)  # fmt: skip
_SLICE_KEYS = ("sources", "base_model", "residual_weight", "parameters")
_SOURCE_KEYS = ("model", "layer_range", "parameters")
_MODEL_KEYS = ("model", "parameters")
_SIGNS = ("merge_method", "slices", "modules", "base_model", "experts", "gate_mode")
_EXAMPLE = (
    "for example `models: [{model: org/a, parameters: {weight: 0.5}}, {model: org/b, parameters: {weight: 0.5}}]`"
)

Parameters = Mapping[str, Entry]


@dataclass(frozen=True, slots=True)
class Source:
    """One input of a slice. `layers` None: the whole model. `added` where mergekit itself adds the base to them."""

    ref: Reference
    layers: tuple[int, int] | None
    parameters: Parameters
    mark: Mark
    added: bool = False


@dataclass(frozen=True, slots=True)
class Slice:
    """Layers of the output made of the same number of layers of every source."""

    sources: tuple[Source, ...]
    base: Reference | None
    parameters: Parameters
    mark: Mark

    @property
    def count(self) -> int | None:
        """The number of layers, None where whole models are merged."""
        layers = self.sources[0].layers
        return None if layers is None else layers[1] - layers[0]


@dataclass(frozen=True, slots=True)
class Document:
    """One merge. `dtype` is what its result is saved in; `compat`, a key of this program's, asks for mergekit's
    numbers where the native methods decide otherwise; `root` its node, for what is read later. `sound` is False
    where parts of it could not be read."""

    name: str | None
    method: str
    mark: Mark
    slices: tuple[Slice, ...]
    base: Reference | None
    parameters: Parameters
    dtype: str | None
    compat: bool
    root: MapNode
    sound: bool


def is_mergekit(node: Node) -> bool:
    """Whether the document is written in mergekit's language and not in the native one."""
    if not isinstance(node, MapNode) or "version" in node.entries or "steps" in node.entries:
        return False
    models = node.get("models")
    listed = isinstance(models, ListNode) and any(isinstance(item, MapNode) for item in models.items)
    return listed or any(key in node.entries for key in _SIGNS)


def read_document(node: Node, problems: list[Problem], notes: list[Problem]) -> Document | None:
    """The merge that `node` writes. Findings go to `problems`, remarks to `notes`; None where no merge can be made."""
    if not isinstance(node, MapNode):
        hint = "every document has a `merge_method`"
        problems.append(Problem(f"a document is a mapping at its top, not {describe(node)}", node.mark, hint))
        return None
    return _Reader(problems, notes).document(node)


def read_dtype(node: Node | None, key: str, problems: list[Problem]) -> str | None:
    """The dtype under `key`, None where there is none or it is at fault."""
    if node is None or (isinstance(node, ScalarNode) and node.value is None):
        return None
    value = node.value if isinstance(node, ScalarNode) else None
    name = value.removeprefix("torch.") if isinstance(value, str) else ""
    if name in DTYPES:
        return name
    hint = (suggest(name, DTYPES) if name else None) or _DTYPE_HINT
    if name == "int64":
        hint = f"weights are numbers with a fraction; {_DTYPE_HINT}"
    problems.append(Problem(f"`{key}` must be a floating type, not {describe(node)}", node.mark, hint))
    return None


class _Reader:
    def __init__(self, problems: list[Problem], notes: list[Problem]):
        self.problems = problems
        self.notes = notes

    def add(self, message: str, mark: Mark, hint: str | None) -> None:
        self.problems.append(Problem(message, mark, hint))

    def keys(self, node: MapNode, known: tuple[str, ...], what: str) -> None:
        for key, entry in node.entries.items():
            if key not in known:
                self.add(f"{what} has no key `{key}`", entry.mark, suggest(key, known))

    def document(self, root: MapNode) -> Document | None:
        self.keys(root, TOP_KEYS, "a merge")
        before = len(self.problems)
        method, mark = self.method(root)
        base = self.base(root)
        parameters = self.parameters(root)
        dtype = self.dtype(root.get("dtype"), "dtype")
        out_dtype = self.dtype(root.get("out_dtype"), "out_dtype")
        name = self.name(root.get("name"))
        compat = self.compat(root.get("compat"))
        slices = self.slices(root, base)
        if method is None or not slices:
            return None
        sound = len(self.problems) == before
        return Document(name, method, mark, tuple(slices), base, parameters, out_dtype or dtype, compat, root, sound)

    def method(self, root: MapNode) -> tuple[str | None, Mark]:
        node = root.get("merge_method")
        if node is None:
            self.add("the merge does not say its `merge_method`", root.mark, "for example `merge_method: linear`")
            return None, root.mark
        if isinstance(node, ScalarNode) and isinstance(node.value, str) and node.value.strip():
            return node.value, node.mark
        self.add(f"`merge_method` must name a method, not {describe(node)}", node.mark, "for example `linear`")
        return None, node.mark

    def name(self, node: Node | None) -> str | None:
        if node is None:
            return None
        if isinstance(node, ScalarNode) and isinstance(node.value, str) and NAME.fullmatch(node.value):
            return node.value
        hint = "a name is letters, digits, `_`, `-` and `.`, and starts with a letter, a digit or `_`"
        self.add(f"{describe(node)} cannot be the name of a merge", node.mark, hint)
        return None

    def base(self, node: MapNode) -> Reference | None:
        found = node.get("base_model")
        if found is None or (isinstance(found, ScalarNode) and found.value is None):
            return None
        return read_reference(found, "`base_model`", self.problems)

    def dtype(self, node: Node | None, key: str) -> str | None:
        return read_dtype(node, key, self.problems)

    def compat(self, node: Node | None) -> bool:
        value = False if node is None else node.value if isinstance(node, ScalarNode) else None
        if isinstance(value, bool):
            return value
        assert node is not None
        hint = "`true` asks for mergekit's numbers where this program decides otherwise"
        self.add(f"`compat` is true or false, not {describe(node)}", node.mark, hint)
        return False

    def parameters(self, node: MapNode) -> Parameters:
        found = node.get("parameters")
        if found is None or (isinstance(found, ScalarNode) and found.value is None):
            return {}
        if isinstance(found, MapNode):
            return found.entries
        hint = "for example `parameters: {weight: 0.5}`"
        self.add(f"`parameters` must map names to values, not be {describe(found)}", found.mark, hint)
        return {}

    def slices(self, root: MapNode, base: Reference | None) -> list[Slice]:
        """The slices, or the whole models as one slice."""
        given = [key for key in ("models", "slices", "modules") if key in root.entries]
        if "modules" in given:
            hint = "merge models of one list of layers with `models` or `slices`"
            self.add("`modules` is not supported", root.entries["modules"].mark, hint)
            return []
        if len(given) != 1:
            what = "both `models` and `slices`" if given else "neither `models` nor `slices`"
            self.add(f"the merge has {what}", root.entries[given[-1]].mark if given else root.mark, _EXAMPLE)
            return []
        key = given[0]
        node = root.entries[key].value
        if not isinstance(node, ListNode) or not node.items:
            what = "an empty list" if isinstance(node, ListNode) else describe(node)
            self.add(f"`{key}` must be a list of {key}, not {what}", root.entries[key].mark, _EXAMPLE)
            return []
        if key == "slices":
            return [part for item in node.items if (part := self.slice(item)) is not None]
        sources = [found for item in node.items if (found := self.source(item, sliced=False)) is not None]
        if base is not None and all(source.ref.key != base.key for source in sources):
            sources.append(Source(base, None, {}, base.mark, added=True))
        self.twice(sources)
        return [Slice(tuple(sources), None, {}, node.mark)] if sources else []

    def slice(self, node: Node) -> Slice | None:
        sources = node.get("sources") if isinstance(node, MapNode) else None
        if not isinstance(node, MapNode) or not isinstance(sources, ListNode) or not sources.items:
            hint = "for example `- sources: [{model: org/a, layer_range: [0, 16]}]`"
            self.add("a slice must be a mapping with a list of `sources`", node.mark, hint)
            return None
        self.keys(node, _SLICE_KEYS, "a slice")
        if "residual_weight" in node.entries:
            mark = node.entries["residual_weight"].mark
            self.notes.append(Problem("`residual_weight` has no effect", mark, "mergekit reads it and never uses it"))
        found = [source for item in sources.items if (source := self.source(item, sliced=True)) is not None]
        if not found:
            return None
        self.twice(found)
        counts = [source.layers[1] - source.layers[0] for source in found if source.layers]
        if len(set(counts)) > 1:
            lengths = ", ".join(str(count) for count in counts)
            hint = "layers are merged one by one, so every `layer_range` must have the same length"
            self.add(f"the sources of a slice have different numbers of layers: {lengths}", node.mark, hint)
        return Slice(tuple(found), self.base(node), self.parameters(node), node.mark)

    def source(self, node: Node, sliced: bool) -> Source | None:
        """An item of `models` or, `sliced`, of `sources`."""
        if not isinstance(node, MapNode) or "model" not in node.entries:
            what = "a source" if sliced else "an item of `models`"
            self.add(f"{what} must name its `model`", node.mark, "for example `- model: org/name`")
            return None
        if not sliced and "layer_range" in node.entries:
            hint = "layers are chosen under `slices`, in `sources`"
            self.add("`models` takes whole models, without `layer_range`", node.entries["layer_range"].mark, hint)
        self.keys(node, _SOURCE_KEYS if sliced or "layer_range" in node.entries else _MODEL_KEYS, "a source")
        ref = read_reference(node.entries["model"].value, "`model`", self.problems)
        parameters = self.parameters(node)
        layers = self.layers(node) if sliced else None
        return None if ref is None else Source(ref, layers, parameters, ref.mark)

    def layers(self, node: MapNode) -> tuple[int, int] | None:
        found = node.get("layer_range")
        values = (
            [item.value for item in found.items if isinstance(item, ScalarNode)] if isinstance(found, ListNode) else []
        )
        whole = [value for value in values if isinstance(value, int) and not isinstance(value, bool)]
        if isinstance(found, ListNode) and len(whole) == len(found.items) == 2 and 0 <= whole[0] < whole[1]:
            return whole[0], whole[1]
        mark = node.mark if found is None else found.mark
        message = "a source must have a `layer_range` of two whole numbers, the second one larger"
        self.add(message, mark, "for example `layer_range: [0, 16]`; the end is not included")
        return None

    def twice(self, sources: list[Source]) -> None:
        seen: set[Key] = set()
        for source in sources:
            if source.ref.key in seen:
                hint = "mergekit would use one of the two only; remove the other"
                self.add(f"`{source.ref.path}` is listed twice in one merge", source.mark, hint)
            seen.add(source.ref.key)
