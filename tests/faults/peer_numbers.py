"""What mergekit does about numbers, about determinism and about the proof of an output. See peer.py."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from peer_machine import ONE, SHARDS, Peer, Ran, Row, code, digests
from safetensors.torch import load_file, save_file

SEEDED = ("--random-seed", "1")
CASES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "linear": ({}, ()),
    "ties": ({"merge_method": "ties", "parameters": {"density": 0.5}}, ()),
    "dare_ties with --random-seed": ({"merge_method": "dare_ties", "parameters": {"density": 0.5}}, SEEDED),
    "dare_ties without": ({"merge_method": "dare_ties", "parameters": {"density": 0.5}}, ()),
}


class Numbers:
    def __init__(self, peer: Peer):
        self.peer = peer
        with peer.place() as place:
            peer.run(peer.recipe(place), place / "out", *ONE)
            self.whole = digests(place / "out")

    def rows(self) -> Iterator[Row]:
        for row in (self.nan, self.overflow, self.twice, self.threads, self.hash_seed, self.config_of, self.verify,
                    self.run_again):  # fmt: skip
            yield row()

    def noticed(self, ran: Ran, place: Path, dtype: str) -> str:
        """Whether a message names numbers that are not finite, and how many the output has."""
        bad = sum(int((~x.isfinite()).sum()) for x in load_file(place / "out" / "model.safetensors").values())
        lines = re.split(r"[\r\n]+", ran.out + ran.err)
        lines = [line for line in lines if re.search(r"\b(nan|inf|overflow|finite)\b", line, re.I)]
        told = f"messages: {', '.join(map(code, lines))}" if lines else "no message names it"
        return f"{ran.told}; {bad} numbers of the {dtype} output are not finite; {told}"

    def nan(self) -> Row:
        with self.peer.place("a") as place:
            weights = load_file(place / "a" / "model.safetensors")
            weights["model.norm.weight"][3] = float("nan")
            save_file(weights, place / "a" / "model.safetensors")
            ran = self.peer.merge(place, "--no-copy-tokenizer")
            return "a NaN in an input", 1, self.noticed(ran, place, "bfloat16")

    def overflow(self) -> Row:
        with self.peer.place("a") as place:
            weights = load_file(place / "a" / "model.safetensors")
            weights["model.norm.weight"][:5] = 1e6
            save_file(weights, place / "a" / "model.safetensors")
            recipe = self.peer.recipe(place, models=(place / "a", self.peer.models / "b"), out_dtype="float16")
            ran = self.peer.run(recipe, place / "out", "--no-copy-tokenizer")
            return "5 numbers overflow in float16 (out_dtype)", 1, self.noticed(ran, place, "float16")

    def differ(self, make: Callable[[], list[dict[str, Any]]], *names: str) -> str:
        """How many different outputs these runs give of each of these cases."""
        told = []
        for name in names:
            recipe, flags = CASES[name]
            found = []
            with self.peer.place() as place:
                base = {"base_model": str(self.peer.models / "base")} if recipe else {}
                path = self.peer.recipe(place, **recipe, **base)
                for number, run in enumerate(make()):
                    words = run.pop("words", ())
                    ran = self.peer.run(path, place / f"{number}", *SHARDS, "--quiet", *flags, *words, **run)
                    found.append(ran.told if ran.code else json.dumps(digests(place / f"{number}")))
            count = len({*found})
            told.append(f"{name}: {'same bytes' if count == 1 else f'{count} different outputs of {len(found)}'}")
        return "<br>".join(told)

    def twice(self) -> Row:
        # Forks would share the state of one random generator.
        def make() -> list[dict[str, Any]]:
            return [{"whole": True}, {"whole": True}]

        plain = self.differ(lambda: [{}, {}], "linear", "ties")
        drawn = self.differ(make, "dare_ties with --random-seed", "dare_ties without")
        return "determinism: two runs", 8, f"{plain}<br>{drawn}"

    def threads(self) -> Row:
        def make() -> list[dict[str, Any]]:
            return [{"words": ("-j", n)} for n in "1212"]

        return "determinism: `-j 1` and `-j 2`, each twice", 12, self.differ(make, *[*CASES][:3])

    def hash_seed(self) -> Row:
        def make() -> list[dict[str, Any]]:
            return [{"whole": True, "PYTHONHASHSEED": n} for n in "01"]

        text = self.differ(make, "linear", "dare_ties with --random-seed")
        return "determinism: weights under PYTHONHASHSEED 0, 1", 4, text

    def config_of(self) -> Row:
        """Models whose config.json differ, no base_model."""
        found = []
        with self.peer.place("a", "b") as place:
            for name, length in (("a", 1111), ("b", 2222)):
                file = place / name / "config.json"
                file.write_text(json.dumps(json.loads(file.read_text()) | {"max_position_embeddings": length}))
            recipe = self.peer.recipe(place, models=(place / "a", place / "b"))
            for seed in "0123":
                self.peer.run(recipe, place / seed, *ONE, whole=True, PYTHONHASHSEED=seed)
                held = json.loads((place / seed / "config.json").read_text())["max_position_embeddings"]
                found.append(f"{seed}: of the {'first' if held == 1111 else 'second'} model")
        return (
            "determinism: whose config.json the output has, no base_model, PYTHONHASHSEED 0 to 3",
            4,
            ", ".join(found),
        )

    def verify(self) -> Row:
        with self.peer.place() as place:
            self.peer.run(self.peer.recipe(place), place / "out", *ONE)
            files = sorted((place / "out").iterdir())
            text = "".join(file.read_text() for file in files if file.suffix != ".safetensors")
            digest = self.whole["model.safetensors"]
            names = ", ".join(f"`{file.name}`" for file in files)
            commands = ", ".join(f"`{c.name}`" for c in sorted(self.peer.executable.parent.glob("mergekit-*")))
            held = "names" if digest in text else "holds no digest of"
            return "verifying an output", 1, f"the output ({names}) {held} the weights; its commands: {commands}"

    def run_again(self) -> Row:
        with self.peer.place() as place:
            self.peer.run(self.peer.recipe(place), place / "out", *ONE)
            ran = self.peer.run(place / "out" / "mergekit_config.yml", place / "again", *ONE)
            same = "same bytes" if digests(place / "again") == self.whole else "OTHER bytes"
            return "the output's mergekit_config.yml, run", 1, f"{ran.told}, {same}"
