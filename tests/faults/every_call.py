"""Let every system call of a run fail, one after the other, and hold each time what a user is promised.

    python tests/faults/every_call.py --errors ENOSPC,EIO --recipes linear,permute

First a run is left alone and its calls on files below the output's folder (with `--inputs`: on the inputs) are counted.
Then the k-th fails, alone or with all after it, for every k. Promised is: the run ends with exit code 0, 4 or 5 and no
traceback; an error names a file and says what to do; what lay there before lies there still; no folder looks finished
that is not; and doing what the hint says ends in the bytes of the undisturbed run.
"""

from __future__ import annotations

import argparse
import collections
import errno
import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.faults.layer import Layer, Ran

SHAPES = {
    "model.embed_tokens.weight": (20, 8),
    "model.layers.0.mlp.gate_proj.weight": (12, 8),
    "model.layers.0.mlp.up_proj.weight": (12, 8),
    "model.layers.0.mlp.down_proj.weight": (8, 12),
    "model.norm.weight": (8,),
    "lm_head.weight": (20, 8),
}
CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 1,
    "hidden_size": 8,
    "intermediate_size": 12,
    "tie_word_embeddings": False,
}
SAVES = {
    "one": "{to: o/deep/out, shard: 1KB}",
    "two": "[{step: m, to: o/out}, {step: m, to: o/half, dtype: float16}]",
    "masks": "{step: m, as: masks, base: a, tasks: [b, c], compress: zstd, to: o/out}",
}
# Steps, saves, and whether torch takes part.
RECIPES = {
    "linear": ("m: {use: linear, of: [a, b]}", "one", False),
    "two": ("m: {use: linear, of: [a, b]}", "two", False),
    "ties": ("m: {use: ties, base: a, of: [b, c], with: {scope: global}}", "one", True),
    "permute": (
        "p: {use: permute, of: b, like: a, with: {spaces: [mlp]}}\n  m: {use: linear, of: [a, p]}",
        "one",
        True,
    ),
    "masks": (
        "b_: {use: delta, of: b, base: a}\n  c_: {use: delta, of: c, base: a}\n"
        "  m: {use: linear, of: [b_, c_], with: {normalize: false}}",
        "masks",
        True,
    ),
}
# Calls that a full disk lets fail: the rest goes on as before.
FULL = "calls=open,write,pwrite,fallocate,ftruncate,fsync,fdatasync,mkdir,rename "


def write_place(folder: Path) -> None:
    """Three checkpoints, a recipe of each kind, and a file of the user's where the outputs go."""
    generator = torch.Generator().manual_seed(4)
    for name in ("a", "b", "c"):
        (folder / name).mkdir(parents=True)
        tensors = {key: torch.randn(shape, generator=generator) for key, shape in SHAPES.items()}
        save_file(tensors, folder / name / "model.safetensors", {"format": "pt"})
        (folder / name / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
        (folder / name / "tokenizer.json").write_text("{}", encoding="utf-8")
    for name, (steps, save, _) in RECIPES.items():
        text = f"version: 1\nmodels: {{a: ./a, b: ./b, c: ./c}}\nsteps:\n  {steps}\nsave: {SAVES[save]}\n"
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")


def tree(folder: Path) -> dict[str, str]:
    """Every file below `folder` with the SHA-256 of its bytes."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@dataclass(frozen=True)
class Bench:
    """A folder of `write_place`, a recipe in it, how commands are run, what the undisturbed run made."""

    folder: Path
    recipe: str
    fork: Callable[..., Ran]
    whole: dict[str, str]
    calls: tuple[str, ...]

    @property
    def outputs(self) -> Path:
        return self.folder / "o"

    def run(self, *flags: str, rules: str = "") -> Ran:
        return self.fork(["run", f"{self.recipe}.yaml", "--threads", "1", *flags], rules, self.folder)

    def clear(self) -> None:
        shutil.rmtree(self.outputs, ignore_errors=True)

    def hold(self, rules: str) -> str:
        """Run under `rules` and do what the message says. Gives what happened in a few words; raises AssertionError
        where a promise is broken."""
        self.clear()
        (self.folder / "mine.txt").write_text("mine")
        before = self.others()
        ran = self.run(rules=rules)
        assert self.others() == before, "files of the user changed"
        assert ran.code in (0, 4, 5) and "Traceback" not in ran.err, f"exit code {ran.code}: {ran.err}"
        happened = "no harm"
        if ran.code:
            assert "error: " in ran.err and "hint: " in ran.err and "`" in ran.err, ran.err
            assert not ran.out, ran.out
            for folder in self.finished():
                inside = {n: d for n, d in self.whole.items() if n.startswith(f"{folder}/")}
                found = tree(self.outputs / folder)
                assert {n: found.get(n.removeprefix(f"{folder}/")) for n in inside} == inside, f"{folder} looks whole"
            happened = self.follow(ran)
        made = {name: digest for name, digest in tree(self.outputs).items() if "journal" not in name}
        assert made == self.whole, f"after `{ran.err}` and {happened}: {sorted(made)}"
        return f"exit {ran.code}, {happened}"

    def others(self) -> dict[str, str]:
        return {n: d for n, d in tree(self.folder).items() if not n.startswith("o/")}

    def finished(self) -> list[str]:
        """Folders that nobody would take for unfinished ones."""
        return sorted({str(Path(n).parent) for n in tree(self.outputs) if ".partial" not in n})

    def follow(self, ran: Ran) -> str:
        """Do what the hint of a failed run says."""
        hint = ran.err[ran.err.index("hint: ") :]
        if "--resume" in hint and "without `--resume`" not in hint:
            again, happened = self.run("--resume"), "resumed"
        elif "move it" in hint:
            for partial in self.outputs.rglob("*.partial"):
                partial.rename(partial.with_suffix(""))
            return "moved by hand"
        elif "is whole" in hint:
            return "already whole"
        else:
            again, happened = self.run(), "started again"
        assert again.code == 0, f"`{ran.err}`\nthen {happened}: exit code {again.code}: {again.err}"
        return happened


def bench(folder: Path, recipe: str, fork: Callable[..., Ran]) -> Bench:
    """The undisturbed run, counted."""
    empty = Bench(folder, recipe, fork, {}, ())
    empty.clear()
    ran = empty.run(rules=f"path={folder}/o")
    assert ran.code == 0, ran.err
    return Bench(folder, recipe, fork, tree(empty.outputs), ran.calls)


def rules(bench: Bench, names: list[str], inputs: bool = False) -> Iterator[str]:
    """One rule for each call and error: a full disk from then on, one failing call, a dead disk from then on."""
    if inputs:
        place = f"path={bench.folder}/b/"
        bench.clear()
        calls = bench.run(rules=place).calls
    else:
        place, calls = f"path={bench.folder}/o", bench.calls
    full = [call for call in calls if call.split()[0] in FULL.removeprefix("calls=").strip().split(",")]
    for name in names:
        number = getattr(errno, name)
        for k in range(1, len(calls) + 1):
            yield f"{place} at={k} errno={number}"
        if name in ("ENOSPC", "EDQUOT", "EROFS"):
            for k in range(1, len(full) + 1):
                yield f"{FULL}{place} from={k} errno={number}"
        elif name != "EINTR":
            for k in range(1, len(calls) + 1):
                yield f"{place} from={k} errno={number}"


def main() -> int:
    """Do it for the recipes and errors wanted; exit code 1 where a promise is broken."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--errors", default="ENOSPC,EDQUOT,EIO,EROFS,EACCES,EINTR")
    parser.add_argument("--recipes", default=",".join(RECIPES))
    parser.add_argument("--inputs", action="store_true", help="let the calls on an input fail")
    given = parser.parse_args()
    broken = 0
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "place"
        write_place(folder)
        layer = Layer(Path(place))
        for name in given.recipes.split(","):
            seen: collections.Counter[str] = collections.Counter()
            with layer.forks(torch=RECIPES[name][2]) as fork:
                made = bench(folder, name, fork)
                for rule in rules(made, given.errors.split(","), given.inputs):
                    try:
                        seen[made.hold(rule)] += 1
                    except AssertionError as fault:
                        broken += 1
                        print(f"BROKEN {name}: {rule}\n{fault}\n")
            told = ", ".join(f"{count} {what}" for what, count in sorted(seen.items()))
            print(f"{name}: {len(made.calls)} calls on the output, {seen.total()} held ({told})")
    print(f"{broken} promises broken")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
