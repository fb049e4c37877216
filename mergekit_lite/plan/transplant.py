"""`transplant`: which rows of a model's embedding and head are its own in another model's vocabulary, and which are
sums of them."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from mergekit_lite.checkpoint.meta import MERGEABLE, Checkpoint
from mergekit_lite.errors import Problem
from mergekit_lite.family.section import assign
from mergekit_lite.methods.transplant import transplant
from mergekit_lite.plan.graph import Adopted, Builder, Table
from mergekit_lite.plan.model import StepView
from mergekit_lite.plan.settings import resolve
from mergekit_lite.plan.steps import Source
from mergekit_lite.plan.vocabulary import tensors_of
from mergekit_lite.plan.words import count
from mergekit_lite.recipe.model import Recipe, Step
from mergekit_lite.vocabulary.graft import graft
from mergekit_lite.vocabulary.output import GENERATION, files_of, generation_config, renumbered, vocabulary_keys
from mergekit_lite.vocabulary.shared import shared_tokens
from mergekit_lite.vocabulary.tokens import Reader, Tokens

_EMBEDDING = re.compile(r"(?:^|[._])(?:wte|shared|\w*(?<!un)embed(?!_out)\w*)(?:[._]|$)")


def conflict(recipe: Recipe, steps: Sequence[Step]) -> Problem | None:
    """What is wrong where a recipe has both a transplant and a vocabulary for all its models."""
    wish = next((s.tokenizer for s in recipe.saves if s.tokenizer is not None and s.tokenizer.source is not None), None)
    step = next((step for step in steps if step.use == "transplant"), None)
    if wish is None or step is None:
        return None
    hint = "leave out `tokenizer`: the output has the tokenizer that the step gives; or leave out the step"
    message = f"`tokenizer` brings all models to one vocabulary before any step, and `{step.name}` transplants another"
    return Problem(message, wish.mark, hint)


def build_transplant(
    builder: Builder, step: Step, source: Source, vocabulary: Source, checkpoints: Mapping[str, Checkpoint]
) -> tuple[Table, list[Problem]]:
    """`source` with the vocabulary of the model `vocabulary`, and what is wrong with it. Raises InputError for a
    tokenizer that cannot be read."""
    nothing = replace(source.table, nodes={})
    problems = _unfit(step, source, vocabulary, checkpoints)
    if problems:
        return nothing, problems
    reader = Reader()
    owner = source.table.adopted.lead if source.table.adopted is not None else source.table.donor
    mine = reader.read(owner, checkpoints[owner])
    theirs = reader.read(vocabulary.name, checkpoints[vocabulary.name])
    pairs = _pairs(source.table, vocabulary.table)
    problems = [
        Problem(f"`{name}` has no tokenizer", mark, "put its tokenizer.json and tokenizer_config.json into its folder")
        for name, mark, tokens in ((owner, source.mark, mine), (vocabulary.name, vocabulary.mark, theirs))
        if tokens is None
    ]
    problems += [
        Problem(f"no tensor of `{one.name}` has a row for every token", one.mark, "is it a model of language?")
        for one in (source, vocabulary)
        if not _matrices(one.table)
    ]
    stored = [(source, name) for name, _ in pairs] + [(vocabulary, name) for name in {other: 0 for _, other in pairs}]
    for one, name in stored:
        if one.table.dtypes[name] not in MERGEABLE:
            message = f"`{one.name}` stores `{name}` as {one.table.dtypes[name]}: its rows are codes"
            problems.append(Problem(message, one.mark, "save it in bfloat16 first (transformers: `dequantize()`)"))
    if problems or mine is None or theirs is None:
        return nothing, problems
    return _made(builder, step, source, vocabulary, checkpoints, mine, theirs, pairs)


def _made(
    builder: Builder,
    step: Step,
    source: Source,
    vocabulary: Source,
    checkpoints: Mapping[str, Checkpoint],
    mine: Tokens,
    theirs: Tokens,
    pairs: Mapping[tuple[str, str], None],
) -> tuple[Table, list[Problem]]:
    table = source.table
    value = step.params.get("k")
    terms: int = resolve(step, transplant, "", None)["k"]
    given = {name: node.shape[0] for name, node in vocabulary.table.nodes.items() if node.shape}
    rows = max(theirs.size, *(given[other] for _, other in pairs))
    shared = None if dict(mine.ids) == dict(theirs.ids) else shared_tokens(theirs, mine)
    nodes = dict(table.nodes)
    counts: dict[str, int] = {}
    problems: list[Problem] = []
    both = f"`{source.name}` and `{vocabulary.name}` share"
    for name, other in pairs:
        node = table.nodes[name]
        made = graft(rows, shared, node.shape[0], given[other])
        counts = counts or {**made.counts(), "k": terms}
        if made.keeps(node.shape[0]):
            continue
        if len(made.sums) and len(made.atoms) < terms:
            message = f"{both} {len(made.atoms):,} tokens, fewer than `k` = {terms}"
            hint = "sums of so few rows say little; give a smaller `k`, or another model for `vocabulary`"
            problems.append(Problem(message, value.mark if value is not None else vocabulary.mark, hint))
            break
        nodes[name] = builder.transplant(node, vocabulary.table.nodes[other], made, terms, step.name)
    config = renumbered(
        copy.deepcopy(dict(table.config)),
        vocabulary.table.config,
        {number: token for token, number in mine.ids.items()},
        theirs.ids,
    )
    for key in vocabulary_keys(config):
        assign(config, key, rows)
    lead, donor = checkpoints[vocabulary.name], checkpoints[table.donor]
    files = files_of(lead, theirs)
    old = {number: token for token, number in mine.ids.items()}
    text = None if lead is donor else generation_config(donor, lead, old, theirs.ids)
    if text is not None:
        files[GENERATION] = text
    adopted = Adopted(vocabulary.name, files, counts)
    return replace(table, nodes=nodes, config=config, adopted=adopted), problems


def transplanted(step: StepView) -> str:
    """`12,000 rows of tokens shared with donor, 500 sums of at most 64 of them, 3 zero`."""
    rows = step.rows
    parts = [f"{count(rows['shared'], 'row')} of tokens shared with {step.params.get('vocabulary')}"]
    if rows["approximated"]:
        parts.append(f"{count(rows['approximated'], 'sum')} of at most {rows['k']} of them")
    return ", ".join([*parts, *([f"{rows['zero']:,} zero"] if rows["zero"] else [])])


def without_row(step: Step, table: Table) -> list[Problem]:
    """A warning of tokens that no model has a row for."""
    zero = table.adopted.rows["zero"] if table.adopted is not None and step.use == "transplant" else 0
    if not zero:
        return []
    message = f"{count(zero, 'token')} beyond the rows of the vocabulary's model, and not shared, get zeros"
    return [Problem(message, step.use_mark, "its tokenizer has more tokens than its embedding has rows")]


def _unfit(step: Step, source: Source, vocabulary: Source, checkpoints: Mapping[str, Checkpoint]) -> list[Problem]:
    problems = [
        Problem("this setting is one value for all tensors", value.mark, "give it plainly")
        for value in step.params.values()
        if not value.constant
    ]
    if vocabulary.name not in checkpoints:
        hint = "name the model whose tokenizer is wanted"
        problems.append(Problem(f"`{vocabulary.name}` is a step, and has no tokenizer", vocabulary.mark, hint))
    for one in (source, vocabulary):
        if one.table.space != "weight":
            hint = "add it to its base first: `use: add`"
            problems.append(Problem(f"`transplant` takes whole models, `{one.name}` is a delta", one.mark, hint))
        if one.table.quantized:
            hint = "save it in bfloat16 first (transformers: `model.dequantize()`), then merge"
            problems.append(Problem(f"`{one.name}` is quantised: its numbers are codes", one.mark, hint))
    return problems


def _matrices(table: Table) -> list[str]:
    """The tensors with a row for every token that are matrices, the embedding first."""
    found = [name for name in tensors_of(table, table.config) if len(table.nodes[name].shape) == 2]
    stated = table.family.vocabulary[:1]
    return sorted(found, key=lambda name: (name not in stated, _EMBEDDING.search(name) is None))


def _pairs(mine: Table, theirs: Table) -> dict[tuple[str, str], None]:
    """Each tensor that has a row for every token, with the matrix of the other model in which its sums are found: an
    embedding with the embedding, a head with the head or, where the other's head is its embedding, with that. A bias
    takes the sums of the head."""
    own, other = _matrices(mine), _matrices(theirs)
    if not own or not other:
        return {}

    def pair(name: str) -> str:
        if name == own[0] or len(other) == 1:
            return other[0]
        if len(mine.nodes[name].shape) == 1 and len(own) == 1:
            return other[0]  # the bias of a head that is the embedding
        return name if name in other[1:] else other[1]

    return {(name, pair(name)): None for name in tensors_of(mine, mine.config)}
