"""Scores with what they say of each sample, kept as scores are."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np

from mergekit_lite.errors import StoppedError
from mergekit_lite.evaluate.book import Book
from mergekit_lite.evaluate.judge import Check
from mergekit_lite.evaluate.samples import Samples, Where
from mergekit_lite.evaluate.score import Score
from mergekit_lite.limits import hint_for
from mergekit_lite.recipe.model import Scoring
from mergekit_lite.recipe.score import written

SCORES, SAMPLES = "scores.jsonl", "samples"


class Readings(Book):
    """The scores in a folder, and under `samples/` what they said of each sample. A score whose samples are wanted
    and not there counts as one that was never measured."""

    def __init__(self, folder: Path, scoring: Scoring, where: Where, logged: bool):
        """`logged`: what the command says is kept. Raises StoppedError where the folder cannot be read."""
        super().__init__(folder / SCORES)
        self._folder, self._where, self._logged = folder / SAMPLES, where, logged
        self._kind = hashlib.sha256(repr((written(scoring), where)).encode()).hexdigest()[:16]
        self._samples: dict[str, Samples] = {}

    def get(self, merged: str, score: str) -> float | None:
        if self._where and self.samples(merged) is None:
            return None
        return super().get(merged, score)

    def samples(self, merged: str) -> Samples | None:
        """Those of a merge, by its digest; None where there are none."""
        if merged not in self._samples:
            try:
                with self._file(merged).open("rb") as file, np.load(file, allow_pickle=False) as found:
                    arrays: dict[str, Any] = dict(found)
                self._samples[merged] = Samples(arrays.pop("right"), **arrays)
            except Exception:  # there is none, or a crash has left a part of it: it is measured again
                return None
        return self._samples[merged]

    def measure(self, scoring: Scoring, model: Path, log: Path, check: Check, merged: str) -> float:
        """Run the score's command, and keep what it says of samples. Raises ScoreFailed and StoppedError."""
        score = Score(scoring.command, scoring.metric, scoring.timeout)
        kept = log if self._logged else None
        if not self._where:
            return score.of(model, kept, check)
        value, samples = score.read(model, self._where.take, kept, check)
        for first in list(self._samples.values())[:1]:
            samples.check(first)
        self._keep(merged, samples)
        return value

    def _keep(self, merged: str, samples: Samples) -> None:
        given = {"right": samples.right, "labels": samples.labels, "probabilities": samples.probabilities}
        arrays: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        path = self._file(merged)
        try:
            path.parent.mkdir(exist_ok=True)
            new = path.with_name(f"{path.name}.{os.getpid()}")
            with new.open("wb") as file:
                np.savez(file, **arrays)
            new.replace(path)
        except OSError as fault:
            raise StoppedError(f"cannot write `{path}`: {fault.strerror}", hint=hint_for(fault)) from fault
        self._samples[merged] = samples

    def _file(self, merged: str) -> Path:
        return self._folder / f"{merged}-{self._kind}.npz"
