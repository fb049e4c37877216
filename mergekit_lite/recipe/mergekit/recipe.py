"""mergekit's documents -> a `Recipe` of steps.

Whole models are merged by one step. Of a slice every source is cut by a `stack` step, the cut models are merged by a
step, and the merged slices are put one above the other by a last `stack`: embeddings come from the first slice, final
norm and head from the last. A named document is a step that others refer to, so no stage is written to the disk.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mergekit_lite.errors import Mark, Problem, suggest
from mergekit_lite.recipe.links import cycles, ends_of, references
from mergekit_lite.recipe.mergekit.document import Document, Slice, Source, read_document
from mergekit_lite.recipe.mergekit.experts import is_mixture, read_experts
from mergekit_lite.recipe.mergekit.language import TABLE
from mergekit_lite.recipe.mergekit.merge import MergeReader
from mergekit_lite.recipe.mergekit.mixture import mixture_step
from mergekit_lite.recipe.mergekit.parameter import Span
from mergekit_lite.recipe.mergekit.reference import Key, Reference
from mergekit_lite.recipe.mergekit.vocabulary import differing, read_tokenizer, same_wish
from mergekit_lite.recipe.model import Input, Model, Recipe, Ref, Save, Step, Tokenizer
from mergekit_lite.recipe.node import MapNode, Node
from mergekit_lite.recipe.save import DEFAULT_SHARD
from mergekit_lite.recipe.value import Value

_FINAL = "merged"


def read_mergekit(
    nodes: Sequence[Node], text: str, file: str, overrides: tuple[str, ...], problems: list[Problem]
) -> Recipe | None:
    """The recipe that mergekit's documents write; findings go to `problems`. None where no document can be read.

    Reading mergekit's own language ends here: `text` is kept, and `to_yaml` writes the recipe in the native one.
    """
    maker = _Maker(problems)
    if any(is_mixture(node) for node in nodes):
        return _mixture(maker, nodes, text, file, overrides)
    documents = [found for node in nodes if (found := read_document(node, problems, maker.notes)) is not None]
    if not documents:
        return None
    final = maker.make(documents)
    mark = documents[0].root.mark if final is None else final.mark
    save = Save(None, None, None if final is None else final.dtype, DEFAULT_SHARD, mark, tokenizer=maker.tokenizer)
    return Recipe(
        models=maker.models,
        steps=maker.steps,
        saves=(save,),
        seed=0,
        file=file,
        text=text,
        overrides=overrides,
        notes=tuple(maker.notes),
    )


def _mixture(maker: _Maker, nodes: Sequence[Node], text: str, file: str, overrides: tuple[str, ...]) -> Recipe | None:
    """The recipe of a document for mergekit-moe."""
    if len(nodes) > 1:
        hint = "keep it in a file of its own, and name the checkpoint that the other documents make"
        maker.add("a mixture of experts is the only document of its file", nodes[1].mark, hint)
    root = next(node for node in nodes if is_mixture(node))
    assert isinstance(root, MapNode)
    found = read_experts(root, maker.problems, maker.notes)
    if found is None:
        return None
    step = mixture_step(found, file, maker.ref, maker.name, maker.models)
    save = Save(None, None, found.dtype, DEFAULT_SHARD, found.mark)
    return Recipe(
        maker.models, {step.name: step}, (save,), 0, file, text, overrides=overrides, notes=tuple(maker.notes)
    )


@dataclass(frozen=True, slots=True)
class _Part:
    """One slice: `layers` as the last `stack` takes them, `outside` the step or model with the tensors outside the
    layers, `donor` the model that gives the configuration, `step` the merge unless a model's layers are only copied."""

    layers: Input
    outside: Ref
    donor: str
    step: Step | None


class _Maker:
    """Makes the models and steps of all documents. `stages` maps the documents' names to their steps'."""

    def __init__(self, problems: list[Problem]):
        self.problems = problems
        self.notes: list[Problem] = []
        self.models: dict[str, Model] = {}
        self.steps: dict[str, Step] = {}
        self.tokenizer: Tokenizer | None = None
        self._stages: set[str] = set()
        self._taken: set[str] = set()
        self._names: dict[Key, str] = {}
        self._cuts: dict[tuple[str, tuple[int, int]], str] = {}

    def make(self, documents: Sequence[Document]) -> Document | None:
        """Steps of all documents; the one whose result is saved, None where that is not clear."""
        unnamed = [document for document in documents if document.name is None]
        for document in unnamed[1:]:
            message = "a second merge has no `name`"
            self.add(message, document.mark, "only the last merge, whose result is saved, may go without one")
        for document in documents:
            if document.name is not None and document.name in self._stages:
                self.add(f"two merges have the name `{document.name}`", document.mark, "give each its own")
            self._stages |= {document.name} if document.name else set()
        self._taken |= {*self._stages, _FINAL}
        for document in documents:
            self.document(document)
        uses = {step.name: [ref.name for ref in references(step)] for step in self.steps.values()}
        for path in cycles(uses):
            mark = self.steps[path[0]].mark
            self.add(f"merges use one another in a circle: {' -> '.join(path)}", mark, "none can need its own result")
        if self.problems:
            return (unnamed or list(documents))[0]
        ends = ends_of(uses, {name: set() for name in uses})
        last = [d for d in documents if (d.name or _FINAL) in ends]
        if len(last) != 1:
            names = ", ".join(f"`{d.name}`" if d.name else "the one without a name" for d in last)
            hint = "keep one result: remove the merges that nothing uses, or put them in a file of their own"
            self.add(f"{len(last)} merges are used by no other: {names}", last[-1].mark, hint)
        return last[0]

    def add(self, message: str, mark: Mark, hint: str | None) -> None:
        self.problems.append(Problem(message, mark, hint))

    def document(self, document: Document) -> None:
        method = TABLE.get(document.method)
        base = self.ref(document.base) if document.base else None
        self.vocabulary(document, base)
        if method is None:
            hint = suggest(document.method, TABLE)
            self.add(f"mergekit has no merge method `{document.method}`", document.mark, hint)
            return
        name = document.name or _FINAL
        reader = MergeReader(document, method, self.problems, self.notes)
        reader.check_names()
        parts = [self.part(slice_, number, document, reader) for number, slice_ in enumerate(document.slices)]
        if not document.sound or any(part is None for part in parts):
            return
        self.finish(name, document, [part for part in parts if part is not None], base)

    def vocabulary(self, document: Document, base: Ref | None) -> None:
        tokenizer = read_tokenizer(document.root, self.ref, base, self.problems)
        if tokenizer is None:
            return
        if self.tokenizer is not None and not same_wish(tokenizer, self.tokenizer):
            self.problems.append(differing(tokenizer.mark))
        self.tokenizer = tokenizer

    def part(self, slice_: Slice, number: int, document: Document, reader: MergeReader) -> _Part | None:
        """The merged layers of one slice, and what stands outside the layers in it. None where it is at fault."""
        only = len(document.slices) == 1
        shift = sum(s.count or 0 for s in document.slices[:number])
        named = document.name or _FINAL
        alone = reader.alone(slice_)
        if alone is not None and slice_.count is not None:
            # Copied layers need no step of their own: the last `stack` takes them from the model.
            ref = self.ref(alone.ref)
            return _Part(Input(ref, {"layers": _layers(alone)}), ref, ref.name, None)
        outer = only and slice_.count is None
        name = named if outer else self.name(named if only else f"{named}_{number}")
        span = Span(shift, slice_.count, "last" if slice_.count == 1 else "all")
        step = reader.step(name, slice_, span, self.cut)
        if step is None:
            return None
        outside = name
        if slice_.count == 1 and (only or number in (0, len(document.slices) - 1)):
            # A gradient gives the one layer its last value, and what stands outside the layers its first.
            other = reader.step(f"{name}_outside", slice_, replace(span, gradient="first"), self.cut)
            if other is not None and _differ(step, other):
                outside = self.name(other.name)
                self.steps[outside] = replace(other, name=outside)
        self.steps[name] = step
        ref = Ref(name, step.mark)
        donor = reader.donor(slice_)
        return _Part(Input(ref), Ref(outside, step.mark), self.ref(donor).name, step)

    def finish(self, name: str, document: Document, parts: Sequence[_Part], base: Ref | None) -> None:
        """The document's own step: that of its only slice, or a `stack` of all."""
        first, last = parts[0], parts[-1]
        rest = base if base is not None and base.name != first.donor else None
        whole = first.step is not None and first.outside.name == first.layers.ref.name
        if len(parts) == 1 and whole and rest is None:
            assert first.step is not None
            self.steps.pop(first.step.name, None)
            self.steps[name] = replace(first.step, name=name)
            return
        inputs = tuple(part.layers for part in parts)
        lead = rest or inputs[0].ref
        below = first.outside if first.outside.name != lead.name else None
        above = last.outside if last.outside.name != lead.name else None
        mark = document.mark
        self.steps[name] = Step(name, "stack", inputs, None, {}, mark, mark, "error", rest, below, above)

    def ref(self, reference: Reference) -> Ref:
        """The native name of a checkpoint, or of the merge of this name."""
        mark = reference.mark
        if reference.revision is None and reference.path in self._stages:
            if reference.lora is not None:
                hint = "name a checkpoint, or merge the model that this adapter belongs to"
                problem = Problem(f"`{reference.path}` is the merge of this name, which takes no adapter", mark, hint)
                self.problems += [] if problem in self.problems else [problem]
            return Ref(reference.path, mark)
        name = self._names.get(reference.key)
        if name is None:
            parts = [part.rstrip("/").rpartition("/")[2] for part in (reference.path, reference.lora or "")]
            last = re.sub(r"[^A-Za-z0-9_.-]+", "_", "_".join(filter(None, parts))).lstrip(".-")
            name = self._names[reference.key] = self.name(last or "model")
            place = (reference.path, reference.revision)
            self.models[name] = Model(name, *place, mark, reference.lora, reference.lora_revision)
        return Ref(name, mark)

    def name(self, wanted: str) -> str:
        """`wanted`, or that with a number behind it where it is taken."""
        name, number = wanted, 2
        while name in self._taken:
            name, number = f"{wanted}_{number}", number + 1
        self._taken.add(name)
        return name

    def cut(self, source: Source) -> Ref:
        """The source as a merge takes it: the model, or a step that takes layers of it."""
        ref = self.ref(source.ref)
        if source.layers is None:
            return ref
        key = (ref.name, source.layers)
        if key not in self._cuts:
            start, stop = source.layers
            name = self._cuts[key] = self.name(f"{ref.name}_{start}_{stop}")
            inputs = (Input(ref, {"layers": _layers(source)}),)
            self.steps[name] = Step(name, "stack", inputs, None, {}, source.mark, source.mark)
        return Ref(self._cuts[key], source.mark)


def _layers(source: Source) -> Value:
    assert source.layers is not None
    return Value.plain(source.layers, source.mark)


def _differ(one: Step, other: Step) -> bool:
    """Whether two steps over the same inputs have different settings."""

    def settings(step: Step) -> list[object]:
        values = [*step.params.items(), *(pair for item in step.of for pair in item.params.items())]
        return [(name, [(rule.glob, rule.value) for rule in value.rules]) for name, value in values]

    return settings(one) != settings(other)
