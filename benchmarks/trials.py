"""What a trial of `merge search` costs beside the merge by itself, in one process: wall seconds, tensors, bytes.

    python benchmarks/trials.py --models bench/60M

The folder holds a base and three fine-tunes (make_models.py). A merge by itself is `mergekit_lite.run`, with digests
and flushes; trials follow each other in one folder, as a search writes them. Rounds, medians; the rows of one round
follow each other, so that what else the machine does meets all of them.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

from mergekit_lite import plan, run
from mergekit_lite.choose import planner
from mergekit_lite.merge import default_threads
from mergekit_lite.recipe.model import Recipe
from mergekit_lite.recipe.read import parse
from mergekit_lite.run.progress import Options
from mergekit_lite.run.trial import Made, TrialFolder

STEPS = {
    "linear": "{{use: linear, of: {{a: {{weight: {{{layers}, '*': {all}}}}}, b: {{weight: 1}}, c: {{weight: 1}}}}}}",
    "ties": "{{use: ties, base: base, of: [a, b, c], with: {{density: 0.2, lambda: {{{layers}, '*': {all}}}}}}}",
}
LAYER = "'model.layers.0.*'"
# What differs from the trial before, and the values of layer 0 and of all else.
TRIALS = (("everything", 0.3, 0.3), ("one layer", 0.4, 0.3), ("nothing", 0.4, 0.3))


def recipe(models: Path, method: str, layer: float, rest: float, out: Path) -> Recipe:
    folders = {"base": models / "base", **{name: models / f"tune{i}" for i, name in enumerate("abc", 1)}}
    step = STEPS[method].format(layers=f"{LAYER}: {layer}", all=rest)
    named = ", ".join(f"{name}: {str(path)!r}" for name, path in folders.items())
    text = f"version: 1\nmodels: {{{named}}}\nsteps: {{m: {step}}}\nsave: {{to: {str(out)!r}}}\n"
    made, problems = parse(text, "trials")
    if made is None:
        raise SystemExit("\n".join(problem.render() for problem in problems))
    return made


def measure(models: Path, method: str, rounds: int) -> list[str]:
    """The rows of one method."""
    seconds: dict[str, list[float]] = {name: [] for name in ("merge", *(name for name, _, _ in TRIALS))}
    made: dict[str, Made] = {}
    make = planner()
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(dir=models.parent) as work:
            began = time.perf_counter()
            run(plan(recipe(models, method, 0.3, 0.3, Path(work) / "merge")))
            seconds["merge"].append(time.perf_counter() - began)
            folder = TrialFolder(Path(work) / "trial")
            # The first makes the files and is not counted.
            folder.write(make(recipe(models, method, 0.9, 0.9, folder.path), folder.path), Options(default_threads()))
            for name, layer, rest in TRIALS:
                began = time.perf_counter()
                trial = make(recipe(models, method, layer, rest, folder.path), folder.path)
                made[name] = folder.write(trial, Options(default_threads()))
                seconds[name].append(time.perf_counter() - began)
    whole = median(seconds["merge"])
    rows = [f"| {method} | the merge by itself | {whole:.2f} | 1 | | | |"]
    for name, _, _ in TRIALS:
        ratio = median(trial / merge for trial, merge in zip(seconds[name], seconds["merge"], strict=True))
        one = made[name]
        read, written = one.bytes_read / 1e6, one.bytes_written / 1e6
        cells = (f"{median(seconds[name]):.2f}", f"{ratio:.2f}", f"{one.tensors} of {one.all_tensors}")
        rows.append(f"| {' | '.join([method, f'changes {name}', *cells, f'{read:.0f}', f'{written:.0f}'])} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True, help="a folder of make_models.py")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    print("| method | trial | s | ratio | tensors | MB read | MB written |\n| :- | :- | -: | -: | -: | -: | -: |")
    for method in STEPS:
        print("\n".join(measure(args.models, method, args.rounds)), flush=True)


if __name__ == "__main__":
    main()
