"""What a score's command says of each sample: whether it was right, and the probabilities of classes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mergekit_lite.errors import UsageError
from mergekit_lite.evaluate.score import FILES, ScoreFailed, entry_at

FORMS = (".npy", ".safetensors", ".jsonl")
_WIDE = 1e-3  # what a sum of probabilities that were rounded may differ from 1


@dataclass(frozen=True, slots=True)
class Where:
    """Where predictions, labels and probabilities lie: keys joined by dots in the JSON of the score, or a file in
    `{out}`, a glob that ends in .npy, .safetensors or .jsonl, the latter two with `:NAME` of a tensor or key."""

    predictions: str | None = None
    labels: str | None = None
    probabilities: str | None = None

    def check(self, command: str) -> None:
        """Raises UsageError for what cannot give anything."""
        if self.probabilities is not None and self.labels is None:
            raise UsageError("`--probabilities` need `--labels`", hint="say where in the JSON the true classes lie")
        if self.labels is not None and self.predictions is None and self.probabilities is None:
            raise UsageError("`--labels` alone says nothing", hint="give `--predictions` or `--probabilities` too")
        if self.predictions is not None and self.probabilities is not None:
            raise UsageError("`--probabilities` say already which class is predicted", hint="leave out `--predictions`")
        for place in (self.predictions, self.labels, self.probabilities):
            if place is not None and _file(place) is not None and FILES not in command:
                raise UsageError(f"`{place}` is a file in `{FILES}`, which the score command has not", hint=_OUT)

    def __bool__(self) -> bool:
        return self.predictions is not None or self.probabilities is not None

    def take(self, said: Any, files: Path | None) -> Samples:
        """The samples of one score. Raises ScoreFailed where they are not there or do not go together."""
        labels = _vector("labels", self.labels, said, files) if self.labels is not None else None
        if self.probabilities is not None:
            assert labels is not None
            shares = _probabilities(_values(self.probabilities, said, files), self.probabilities)
            labels = _classes(labels, shares.shape)
            return Samples(np.asarray(shares.argmax(axis=1) == labels), labels, shares)
        assert self.predictions is not None
        given = _vector("predictions", self.predictions, said, files)
        binary = bool(np.isin(given, (0, 1)).all())
        if labels is None:
            if binary:
                return Samples(given.astype(np.bool_))
            hint = "0 and 1 say whether a sample was right; `--labels` compares classes with the true ones"
            raise ScoreFailed(f"the predictions at `{self.predictions}` are not all 0 or 1", hint=hint)
        if len(given) != len(labels):
            raise ScoreFailed(f"there are {len(given)} predictions and {len(labels)} labels")
        if binary and not np.isin(labels, (0, 1)).all():
            hint = "leave out `--labels` where 0 and 1 say whether a sample is right"
            raise ScoreFailed("the predictions are all 0 or 1, and the labels are not", hint=hint)
        return Samples(np.asarray(given == labels), labels)


@dataclass(frozen=True, slots=True)
class Samples:
    """Of each sample: whether it was right (n), bool; where they are known, its label (n) and the probabilities of
    classes (n, classes), float64."""

    right: NDArray[np.bool_]
    labels: NDArray[Any] | None = None
    probabilities: NDArray[np.float64] | None = None

    @property
    def accuracy(self) -> float:
        return float(self.right.mean())

    def check(self, first: Samples) -> None:
        """Raises ScoreFailed where these are not the samples of another score."""
        same = self.labels is None or first.labels is None or np.array_equal(self.labels, first.labels)
        if len(self.right) != len(first.right) or not same:
            hint = "the command has to take the same samples in the same order each time"
            raise ScoreFailed("the samples are not those of the first score", hint=hint)


def flips(first: NDArray[np.bool_], last: NDArray[np.bool_], merged: NDArray[np.bool_]) -> tuple[float, float]:
    """FFT and TTF of a merge of two models: the share of samples that both get wrong and the merge right, and of those
    that both get right and the merge wrong."""
    return float((~first & ~last & merged).mean()), float((first & last & ~merged).mean())


_OUT = f"write `{FILES}` where the command is told a folder to write to"


def _file(place: str) -> tuple[str, str | None] | None:
    """A glob of files and what is named in them; None for keys of JSON."""
    head, colon, name = place.rpartition(":")
    for pattern, inside in ((place, None), (head, name)):
        if pattern.endswith(FORMS) and (inside is None or colon):
            return pattern, inside
    return None


def _values(place: str, said: Any, files: Path | None) -> Any:
    named = _file(place)
    if named is None:
        found = entry_at(said, place)
        if not isinstance(found, list):
            what = "nothing" if found is None else "no list"
            raise ScoreFailed(f"in the score's JSON there is {what} at `{place}`", hint="keys are joined by dots: a.b")
        return found
    assert files is not None
    pattern, inside = named
    paths = sorted((p for p in files.rglob(pattern) if p.is_file()), key=lambda p: p.stat().st_mtime_ns)
    if not paths:
        raise ScoreFailed(f"the score command wrote no file `{pattern}` into `{FILES}`", hint="check its name")
    try:
        return _read(paths[-1], inside)
    except ScoreFailed:
        raise
    except Exception as fault:  # each library has errors of its own for damaged files
        raise ScoreFailed(f"cannot read `{pattern}`, which the score command wrote: {fault}") from fault


def _read(path: Path, inside: str | None) -> Any:
    if path.suffix == ".npy":
        return np.load(path, allow_pickle=False)
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        return [entry_at(row, inside) for row in rows]
    from safetensors.numpy import load_file

    tensors = load_file(path)
    if inside is None and len(tensors) == 1:
        return next(iter(tensors.values()))
    if inside not in tensors:
        hint = f"name one: `{path.name}:{next(iter(tensors), 'NAME')}`"
        raise ScoreFailed(f"`{path.name}` holds {', '.join(f'`{name}`' for name in tensors) or 'nothing'}", hint=hint)
    return tensors[inside]


def _vector(what: str, place: str, said: Any, files: Path | None) -> NDArray[Any]:
    found = _array(_values(place, said, files), place)
    if found.ndim != 1 or not len(found) or found.dtype.kind not in "biufU":
        shape = "×".join(map(str, found.shape))
        raise ScoreFailed(f"the {what} at `{place}` are no list with one entry for each sample, but {shape}")
    return found


def _array(found: Any, place: str) -> NDArray[Any]:
    try:
        return np.asarray(found)
    except ValueError:
        raise ScoreFailed(f"the lists at `{place}` are not equally long") from None


def _probabilities(found: Any, place: str) -> NDArray[np.float64]:
    shares = _array(found, place)
    if shares.ndim != 2 or not shares.size or shares.dtype.kind not in "iuf":
        shape = "×".join(map(str, shares.shape))
        raise ScoreFailed(f"the probabilities at `{place}` are {shape}", hint="(samples, classes), a row for each")
    shares = shares.astype(np.float64)
    if not np.isfinite(shares).all() or (shares < 0).any() or (abs(shares.sum(axis=1) - 1) > _WIDE).any():
        hint = "they are not below 0 and each row adds up to 1: the softmax of a model's scores"
        raise ScoreFailed(f"the numbers at `{place}` are no probabilities", hint=hint)
    return shares


def _classes(labels: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    if labels.dtype.kind not in "iu" or len(labels) != shape[0] or labels.min() < 0 or labels.max() >= shape[1]:
        hint = f"one for each of the {shape[0]} rows of the probabilities, from 0 to {shape[1] - 1}"
        raise ScoreFailed("the labels are no numbers of classes", hint=hint)
    return labels
