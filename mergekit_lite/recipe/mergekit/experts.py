"""One document of mergekit-moe's language: a mixture of experts made of dense models, as written. All keys are checked.

base_model         the model that gives all but the experts
experts            source_model, positive_prompts, negative_prompts, noise_scale, residual_scale of each
shared_experts     the same of the one that every token goes to
gate_mode          hidden (with hidden_last the same, and hidden_avg), cheap_embed, random, uniform_random
experts_per_token, architecture, dtype
states             a key of this program's: the folder of what prompts look like inside the base
"""

from __future__ import annotations

from dataclasses import dataclass

from mergekit_lite.errors import Mark, Problem, suggest
from mergekit_lite.recipe.mergekit.document import read_dtype
from mergekit_lite.recipe.mergekit.reference import Reference, read_reference
from mergekit_lite.recipe.node import ListNode, MapNode, Node, ScalarNode, describe

TOP_KEYS = (
    "base_model", "experts", "shared_experts", "gate_mode", "experts_per_token", "architecture", "dtype", "states",
)  # fmt: skip
_EXPERT_KEYS = ("source_model", "positive_prompts", "negative_prompts", "noise_scale", "residual_scale")
HIDDEN = ("hidden", "hidden_last", "hidden_avg")
GATE_MODES = (*HIDDEN, "cheap_embed", "random", "uniform_random")
# What their output architectures begin with, and what these are called here.
_ARCHITECTURES = {"mixtral": "mixtral", "deepseek moe": "deepseek", "qwen moe": "qwen2_moe", "qwen3 moe": "qwen3_moe"}
_EXAMPLE = "for example `experts: [{source_model: org/math, positive_prompts: [Prove that]}]`"
_PROMPTS = 'for example `positive_prompts: ["Prove that", "How many"]`'


@dataclass(frozen=True, slots=True)
class Prompts:
    """Texts, at least one."""

    texts: tuple[str, ...]
    mark: Mark


@dataclass(frozen=True, slots=True)
class Expert:
    """A model as an expert: the texts for and against it, the standard deviation of the noise on its weights, and the
    factor of what it gives."""

    ref: Reference
    positive: Prompts | None
    negative: Prompts | None
    noise: tuple[float, Mark] | None
    scale: tuple[float, Mark] | None


@dataclass(frozen=True, slots=True)
class Mixture:
    """A document. `style` is the native name of the architecture, `auto` where the models decide; `mode_mark` is where
    `gate_mode` stands, or the document where it does not."""

    base: Reference
    experts: tuple[Expert, ...]
    shared: Expert | None
    gate_mode: str
    mode_mark: Mark
    per_token: int
    style: str
    style_mark: Mark
    dtype: str | None
    states: str | None
    mark: Mark


def is_mixture(node: Node) -> bool:
    """Whether the document is for mergekit-moe."""
    return isinstance(node, MapNode) and ("experts" in node.entries or "gate_mode" in node.entries)


def read_experts(root: MapNode, problems: list[Problem], notes: list[Problem]) -> Mixture | None:
    """The mixture that `root` writes. Findings go to `problems`, remarks to `notes`; None where there are findings."""
    return _Reader(problems, notes).mixture(root)


class _Reader:
    def __init__(self, problems: list[Problem], notes: list[Problem]):
        self.problems = problems
        self.notes = notes

    def add(self, message: str, mark: Mark, hint: str | None) -> None:
        self.problems.append(Problem(message, mark, hint))

    def keys(self, node: MapNode, known: tuple[str, ...], what: str) -> None:
        for key, entry in node.entries.items():
            if key not in known:
                hint = suggest(key, known)
                if key == "merge_method":
                    hint = "models are merged, or become experts; merge them first, in a recipe of its own"
                self.add(f"{what} has no key `{key}`", entry.mark, hint)

    def mixture(self, root: MapNode) -> Mixture | None:
        before = len(self.problems)
        self.keys(root, TOP_KEYS, "a mixture of experts")
        node = _given(root, "base_model")
        base = None if node is None else read_reference(node, "`base_model`", self.problems)
        if node is None:
            self.add("the mixture does not name its `base_model`", root.mark, "for example `base_model: org/name`")
        mode, mode_mark = self.gate_mode(root)
        experts = self.experts(root, "experts", mode)
        if not experts and len(self.problems) == before:
            mark = root.entries["experts"].mark if "experts" in root.entries else root.mark
            self.add("the mixture has no experts", mark, _EXAMPLE)
        shared = self.experts(root, "shared_experts", mode)
        if len(shared) > 1:
            mark = shared[1].ref.mark
            self.add(f"there is one shared expert, here are {len(shared)}", mark, "keep one, or make it an expert")
        style, style_mark = self.style(root, shared, mode)
        per_token = self.per_token(root, len(experts))
        dtype = read_dtype(root.get("dtype"), "dtype", self.problems)
        states = self.text(root, "states", "for example `states: stats/mixture`, what `merge stats` has written")
        if len(self.problems) > before or base is None:
            return None
        if mode in ("random", "uniform_random"):
            unused = next((e.positive or e.negative for e in (*experts, *shared) if e.positive or e.negative), None)
            if unused is not None:
                self.notes.append(Problem(f"prompts have no effect with `gate_mode: {mode}`", unused.mark))
        one = shared[0] if shared else None
        return Mixture(
            base, tuple(experts), one, mode, mode_mark, per_token, style, style_mark, dtype, states, root.mark
        )

    def gate_mode(self, root: MapNode) -> tuple[str, Mark]:
        node = _given(root, "gate_mode")
        if node is None:
            return "hidden", root.entries["experts"].mark if "experts" in root.entries else root.mark
        value = node.value if isinstance(node, ScalarNode) else None
        if isinstance(value, str) and value in GATE_MODES:
            return value, node.mark
        hint = suggest(value, GATE_MODES) if isinstance(value, str) else f"one of {_words(GATE_MODES)}"
        self.add(f"`gate_mode` cannot be {describe(node)}", node.mark, hint)
        return "random", node.mark  # which asks nothing of the experts

    def style(self, root: MapNode, shared: list[Expert], mode: str) -> tuple[str, Mark]:
        gated = bool(shared) and shared[0].positive is not None and mode not in ("random", "uniform_random")
        text = self.text(root, "architecture", f"one of {_words(_ARCHITECTURES)}")
        if not text:
            mark = root.entries["shared_experts"].mark if gated else root.mark
            return "qwen2_moe" if gated else "auto", mark
        mark = root.entries["architecture"].value.mark
        found = [style for name, style in _ARCHITECTURES.items() if name.startswith(text.lower())]
        if not found:
            self.add(f"there is no architecture `{text}`", mark, suggest(text.lower(), list(_ARCHITECTURES)))
            return "auto", mark
        # `qwen` means both of them, one of which must have a shared expert, and the other none.
        style = found[0] if len(found) == 1 or shared else found[-1]
        if shared and style in ("mixtral", "qwen3_moe"):
            self.add(
                f"`architecture: {text}` has no shared expert", shared[0].ref.mark, "leave it out, or list it above"
            )
        if not shared and style == "qwen2_moe":
            self.add(f"`architecture: {text}` needs a shared expert", mark, "name a model in `shared_experts`")
        if gated and style == "deepseek":
            hint = "leave its prompts out, or take `architecture: qwen`"
            self.add(f"the shared expert of `architecture: {text}` has no gate", shared[0].ref.mark, hint)
        return style, mark

    def per_token(self, root: MapNode, experts: int) -> int:
        node = _given(root, "experts_per_token")
        value = 2 if node is None else node.value if isinstance(node, ScalarNode) else None
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            assert node is not None
            hint = "for example `experts_per_token: 2`"
            self.add(f"`experts_per_token` is a whole number from 1, not {describe(node)}", node.mark, hint)
            return 1
        if value > experts > 0:
            said = "a token goes to 2 experts" if node is None else f"a token cannot go to {value} experts"
            count = "one" if experts == 1 else f"{experts}"
            hint = f"list more, or write `experts_per_token: {experts}`"
            mark = root.entries["experts"].mark if node is None else node.mark
            self.add(f"{said}, here {'is' if experts == 1 else 'are'} {count}", mark, hint)
        return value

    def experts(self, root: MapNode, key: str, mode: str) -> list[Expert]:
        node = _given(root, key)
        if node is None:
            return []
        if not isinstance(node, ListNode):
            self.add(f"`{key}` must be a list of models, not {describe(node)}", node.mark, _EXAMPLE)
            return []
        return [found for item in node.items if (found := self.expert(item, key, mode)) is not None]

    def expert(self, node: Node, key: str, mode: str) -> Expert | None:
        if not isinstance(node, MapNode) or _given(node, "source_model") is None:
            self.add(f"an item of `{key}` must name its `source_model`", node.mark, _EXAMPLE)
            return None
        self.keys(node, _EXPERT_KEYS, "an expert")
        ref = read_reference(node.entries["source_model"].value, "`source_model`", self.problems)
        positive, negative = (self.prompts(node, name) for name in ("positive_prompts", "negative_prompts"))
        asked = mode not in ("random", "uniform_random")
        lacking = asked and positive is None
        if lacking and "positive_prompts" not in node.entries and (key == "experts" or negative is not None):
            message = f"an expert has no `positive_prompts`, which `gate_mode: {mode}` needs"
            self.add(message, node.mark, f"{_PROMPTS}; or take `gate_mode: random`")
        noise, scale = (self.number(node, name, low) for name, low in (("noise_scale", 0.0), ("residual_scale", None)))
        return None if ref is None else Expert(ref, positive, negative, noise, scale)

    def prompts(self, node: MapNode, key: str) -> Prompts | None:
        """The texts under `key`; None where there are none. An empty list is none too, but for `positive_prompts`."""
        found = _given(node, key)
        if found is None:
            return None
        items = found.items if isinstance(found, ListNode) else []
        texts = [item.value for item in items if isinstance(item, ScalarNode) and isinstance(item.value, str)]
        if isinstance(found, ListNode) and len(texts) == len(items) and all(texts):
            if not texts and key == "positive_prompts":
                self.add("`positive_prompts` is an empty list", found.mark, _PROMPTS)
            return Prompts(tuple(texts), found.mark) if texts else None
        odd = next((i for i in items if not isinstance(i, ScalarNode) or not isinstance(i.value, str)), found)
        what = "a list of texts" if odd is found else "texts"
        told = "an empty one" if odd is found and items else describe(odd)
        hint = f"{_PROMPTS}; quotes make a text of a number" if odd is not found else _PROMPTS
        self.add(f"`{key}` are {what}, not {told}", odd.mark, hint)
        return None

    def number(self, node: MapNode, key: str, low: float | None) -> tuple[float, Mark] | None:
        found = _given(node, key)
        if found is None:
            return None
        value = found.value if isinstance(found, ScalarNode) else None
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or abs(value) == float("inf")
            or value != value
        ):
            self.add(f"`{key}` is a number, not {describe(found)}", found.mark, f"for example `{key}: 0.1`")
            return None
        if low is not None and value < low:
            self.add(f"`{key}` is a standard deviation, not {value:g}", found.mark, f"for example `{key}: 0.1`")
            return None
        return float(value), found.mark

    def text(self, node: MapNode, key: str, hint: str) -> str | None:
        found = _given(node, key)
        if found is None:
            return None
        if isinstance(found, ScalarNode) and isinstance(found.value, str):
            return found.value or None
        self.add(f"`{key}` must be a text, not {describe(found)}", found.mark, hint)
        return None


def _given(node: MapNode, key: str) -> Node | None:
    """The node under `key`; None where there is none, or null."""
    found = node.get(key)
    return None if found is None or (isinstance(found, ScalarNode) and found.value is None) else found


def _words(names: tuple[str, ...] | dict[str, str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
