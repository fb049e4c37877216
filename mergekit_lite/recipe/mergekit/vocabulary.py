"""`tokenizer_source`, `tokenizer` and `chat_template`, read and checked; what is not carried out yet is said."""

from __future__ import annotations

from collections.abc import Callable

from mergekit_lite.errors import Mark, Problem, suggest
from mergekit_lite.recipe.mergekit.reference import Reference, read_reference
from mergekit_lite.recipe.model import Ref, Tokenizer, TokenRow
from mergekit_lite.recipe.node import MapNode, Node, ScalarNode, describe

TEMPLATES = ("auto", "alpaca", "chatml", "llama3", "mistral", "exaone")
_BLOCK_KEYS = ("source", "tokens", "pad_to_multiple_of")
_TOKEN_KEYS = ("source", "force")
_ROW_KEYS = {"model_token": ("kind", "model", "token", "token_id"), "zero": ("kind",)}
_LATER = "leave it out: the tokenizer and chat template of the base, or else of the first model, are copied as they are"

FindRef = Callable[[Reference], Ref]


def read_tokenizer(root: MapNode, find: FindRef, problems: list[Problem]) -> Tokenizer | None:
    """What the document asks of the vocabulary, None where it asks nothing. `find` gives the model of a reference."""
    plain, block, template = root.get("tokenizer_source"), root.get("tokenizer"), root.get("chat_template")
    if plain is not None and block is not None:
        mark = root.entries["tokenizer"].mark
        problems.append(Problem("`tokenizer_source` and `tokenizer` are given both", mark, "keep one of the two"))
    mark = next(
        (root.entries[k].mark for k in ("tokenizer", "tokenizer_source", "chat_template") if k in root.entries),
        root.mark,
    )
    if plain is None and block is None and template is None:
        return None
    source: str | Ref | None = None
    tokens: dict[str, TokenRow] = {}
    pad: int | None = None
    if isinstance(block, MapNode):
        for key, entry in block.entries.items():
            if key not in _BLOCK_KEYS:
                problems.append(Problem(f"`tokenizer` has no key `{key}`", entry.mark, suggest(key, _BLOCK_KEYS)))
        inner = block.get("source")
        source = "union" if inner is None else _source(inner, "`source`", find, problems)
        tokens = _tokens(block.get("tokens"), find, problems)
        pad = _pad(block.get("pad_to_multiple_of"), problems)
    elif block is not None:
        hint = "for example `tokenizer: {source: base}`"
        problems.append(Problem(f"`tokenizer` must be a mapping, not {describe(block)}", block.mark, hint))
    elif plain is not None:
        source = _source(plain, "`tokenizer_source`", find, problems)
    return Tokenizer(source, mark, tokens, pad, _template(template, problems))


def unsupported(tokenizer: Tokenizer, base: Ref | None) -> list[Problem]:
    """What of it is not carried out yet. The base's files are copied, and so nothing else is asked for by `base`."""
    problems = []
    source, mark = tokenizer.source, tokenizer.mark
    if source == "base" and base is None:
        problems.append(Problem("the tokenizer of the base is asked for, and there is no `base_model`", mark, _LATER))
    elif (
        source is not None and source != "base" and not (isinstance(source, Ref) and base and source.name == base.name)
    ):
        name = source.name if isinstance(source, Ref) else source
        problems.append(Problem(f"a vocabulary taken from `{name}` is not supported yet", mark, _LATER))
    for asked, what in (
        (tokenizer.tokens, "`tokens`"),
        (tokenizer.pad_to_multiple_of, "`pad_to_multiple_of`"),
        (tokenizer.chat_template, "`chat_template`"),
    ):
        if asked:
            problems.append(Problem(f"{what} is not supported yet", mark, _LATER))
    return problems


def _source(node: Node, what: str, find: FindRef, problems: list[Problem]) -> str | Ref | None:
    if isinstance(node, ScalarNode) and node.value in ("union", "base", None):
        return None if node.value is None else str(node.value)
    reference = read_reference(node, what, problems)
    return None if reference is None else find(reference)


def _tokens(node: Node | None, find: FindRef, problems: list[Problem]) -> dict[str, TokenRow]:
    if node is None:
        return {}
    if not isinstance(node, MapNode):
        hint = 'for example `tokens: {"<|im_start|>": {source: org/name}}`'
        problems.append(Problem(f"`tokens` must map tokens to sources, not be {describe(node)}", node.mark, hint))
        return {}
    return {token: _row(entry.value, entry.mark, find, problems) for token, entry in node.entries.items()}


def _row(node: Node, mark: Mark, find: FindRef, problems: list[Problem]) -> TokenRow:
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
        return _special(source, kind, mark, forced, find, problems)
    if source is None or (isinstance(source, ScalarNode) and source.value is None):
        return TokenRow("default", mark, force=forced)
    reference = read_reference(source, "`source`", problems)
    return TokenRow(
        "default" if reference is None else "model", mark, None if reference is None else find(reference), force=forced
    )


def _special(node: MapNode, kind: Node, mark: Mark, force: bool, find: FindRef, problems: list[Problem]) -> TokenRow:
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
    reference = read_reference(model, "`model`", problems)
    return TokenRow("model_token", mark, None if reference is None else find(reference), text, index, force)


def _pad(node: Node | None, problems: list[Problem]) -> int | None:
    if node is None or (isinstance(node, ScalarNode) and node.value is None):
        return None
    if isinstance(node, ScalarNode) and type(node.value) is int and node.value > 0:
        return node.value
    message = f"`pad_to_multiple_of` must be a whole number above 0, not {describe(node)}"
    problems.append(Problem(message, node.mark, "for example `pad_to_multiple_of: 64`"))
    return None


def _template(node: Node | None, problems: list[Problem]) -> str | None:
    if node is None or (isinstance(node, ScalarNode) and node.value is None):
        return None
    value = node.value if isinstance(node, ScalarNode) else None
    if isinstance(value, str) and (value in TEMPLATES or "{" in value):
        return value
    hint = suggest(value, TEMPLATES) if isinstance(value, str) else None
    message = f"`chat_template` is one of {', '.join(TEMPLATES)} or a template's text, not {describe(node)}"
    problems.append(Problem(message, node.mark, hint or "for example `chat_template: chatml`"))
    return None
