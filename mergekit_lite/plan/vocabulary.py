"""Another vocabulary: which one a recipe asks for, and every model's tensors brought to it before any step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mergekit_lite.checkpoint.meta import MERGEABLE, Checkpoint
from mergekit_lite.errors import Mark, Problem, RecipeError
from mergekit_lite.family.section import assign
from mergekit_lite.plan.graph import Adopted, Builder, Table
from mergekit_lite.plan.model import Node, Output, Vocabulary
from mergekit_lite.recipe.links import final_step
from mergekit_lite.recipe.model import Recipe, Ref, Save, Tokenizer, TokenRow
from mergekit_lite.recipe.tokenizer import TEMPLATES
from mergekit_lite.vocabulary.output import files_of, generation_config, renumbered, vocabulary_keys
from mergekit_lite.vocabulary.rows import Choice, lost, padded
from mergekit_lite.vocabulary.rows import Table as RowTable
from mergekit_lite.vocabulary.template import commonest, known, template_of, with_template
from mergekit_lite.vocabulary.tokens import Reader, Tokens
from mergekit_lite.vocabulary.union import united, with_added

SHOWN = 3


def models_named(recipe: Recipe) -> set[str]:
    """The models that the saves' vocabularies mention, whether or not a step reads them."""
    found: set[str] = set()
    for wish in {id(save.tokenizer): save.tokenizer for save in recipe.saves if save.tokenizer is not None}.values():
        refs = [wish.source, wish.chat_template, wish.base, *(row.model for row in wish.tokens.values())]
        found |= {donor_of(recipe, ref.name) for ref in refs if isinstance(ref, Ref)}
    return found


def donor_of(recipe: Recipe, name: str) -> str:
    """The model that gives a model or step its configuration."""
    while name not in recipe.models:
        step = recipe.steps[name]
        name = (step.rest or step.base or step.of[0].ref).name
    return name


def base_of(recipe: Recipe, name: str) -> str | None:
    """The model that a step's inputs are compared with, or those of the first of its inputs that is a step."""
    while name in recipe.steps:
        step = recipe.steps[name]
        if step.base is not None:
            return donor_of(recipe, step.base.name)
        name = (step.rest or step.of[0].ref).name
    return None


@dataclass(frozen=True, slots=True)
class Remapped:
    """What the plan knows of the vocabulary: how it is shown, the tokens of the output and of every model."""

    view: Vocabulary
    tokens: Tokens
    read: Mapping[str, Tokens]


def remap(
    builder: Builder,
    recipe: Recipe,
    checkpoints: Mapping[str, Checkpoint],
    tables: dict[str, Table],
    merged: Sequence[str],
) -> tuple[Remapped | None, list[Problem]]:
    """Bring `tables`, by model, to the vocabulary that the recipe asks for, if it does; what a person may want to know.

    `merged` are the models that steps read. Raises RecipeError, and InputError for a tokenizer that cannot be read.
    """
    wish, save = _wish(recipe)
    if wish is None or save is None:
        return None, []
    if any((form := tables[name].form) is not None and form.pipeline for name in merged):
        hint = "leave it out: those of the pipeline's folders are copied as they are"
        raise RecipeError(Problem("`tokenizer` is for language models, not for pipelines", wish.mark, hint))
    step = save.step.name if save.step else final_step(recipe)
    donor = donor_of(recipe, step)
    base = donor_of(recipe, wish.base.name) if wish.base is not None else base_of(recipe, step)
    lead = donor_of(recipe, wish.source.name) if isinstance(wish.source, Ref) else base or donor
    names = [*merged, *(name for name in checkpoints if name not in merged)]
    read, notes = _read(names, lead, checkpoints, recipe, wish)
    tokens = read[lead]
    others = [read[name] for name in merged if name != lead]
    if wish.source == "union":
        tokens, more = united(tokens, others, wish.mark)
        notes += more
    tokens = with_added(tokens, wish.tokens, list(read.values()))
    rows = padded(tokens.size, wish.pad_to_multiple_of)

    kinds = {name: tensors_of(tables[name], checkpoints[name].config) for name in names}
    lacking = [name for name in merged if not kinds[name]]
    if lacking:
        message = f"no tensor of `{lacking[0]}` has a row for every token"
        raise RecipeError(Problem(message, recipe.models[lacking[0]].mark, "leave out `tokenizer`"))
    old = {name: dict(tables[name].nodes) for name in names}
    counts: dict[str, Mapping[str, int]] = {}
    for tensor in dict.fromkeys(t for name in names for t in kinds[name]):
        having = [name for name in names if tensor in kinds[name]]
        shape = old[having[0]][tensor].shape[1:]
        having = [name for name in having if old[name][tensor].shape[1:] == shape]
        owners = [name for name in having if name in merged]
        table = RowTable(
            tokens.ids,
            rows,
            [(read[name].ids, old[name][tensor].shape[0]) for name in having],
            len(owners),
            owners.index(base) if base in owners else None,
            {token: _choice(token, row, having, read, old, tensor, recipe) for token, row in wish.tokens.items()},
        )
        for place, name in enumerate(owners):
            nodes = dict(tables[name].nodes)
            nodes[tensor] = _remapped(builder, table, place, [old[n][tensor] for n in having])
            _check_dtypes(tables[name], tensor, nodes[tensor] is old[name][tensor], recipe.models[name].mark)
            tables[name] = replace(tables[name], nodes=nodes)
            counts.setdefault(name, _named(table.counts(place), having, name))
        empty = [token for token in lost(table, tokens.ids) if token not in wish.tokens]
        if empty:
            shown = ", ".join(repr(token) for token in empty[:SHOWN]) + (" .." if len(empty) > SHOWN else "")
            count = f"{len(empty)} tokens have" if len(empty) > 1 else "one token has"
            hint = "give them rows: `tokens: {TOKEN: {source: {kind: model_token, model: NAME, token: LIKE}}}`"
            message = f"{count} no row in `{tensor}` of any model and get zeros: {shown}"
            notes.append(Problem(message, wish.mark, hint))
    source = wish.source.name if isinstance(wish.source, Ref) else str(wish.source)
    tensors = tuple(dict.fromkeys(t for name in merged for t in kinds[name]))
    view = Vocabulary(source, lead, len(tokens.ids), rows, counts, tensors)
    return Remapped(view, tokens, read), notes


def tensors_of(table: Table, config: Mapping[str, Any]) -> list[str]:
    """The tensors that have a row for every token: those that the family states, or else those outside the layers that
    have as many rows as the configuration states tokens."""
    if table.family.vocabulary:
        return [name for name in table.family.vocabulary if name in table.nodes]
    sizes = set(vocabulary_keys(config).values())
    return [
        name
        for name, node in table.nodes.items()
        if node.shape[:1] and node.shape[0] in sizes and table.family.layer(name) is None
    ]


def beside(
    output: Output,
    save: Save,
    recipe: Recipe,
    checkpoints: Mapping[str, Checkpoint],
    found: Remapped | None,
    adopted: Adopted | None,
) -> Output:
    """`output` with the tokenizer and the configuration that go with its vocabulary, and with its chat template.
    `adopted` is the vocabulary that a step has given it."""
    wish = save.tokenizer
    if wish is None:
        return output if adopted is None else replace(output, tokenizer=adopted.files)
    donor = checkpoints[output.donor]
    lead = checkpoints[found.view.lead] if found is not None else donor
    config: dict[str, Any] = dict(output.config)
    files = files_of(lead, found.tokens if found is not None else None) if adopted is None else dict(adopted.files)
    if found is not None:
        old = {number: token for token, number in found.read[output.donor].ids.items()}
        given = lead.config if lead is not donor else {}
        config = renumbered(config, given, old, found.tokens.ids)
        for key in vocabulary_keys(config):
            assign(config, key, found.view.rows)
        if lead is not donor and (text := generation_config(donor, lead, old, found.tokens.ids)) is not None:
            files["generation_config.json"] = text
    template = _template(wish, recipe, checkpoints)
    if template is not None:
        files = with_template(files, template)
    return replace(output, config=config, tokenizer=files)


def _template(wish: Tokenizer, recipe: Recipe, checkpoints: Mapping[str, Checkpoint]) -> str | None:
    asked = wish.chat_template
    if asked is None:
        return None
    if isinstance(asked, Ref):
        name = donor_of(recipe, asked.name)
        text = template_of(checkpoints[name].folder)
        if text is None:
            raise RecipeError(Problem(f"`{name}` has no chat template", asked.mark, "take that of another model"))
        return text
    if asked == "auto":
        return commonest([template_of(checkpoint.folder) for checkpoint in checkpoints.values()])
    return known(asked) if asked in TEMPLATES else asked


def _wish(recipe: Recipe) -> tuple[Tokenizer | None, Save | None]:
    """The vocabulary that all saves ask for. Raises RecipeError where they ask for different ones: they share steps."""

    def asked(save: Save) -> Any:
        wish = save.tokenizer
        if wish is None or wish.source is None:
            return None
        source, base = (ref.name if isinstance(ref, Ref) else ref for ref in (wish.source, wish.base))
        return source, base, wish.pad_to_multiple_of, [(token, _bare(row)) for token, row in wish.tokens.items()]

    wishes = [asked(save) for save in recipe.saves]
    for save, wish in zip(recipe.saves, wishes, strict=True):
        if wish != wishes[0]:
            message = "the saves of this recipe ask for different vocabularies"
            raise RecipeError(Problem(message, save.mark, "give each `save` the same `tokenizer`, or split the recipe"))
    return (None, None) if wishes[0] is None else (recipe.saves[0].tokenizer, recipe.saves[0])


def _bare(row: TokenRow) -> tuple[object, ...]:
    return row.kind, row.model.name if row.model else None, row.token, row.token_id, row.force


def _read(
    names: Sequence[str], lead: str, checkpoints: Mapping[str, Checkpoint], recipe: Recipe, wish: Tokenizer
) -> tuple[dict[str, Tokens], list[Problem]]:
    """Every model's tokenizer; a model without one is taken to have that of `lead`, which is said."""
    reader = Reader()
    found = {name: reader.read(name, checkpoints[name]) for name in names}
    first = found[lead]
    if first is None:
        hint = "put its tokenizer.json and tokenizer_config.json into its folder, or name another model"
        raise RecipeError(Problem(f"`{lead}`, whose vocabulary is asked for, has no tokenizer", wish.mark, hint))
    made, notes = {}, []
    for name in names:
        tokens = found[name]
        if tokens is None:
            message = f"`{name}` has no tokenizer and is taken to have that of `{lead}`"
            hint = "if it has another one, put its tokenizer.json into its folder"
            notes.append(Problem(message, recipe.models[name].mark, hint))
        made[name] = tokens or replace(first, name=name)
    return made, notes


def _choice(
    token: str,
    row: TokenRow,
    having: Sequence[str],
    read: Mapping[str, Tokens],
    nodes: Mapping[str, Mapping[str, Node]],
    tensor: str,
    recipe: Recipe,
) -> Choice:
    """The row of `tensor` that the recipe chooses for `token`. Raises RecipeError where there is no such row."""
    if row.kind in ("default", "zero"):
        return Choice(row.kind == "zero", None, 0, row.force)
    assert row.model is not None
    name = row.model.name
    if name not in recipe.models:
        hint = "name the model that the row is taken from"
        raise RecipeError(Problem(f"`{name}` is a step, and rows of tokens come from models", row.mark, hint))
    if name not in having:
        # A model whose head is its embedding stores no head, and gives none: the usual fallback is left.
        return Choice(False, None, 0, False)
    wanted = row.token if row.kind == "model_token" else token
    number = row.token_id if wanted is None else read[name].ids.get(wanted)
    rows = nodes[name][tensor].shape[0]
    if number is None:
        hint = "name another model, or another token of it: `{kind: model_token, model: NAME, token: LIKE}`"
        raise RecipeError(Problem(f"`{name}` has no token {wanted!r}", row.mark, hint))
    if not 0 <= number < rows:
        raise RecipeError(Problem(f"`{tensor}` of `{name}` has {rows} rows, and none of number {number}", row.mark))
    return Choice(True, having.index(name), number, row.force)


def _remapped(builder: Builder, table: RowTable, place: int, nodes: Sequence[Node]) -> Node:
    if table.is_own(place, nodes[place].shape[0]):
        return nodes[place]
    used, rows = table.of(place)
    return builder.remap([nodes[number] for number in used], rows, used.index(place) if place in used else None)


def _check_dtypes(table: Table, tensor: str, same: bool, mark: Mark) -> None:
    if not same and (table.quantized is not None or table.dtypes[tensor] not in MERGEABLE):
        hint = "save it in bfloat16 first (transformers: `model.dequantize()`), or leave out `tokenizer`"
        raise RecipeError(Problem(f"`{tensor}` of `{table.donor}` is quantised: its rows are codes", mark, hint))


def _named(counts: Mapping[str, int], having: Sequence[str], own: str) -> dict[str, int]:
    named = {having[int(key)] if key.isdigit() else key: count for key, count in counts.items()}
    return {("own" if key == own else key): count for key, count in named.items()}


def vocabulary(found: Vocabulary) -> list[str]:
    """The output's vocabulary in lines: its size and its tensors, then where the rows of every model come from."""
    lead = "" if found.source == found.lead else f" of {found.lead}" if found.source == "base" else f" on {found.lead}"
    rows = f", {found.rows:,} rows" if found.rows != found.tokens else ""
    lines = [f"vocabulary  {found.source}{lead}: {found.tokens:,} tokens{rows}, in {', '.join(found.tensors)}"]
    kinds = {"own": "its own", "mean": "a mean of those that have them", "zero": "zero", "padding": "padding"}
    for name, counts in found.models.items():
        parts = [
            f"{count:,} {kinds.get(kind) or f'of {kind}'}" for kind, count in sorted(counts.items(), key=_own_first)
        ]
        lines.append(f"  {name}: {', '.join(parts)}")
    return lines


def _own_first(item: tuple[str, int]) -> tuple[bool, str]:
    return item[0] != "own", item[0]
