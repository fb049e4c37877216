"""The recipe language as a JSON Schema, for editors: completion, hints and red lines while a recipe is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mergekit_lite.methods.spec import Method, Param
from mergekit_lite.recipe.lora import FORMS, SVDS
from mergekit_lite.recipe.masks import COMPRESS, THRESHOLD
from mergekit_lite.recipe.push import BRANCH, MOST_MESSAGE
from mergekit_lite.recipe.read import COMPUTE, NAME
from mergekit_lite.recipe.save import DTYPES, QUANTIZE, SHORT_DTYPES, UNITS
from mergekit_lite.recipe.step import MISSING
from mergekit_lite.recipe.tokenizer import TEMPLATES

Schema = dict[str, Any]
TEXT: Schema = {"type": "string", "pattern": r"\S"}
REFERENCE: Schema = {**TEXT, "description": "A model or a step by name; a path or Hub id holds a `/`."}
MODEL: Schema = {
    "anyOf": [
        TEXT,
        {
            "type": "object",
            "properties": {
                "path": {**TEXT, "description": "The base: a path, or a Hub id with @revision."},
                "adapter": {
                    **TEXT,
                    "description": "An adapter that is folded in, or without `path` a delta: a folder, or a Hub id.",
                },
            },
            "required": ["adapter"],
            "additionalProperties": False,
        },
    ]
}
_MISSING_HELP = (
    "What to do with tensors that only some inputs have. error: stop; base: keep the base's tensor; skip: leave them "
    "out; zero_delta: take the base for the model that lacks it."
)


def schema(methods: Mapping[str, Method]) -> Schema:
    """The JSON Schema (draft 2020-12) of recipes that use the public ones of `methods`.

    It accepts every recipe that the reader accepts. The reader sees more: references, cycles, spaces, integers written
    as `1.0`.
    """
    public = [method for method in methods.values() if method.public]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "mergekit_lite recipe",
        "description": "Models to load, steps of work, folders to save.",
        "type": "object",
        "properties": {
            "version": {"const": 1, "description": "The version of the recipe language."},
            "seed": {
                "type": "integer",
                "minimum": 0,
                "maximum": 2**63 - 1,
                "default": 0,
                "description": "Seed of all random masks.",
            },
            "compute": {"enum": list(COMPUTE), "default": COMPUTE[0], "description": "The dtype of the arithmetic."},
            "models": _named(f"^{NAME.pattern}$|/", MODEL, "Checkpoints by name: a path, or a Hub id with @revision."),
            "steps": _named(f"^{NAME.pattern}$", {"$ref": "#/$defs/step"}, "Steps by name: use a method of inputs."),
            "save": {
                "description": "One output folder, or a list of them.",
                "anyOf": [
                    {"$ref": "#/$defs/save"},
                    {"type": "array", "items": {"$ref": "#/$defs/save"}, "minItems": 1, "maxItems": 1},
                    {"type": "array", "items": {"$ref": "#/$defs/save", "required": ["to"]}, "minItems": 2},
                ],
            },
            "lock": {"type": "object", "description": "What an earlier run noted; `merge run` writes it."},
        },
        "required": ["version"],
        "anyOf": [{"required": ["steps"]}, {"required": ["models"]}, {"required": ["save"]}],
        "additionalProperties": False,
        "$defs": {"step": _step(public), "save": _save()},
    }


def _named(pattern: str, item: Schema, description: str) -> Schema:
    return {
        "type": "object",
        "propertyNames": {"pattern": pattern},
        "additionalProperties": item,
        "description": description,
    }


def _step(methods: list[Method]) -> Schema:
    return {
        "type": "object",
        "properties": {
            "use": {
                "description": "The method.",
                "oneOf": [{"const": method.name, "description": method.summary} for method in methods],
            },
            "of": {"description": "The inputs: one name, a list, or a mapping of names to settings."},
            "base": {**REFERENCE, "description": "The model that the inputs were fine-tuned from."},
            "with": {"type": "object", "description": "Settings of the method."},
            "missing": {"enum": list(MISSING), "default": MISSING[0], "description": _MISSING_HELP},
            "rest": {**REFERENCE, "description": "The model that gives `stack` the tensors outside the layers."},
            "below": {**REFERENCE, "description": "The model that gives `stack` the embeddings, if not `rest`."},
            "above": {**REFERENCE, "description": "The model that gives `stack` the final norm and head."},
            "like": {**REFERENCE, "description": "Short for `with: {like: NAME}`."},
        },
        "required": ["use", "of"],
        "additionalProperties": False,
        "allOf": [
            {"if": {"properties": {"use": {"const": method.name}}, "required": ["use"]}, "then": _use(method)}
            for method in methods
        ],
    }


def _use(method: Method) -> Schema:
    """What a step that uses `method` may hold."""
    settings = {param.name: _setting(param) for param in method.params}
    beside = {param.name: settings[param.name] for param in method.per_input}
    properties: Schema = {
        "with": {"type": "object", "properties": settings, "additionalProperties": False},
        "of": _inputs(method, beside),
    }
    required: list[str] = []
    demands: list[Schema] = []
    if method.base == "no":
        properties["base"] = False
    elif method.base == "required" and not method.surrounds:
        required.append("base")
    if method.name != "stack":
        properties |= {"rest": False, "below": False, "above": False}
    if method.param("like") is None:
        properties["like"] = False
    for param in method.params:
        if param.required:
            demands.append({"anyOf": _places(param)})
    made: Schema = {"properties": properties}
    return made | ({"required": required} if required else {}) | ({"allOf": demands} if demands else {})


def _places(param: Param) -> list[Schema]:
    """Where a required setting may stand: under `with`, or where it is one per input, beside every input."""
    name = {"required": [param.name]}
    places: list[Schema] = [{"properties": {"with": name}, "required": ["with"]}]
    if param.name == "like":
        places.append({"required": ["like"]})
    if param.per_input:
        listed: Schema = {"type": "array", "items": {"type": "object", **name}}
        named: Schema = {"type": "object", "additionalProperties": {"type": "object", **name}}
        places.append({"properties": {"of": {"anyOf": [listed, named]}}})
    return places


def _inputs(method: Method, beside: Schema) -> Schema:
    low, high = method.inputs
    listed = {
        "type": "object",
        "properties": {"model": REFERENCE, **beside},
        "required": ["model"],
        "additionalProperties": False,
    }
    settings = {"type": ["object", "null"], "properties": beside, "additionalProperties": False}
    array: Schema = {"type": "array", "items": {"anyOf": [REFERENCE, listed]}, "minItems": max(1, low)}
    mapping: Schema = {"type": "object", "additionalProperties": settings, "minProperties": max(1, low)}
    if high is not None:
        array["maxItems"] = mapping["maxProperties"] = high
    return {"anyOf": [*([REFERENCE] if low <= 1 else []), array, mapping]}


def _setting(param: Param) -> Schema:
    """A setting in all its forms: one value, a curve over depth, globs over tensor names."""
    scalar = _scalar(param)
    text = f"{param.help} ({param.range_text()})"
    made: Schema = {"description": text}
    if not param.required and param.default is not None:
        made["default"] = param.default
    if param.kind in ("reference", "path"):
        return made | scalar
    forms = [scalar]
    if param.kind == "number":
        forms.append(
            {
                "type": "object",
                "description": "A curve over layer depth.",
                "properties": {
                    "across": {"type": "array", "items": scalar, "minItems": 2},
                    "else": {**scalar, "description": "For tensors outside the layers."},
                },
                "required": ["across"],
                "additionalProperties": False,
            }
        )
    globs: Schema = {
        "type": "object",
        "description": "Globs over tensor names; `else` applies last.",
        "properties": {
            "else": {"anyOf": list(forms), "description": "For tensors that no glob matches."},
            "across": False,
        },
        "additionalProperties": {"anyOf": list(forms)},
        "minProperties": 1,
    }
    return made | {"anyOf": [*forms, globs]}


def _scalar(param: Param) -> Schema:
    if param.kind == "choice":
        return {"enum": list(param.choices)}
    if param.kind == "flag":
        return {"type": "boolean"}
    if param.kind in ("reference", "path"):
        return TEXT
    if param.kind == "words":
        one: Schema = {"enum": list(param.choices)}
        return {"anyOf": [one, {"type": "array", "items": one, "minItems": 1}]}
    if param.kind == "integers":
        number: Schema = {"type": "integer", "minimum": param.low or 0}
        return {"anyOf": [number, {"type": "array", "items": number, "minItems": 1}]}
    if param.kind == "spans":
        item: Schema = {
            "anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": _span(param.choices)}]
        }
        return {"anyOf": [*item["anyOf"], {"type": "array", "items": item, "minItems": 1}]}
    if param.kind == "globs":
        name: Schema = {"type": "string", "minLength": 1}
        return {"anyOf": [name, {"type": "array", "items": name, "minItems": 1}]}
    if param.kind == "texts":
        return {"anyOf": [TEXT, {"type": "array", "items": TEXT, "minItems": 1}]}
    if param.kind == "layers":
        return {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 2, "maxItems": 2}
    made: Schema = {"type": param.kind}
    if param.low is not None:
        made["exclusiveMinimum" if param.open_low else "minimum"] = param.low
    if param.high is not None:
        made["exclusiveMaximum" if param.open_high else "maximum"] = param.high
    return made


def _span(words: Sequence[str]) -> str:
    """A pattern for the texts among `spans`."""
    return "|".join(["^[0-9]{1,9}-[0-9]{1,9}$", *(f"^{word}$" for word in words)])


def _save() -> Schema:
    units = "|".join("".join(f"[{c.upper()}{c.lower()}]" if c.isalpha() else c for c in unit) for unit in UNITS)
    return {
        "type": "object",
        "properties": {
            "step": {**REFERENCE, "description": "What to save; the last step if left out."},
            "to": {**TEXT, "description": "The output folder."},
            "dtype": {
                "enum": [*DTYPES, *SHORT_DTYPES],
                "description": "The dtype on disk; the stored ones if left out.",
            },
            "quantize": {
                "enum": list(QUANTIZE),
                "description": "Store the weights of linear layers in FP8, with a scale for each block.",
            },
            "shard": {
                "description": "The most bytes of tensors in one file.",
                "default": "5GB",
                "anyOf": [
                    {"type": "integer", "minimum": 1},
                    {"type": "string", "pattern": f"^[0-9]{{1,30}}(\\.[0-9]{{1,30}})? ?({units})$"},
                ],
            },
            "push": _push(),
            "tokenizer": _tokenizer(),
            "chat_template": {
                "anyOf": [TEXT, {"type": "null"}],
                "description": f"{', '.join(TEMPLATES)}, a model, or a template's text.",
            },
            "as": {
                "enum": [*FORMS, "masks"],
                "description": "Save an adapter of `base`, as peft loads it, or a mask store, not a model.",
            },
            "base": {**REFERENCE, "description": "The model that the adapter, or the masked vector, is for."},
            "tasks": {
                "description": "The tasks of a mask store: models or steps, by name.",
                "anyOf": [
                    {"type": "array", "items": TEXT, "minItems": 1},
                    _named(f"^{NAME.pattern}$", REFERENCE, "Models or steps by task.") | {"minProperties": 1},
                ],
            },
            "threshold": {
                "description": "How large a task's own change must be beside the others'; for all, or by task.",
                "default": THRESHOLD,
                "anyOf": [
                    {"type": "number", "minimum": 0},
                    {"type": "object", "additionalProperties": {"type": "number", "minimum": 0}},
                ],
            },
            "compress": {
                "enum": list(COMPRESS),
                "description": "Code the masks of a mask store; a bit for each entry and task if left out.",
            },
            "rank": {
                "type": "integer",
                "minimum": 1,
                "description": "The rank of the factors, with `energy` the most.",
            },
            "energy": {
                "type": "number",
                "exclusiveMinimum": 0,
                "maximum": 1,
                "description": "The share of the squared norm of every change that is kept.",
            },
            "svd": {"enum": list(SVDS), "default": SVDS[0], "description": "How the factors are found."},
            "targets": {
                "description": "Globs of the tensors that the adapter changes; all if left out.",
                "anyOf": [TEXT, {"type": "array", "items": TEXT, "minItems": 1}],
            },
        },
        "dependentRequired": {
            **{key: ["as"] for key in ("base", "rank", "energy", "svd", "targets", "tasks", "threshold", "compress")},
            "as": ["base"],
        },
        # An adapter is not stored in FP8, and with `quantize` the dtype is that of all other tensors.
        "dependentSchemas": {
            "quantize": {
                "properties": {
                    "as": False,
                    "dtype": {"enum": [name for name in (*DTYPES, *SHORT_DTYPES) if not name.startswith("float8")]},
                }
            }
        },
        "additionalProperties": False,
    }


def _push() -> Schema:
    return {
        "type": "object",
        "description": "Where on the Hub the output is published once the run is done.",
        "properties": {
            "repo": {**TEXT, "description": "The repository, `owner/name`."},
            "private": {
                "type": "boolean",
                "description": "Whether a repository that is made is private.",
                "default": True,
            },
            "branch": {"type": "string", "pattern": f"^{BRANCH}$", "description": "The branch; main if left out."},
            "pr": {"type": "boolean", "description": "Open a pull request.", "default": False},
            "message": {**TEXT, "maxLength": MOST_MESSAGE, "description": "The commit's message."},
        },
        "required": ["repo"],
        "additionalProperties": False,
        "not": {"properties": {"pr": {"const": True}}, "required": ["branch", "pr"]},
    }


def _tokenizer() -> Schema:
    """The vocabulary that a save asks for, in its short and its long form."""
    source: Schema = {"anyOf": [TEXT, {"type": "null"}], "description": "base, union, or a model."}
    model_token: Schema = {
        "type": "object",
        "properties": {
            "kind": {"const": "model_token"},
            "model": REFERENCE,
            "token": {"type": "string"},
            "token_id": {"type": "integer"},
        },
        "required": ["kind", "model"],
        "oneOf": [{"required": ["token"]}, {"required": ["token_id"]}],
        "additionalProperties": False,
    }
    zero: Schema = {
        "type": "object",
        "properties": {"kind": {"const": "zero"}},
        "required": ["kind"],
        "additionalProperties": False,
    }
    row: Schema = {
        "type": "object",
        "properties": {
            "source": {"anyOf": [REFERENCE, model_token, zero, {"type": "null"}]},
            "force": {"type": "boolean", "description": "Also for models that have the token."},
        },
        "additionalProperties": False,
    }
    block: Schema = {
        "type": "object",
        "properties": {
            "source": source,
            "tokens": {
                "type": ["object", "null"],
                "additionalProperties": row,
                "description": "Where rows of single tokens come from.",
            },
            "pad_to_multiple_of": {"type": ["integer", "null"], "minimum": 1, "maximum": 1 << 20},
            "base": {**REFERENCE, "description": "The model whose rows others take for tokens that they lack."},
        },
        "additionalProperties": False,
    }
    return {"description": "The output's vocabulary.", "anyOf": [source, block]}
