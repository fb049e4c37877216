"""What an adapter is, from its configuration and its header alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

from mergekit_lite.checkpoint.adapter import open_adapter
from mergekit_lite.checkpoint.meta import Adapter, TensorMeta
from mergekit_lite.recipe.read import split_location

KINDS = {"LORA": "LoRA", "LOHA": "LoHa", "LOKR": "LoKr", "IA3": "(IA)^3", "FLORA": "FLoRA"}


@dataclass(frozen=True, slots=True)
class AdapterLook:
    """An adapter at a glance. `modules` counts the adapted modules by the last part of their names; `ranks` and
    `scales` are all that occur, in order; `whole` are tensors that take the place of the base's; `bytes` all tensors'.
    """

    location: str
    revision: str | None
    kind: str
    base: str | None
    modules: dict[str, int]
    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    whole: tuple[str, ...]
    tensors: int
    parameters: int
    bytes: int

    def as_json(self) -> dict[str, object]:
        return {"adapter": True, **asdict(self)}


def adapter_at(text: str, offline: bool = False) -> Adapter:
    """The adapter at a location as it stands on a command line; of one on the Hub the header alone is read. Raises
    InputError as `open_adapter` does."""
    return open_adapter(*split_location(text), offline=offline, stream=True)


def look_at(adapter: Adapter) -> AdapterLook:
    """All that header and configuration tell."""
    metas = list(tensors_of(adapter))
    lows, products = adapter.low_rank.values(), adapter.products.values()
    modules: dict[str, int] = {}
    for module in (*adapter.low_rank, *adapter.products):
        last = module.rpartition(".")[2]
        modules[last] = modules.get(last, 0) + 1
    return AdapterLook(
        location=adapter.location,
        revision=adapter.revision,
        kind="DoRA" if any(low.magnitude is not None for low in lows) else KINDS[adapter.kind],
        base=adapter.base,
        modules=modules,
        ranks=tuple(sorted({low.a.shape[0] for low in lows if low.a.shape})),
        scales=tuple(sorted({*(low.scale for low in lows), *(p.scale for p in products if p.kind != "IA3")})),
        whole=tuple(adapter.whole),
        tensors=len(metas),
        parameters=sum(meta.numel for meta in metas),
        bytes=sum(meta.nbytes for meta in metas),
    )


def tensors_of(adapter: Adapter) -> Iterator[TensorMeta]:
    """Every tensor of the adapter, module by module."""
    for low in adapter.low_rank.values():
        yield from (meta for meta in (low.a, low.b, low.magnitude, low.bias) if meta is not None)
    for product in adapter.products.values():
        yield from product.parts.values()
    yield from adapter.whole.values()
