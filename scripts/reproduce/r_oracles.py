"""R14: every answer of tests/oracles.json is held against the program by a test that passes."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from claims import Bar, Claim, Experiment, Figure, Found, Measurement
from measured import ROOT
from suite import environment, pytest_failed

TESTS = ROOT / "tests"
UNREAD = "unread "
ANSWERS = TESTS / "oracles.json"


def files() -> list[str]:
    """The test files that read the answers."""
    texts = ((path, path.read_text(encoding="utf-8")) for path in sorted(TESTS.rglob("test_*.py")))
    return [str(path.relative_to(ROOT)) for path, text in texts if "ORACLES" in text or ANSWERS.name in text]


def measure(seed: int) -> Measurement:
    with tempfile.TemporaryDirectory() as folder:
        noted = Path(folder) / "noted.json"
        words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "oracle_watch", "--noted", str(noted), *files()]
        done = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment(), capture_output=True, text=True)
        if not noted.is_file():
            raise pytest_failed(done)
        found = json.loads(noted.read_text(encoding="utf-8"))
    return {
        "cases": found["cases"],
        "read": found["read"],
        "held": found["held"],
        "apart in float64": found["apart"]["float64"],
        "apart in float32": found["apart"]["float32"],
        **{f"{UNREAD}{case}": 1.0 for case in found["unread"]},
    }


def unread(found: Found) -> str:
    """The answers that no test reads."""
    cases = sorted({name.removeprefix(UNREAD) for m in found.seeds.values() for name in m if name.startswith(UNREAD)})
    return f"No test reads {', '.join(cases)}." if cases else ""


EXPERIMENT = Experiment(
    "oracles",
    measure,
    lambda: ANSWERS.read_text(encoding="utf-8"),
    (
        Claim(
            "R14",
            "oracles",
            "each method's own paper; the answers are the specification's, computed by plain loops in NumPy",
            "Answers in float64 for small inputs (tests/oracles.json), which tests hold against the program's methods "
            "and tools within the tolerance that each states, in float64, and of methods that take both within 1e-5 in "
            "float32.",
            (
                Figure("answers", "cases", "120", ".0f"),
                Figure("answers that a test reads", "read", "120", ".0f"),
                Figure("answers of which every test that reads them passes", "held", "120", ".0f"),
                Figure("largest difference of a method in float64", "apart in float64", "", ".1e"),
                Figure("largest relative difference of a method in float32", "apart in float32", "", ".1e"),
            ),
            (
                Bar(
                    "answers that are missed or that no test reads",
                    lambda m: max(m["cases"]) - min(m["held"]),
                    "at most",
                    0,
                    ".0f",
                ),
                Bar(
                    "largest relative difference in float32",
                    lambda m: max(m["apart in float32"]),
                    "at most",
                    1e-5,
                    ".1e",
                ),
            ),
            remark=unread,
        ),
    ),
    seeds=(0,),
    drawn=False,
)
