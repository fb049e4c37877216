"""A model with an adapter: the base's table with the adapter folded in, tensor by tensor. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from mergekit_lite.checkpoint import lycoris
from mergekit_lite.checkpoint.meta import MERGEABLE, Adapter, Checkpoint, LowRank, Product, TensorMeta
from mergekit_lite.errors import Mark, Problem
from mergekit_lite.methods import lycoris as products
from mergekit_lite.methods import tucker
from mergekit_lite.methods.lora import folding, multiplying
from mergekit_lite.methods.spec import Call, Method, Slot
from mergekit_lite.plan.graph import Builder, Table
from mergekit_lite.plan.model import Node
from mergekit_lite.plan.steps import Faults, listed
from mergekit_lite.plan.words import shape as sizes


def adapted(
    builder: Builder, name: str, checkpoint: Checkpoint, table: Table, add: Method, mark: Mark
) -> tuple[Table, list[Problem]]:
    """The table of the model `name` with its checkpoint's adapter folded in, and what is wrong with it. `add` is the
    method of this name, `mark` the place of the model in the recipe."""
    adapter = checkpoint.adapter
    if adapter is None:
        return table, []
    if not checkpoint.location:
        return alone(builder, name, adapter, table, mark)
    if table.quantized is not None:
        hint = "name the base in bfloat16: an adapter that was trained on a quantised copy fits it too"
        message = f"`{checkpoint.location}` {table.quantized.says}, and it cannot take an adapter"
        return table, [Problem(message, mark, hint)]
    tied = dict(table.family.tied)
    adapter = _once(adapter, tied)
    found, lost = places(_wanted(adapter), [*checkpoint.tensors, *tied, *tied.values()])
    problems = _lost(checkpoint, adapter, lost, mark) + _tied(checkpoint, adapter, found.values(), tied, mark)
    if problems:
        return table, problems
    faults = Faults()
    folder = _Folder(builder, name, table, add, adapter, found, mark, faults)
    return replace(table, nodes=folder.nodes()), faults.problems()


def alone(builder: Builder, name: str, adapter: Adapter, table: Table, mark: Mark) -> tuple[Table, list[Problem]]:
    """An adapter without its base as a table of deltas, scale times B A, by the adapter's own names."""
    hint = f"name its base: `{name}: {{path: BASE, adapter: {adapter.location}}}`"
    lows = adapter.low_rank.items()
    unfit = [*adapter.products, *adapter.whole, *(m for m, low in lows if low.magnitude or low.bias or not low.a.shape)]
    if unfit:
        message = f"only the factors of LoRA are a delta without a base; `{adapter.location}` has more"
        return table, [Problem(f"{message}: {listed(unfit)}", mark, hint)]
    nodes: dict[str, Node] = {}
    dtypes: dict[str, str] = {}
    for module, low in lows:
        place = f"{module}.weight"
        a, b = low.a.shape, low.b.shape
        if (
            {low.a.dtype, low.b.dtype} - MERGEABLE
            or len(a) != len(b)
            or len(a) < 2
            or b[1:] != (a[0], *(1 for _ in a[2:]))
        ):
            message = f"the factors of `{adapter.location}` do not fit one another: `{place}`"
            return table, [Problem(message, mark, "is it an adapter that peft saved?")]
        call = multiplying(low.embedding or adapter.transposed)(Slot(0), Slot(1), scale=low.scale)
        nodes[place] = builder.call(call, [builder.load(low.a), builder.load(low.b)], [name] * 2, name, place)
        dtypes[place] = low.a.dtype
    return replace(table, space="delta", nodes=nodes, dtypes=dtypes), []


def _once(adapter: Adapter, tied: Mapping[str, str]) -> Adapter:
    """The adapter without the head that peft saves beside an embedding to which it stays tied: they are one there."""
    twice = [a for a, c in tied.items() if adapter.retied and {a, c} <= adapter.whole.keys()]
    return replace(adapter, whole={n: meta for n, meta in adapter.whole.items() if n not in twice})


def places(wanted: Iterable[str], names: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The name among `names` that each of `wanted` stands for, and those without one.

    That is the name itself. For all others it is the one that stands there with the same prefix more, or without the
    same prefix (`model.`), which holds no number of a layer; where two prefixes would do as well, there is none.
    """
    known = set(names)
    found = {name: name for name in wanted if name in known}
    rest = [name for name in wanted if name not in found]
    ways = next((ways for ways in (_ways(name, known) for name in rest) if ways), set())
    taken = set(found.values())
    fits = sorted(({n: p for n in rest if (p := _moved(n, way)) in known - taken} for way in ways), key=len)
    if fits and len(fits[-1]) > len(fits[-2] if len(fits) > 1 else {}):
        found |= fits[-1]
    return found, [name for name in rest if name not in found]


def _ways(name: str, known: Iterable[str]) -> set[tuple[str, str]]:
    """The prefixes (to take away, to put before) that make a known name of `name`."""
    more = {("", other.removesuffix(name)) for other in known if other.endswith(f".{name}")}
    less = {(name.removesuffix(other), "") for other in known if name.endswith(f".{other}")}
    return {way for way in more | less if not any(part.isdigit() for prefix in way for part in prefix.split("."))}


def _moved(name: str, way: tuple[str, str]) -> str | None:
    return way[1] + name.removeprefix(way[0]) if name.startswith(way[0]) else None


def _wanted(adapter: Adapter) -> list[str]:
    """The tensors of the base that an adapter changes, by the adapter's names."""
    weights = [f"{module}.weight" for module in (*adapter.low_rank, *adapter.products)]
    biases = [f"{module}.bias" for module, low in adapter.low_rank.items() if low.bias is not None]
    return list(dict.fromkeys([*weights, *biases, *adapter.whole]))


def _lost(checkpoint: Checkpoint, adapter: Adapter, lost: Sequence[str], mark: Mark) -> list[Problem]:
    if not lost:
        return []
    made = f"; it says that it was made for `{adapter.base}`" if adapter.base else ""
    message = f"the adapter `{adapter.location}` changes tensors that `{checkpoint.location}` lacks: {listed(lost)}"
    return [Problem(message, mark, f"is it an adapter of this model?{made}; `merge inspect --tensors` shows the names")]


def _tied(
    checkpoint: Checkpoint, adapter: Adapter, changed: Iterable[str], tied: Mapping[str, str], mark: Mark
) -> list[Problem]:
    """A change of one of two tensors that are one in the base: in the adapter the other one stays as it was."""
    changed = set(changed)
    hint = (
        "name a base that stores both: load this one with transformers, give the head a copy of the embedding, set "
        "`tie_word_embeddings` to false in its configuration, save it"
    )
    return [
        Problem(
            f"the adapter `{adapter.location}` changes `{alias if alias in changed else canonical}`, but "
            f"`{checkpoint.location}` ties `{alias}` to `{canonical}`: folding it in would change both",
            mark,
            hint,
        )
        for alias, canonical in tied.items()
        if alias in changed or (canonical in changed and not adapter.retied)
    ]


@dataclass(frozen=True, slots=True)
class _Folder:
    """Folds one adapter into the nodes of its base. `found` gives the base's name of each tensor that is changed."""

    builder: Builder
    name: str
    table: Table
    add: Method
    adapter: Adapter
    found: Mapping[str, str]
    mark: Mark
    faults: Faults

    def nodes(self) -> dict[str, Node]:
        """The base's nodes with the adapter in them: whole tensors first, what is added after."""
        nodes = dict(self.table.nodes)
        for name, meta in self.adapter.whole.items():
            place = self.found[name]
            # Counters, such as a batch norm's, are copied like the base's.
            alike = meta.dtype == self.table.dtypes[place]
            if (alike or self.fit(place, meta)) and self.same(place, meta):
                nodes[place] = self.builder.load(meta)
        turned = {module: self.turned(module, low) for module, low in self.adapter.low_rank.items()}
        # A square weight shows nothing: it lies as the adapter says, or as the linear layers that show it.
        modules = self.adapter.low_rank.items()
        default = self.adapter.transposed or any(turned[m] == "yes" and not low.embedding for m, low in modules)
        for module, low in modules:
            place = self.found[f"{module}.weight"]
            parts = [part for part in (low.a, low.b, low.magnitude) if part is not None]
            if turned[module] == "no way":
                self.misfit(place, [low.a, low.b])
            elif all(self.fit(place, part) for part in parts):
                transposed = turned[module] == "yes" or (turned[module] == "either" and default)
                if self.lengths(place, low, transposed):
                    nodes[place] = self.fold(nodes[place], low, transposed, place)
            if low.bias is not None:
                place = self.found[f"{module}.bias"]
                if self.fit(place, low.bias) and self.same(place, low.bias):
                    inputs = [self.builder.load(low.bias), nodes[place]]
                    call = self.add(Slot(0), Slot(1), weight=low.scale)
                    nodes[place] = self.builder.call(call, inputs, [self.name] * 2, self.name, place)
        # Where only a layer that is stored as in x out can be meant, all are.
        vectors = [(self.found[f"{m}.weight"], p) for m, p in self.adapter.products.items() if p.kind == "IA3"]
        plain = [
            len(nodes[at].shape) != 2 or lycoris.scales(p, nodes[at].shape, False) is not None for at, p in vectors
        ]
        for module, product in self.adapter.products.items():
            place = self.found[f"{module}.weight"]
            if all(self.fit(place, part) for part in product.parts.values()):
                self.change(nodes, place, product, self.adapter.transposed or not all(plain))
        return nodes

    def change(self, nodes: dict[str, Node], place: str, product: Product, transposed: bool) -> None:
        """Put what LoHa, LoKr, FLoRA or (IA)^3 make of the weight at `place` into `nodes`."""
        weight = nodes[place]
        parts = list(product.parts.values())
        if product.kind != "IA3":
            if not lycoris.fits(product, weight.shape):
                self.misfit(place, parts)
                return
            slots = tuple(map(Slot, range(1 + len(parts))))
            if product.kind == "FLORA":
                call = tucker.folding()(*slots, scale=product.scale)
            else:
                call = products.folding()(*slots, scale=product.scale, parts=tuple(product.parts))
            nodes[place] = self.made(call, [weight, *map(self.builder.load, parts)], place)
            return
        axis = lycoris.scales(product, weight.shape, transposed)
        if axis is None:
            self.misfit(place, parts)
            return
        numbers = self.builder.load(parts[0])
        # A convolution that takes its channels in groups has fewer columns than inputs.
        grouped = axis == 1 and len(weight.shape) > 2 and lycoris.groups(parts[0].numel, weight.shape) != 1
        scaling = products.grouped() if grouped else products.scaling()
        settings = {} if grouped else {"axis": axis}
        nodes[place] = self.made(scaling(Slot(0), Slot(1), **settings), [weight, numbers], place)
        bias = f"{place.removesuffix('weight')}bias"
        # What scales inputs leaves the bias alone.
        if bias in nodes and axis == (1 if transposed and len(weight.shape) == 2 else 0):
            nodes[bias] = self.made(products.scaling()(Slot(0), Slot(1), axis=1), [nodes[bias], numbers], bias)

    def made(self, call: Call, inputs: Sequence[Node], place: str) -> Node:
        return self.builder.call(call, inputs, [self.name] * len(inputs), self.name, place)

    def fold(self, weight: Node, low: LowRank, transposed: bool, place: str) -> Node:
        parts = [part for part in (low.a, low.b, low.magnitude) if part is not None]
        inputs = [weight, *map(self.builder.load, parts)]
        settings = {"scale": low.scale, "transposed": transposed, "dora": low.magnitude is not None}
        call = folding()(*map(Slot, range(len(inputs))), **settings)
        return self.builder.call(call, inputs, [self.name] * len(inputs), self.name, place)

    def turned(self, module: str, low: LowRank) -> str:
        """Whether the weight is stored as in x out: `yes`, `no`, `either` by its shape, or in `no way`."""
        weight = self.table.nodes[self.found[f"{module}.weight"]].shape
        a, b = low.a.shape, low.b.shape
        if len(weight) < 2 or not a or not a[0]:
            return "no way"
        rank = a[0]
        plain = a == (rank, *weight[1:]) and b == (weight[0], rank, *(1 for _ in weight[2:])) and not low.embedding
        turned = len(weight) == 2 and a == (rank, weight[0]) and b == (weight[1], rank)
        if plain and turned:
            return "either"
        return "no" if plain else "yes" if turned else "no way"

    def fit(self, place: str, meta: TensorMeta) -> bool:
        """Whether both are numbers to compute with; says so to `faults` where not."""
        for dtype, what in ((self.table.dtypes[place], "its base"), (meta.dtype, f"the adapter `{meta.name}`")):
            if dtype not in MERGEABLE:
                self.faults.add(f"{what} is stored as {dtype}, not as numbers to merge, for", self.mark, None, place)
                return False
        return True

    def same(self, place: str, meta: TensorMeta) -> bool:
        shape = self.table.nodes[place].shape
        if meta.shape == shape:
            return True
        message = f"the adapter `{self.adapter.location}` has another shape than its base, "
        message += f"{sizes(meta.shape)} and not {sizes(shape)}, in"
        hint = "an adapter that was trained with another vocabulary needs a base of the same one"
        self.faults.add(message, self.mark, hint, place)
        return False

    def misfit(self, place: str, parts: Sequence[TensorMeta]) -> None:
        factors = " and ".join(sizes(part.shape) for part in parts)
        shape = sizes(self.table.nodes[place].shape)
        message = f"the factors of the adapter `{self.adapter.location}`, {factors}, do not fit a weight of {shape}"
        self.faults.add(message, self.mark, "is it an adapter of this model?", place)

    def lengths(self, place: str, low: LowRank, transposed: bool) -> bool:
        """Whether DoRA's magnitudes are as many as the weight has outputs."""
        count = self.table.nodes[place].shape[1 if transposed else 0]
        if low.magnitude is None or low.magnitude.numel == count:
            return True
        message = f"the adapter `{self.adapter.location}` has {low.magnitude.numel} magnitudes for {count} outputs in"
        self.faults.add(message, self.mark, "is it an adapter of this model?", place)
        return False
