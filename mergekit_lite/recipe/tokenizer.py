"""What a recipe asks of the output's vocabulary: `tokenizer` and `chat_template`, the same in both languages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from mergekit_lite.errors import Mark, Problem, suggest
from mergekit_lite.recipe.model import Ref, Tokenizer, TokenRow
from mergekit_lite.recipe.node import MapNode, Node, ScalarNode, describe

SOURCES = ("base", "union")
TEMPLATES = ("auto", "alpaca", "chatml", "llama3", "mistral", "exaone")
BLOCK_KEYS = ("source", "tokens", "pad_to_multiple_of")
_TOKEN_KEYS = ("source", "force")
_ROW_KEYS = {"model_token": ("kind", "model", "token", "token_id"), "zero": ("kind",)}

ReadRef = Callable[[Node, str], "Ref | None"]  # the model that a node names; what it is, for a message


def read_block(
    block: MapNode, default: str | None, read_ref: ReadRef, problems: list[Problem], keys: tuple[str, ...] = BLOCK_KEYS
) -> Tokenizer:
    """`{source: .., tokens: .., pad_to_multiple_of: ..}`. `default` is the source where none is named."""
    for key, entry in block.entries.items():
        if key not in keys:
            problems.append(Problem(f"`tokenizer` has no key `{key}`", entry.mark, suggest(key, keys)))
    inner = block.get("source")
    return Tokenizer(
        default if inner is None else read_source(inner, "`source`", read_ref, problems),
        block.mark,
        _tokens(block.get("tokens"), read_ref, problems),
        _pad(block.get("pad_to_multiple_of"), problems),
    )


def read_source(node: Node, what: str, read_ref: ReadRef, problems: list[Problem]) -> str | Ref | None:
    """`base`, `union`, or the model that `node` names; None where it says `null`."""
    if isinstance(node, ScalarNode) and node.value in (*SOURCES, None):
        return None if node.value is None else str(node.value)
    return read_ref(node, what)


def read_template(node: Node | None, problems: list[Problem]) -> str | None:
    """A chat template as mergekit's language states it: `auto`, a name, or Jinja text."""
    if node is None or (isinstance(node, ScalarNode) and node.value is None):
        return None
    value = node.value if isinstance(node, ScalarNode) else None
    if isinstance(value, str) and (value in TEMPLATES or "{" in value):
        return value
    hint = suggest(value, TEMPLATES) if isinstance(value, str) else None
    message = f"`chat_template` is one of {', '.join(TEMPLATES)} or a template's text, not {describe(node)}"
    problems.append(Problem(message, node.mark, hint or "for example `chat_template: chatml`"))
    return None


def read_native(
    tokenizer: Node | None, template: Node | None, read_ref: ReadRef, problems: list[Problem]
) -> Tokenizer | None:
    """What a save of the native language asks of the vocabulary; None where it asks nothing."""
    made: Tokenizer | None = None
    if isinstance(tokenizer, MapNode):
        made = read_block(tokenizer, "base", read_ref, problems, (*BLOCK_KEYS, "base"))
        base = tokenizer.get("base")
        made = replace(made, base=None if base is None else read_ref(base, "`base`"))
    elif tokenizer is not None:
        made = Tokenizer(read_source(tokenizer, "`tokenizer`", read_ref, problems), tokenizer.mark)
    if template is None:
        return made
    value = template.value if isinstance(template, ScalarNode) else None
    made = made or Tokenizer(None, template.mark)
    if isinstance(value, str) and value not in TEMPLATES and "{" not in value:
        return replace(made, chat_template=read_ref(template, "`chat_template`"))
    return replace(made, chat_template=read_template(template, problems))


def _tokens(node: Node | None, read_ref: ReadRef, problems: list[Problem]) -> dict[str, TokenRow]:
    if node is None or (isinstance(node, ScalarNode) and node.value is None):
        return {}
    if not isinstance(node, MapNode):
        hint = 'for example `tokens: {"<|im_start|>": {source: org/name}}`'
        problems.append(Problem(f"`tokens` must map tokens to sources, not be {describe(node)}", node.mark, hint))
        return {}
    return {token: _row(entry.value, entry.mark, read_ref, problems) for token, entry in node.entries.items()}


def _row(node: Node, mark: Mark, read_ref: ReadRef, problems: list[Problem]) -> TokenRow:
    if not isinstance(node, MapNode):
        hint = "for example `{source: org/name, force: true}`"
        problems.append(Problem(f"a token's entry must be a mapping, not {describe(node)}", node.mark, hint))
        return TokenRow("default", mark)
    for key, entry in node.entries.items():
        if key not in _TOKEN_KEYS:
            problems.append(Problem(f"a token has no key `{key}`", entry.mark, suggest(key, _TOKEN_KEYS)))
    force = node.get("force")
    forced = isinstance(force, ScalarNode) and force.value is True
    if force is not None and not (isinstance(force, ScalarNode) and isinstance(force.value, bool)):
        problems.append(
            Problem(f"`force` is true or false, not {describe(force)}", force.mark, "leave it out for false")
        )
    source = node.get("source")
    kind = source.get("kind") if isinstance(source, MapNode) else None
    if isinstance(source, MapNode) and kind is not None:
        return _special(source, kind, mark, forced, read_ref, problems)
    if source is None or (isinstance(source, ScalarNode) and source.value is None):
        return TokenRow("default", mark, force=forced)
    model = read_ref(source, "`source`")
    return TokenRow("default" if model is None else "model", mark, model, force=forced)


def _special(
    node: MapNode, kind: Node, mark: Mark, force: bool, read_ref: ReadRef, problems: list[Problem]
) -> TokenRow:
    name = kind.value if isinstance(kind, ScalarNode) else None
    if not isinstance(name, str) or name not in _ROW_KEYS:
        message = f"`kind` is `model_token` or `zero`, not {describe(kind)}"
        problems.append(
            Problem(message, kind.mark, "a model's own row of this token needs no kind: `source: org/name`")
        )
        return TokenRow("default", mark)
    for key, entry in node.entries.items():
        if key not in _ROW_KEYS[name]:
            problems.append(Problem(f"a `{name}` source has no key `{key}`", entry.mark, suggest(key, _ROW_KEYS[name])))
    if name == "zero":
        return TokenRow("zero", mark, force=force)
    token, number, model = (node.get(key) for key in ("token", "token_id", "model"))
    text = token.value if isinstance(token, ScalarNode) and isinstance(token.value, str) else None
    index = number.value if isinstance(number, ScalarNode) and type(number.value) is int else None
    if (text is None) == (index is None):
        hint = "for example `{kind: model_token, model: org/name, token: <pad>}`"
        problems.append(Problem("a `model_token` needs either a `token` or a `token_id`", node.mark, hint))
    if model is None:
        problems.append(Problem("a `model_token` does not name its `model`", node.mark, "add `model: org/name`"))
        return TokenRow("default", mark)
    return TokenRow("model_token", mark, read_ref(model, "`model`"), text, index, force)


def _pad(node: Node | None, problems: list[Problem]) -> int | None:
    if node is None or (isinstance(node, ScalarNode) and node.value is None):
        return None
    if isinstance(node, ScalarNode) and type(node.value) is int and 0 < node.value <= 1 << 20:
        return node.value
    message = f"`pad_to_multiple_of` must be a whole number above 0, not {describe(node)}"
    problems.append(Problem(message, node.mark, "for example `pad_to_multiple_of: 64`"))
    return None
