"""Documents that run: every recipe of the project, every block of README.md and docs/, the demo and its claim.

What is done with a block depends on its language:

    console   The commands after `$ ` are run, one after the other, in one folder per document. What `merge` prints must
              be what stands below; a line `...` stands for any lines. Commands in `BY_HAND` are not run.
    yaml      A recipe, or sections of one that `SKELETON` completes. It must be read without a fault and, where its
              models are the demo's, planned. A first line `# NAME.yaml` makes it a file for later blocks; names that
              start with `wrong` are faulty on purpose.
    python    It runs, in one namespace per document. A first line `# NAME.py` makes it a file of its own.
    others    They are not run.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mergekit_lite import load_recipe, merge, merge_in_memory, plan
from mergekit_lite.cli.app import execute
from mergekit_lite.evaluate.template import Template
from mergekit_lite.methods.registry import all_methods
from mergekit_lite.recipe.model import Recipe, Save
from mergekit_lite.recipe.read import holes_of
from tests.conftest import Demo

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "scripts"))
import digits  # noqa: E402

DOCUMENTS = (
    *("README.md", "docs/design.md", "docs/recipes.md", "docs/statistics.md", "docs/search.md"),
    *("docs/path.md", "docs/methods.md", "docs/compat.md", "docs/families.md", "docs/alignment.md"),
    *("docs/strangers.md", "docs/reliability.md", "docs/ci.md", "docs/eight_tasks.md", "docs/experts.md"),
    "docs/reproduction.md",
)
RECIPES = sorted(
    str(path.relative_to(ROOT)) for path in (ROOT / "recipes").rglob("*.yaml") if path.parent.name != "families"
)
# The demo's networks read pictures. A recipe about tokens or language models needs others, and `tests/vocabulary`
# and `tests/run` run it; one about experts has a test of its own.
EXPERTS = "recipes/methods/merge_experts.yaml"
OTHERS = ("recipes/methods/transplant.yaml", "recipes/methods/moe.yaml", EXPERTS)
PUBLIC = [method.name for method in all_methods().values() if method.public]
BY_HAND = ("make test", "make venv", "pip ", "git ")
SKELETON = """\
version: 1
models: {base: org/base, math: org/math, code: org/code, chat: ./chat}
steps: {merged: {use: linear, of: [math, code]}}
save: {step: merged, to: out/merged}
"""
# What differs between machines or between two runs on one: times, rates, digests.
VARYING = [(r"\bin [0-9.]+ (s|min)\b", "in #"), (r"[0-9.]+ [kMG]?B/s", "# B/s"), (r"\b[0-9a-f]{64}\b", "#")]
# The demo's weights may differ in their last bits between machines, and so may every number made from them.
NUMBERS = [(r"-?[0-9][0-9.,]*(?:e-?[0-9]+)?(?:/[0-9,]+)?", "#"), (r"[ ━─]+", " ")]
MEASURED = ("merge diff", "make demo", "merge inspect out/small_ties --quantisability")
# Each new method may widen the columns of this table.
WIDTHS = [(r" {2,}", "  ")]


@dataclass(frozen=True)
class Block:
    document: str
    line: int
    language: str
    text: str

    @property
    def file(self) -> str | None:
        """The file name that its first line gives it."""
        match = re.match(r"# ([\w.-]+\.(?:yaml|py))\n", self.text)
        return match[1] if match else None


def blocks(document: str) -> list[Block]:
    text = (ROOT / document).read_text(encoding="utf-8")
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)
    return [Block(document, text.count("\n", 0, m.start()) + 1, m[1], m[2]) for m in found]


@pytest.fixture
def place(demo: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with `demo/`, `recipes/`, `scripts/` and `.venv/`, on a machine that has two cores."""
    for name in ("demo", "recipes", "scripts", ".venv"):
        (tmp_path / name).symlink_to(demo.folder / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(merge, "default_threads", lambda: 2)
    return tmp_path


def run(*words: str) -> tuple[int, str]:
    """Exit code of a command and what a terminal would show of it."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
        code = execute(words)
    return code, shown.getvalue()


def as_model(save: Save, recipe: Recipe) -> Path:
    """The folder of a model that a recipe has saved, or of what an adapter or the first task of a mask store makes of
    its base."""
    assert save.to is not None
    if save.lora is not None:
        model = f"{{path: {recipe.models[save.lora.base.name].location}, adapter: {save.to}}}"
    elif save.masks is not None:
        model = f'"{save.to}#{next(iter(save.masks.tasks))}"'
    else:
        return Path(save.to)
    Path("folded.yaml").write_text(f"version: 1\nmodels: {{m: {model}}}\nsave: {{step: m, to: out/folded}}\n")
    code, shown = run("run", "folded.yaml")
    assert code == 0, shown
    return Path("out/folded")


def mean_accuracy(weights: digits.Weights, part: str) -> float:
    images, labels = digits.split(part)
    scores = [digits.accuracy(weights, digits.show(task, images), labels) for task in digits.TASKS]
    return sum(scores) / len(scores)


# Recipes


@pytest.mark.parametrize("path", [path for path in RECIPES if path not in OTHERS])
def test_a_recipe_gives_a_network_that_works(path: str, place: Path):
    code, shown = run("run", path)
    assert code == 0 and "warning" not in shown, shown
    recipe = load_recipe(path)
    base = digits.load(Path("demo/base"))
    for save in recipe.saves:
        weights = digits.load(as_model(save, recipe))
        assert all(bool(torch.isfinite(tensor).all()) for tensor in weights.values())
        assert digits.forward(weights, torch.zeros(1, 64)).shape == (1, 10)
        if not any(step.use in ("stack", "slice") for step in recipe.steps.values()):
            assert {name: tensor.shape for name, tensor in weights.items()} == {n: t.shape for n, t in base.items()}
            # Chance is 0.1; the base has about 0.6.
            assert mean_accuracy(weights, "validation") > 0.5


def test_the_recipe_of_merged_experts_gives_a_model_with_fewer(place: Path):
    from transformers import AutoModelForCausalLM

    code, shown = run("run", EXPERTS)
    assert code == 0 and "warning" not in shown, shown
    (save,) = load_recipe(EXPERTS).saves
    assert save.to is not None
    models = [AutoModelForCausalLM.from_pretrained(at) for at in ("demo/experts/seed0/model", save.to)]
    before, after = (model.config.num_local_experts for model in models)
    assert after < before
    tokens = torch.arange(40)[None]
    logits = [model(tokens).logits for model in models]
    assert logits[0].shape == logits[1].shape and bool(torch.isfinite(logits[1]).all())


def test_every_method_has_a_recipe():
    used = {path: {step.use for step in load_recipe(ROOT / path).steps.values()} for path in RECIPES}
    for name in PUBLIC:
        assert name in used.get(f"recipes/methods/{name}.yaml", ()), f"recipes/methods/{name}.yaml is missing"


def test_what_the_quickstart_says_of_itself_holds(place: Path):
    """0.5 is the best of ten factors on the validation split; on the test split the merge beats the plain mean, and the
    mean every fine-tune."""
    models = {name: digits.load(Path("demo") / name) for name in ("base", *digits.TASKS)}

    def merged(step: str, *overrides: str) -> digits.Weights:
        recipe = load_recipe("recipes/quickstart.yaml", [*overrides, f"save={{step: {step}}}"])
        return merge_in_memory(recipe, models)

    factors = [number / 10 for number in range(1, 11)]
    found = {x: mean_accuracy(merged("merged", f"steps.merged.with.lambda={x}"), "validation") for x in factors}
    assert max(found, key=lambda x: found[x]) == 0.5, found
    average = mean_accuracy(merged("average"), "test")
    assert mean_accuracy(merged("merged"), "test") > average + 0.02
    assert average > max(mean_accuracy(weights, "test") for weights in models.values())


# Documents


@pytest.mark.parametrize("document", DOCUMENTS[:6])
def test_blocks_run(document: str, place: Path, demo: Demo):
    """Every fault of a document comes with the line of its block, all at once."""
    faults: list[str] = []
    names: dict[str, Any] = {"__name__": "document"}
    for block in blocks(document):
        try:
            if block.language == "console":
                faults += [f"{block.document}:{block.line}: {fault}" for fault in _console(block, demo)]
            elif block.language == "yaml":
                _recipe(block, names)
            elif block.language == "python":
                if block.file:
                    Path(block.file).write_text(block.text, encoding="utf-8")
                with contextlib.redirect_stdout(io.StringIO()):
                    exec(compile(block.text, f"{block.document}:{block.line}", "exec"), names)
        except Exception as fault:
            faults.append(f"{block.document}:{block.line}: {type(fault).__name__}: {fault}")
    assert not faults, "\n\n".join(faults)


def _recipe(block: Block, names: Mapping[str, Any]) -> None:
    name = block.file or "block.yaml"
    Path(name).write_text(block.text, encoding="utf-8")
    if name.startswith("wrong"):
        return
    if holes_of(block.text, name)[0]:
        Template(name)  # raises where a filling is at fault
        return
    written = yaml.safe_load(block.text)
    if any(step["use"] in names for step in written.get("steps", {}).values()):
        return  # a method that the document defines: `test_the_package_of_the_readme_adds_its_method` runs it
    rest = {key: value for key, value in yaml.safe_load(SKELETON).items() if key not in written}
    if rest:
        Path("block.yaml").write_text(block.text + yaml.safe_dump(rest), encoding="utf-8")
    recipe = load_recipe("block.yaml" if rest else name)
    if all(model.location.startswith("demo/") for model in recipe.models.values()):
        plan(recipe, check_output=False, out=None if any(save.to for save in recipe.saves) else "out/block")


def _console(block: Block, demo: Demo) -> Iterator[str]:
    """What differs from the block, command by command."""
    code = 0
    for command, expected in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", block.text, re.M):
        if command.startswith(BY_HAND):
            continue
        if command == "echo $?":
            shown = f"{code}\n"
        elif command == "make demo":
            shown = demo.printed
        elif command.startswith("merge "):
            code, shown = run(*shlex.split(command)[1:])
        else:
            words = command.replace("python ", shlex.quote(sys.executable) + " ", 1)
            done = subprocess.run(["bash", "-c", words], capture_output=True, text=True, timeout=60)
            code, shown = done.returncode, done.stdout + done.stderr
        if code == 70 or not _same(expected, shown, command):
            yield f"$ {command}\n--- stands there\n{expected}--- is printed\n{shown}"


def _same(expected: str, shown: str, command: str) -> bool:
    rules = VARYING + (NUMBERS if command.startswith(MEASURED) else WIDTHS if command == "merge methods" else [])

    def plain(text: str) -> str:
        for pattern, put in rules:
            text = re.sub(pattern, put, text)
        return "".join(line.rstrip() + "\n" for line in text.splitlines())

    parts = [re.escape(plain(part)) for part in re.split(r"^\.\.\.\n", expected, flags=re.M)]
    return re.fullmatch(".*".join(parts), plain(shown), re.S) is not None


def test_the_page_of_methods_is_fresh():
    """`make docs` writes it."""
    code, shown = run("methods", "--markdown")
    assert code == 0
    assert (ROOT / "docs/methods.md").read_text(encoding="utf-8") == shown


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str):
    text = re.sub(r"^```.*?^```$", "", (ROOT / document).read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"https?:", target):
            path, _, anchor = target.partition("#")
            file = (ROOT / document).parent / path if path else ROOT / document
            assert file.exists(), target
            assert not anchor or anchor in _anchors(file), target


def _anchors(file: Path) -> set[str]:
    """The names of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_map_of_files_is_whole():
    """The README's map names every module once, where it stands. Files of methods may be left to docs/methods.md."""
    (tree,) = (block.text for block in blocks("README.md") if block.text.startswith("mergekit_lite/\n"))
    folders: list[str] = []
    mapped = []
    for line in tree.splitlines():
        lead, name = re.match(r"( *)(\S+)", line).groups()  # type: ignore[union-attr]  # no line is empty
        del folders[len(lead) // 2 :]
        if name.endswith("/"):
            folders.append(name)
        elif name.endswith(".py"):
            mapped.append("".join(folders) + name)
    found = [path.relative_to(ROOT) for path in (ROOT / "mergekit_lite").rglob("*.py")]
    wanted = {str(path) for path in found if path.name != "__init__.py" or len(path.parts) == 2}
    methods = {method.module.replace(".", "/") + ".py" for method in all_methods().values() if method.public}
    assert len(mapped) == len(set(mapped))
    assert wanted - methods <= set(mapped) <= wanted


def test_the_package_of_the_readme_adds_its_method(place: Path):
    """The README's module and its entry point, in a folder as pip installs them, add a method to `merge`."""
    (code,) = (block.text for block in blocks("README.md") if block.file == "merge_clip.py")
    (toml,) = (block.text for block in blocks("README.md") if block.language == "toml")
    group, points = re.findall(r'^\[project\.entry-points\."(.+)"\]\n((?:.+\n)+)', toml, re.M)[0]
    about = Path("site/merge_clip-0.1.dist-info")
    about.mkdir(parents=True)
    Path("site/merge_clip.py").write_text(code, encoding="utf-8")
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: merge-clip\nVersion: 0.1\n")
    (about / "entry_points.txt").write_text(f"[{group}]\n" + points.replace('"', ""))
    recipe = next(block.text for block in blocks("README.md") if block.file == "clip.yaml")
    Path("clip.yaml").write_text(recipe, encoding="utf-8")
    ran = _with_packages("site", "run", "clip.yaml")
    assert ran.returncode == 0, ran.stderr
    base, tuned, clipped = (digits.load(Path(f)) for f in ("demo/base", "demo/turned", "out/clip"))
    for name, start in base.items():
        torch.testing.assert_close(clipped[name], start + (tuned[name] - start).clamp(-0.02, 0.02))
    # Without the package there is no such method.
    assert run("plan", "clip.yaml")[0] == 3


def _with_packages(folder: str, *words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([folder, str(ROOT)])}
    command = [sys.executable, "-m", "mergekit_lite", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
