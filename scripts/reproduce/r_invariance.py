"""R15: permuting units changes no output of any network that the program knows."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

from claims import Bar, Claim, Experiment, Figure, Measurement
from measured import ROOT
from suite import environment, pytest_failed

FILE = "tests/family/test_family_spaces.py"
TESTS = {
    "permuted": "test_permutations_of_every_space_leave_the_outputs_as_they_are",
    "swapped": "test_a_swapped_rotary_pair_changes_the_outputs",
}
# The specification's networks, in the tests' names, and those in which it names no rotary embedding.
NAMED = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "mixtral", "qwen2_moe", "bert", "vit")
PLAIN = ("bert", "vit")


def measure(seed: int) -> Measurement:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", "-o", "junit_family=xunit1"]
        words += [f"{FILE}::{test}" for test in TESTS.values()]
        done = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment(), capture_output=True, text=True)
        if not report.is_file():
            raise pytest_failed(done)
        cases = list(ElementTree.parse(report).iter("testcase"))
    changes: dict[str, dict[str, float]] = {kind: {} for kind in TESTS}
    for case in cases:
        test, _, name = (case.get("name") or "").rstrip("]").partition("[")
        kind = next(kind for kind, wanted in TESTS.items() if wanted == test)
        for stated in case.iter("property"):
            if stated.get("name") == "change":
                changes[kind][name] = float(stated.get("value") or "nan")
    failed = sum(case.find("failure") is not None or case.find("error") is not None for case in cases)

    def worst(names: list[str]) -> float:
        return max(changes["permuted"].get(name, float("inf")) for name in names)

    named = {name: matching(name, changes["permuted"]) for name in NAMED}
    return {
        "networks": len(changes["permuted"]),
        "named": sum(bool(found) for found in named.values()),
        "failed": failed,
        "skipped": sum(case.find("skipped") is not None for case in cases),
        "largest": max(changes["permuted"].values()),
        "largest plain": worst([one for name in PLAIN for one in named[name]]),
        "largest decoder": worst([one for name in NAMED if name not in PLAIN for one in named[name]]),
        "swapped": len(changes["swapped"]),
        "least swapped": min(changes["swapped"].values()),
    }


def matching(name: str, found: dict[str, float]) -> list[str]:
    """The tests' networks of this name, with or without a head that is named behind it."""
    return [one for one in found if one == name or one.startswith(f"{name}-")]


EXPERIMENT = Experiment(
    "invariance",
    measure,
    lambda: (FILE, TESTS, NAMED),
    (
        Claim(
            "R15",
            "invariance",
            "Git Re-Basin, arXiv 2209.04836: networks do not change if their units do places",
            "Tiny networks of transformers with random weights. A random permutation of every group of units that the "
            "program knows, all at once; the largest difference of an output, relative to the outputs' deviation. The "
            "control swaps pairs of rows of queries and keys that rotary embeddings tell apart.",
            (
                Figure("networks", "networks", "11", ".0f"),
                Figure("of the specification's 11 kinds", "named", "11", ".0f"),
                Figure("largest change, all networks", "largest", "", ".1e"),
                Figure("largest change, BERT and ViT", "largest plain", "1e-15", ".1e"),
                Figure("largest change, the specification's decoders", "largest decoder", "5e-6", ".1e"),
                Figure("networks of the control", "swapped", "", ".0f"),
                Figure("least change of the control", "least swapped", "", ".2f"),
            ),
            (
                Bar("largest change", lambda m: max(m["largest"]), "below", 1e-4, ".1e"),
                Bar("least change of the control", lambda m: min(m["least swapped"]), "above", 0.1, ".2f"),
                Bar(
                    "tests that failed or were skipped",
                    lambda m: max(m["failed"]) + max(m["skipped"]),
                    "at most",
                    0,
                    ".0f",
                ),
                Bar("kinds of the specification's 11", lambda m: min(m["named"]), "at least", 11, ".0f"),
            ),
        ),
    ),
    seeds=(0,),
    drawn=False,
)
