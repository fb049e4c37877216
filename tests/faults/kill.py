"""Kill runs with `kill -9` at random moments, resume them, and compare every byte with undisturbed runs.

    python tests/faults/kill.py --times 200 --models DIR

Every run is killed once or twice, on 1 or 2 threads of 1 or 2 processes, and goes on with 1 or 2. DIR is made and
filled with four models where it does not exist; recipes and outputs go beside them and are removed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import socket
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
# With SIGNAL_AT the run sends itself a signal once a function of the journal has been called so many times: `unit 2 9`.
# With STARTED_AT it writes down which units it has begun, in a file for each rank.
PROGRAM = """
import os
from mergekit_lite.run import execute, journal
from mergekit_lite.cli.app import main

if "SIGNAL_AT" in os.environ:
    name, count, number = os.environ["SIGNAL_AT"].split()
    original, calls = getattr(journal.Journal, name), []

    def counted(*arguments):
        original(*arguments)
        calls.append(name)
        if len(calls) == int(count):
            os.kill(os.getpid(), int(number))

    setattr(journal.Journal, name, counted)
if "STARTED_AT" in os.environ:
    begin = execute._Run._unit
    started = os.open(os.environ["STARTED_AT"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def begun(run, unit):
        os.write(started, f"{unit.id}\\n".encode())
        return begin(run, unit)

    execute._Run._unit = begun
main()
"""
STEPS = {
    "linear": "{use: linear, of: [a, b, c]}",  # element by element, in pieces
    "ties": "{use: ties, base: base, of: [a, b, c], with: {scope: global}}",  # statistics of all tensors first
    "dare": "{use: dare_ties, base: base, of: [a, b, c], with: {drop_rate: 0.7}}",  # random masks
    "iso_c": "{use: iso_c, base: base, of: [a, b, c]}",  # whole matrices
    "permute": "{use: permute, of: b, like: a, with: {spaces: [mlp, heads]}}",  # orders first, then gathering
}
HIDDEN, HEADS = 256, 4
CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN, "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS, "head_dim": HIDDEN // HEADS, "tie_word_embeddings": False,
}  # fmt: skip


@dataclass(frozen=True)
class Whole:
    """An undisturbed run: the SHA-256 of its files by name, its seconds from the first byte to the end, and those since
    it has told of a unit."""

    digests: dict[str, str]
    seconds: float
    writing: float


@dataclass(frozen=True)
class Killed:
    """A run that was killed `kills` times: where it stood the last time (`before` its folder was there, `measuring`,
    `writing`), or `late` where it ended first; units taken over when it went on, units that had been begun and were not
    taken over, the most per thread at one kill, and the SHA-256 of its files."""

    kills: int
    stage: str
    resumed: int
    again: float
    digests: dict[str, str]


def write_models(folder: Path, layers: int = 4, inner: int = 704) -> None:
    """`base`, `a`, `b`, `c`: Llamas of `layers` layers with `inner` hidden units in bfloat16."""
    generator = torch.Generator().manual_seed(2)
    shapes = {
        "model.embed_tokens.weight": (1000, HIDDEN),
        "lm_head.weight": (1000, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    for layer in range(layers):
        place = f"model.layers.{layer}."
        shapes |= {f"{place}self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qkvo"}
        shapes |= {f"{place}mlp.{name}_proj.weight": (inner, HIDDEN) for name in ("gate", "up")}
        shapes |= {f"{place}mlp.down_proj.weight": (HIDDEN, inner)}
        shapes |= {f"{place}{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    config = CONFIG | {"num_hidden_layers": layers, "intermediate_size": inner, "vocab_size": 1000}
    for name in ("base", "a", "b", "c"):
        made = {key: (value + (name != "base") * 0.1 * torch.randn(value.shape, generator=generator)).bfloat16()
                for key, value in base.items()}  # fmt: skip
        (folder / name).mkdir(parents=True)
        save_file(made, folder / name / "model.safetensors")
        (folder / name / "config.json").write_text(json.dumps(config), encoding="utf-8")


def write_recipe(path: Path, models: Path, step: str, to: Path) -> Path:
    names = ", ".join(f"{name}: {models / name}" for name in ("base", "a", "b", "c"))
    path.write_text(
        f"version: 1\nseed: 9\nmodels: {{{names}}}\nsteps: {{m: {step}}}\nsave: {{to: {to}, shard: 2MB}}\n",
        encoding="utf-8",
    )
    return path


def start(recipe: Path, *flags: str, signal_at: str | None = None, **variables: str) -> subprocess.Popen[str]:
    """A run in a process of its own, with more environment `variables`; `signal_at` as in PROGRAM."""
    more = {"SIGNAL_AT": signal_at} if signal_at else {}
    # No caches of earlier runs: each shall do all of its work.
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "run", str(recipe), "--json", *flags],
        env=os.environ | {"PYTHONPATH": str(ROOT), "NO_COLOR": "1", "MERGEKIT_LITE_CACHE": "0"} | more | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_ranks(count: int, recipe: Path, *flags: str, started: Path | None = None) -> list[subprocess.Popen[str]]:
    """As many processes that share one run; with `started`, they write there which units they begin."""
    log = [{"STARTED_AT": f"{started}.{rank}"} if started else {} for rank in range(count)]
    if count == 1:
        return [start(recipe, *flags, **log[0])]
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    place = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    return [start(recipe, *flags, **place, **log[r], RANK=str(r), LOCAL_RANK=str(r)) for r in range(count)]


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a run that is left alone."""
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.glob("*.safetensors*"))}


def partial(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def await_begin(process: subprocess.Popen[str], out: Path, before: set[int] | None = None) -> None:
    """Return once the run has made its folder, or has told of units that are not among those `before`, or has ended."""
    while not (told(out) - before if before is not None else partial(out).exists()) and process.poll() is None:
        time.sleep(0.001)


def told(out: Path) -> set[int]:
    """The finished units that the journals of an unfinished run tell of."""
    found = set()
    for path in partial(out).glob("journal*.jsonl"):
        with contextlib.suppress(FileNotFoundError):
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            found |= {json.loads(line)["unit"] for line in lines if line.endswith("\n") and '{"unit"' in line}
    return found


def units(out: Path) -> int:
    """How many finished units the journal of an unfinished run tells of."""
    return len(told(out))


def undisturbed(recipe: Path, out: Path, threads: int) -> Whole:
    process = start(recipe, "--threads", str(threads))
    await_begin(process, out)
    began = time.monotonic()
    await_begin(process, out, set())
    wrote = time.monotonic()
    code, _, err = finish(process)
    if code:
        raise RuntimeError(err)
    ended = time.monotonic()
    whole = Whole(digests(out), ended - began, ended - wrote)
    shutil.rmtree(out)
    return whole


def kill_and_resume(
    recipe: Path,
    out: Path,
    threads: int,
    delays: Sequence[float],
    counts: Sequence[int] = (),
    victim: int = 0,
    writing: bool = False,
) -> Killed:
    """Start a run, kill it `delays[0]` seconds after it made its folder, or with `writing` after it told of a unit; go
    on, kill that after `delays[1]`, and so on; then go on to the end. `counts` are the processes of each of these runs,
    one where it is empty, and `victim` is the one that is killed, or the last one there is; the others must notice it.
    Removes the output. Raises RuntimeError where a run fails."""
    counts = counts or [1] * (len(delays) + 1)
    flags = ["--threads", str(threads)]
    kills, stage, again = 0, "late", 0.0
    begun = out.with_name("begun")
    for delay, count in zip(delays, counts, strict=False):
        before = told(out)
        processes = start_ranks(count, recipe, *flags, *_resume(out), started=begun)
        killed = processes[min(victim, count - 1)]
        await_begin(killed, out, before if writing else None)
        time.sleep(delay)
        killed.send_signal(signal.SIGKILL)
        for process in processes:
            code, err = _finish_as_launched(process)
            if code not in ((0, -signal.SIGKILL) if process is killed else (0, 5)):
                raise RuntimeError(f"exit code {code}: {err}")
        started = [int(line) for log in out.parent.glob("begun.*") for line in log.read_text().splitlines()]
        for log in out.parent.glob("begun.*"):
            log.unlink()
        if out.exists():
            break
        kills += 1
        now = told(out)
        again = max(again, len(set(started) - now) / threads / count)
        stage = "writing" if now - before else "measuring" if partial(out).exists() else "before"
    resumed = 0
    if not out.exists():
        ended = [finish(process) for process in start_ranks(counts[-1], recipe, *flags, *_resume(out))]
        for code, _, err in ended:
            if code:
                raise RuntimeError(f"exit code {code}: {err}")
        resumed = json.loads(ended[0][1])["resumed"]
    killed_run = Killed(kills, stage, resumed, again, digests(out))
    shutil.rmtree(out)
    return killed_run


def _finish_as_launched(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and stderr of a rank. One that was killed before the ranks had found each other is missed by nobody
    but the launcher, which then ends the others; here the note that they wait must have come, and stands for code 5."""
    try:
        _, err = process.communicate(timeout=30)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
        if "waits for the others" in err and process.returncode == 130:
            return 5, err
    return process.returncode, err


def _resume(out: Path) -> list[str]:
    return ["--resume"] if (partial(out) / "journal.jsonl").exists() else []


def main() -> int:
    """Do it many times and print a line for each recipe; exit code 1 where any byte differs or work was done again that
    was finished."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=20, help="how many runs are killed")
    parser.add_argument("--models", type=Path, required=True, help="folder of the models; made where there is none")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if not given.models.exists():
        write_models(given.models)
    rng = random.Random(given.seed)
    out = given.models / "out"
    wholes, seen = {}, {name: Counter[str]() for name in STEPS}
    for name, step in STEPS.items():
        recipe = write_recipe(given.models / f"{name}.yaml", given.models, step, out)
        wholes[name] = undisturbed(recipe, out, 1)
    spans = {(name, ranks, writing): (whole.writing if writing else whole.seconds) * ranks
             for name, whole in wholes.items() for ranks in (1, 2) for writing in (False, True)}  # fmt: skip
    failed, most = False, 0.0
    done = 0
    while done < given.times:
        name = list(STEPS)[done % len(STEPS)]
        threads, ranks = 1 + done // len(STEPS) % 2, 1 + done // len(STEPS) // 2 % 2
        writing = bool(done // len(STEPS) // 4 % 2)
        delays = [rng.uniform(0, spans[name, ranks, writing]) for _ in range(rng.choice([1, 1, 2]))]
        counts = [ranks, *(rng.choice([1, 2]) if ranks > 1 else 1 for _ in delays)]
        killed = kill_and_resume(
            given.models / f"{name}.yaml", out, threads, delays, counts, rng.randrange(ranks), writing
        )
        count = seen[name]
        differs = killed.digests != wholes[name].digests
        failed |= differs or killed.again > 1
        most = max(most, killed.again)
        count["differ"] += differs
        if not killed.kills:
            count["late"] += 1
            spans[name, ranks, writing] *= 0.9
            continue
        done += 1
        count["runs"] += 1
        count["kills"] += killed.kills
        count["resumed"] += killed.resumed
        count[killed.stage] += 1
        count[f"{ranks} ranks"] += 1
        if done % 10 == 0:
            differ = sum(one["differ"] for one in seen.values())
            print(f"{done} of {given.times} runs killed, {differ} differ", file=sys.stderr, flush=True)
    for name, count in seen.items():
        print(
            f"{name}: {count['runs']} runs ({count['2 ranks']} of two processes) killed {count['kills']} times "
            f"({count['before']} before, {count['measuring']} measuring, {count['writing']} writing; {count['late']} "
            f"more ended first), {count['resumed']} units taken over, {count['differ']} outputs differ",
            flush=True,
        )
    print(f"units begun and not taken over: {most:g} a thread at most")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
