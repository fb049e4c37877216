"""`moe`: gates from prompts that stand in the recipe, by the embeddings of their tokens."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergekit_lite.checkpoint.meta import Checkpoint
from mergekit_lite.errors import Problem, RecipeError
from mergekit_lite.methods.moe import Counts, prompt_gates
from mergekit_lite.methods.spec import Slot
from mergekit_lite.plan.dense import mark_of
from mergekit_lite.plan.graph import Builder
from mergekit_lite.plan.model import Node
from mergekit_lite.plan.steps import Source
from mergekit_lite.recipe.model import Step
from mergekit_lite.vocabulary.rows import Rows
from mergekit_lite.vocabulary.tokens import Reader

_TOKENIZER = "put its tokenizer.json and tokenizer_config.json into its folder"


@dataclass(frozen=True, slots=True)
class Said:
    """How often the texts for and against an expert have each token."""

    hidden: Counts
    negative: Counts


@dataclass(frozen=True, slots=True)
class Prompts:
    """The texts of a step: for every one of its inputs, and for the shared expert where there are any. `embeddings` are
    the rows (tokens, width) of the tokens that they have."""

    embeddings: Node
    inputs: tuple[Said, ...]
    shared: Said | None

    def gates(self, builder: Builder, of: Sequence[Said], step: str, name: str) -> Node:
        """The node with a row for each of `of`."""
        call = prompt_gates(len(of), self.embeddings.shape[1])(
            Slot(0), hidden=tuple(one.hidden for one in of), negative=tuple(one.negative for one in of)
        )
        return builder.call(call, [self.embeddings], [""], step, name)


def read_prompts(
    builder: Builder,
    step: Step,
    base: Source,
    settings: Mapping[str, Any],
    checkpoints: Mapping[str, Checkpoint] | None,
) -> Prompts | None:
    """The texts of `step`, None where it has none. `checkpoints` is None where the vocabulary of the recipe is no
    model's own. Raises RecipeError, and InputError for a tokenizer that cannot be read."""
    if not any(settings["prompts"]):
        return None
    first = next((item.params["prompts"] for item in step.of if "prompts" in item.params), step.params.get("prompts"))
    mark = first.mark if first is not None else mark_of(step, "gates")
    table = base.table
    if checkpoints is None or table.adopted is not None:
        hint = "build the mixture first, and change its vocabulary in a recipe of its own"
        raise RecipeError(Problem(f"`prompts` are for the vocabulary that `{base.name}` was made with", mark, hint))
    tokens = Reader().read(table.donor, checkpoints[table.donor])
    if tokens is None:
        raise RecipeError(Problem(f"`{table.donor}` has no tokenizer, which `prompts` need", base.mark, _TOKENIZER))
    node = next((table.nodes[name] for name in table.family.vocabulary if name in table.nodes), None)
    if node is None or len(node.shape) != 2:
        raise RecipeError(Problem(f"`{base.name}` has no embedding of tokens", base.mark, "is it a model of language?"))
    encode = _encoder(tokens.data, tokens.settings)
    counted: dict[str, Counter[int]] = {}

    def ids(texts: Any) -> Counter[int]:
        """The tokens of one text, of several, or of none."""
        found: Counter[int] = Counter()
        for text in texts if isinstance(texts, tuple) else [texts] if texts else []:
            if text not in counted:
                counted[text] = Counter(encode(text))
            found.update(counted[text])
        return found

    pairs = [(ids(one), ids(other)) for one, other in zip(settings["prompts"], settings["against"], strict=True)]
    shared = (ids(settings["shared_prompts"]), ids(settings["shared_against"])) if settings["shared_prompts"] else None
    known = sorted({number for text in counted.values() for number in text})
    beyond = next((number for number in known if number >= node.shape[0]), None)
    if beyond is not None:
        message = f"the tokenizer of `{table.donor}` gives token {beyond}, its embedding has {node.shape[0]} rows"
        raise RecipeError(Problem(message, base.mark, "are tokenizer and weights from one model?"))
    if not all(hidden for hidden, _ in (*pairs, *([shared] if shared else []))):
        raise RecipeError(Problem("a prompt has no tokens", mark, "give a text of what the expert is for"))
    place = {number: i for i, number in enumerate(known)}

    def said(pair: tuple[Counter[int], Counter[int]]) -> Said:
        return Said(*(tuple((place[n], text[n]) for n in sorted(text)) for text in pair))

    return Prompts(_rows_of(builder, node, known), tuple(map(said, pairs)), None if shared is None else said(shared))


def _rows_of(builder: Builder, node: Node, rows: Sequence[int]) -> Node:
    import numpy as np

    taken = np.array(rows, dtype=np.int32)
    return builder.remap([node], Rows(np.zeros_like(taken), taken, None), 0)


def _encoder(data: Mapping[str, Any], settings: Mapping[str, Any]) -> Any:
    """A function from a text to the numbers of its tokens, the one for the beginning of a text first where the
    tokenizer has one."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(json.dumps(data))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    stated = settings.get("bos_token")
    begin = stated.get("content") if isinstance(stated, Mapping) else stated
    lead = begin if isinstance(begin, str) else ""

    def encode(text: str) -> list[int]:
        found: list[int] = tokenizer.encode(lead + text, add_special_tokens=False).ids
        return found

    return encode
