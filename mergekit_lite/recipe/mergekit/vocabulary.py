"""mergekit's `tokenizer_source`, `tokenizer` and `chat_template` as what a save asks of the vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from mergekit_lite.errors import Mark, Problem
from mergekit_lite.recipe.mergekit.reference import Reference, read_reference
from mergekit_lite.recipe.model import Ref, Tokenizer
from mergekit_lite.recipe.node import MapNode, Node, describe
from mergekit_lite.recipe.tokenizer import read_block, read_source, read_template

FindRef = Callable[[Reference], Ref]


def read_tokenizer(root: MapNode, find: FindRef, base: Ref | None, problems: list[Problem]) -> Tokenizer | None:
    """What the document asks of the vocabulary, None where it asks nothing. `find` gives the model of a reference,
    `base` is that of the document."""
    plain, block, template = root.get("tokenizer_source"), root.get("tokenizer"), root.get("chat_template")
    if plain is not None and block is not None:
        mark = root.entries["tokenizer"].mark
        problems.append(Problem("`tokenizer_source` and `tokenizer` are given both", mark, "keep one of the two"))
    keys = ("tokenizer", "tokenizer_source", "chat_template")
    mark = next((root.entries[k].mark for k in keys if k in root.entries), root.mark)
    if plain is None and block is None and template is None:
        return None

    def read_ref(node: Node, what: str) -> Ref | None:
        reference = read_reference(node, what, problems)
        return None if reference is None else find(reference)

    made = Tokenizer(None, mark)
    if isinstance(block, MapNode):
        made = replace(read_block(block, "union", read_ref, problems), mark=mark)
    elif block is not None:
        hint = "for example `tokenizer: {source: base}`"
        problems.append(Problem(f"`tokenizer` must be a mapping, not {describe(block)}", block.mark, hint))
    elif plain is not None:
        made = replace(made, source=read_source(plain, "`tokenizer_source`", read_ref, problems))
    if made.source == "base" and base is None:
        message = "the tokenizer of the base is asked for, and there is no `base_model`"
        problems.append(Problem(message, mark, "add `base_model`, or name the model: `tokenizer_source: org/name`"))
    made = replace(made, chat_template=read_template(template, problems), base=base)
    return None if made.source is None and made.chat_template is None else made


def same_wish(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether two documents ask for the same vocabulary and template, wherever they say so."""

    def bare(tokenizer: Tokenizer) -> tuple[object, ...]:
        source = tokenizer.source.name if isinstance(tokenizer.source, Ref) else tokenizer.source
        rows = {
            token: (row.kind, row.model.name if row.model else None, row.token, row.token_id, row.force)
            for token, row in tokenizer.tokens.items()
        }
        return source, rows, tokenizer.pad_to_multiple_of, tokenizer.chat_template

    return bare(one) == bare(other)


def differing(mark: Mark) -> Problem:
    """The finding that two merges of one file ask for different vocabularies."""
    message = "the merges of this file ask for different tokenizers"
    hint = "write it in the last merge only: it holds for all of them, since nothing is stored in between"
    return Problem(message, mark, hint)
