"""`merge stats`: a checkpoint and data to a folder of statistics."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergekit_lite.calibrate.collect import Pass, check_kinds
from mergekit_lite.calibrate.data import BLOCK, Data, from_file, from_text
from mergekit_lite.calibrate.file import FORMAT, StatisticsFile, check_free, new_folder, write_statistics
from mergekit_lite.calibrate.fisher import check_labels
from mergekit_lite.calibrate.layers import Key, find_layers
from mergekit_lite.calibrate.memory import Need, free_memory, need, positions
from mergekit_lite.calibrate.model import Loaded, check_loadable, check_predicts, load, skeleton
from mergekit_lite.calibrate.names import Gram, gram_names, renamed, stored_names
from mergekit_lite.errors import StoppedError, UsageError
from mergekit_lite.lazy import Tensor, torch

_ROOM = 10**15  # a number of inputs that no Gram matrix is of, for the room that the true one takes


@dataclass(frozen=True, slots=True)
class Settings:
    """What to gather of which data: a `text`, or a `data` file of model inputs; `examples` at most."""

    kinds: tuple[str, ...]
    text: Path | None = None
    data: Path | None = None
    block: int | None = None
    lines: bool = False
    examples: int | None = None
    labels: str = "auto"
    seed: int = 0
    device: str = "cpu"
    device_map: str | None = None
    memory: int | None = None
    threads: int = 1
    offline: bool = False


@dataclass
class Report:
    """What was written: `files` by kind, each with the number of its tensors. `unused` and `skipped` as in
    `Statistics`; `confidence` are the numbers of that kind."""

    out: Path
    files: dict[str, tuple[str, int]] = field(default_factory=dict)
    unused: dict[str, list[str]] = field(default_factory=dict)
    skipped: dict[str, dict[str, str]] = field(default_factory=dict)
    confidence: dict[str, float] = field(default_factory=dict)


class Measurement:
    """A loaded model and its data. `need` is the memory that the rest takes; `steps` are the examples that go through,
    each as often as there are passes."""

    def __init__(self, location: str, settings: Settings, out: Path):
        """Raises UsageError, InputError and StoppedError before anything is written: for settings, files and models
        that cannot be used, and where memory does not suffice."""
        from mergekit_lite.report.look import open_location
        from mergekit_lite.run.device import find_device

        check_kinds(settings.kinds)
        check_labels(settings.labels)
        check_given(settings)
        check_free(out)
        self._settings, self._location, self._out = settings, location, out
        self._device = find_device(settings.device)
        self._checkpoint = open_location(location, settings.offline)
        check_loadable(self._checkpoint, location)
        self._folder = self._checkpoint.folder
        assert self._folder is not None
        self._shapes = {name: meta.shape for name, meta in self._checkpoint.tensors.items()}
        frame = skeleton(self._checkpoint, location)
        if {"fisher", "gradient", "confidence"} & {*settings.kinds}:
            check_predicts(frame)
        self._memory(frame, settings.examples or 1, settings.block or BLOCK)  # before the weights are read
        self._loaded = load(self._checkpoint, location, self._device, settings.device_map)
        assert self._folder is not None
        self.data = read_data(self._loaded, location, self._folder, settings)
        network = self._loaded.network
        self._layers = find_layers(network)
        self._names = stored_names(network, self._shapes)
        most = max(positions(network, batch) for batch in self.data.batches)
        self.need = self._memory(network, self.data.examples, most, loaded=True)
        self._first = self._pass(settings.kinds)  # finds what cannot be gathered of this model

    @property
    def steps(self) -> int:
        return self.data.examples * len(self.need.passes)

    def run(self, advance: Callable[[int], object]) -> Report:
        """Gather and write. `advance` is told of every few examples. Raises StoppedError where a device has too little
        memory or the disk is full; then, as on Ctrl-C, nothing is left behind."""
        report = Report(self._out)
        with new_folder(self._out) as folder, limited_threads(self._settings.threads), device_memory():
            said = self._provenance()
            if "gram" in self._settings.kinds:
                first = self._gram_passes(folder / "gram.safetensors", said, report, advance)
            else:
                first = self._first
                first.run(self.data.batches, advance)
            self._write_others(folder, first, said, report)
        return report

    def _memory(self, network: Any, examples: int, tokens: int, loaded: bool = False) -> Need:
        here = self._settings.device_map is None and self._device.type == "cpu" and not loaded
        weights = sum(m.nbytes * (2 if m.dtype == "F16" else 1) for m in self._checkpoint.tensors.values())
        inner = {key: found[0].inner for key, found in self._grams(network).items()}
        return need(
            network,
            inner,
            self._settings.kinds,
            weights=weights if here else 0,
            tokens=tokens,
            examples=examples,
            free=free_memory(self._settings.memory),
        )

    def _grams(self, network: Any) -> dict[Key, list[Gram]]:
        found: dict[Key, list[Gram]] = {}
        if "gram" in self._settings.kinds:
            for gram in gram_names(find_layers(network), stored_names(network, self._shapes), self._shapes):
                found.setdefault(gram.key, []).append(gram)
        return found

    def _pass(self, kinds: Sequence[str], part: int = 0) -> Pass:
        return Pass(
            self._loaded.network,
            self._layers,
            kinds,
            how=self._settings.labels,
            seed=self._settings.seed,
            shift=self._loaded.causal,
            wanted=self.need.passes[part],
        )

    def _gram_passes(
        self, path: Path, said: Mapping[str, str], report: Report, advance: Callable[[int], object]
    ) -> Pass:
        """Gram matrices part by part, each written before the next; gives the first pass, which gathers all else."""
        grams = self._grams(self._loaded.network)
        skipped = dict(self._named(self._layers.skipped))
        for key, _ in self._layers.grams():
            if key not in grams:
                skipped[key[0]] = "not stored as a matrix of its own: RegMean merges one matrix at a time"
        shapes = {
            gram.name: ("F32", (1, gram.inner, gram.inner) if gram.transposed else (gram.inner, gram.inner))
            for of_key in grams.values()
            for gram in of_key
        }
        rows = dict.fromkeys(shapes, _ROOM)
        fixed = {**said, "kind": "gram", "skipped": json.dumps(skipped)}
        with StatisticsFile(path, shapes, {**fixed, "rows": json.dumps(rows)}) as file:
            for part, keys in enumerate(self.need.passes):
                pass_ = self._pass(("gram",), part) if part else self._first
                pass_.run(self.data.batches, advance)
                assert pass_.grams is not None
                for key in keys:
                    value = pass_.grams.take(key, grams[key][0].inner)
                    for gram in grams[key]:
                        rows[gram.name] = pass_.grams.rows.get(key, 0)
                        file.write(gram.name, value[None] if gram.transposed else value)
                pass_.grams.clear()
            file.finish({**fixed, "rows": json.dumps(rows)})
        report.files["gram"] = (path.name, len(shapes))
        report.unused["gram"] = [name for name, count in rows.items() if not count]
        report.skipped["gram"] = skipped
        return self._first

    def _write_others(self, folder: Path, done: Pass, said: Mapping[str, str], report: Report) -> None:
        done.grams = None
        found = done.statistics()
        for kind, tensors in found.tensors.items():
            skipped: dict[str, str] = {}
            unused = list(found.unused.get(kind, []))
            if kind in ("fisher", "gradient"):
                tensors = renamed(self._loaded.network, tensors, self._shapes)
                # What the conversion made of another shape than the weights have is not theirs.
                tensors = {name: value for name, value in tensors.items() if value.shape == self._shapes[name]}
                unused = [name for name, value in tensors.items() if not value.any()]
                lacking = [name for name in self._shapes if name not in tensors] if kind == "gradient" else []
                skipped = dict.fromkeys(lacking, f"no parameter of {type(self._loaded.network).__name__} by that name")
            elif kind in ("router", "activations"):
                tensors, skipped = self._by_module(tensors)
                unused = [self._called(name) or name for name in unused]
            metadata = {**said, "kind": kind, "unused": json.dumps(unused), "skipped": json.dumps(skipped)}
            name = f"{kind}.safetensors"
            write_statistics(folder / name, tensors, metadata)
            report.files[kind], report.unused[kind], report.skipped[kind] = (name, len(tensors)), unused, skipped
            if kind == "confidence":
                report.confidence = {key: float(value) for key, value in tensors.items()}

    def _by_module(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
        made: dict[str, Tensor] = {}
        skipped: dict[str, str] = {}
        for name, tensor in tensors.items():
            module, _, what = name.rpartition(".")
            stored = self._called(module)
            if stored is None:
                skipped[module] = "its weight is not stored as one tensor"
            else:
                made[f"{stored}.{what}"] = tensor
        return made, skipped

    def _called(self, name: str) -> str | None:
        """What a module is called in the checkpoint; what follows a colon stays."""
        module, colon, rest = name.partition(":")
        stored = self._names.module(module)
        return None if stored is None else stored + colon + rest

    def _named(self, skipped: Mapping[str, str]) -> Iterator[tuple[str, str]]:
        for name, why in skipped.items():
            stored = self._names.stored(name)
            yield (stored[0] if stored and not why.startswith("tied") else name), why

    def _provenance(self) -> dict[str, str]:
        """What stands in the metadata of each file: no time and no path of this machine, so that the same command gives
        the same bytes."""
        from mergekit_lite.plan.lock import version
        from mergekit_lite.run.digest import file_digests

        settings, checkpoint = self._settings, self._checkpoint
        source = settings.text or settings.data
        assert source is not None
        shards = [Path(shard.path) for shard in checkpoint.shards]
        digests = file_digests([*shards, source], settings.threads)
        versions = {name: version(name) for name in ("mergekit_lite", "torch", "transformers")}
        said: dict[str, Any] = {
            "format": FORMAT,
            "collected": ",".join(settings.kinds),
            "model": checkpoint.location if checkpoint.revision else Path(checkpoint.location).name,
            "revision": checkpoint.revision or "",
            "model_digests": json.dumps({path.name: f"blake3:{digests[str(path)]}" for path in shards}),
            "data": source.name,
            "data_digest": f"blake3:{digests[str(source)]}",
            "examples": self.data.examples,
            "tokens": self.data.tokens,
            "block": "" if self.data.block is None else self.data.block,
            "lines": json.dumps(settings.lines),
            "limit": "" if settings.examples is None else settings.examples,
            "seed": settings.seed,
            "labels": settings.labels,
            "compute_dtype": str(self._loaded.network.dtype).removeprefix("torch."),
            "versions": json.dumps(versions),
        }
        return {key: str(value) for key, value in said.items()}


def check_given(settings: Settings) -> None:
    """Raises UsageError where there are no data, or two."""
    if (settings.text is None) == (settings.data is None):
        raise UsageError("data come from `--text` or from `--data`", hint="give one of the two")


def read_data(loaded: Loaded, location: str, folder: Path, settings: Settings) -> Data:
    """The data that the settings name, for the model at `location`. Raises as `from_file` and `from_text`."""
    if settings.data is not None:
        return from_file(loaded, settings.data, settings.examples, settings.seed)
    assert settings.text is not None
    return from_text(
        loaded,
        location,
        folder,
        settings.text,
        settings.block,
        settings.lines,
        settings.examples,
        settings.seed,
    )


@contextmanager
def limited_threads(count: int) -> Iterator[None]:
    """torch with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def device_memory() -> Iterator[None]:
    """Raises StoppedError where a device has too little memory."""
    try:
        yield
    except torch.OutOfMemoryError as fault:
        hint = "take a smaller `--block`, `--device cpu`, or `--device-map auto`"
        raise StoppedError("the device has too little memory for these statistics", hint=hint) from fault
