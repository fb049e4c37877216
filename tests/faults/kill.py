"""Kill runs with `kill -9` at random moments, resume them, and compare every byte with undisturbed runs.

    python tests/faults/kill.py --times 20 --models DIR

DIR is made and filled with four models where it does not exist; recipes and outputs go beside them and are removed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).parents[2]
# The journal is written every few milliseconds, so that a run of a second leaves work to take over. With SIGNAL_AT the
# run sends itself a signal once a function of the journal has been called so many times: `units 2 9`.
PROGRAM = """
import os
from mergekit_lite.run import execute, journal
from mergekit_lite.cli.app import main

execute.JOURNAL_SECONDS = 0.02
if "SIGNAL_AT" in os.environ:
    name, count, number = os.environ["SIGNAL_AT"].split()
    original, calls = getattr(journal.Journal, name), []

    def counted(*arguments):
        original(*arguments)
        calls.append(name)
        if len(calls) == int(count):
            os.kill(os.getpid(), int(number))

    setattr(journal.Journal, name, counted)
main()
"""
STEPS = {
    "ties": "{use: ties, base: base, of: [a, b, c], with: {scope: global}}",
    "dare": "{use: dare_ties, base: base, of: [a, b, c], with: {drop_rate: 0.7}}",
}


@dataclass(frozen=True)
class Whole:
    """An undisturbed run: the SHA-256 of its files by name, and its seconds from the first byte to the end."""

    digests: dict[str, str]
    seconds: float


@dataclass(frozen=True)
class Killed:
    """A run that was killed `kills` times: where it stood the last time (`before` its folder was there, `measuring`,
    `writing`), or `late` where it ended first; units taken over when it went on, and the SHA-256 of its files."""

    kills: int
    stage: str
    resumed: int
    digests: dict[str, str]


def write_models(folder: Path, tensors: int = 10, rows: int = 700) -> None:
    """`base`, `a`, `b`, `c`: `tensors` matrices of `rows` x 1000 in bfloat16 each."""
    generator = torch.Generator().manual_seed(2)
    base = {f"model.layers.{i}.weight": torch.randn(rows, 1000, generator=generator) for i in range(tensors)}
    for name in ("base", "a", "b", "c"):
        made = {key: (value + (name != "base") * 0.1 * torch.randn(value.shape, generator=generator)).bfloat16()
                for key, value in base.items()}  # fmt: skip
        (folder / name).mkdir(parents=True)
        save_file(made, folder / name / "model.safetensors")
        (folder / name / "config.json").write_text(json.dumps({"num_hidden_layers": tensors}), encoding="utf-8")


def write_recipe(path: Path, models: Path, step: str, to: Path) -> Path:
    names = ", ".join(f"{name}: {models / name}" for name in ("base", "a", "b", "c"))
    path.write_text(
        f"version: 1\nseed: 9\nmodels: {{{names}}}\nsteps: {{m: {step}}}\nsave: {{to: {to}, shard: 5MB}}\n",
        encoding="utf-8",
    )
    return path


def start(recipe: Path, *flags: str, signal_at: str | None = None) -> subprocess.Popen[str]:
    """A run in a process of its own; `signal_at` as in PROGRAM."""
    more = {"SIGNAL_AT": signal_at} if signal_at else {}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "run", str(recipe), "--json", *flags],
        env=os.environ | {"PYTHONPATH": str(ROOT), "NO_COLOR": "1"} | more,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a run that is left alone."""
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.glob("*.safetensors*"))}


def journal(out: Path) -> list[dict[str, object]]:
    """The whole lines of the journal of an unfinished run."""
    try:
        lines = (partial(out) / "journal.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def partial(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def await_begin(process: subprocess.Popen[str], out: Path) -> None:
    """Return once the run has made its folder, or has ended."""
    while not partial(out).exists() and process.poll() is None:
        time.sleep(0.001)


def units(out: Path) -> int:
    """How many finished units the journal of an unfinished run tells of."""
    return sum("unit" in entry for entry in journal(out))


def undisturbed(recipe: Path, out: Path, threads: int) -> Whole:
    process = start(recipe, "--threads", str(threads))
    await_begin(process, out)
    began = time.monotonic()
    code, _, err = finish(process)
    if code:
        raise RuntimeError(err)
    whole = Whole(digests(out), time.monotonic() - began)
    shutil.rmtree(out)
    return whole


def kill_and_resume(recipe: Path, out: Path, threads: int, delays: Sequence[float]) -> Killed:
    """Start a run, kill it `delays[0]` seconds after it made its folder, go on, kill that after `delays[1]`, and so on;
    then go on to the end. Removes the output. Raises RuntimeError where a run fails."""
    flags = ["--threads", str(threads)]
    kills, stage = 0, "late"
    for delay in delays:
        process = start(recipe, *flags, *(["--resume"] if partial(out).exists() else []))
        await_begin(process, out)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        code, _, err = finish(process)
        if code not in (0, -signal.SIGKILL):
            raise RuntimeError(err)
        if out.exists():
            break
        kills += 1
        stage = "writing" if units(out) else "measuring" if partial(out).exists() else "before"
    resumed = 0
    if not out.exists():
        code, text, err = finish(
            start(recipe, *flags, *(["--resume"] if (partial(out) / "journal.jsonl").exists() else []))
        )
        if code:
            raise RuntimeError(err)
        resumed = json.loads(text)["resumed"]
    killed = Killed(kills, stage, resumed, digests(out))
    shutil.rmtree(out)
    return killed


def main() -> int:
    """Do it many times and print one line; exit code 1 where any byte differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=20, help="how many runs are killed")
    parser.add_argument("--models", type=Path, required=True, help="folder of the models; made where there is none")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if not given.models.exists():
        write_models(given.models)
    rng = random.Random(given.seed)
    out = given.models / "out"
    wholes = {}
    for name, step in STEPS.items():
        recipe = write_recipe(given.models / f"{name}.yaml", given.models, step, out)
        wholes[name] = undisturbed(recipe, out, 1)
    stages: Counter[str] = Counter()
    late = kills = resumed = differ = 0
    spans = {name: whole.seconds for name, whole in wholes.items()}
    while stages.total() < given.times:
        number = stages.total()
        name = list(STEPS)[number % len(STEPS)]
        threads = 1 + number // len(STEPS) % 2
        delays = [rng.uniform(0, spans[name]) for _ in range(rng.choice([1, 1, 2]))]
        killed = kill_and_resume(given.models / f"{name}.yaml", out, threads, delays)
        differ += killed.digests != wholes[name].digests
        if not killed.kills:
            late += 1
            spans[name] *= 0.9
            continue
        stages[killed.stage] += 1
        kills += killed.kills
        resumed += killed.resumed
    where = ", ".join(f"{count} {stage}" for stage, count in sorted(stages.items()))
    print(
        f"{given.times} runs killed {kills} times ({where}; {late} more ended before they could be), "
        f"{resumed} units taken over, {differ} of {given.times + late} outputs differ"
    )
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
