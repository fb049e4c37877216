"""The manual page of a merge method, made from what the method says of itself: for a terminal, as Markdown, as JSON."""

from __future__ import annotations

import string
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import mergekit_lite.methods
from mergekit_lite.methods.registry import expand
from mergekit_lite.methods.spec import Call, Method, Param, Reach, Slot
from mergekit_lite.plan.explain import plain
from mergekit_lite.recipe.write import dump

SETTINGS = ("setting", "kind", "values", "default", "for each input", "meaning")
# The examples lie in the installed package or, where it runs from its checkout, beside it.
_PACKAGE = Path(mergekit_lite.methods.__file__).parents[1]
EXAMPLES = (_PACKAGE / "recipes", _PACKAGE.parent / "recipes" / "methods")
_REACH: dict[Reach, str] = {
    "element": "each element by itself",
    "measured": "element by element, after a look at the whole tensor",
    "pooled": "element by element, after a look at all tensors",
    "row": "row by row",
    "matrix": "whole tensors",
    "structure": "names and shapes; the plan lays the result out",
    "alignment": "whole models, to find an order of their units",
    "vocabulary": "rows of tokens in embedding and head; everything else is kept",
}
_INTRO = """# Merge methods

Made by `merge methods --markdown`. A step of a recipe uses one of these: `use: NAME`, its inputs under `of`, its
settings under `with`. A setting for each input stands beside the input (`of: {math: {weight: 0.7}}`) or, for all at
once, under `with`. Numbers may follow layer depth (`{across: [0.0, 1.0]}`) or differ by tensor name
(`{"*.mlp.*": 0.4, else: 0.5}`).
"""


def inputs(method: Method) -> str:
    """How many inputs a method takes: `2`, `1 or more`, with its base: `1 or more + base`."""
    low, high = method.inputs
    count = f"{low}" if low == high else f"{low} or more" if high is None else f"{low} to {high}"
    return count + {"no": "", "optional": " (+ base)", "required": " + base"}[method.base]


def spaces(method: Method) -> str:
    """What a method takes and gives: `delta → weight`."""
    if method.surrounds and method.base == "required":
        return "weight → weight"
    return method.takes if method.takes == method.gives == "same" else f"{method.takes} → {method.gives}"


def facts(method: Method) -> list[tuple[str, str]]:
    """Short facts as pairs of a word and what it says."""
    takes = {"same": "whole models, or deltas", "weight": "whole models", "delta": "deltas"}[method.takes]
    gives = {"same": "what it takes", "weight": "a whole model", "delta": "a delta"}[method.gives]
    if method.surrounds and method.base != "no":
        takes += "; or whole models, where the step names a `base`"
        gives += "; with a `base`, a whole model"
    base = {"no": "none", "optional": "optional", "required": "needed"}[method.base]
    if method.surrounds and method.base == "required":
        base = "needed, unless the inputs are deltas"
    found = [("takes", takes), ("gives", gives), ("base", base), ("works", reach(method))]
    made_of = parts(method)
    if made_of:
        found.append(("made of", made_of))
    if method.paper:
        found.append(("paper", method.paper))
    return found


def reach(method: Method) -> str:
    """How much of the inputs must be at hand at once, in words, with the settings at their defaults."""
    used = [call.method for call in _calls(_parts(method))] if method.composite else [method]
    words = _REACH[_reach(method)]
    return f"{words}; other settings may change that" if any(callable(one.reach) for one in used) else words


def parts(method: Method) -> str:
    """A composite written out as its parts, for two inputs and with defaults; empty for other methods."""
    names = [*string.ascii_lowercase[: _count(method)], "base"]
    return _written(_parts(method), names) if method.composite else ""


def settings(method: Method) -> list[tuple[str, ...]]:
    """A row for each setting, under the heads `SETTINGS`."""
    return [
        (p.name, p.kind, p.range_text(), default_text(p), "yes" if p.per_input else "no", p.help) for p in method.params
    ]


def default_text(param: Param) -> str:
    """The default in words."""
    if param.required:
        return "required"
    if param.default is not None:
        return plain(param.default)
    none = dict.fromkeys(("spans", "globs", "texts"), "none")
    return {"layers": "all", "integers": "all", **none}.get(param.kind, "auto")


def example(method: Method) -> str:
    """A recipe that uses the method: the project's, or else the shortest that works."""
    return _kept(method) or dump(_generated(method))


def as_json(method: Method) -> dict[str, Any]:
    """All that is known of a method, as plain data."""
    low, high = method.inputs
    return {
        "name": method.name,
        "summary": method.summary,
        "doc": method.doc,
        "inputs": {"least": low, "most": high},
        "takes": method.takes,
        "gives": method.gives,
        "base": method.base,
        "reach": _reach(method),
        "parts": parts(method) or None,
        "paper": method.paper or None,
        "module": method.module,
        "params": [
            {
                "name": p.name,
                "kind": p.kind,
                "required": p.required,
                "default": None if p.required else p.default,
                "range": p.range_text(),
                "low": p.low,
                "high": p.high,
                "open_low": p.open_low,
                "open_high": p.open_high,
                "choices": list(p.choices),
                "per_input": p.per_input,
                "help": p.help,
            }
            for p in method.params
        ],
        "example": example(method),
    }


def page(methods: Mapping[str, Method]) -> str:
    """The page of all methods that this program brings, as Markdown. Those of other packages are left out."""
    own = [method for method in methods.values() if method.module.startswith("mergekit_lite.")]
    rows = [(f"[{m.name}](#{m.name})", inputs(m), spaces(m), m.summary) for m in own]
    lines = [_INTRO, *_markdown_table(("method", "inputs", "takes → gives", "what it does"), rows), ""]
    return "\n".join([*lines, *(section(method) for method in own)])


def section(method: Method) -> str:
    """The method's part of the page, as Markdown."""
    lines = [f"## {method.name}", "", f"`{method.signature()}`", "", *_prose(method.doc), ""]
    lines += [f"- {key}: {f'`{value}`' if key == 'made of' else value}" for key, value in facts(method)]
    rows = [(f"`{name}`", *rest) for name, *rest in settings(method)]
    if rows:
        lines += ["", *_markdown_table(SETTINGS, rows)]
    return "\n".join([*lines, "", "```yaml", example(method).rstrip(), "```", ""])


def _prose(doc: str) -> Iterator[str]:
    """Docstrings are prose already; only what HTML would swallow is escaped, outside of code."""
    for line in doc.splitlines():
        pieces = line.split("`")
        pieces[::2] = [piece.replace("<", "&lt;").replace("|", "\\|").replace("*", "\\*") for piece in pieces[::2]]
        yield "`".join(pieces)


def _markdown_table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    table = [head, tuple("-" for _ in head), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table]


def _defaults(method: Method, count: int) -> dict[str, Any]:
    """Settings for `count` inputs: the defaults, and something that fits where one is required."""
    found = {}
    for param in method.params:
        value = fitting(param) if param.required else param.default
        found[param.name] = (value,) * count if param.per_input else value
    return found


def fitting(param: Param) -> Any:
    """A value that the setting allows."""
    if param.kind == "choice":
        return param.choices[0]
    if param.kind == "flag":
        return True
    if param.kind == "reference":
        return "base"
    if param.kind == "layers":
        return (0, 2)
    if param.kind == "texts":
        return "a text"
    low = param.low if param.low is not None else (0.0 if param.high is None else param.high - 1)
    high = param.high if param.high is not None else low + 1
    return int(high) if param.kind == "integer" else (low + high) / 2


def _count(method: Method) -> int:
    """Two inputs, or as near to that as the method allows."""
    low, high = method.inputs
    return max(low, 2 if high is None else min(2, high))


def _parts(method: Method) -> Call | Slot:
    count = _count(method)
    slots = tuple(map(Slot, range(count + method.base_last)))
    return expand(Call(method, slots, tuple(_defaults(method, count).items())))


def _reach(method: Method) -> Reach:
    """The reach with default settings; for a composite, that of its most demanding part."""
    if not method.composite:
        return method.reach_of(_defaults(method, _count(method)))
    found = [call.method.reach_of(dict(call.params)) for call in _calls(_parts(method))]
    return max(found, key=list(_REACH).index, default="element")


def _calls(call: Call | Slot) -> Iterator[Call]:
    if isinstance(call, Call):
        yield call
        for below in call.inputs:
            yield from _calls(below)


def _written(call: Call | Slot, names: Sequence[str]) -> str:
    if isinstance(call, Slot):
        return names[call.index]
    below = [_written(one, names) for one in call.inputs]
    for key, value in call.params:
        param = call.method.param(key)
        same = value[0] if isinstance(value, tuple) and len(set(value)) == 1 else value
        if param is None or same != param.default:
            below.append(f"{key}={plain(value)}")
    return f"{call.method.name}({', '.join(below)})"


def _kept(method: Method) -> str | None:
    """The text of the project's example, `NAME.yaml`."""
    for folder in EXAMPLES:
        path = folder / f"{method.name}.yaml"
        if path.is_file():
            return path.read_text(encoding="utf-8")
    return None


def _generated(method: Method) -> dict[str, Any]:
    """The shortest recipe that uses the method and saves a whole model, as data."""
    count = _count(method)
    names = list(string.ascii_lowercase[:count])
    steps: dict[str, Any] = {}
    around = method.surrounds and method.base != "no"
    of = names
    if method.takes == "delta" and not around:
        of = [f"change_{name}" for name in names]
        steps |= {new: {"use": "delta", "of": name, "base": "base"} for new, name in zip(of, names, strict=True)}
    step: dict[str, Any] = {"use": method.name, "of": of[0] if count == 1 else of}
    if any(param.kind == "layers" for param in method.per_input):
        step["of"] = [{"model": name, "layers": [2 * place, 2 * place + 4]} for place, name in enumerate(names)]
    if around or method.base == "required":
        step["base"] = "base"
    fixed = {p.name: fitting(p) for p in method.params if p.required}
    if method.param("like") is not None:
        step["like"] = fixed.pop("like", "base")
    if fixed:
        step["with"] = fixed
    if method.gives == "delta" and not around:
        steps |= {"change": step, "merged": {"use": "add", "of": "change", "base": "base"}}
    else:
        steps["merged"] = step
    based = any("base" in one or "like" in one or "base" in one.get("with", {}).values() for one in steps.values())
    models = {"base": "org/base"} if based else {}
    models |= {name: f"org/model-{name}" for name in names}
    return {"version": 1, "models": models, "steps": steps, "save": {"to": "out/merged"}}
