"""Methods from outside: real packages, installed with pip, used by recipes in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
HALVES = '''
"""A method of one file, as docs and README tell an author to write it."""

from mergekit_lite.methods.registry import method
from mergekit_lite.methods.spec import Param


@method(Param("share", "number", 0.5, "share of the first input", low=0, high=1), inputs=(2, 2))
def halves(xs, share):
    """Weighted mean of two models."""
    return xs[0] * share + xs[1] * (1 - share)
'''
HALFWAY = '''
"""A composite beside a base that it uses itself."""

from mergekit_lite.methods import get
from mergekit_lite.methods.registry import method
from mergekit_lite.methods.spec import Param


@method(
    Param("weight", "number", 1.0, "share of this model", per_input=True),
    Param("t", "number", 0.5, "place on the line from the base to the mean", low=0, high=1),
    takes="weight",
    gives="weight",
    base="required",
    composite=True,
)
def halfway(*slots, weight, t):
    """Part of the way from the base to the mean of the models."""
    *models, base = slots
    return get("interpolate")(base, get("linear")(*models, weight=weight), t=t)
'''
RECIPE = """\
version: 1
models: {a: ./a, b: ./b}
steps: {m: {use: METHOD, of: [a, b]SETTINGS}}
save: {to: out}
"""


def build(folder: Path, name: str, source: str, entry: str) -> Path:
    """A wheel with one module `name` and one entry point, made by hand: nothing is built, so nothing is downloaded."""
    info = f"{name}-1.0.dist-info"
    wheel = folder / f"{name}-1.0-py3-none-any.whl"
    files = {
        f"{name}.py": source,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": f"[mergekit_lite.methods]\n{name} = {entry}\n",
    }
    record = "".join(f"{file},,\n" for file in (*files, f"{info}/RECORD"))
    with zipfile.ZipFile(wheel, "w") as archive:
        for file, text in {**files, f"{info}/RECORD": record}.items():
            archive.writestr(file, text)
    return wheel


def install(folder: Path, name: str, source: str, entry: str | None = None, pip: bool = False) -> None:
    """Put a package into the folder `site`, with pip, or the way that pip does it."""
    wheel = build(folder, name, source, entry or name)
    if pip:
        command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", "--target"]
        subprocess.run([*command, str(folder / "site"), str(wheel)], check=True, capture_output=True, timeout=120)
    else:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder / "site")


def merge(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command in a process that sees the installed packages."""
    path = os.pathsep.join([str(ROOT), str(folder / "site")])
    return subprocess.run(
        [sys.executable, "-m", "mergekit_lite", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path, "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def folder(tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> Path:
    for seed, name in enumerate("ab"):
        tiny_checkpoint(tmp_path / name, seed=seed)
    (tmp_path / "r.yaml").write_text(
        RECIPE.replace("METHOD", "halves").replace("SETTINGS", ", with: {share: 0.25}"), encoding="utf-8"
    )
    (tmp_path / "plain.yaml").write_text(RECIPE.replace("METHOD", "linear").replace("SETTINGS", ""), encoding="utf-8")
    return tmp_path


def test_an_installed_method_merges(folder: Path) -> None:
    absent = merge(folder, "run", "r.yaml")
    assert absent.returncode == 3 and "there is no method `halves`" in absent.stderr
    install(folder, "merge_halves", HALVES, pip=True)
    ran = merge(folder, "run", "r.yaml")
    assert (ran.returncode, ran.stderr) == (0, "")
    a, b, ours = (load_file(folder / name / "model.safetensors") for name in ("a", "b", "out"))
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, a[name] * 0.25 + b[name] * 0.75)
    page = merge(folder, "methods", "halves")
    assert page.returncode == 0 and "Weighted mean of two models." in page.stdout and "share" in page.stdout
    # Its settings are checked as those of the built-in methods are.
    refused = merge(folder, "plan", "r.yaml", "--set", "steps.m.with.share=2")
    assert refused.returncode == 3 and "`share` must lie in [0, 1], not 2" in refused.stderr


def test_a_composite_gets_the_base_as_its_last_slot(folder: Path) -> None:
    install(folder, "merge_halfway", HALFWAY)
    recipe = RECIPE.replace("METHOD", "halfway").replace("of: [a, b]", "of: {a: {weight: 3}, b: }")
    recipe = recipe.replace("b: ./b", "b: ./b, c: ./c")
    (folder / "c").symlink_to(folder / "a")
    (folder / "none.yaml").write_text(recipe.replace("SETTINGS", ""), encoding="utf-8")
    (folder / "based.yaml").write_text(recipe.replace("SETTINGS", ", base: c, with: {t: 0.25}"), encoding="utf-8")
    absent = merge(folder, "plan", "none.yaml")
    assert absent.returncode == 3 and "`halfway` needs a `base`" in absent.stderr
    ran = merge(folder, "run", "based.yaml")
    assert (ran.returncode, ran.stderr) == (0, "")
    a, b, ours = (load_file(folder / name / "model.safetensors") for name in ("a", "b", "out"))
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, a[name] * (0.75 + 0.25 * 0.75) + b[name] * 0.25 * 0.25)
    assert "interpolate(base, linear(a, b), t=0.5)" in merge(folder, "methods", "halfway").stdout


BROKEN = {
    "merge_import": ("import a_module_that_is_not_there\n", None, "do not load (ModuleNotFoundError"),
    "merge_syntax": ("def broken(:\n", None, "do not load (SyntaxError"),
    "merge_raise": ("raise SystemError('no luck')\n", None, "do not load (SystemError('no luck')"),
    "merge_empty": ("x = 1\n", None, "the module has no method"),
    "merge_number": ("x = 1\n", "merge_number:x", "neither a module nor a method but int"),
    "merge_absent": ("x = 1\n", "merge_absent:y", "do not load (AttributeError"),
    "merge_silent": (HALVES.replace('    """Weighted mean of two models."""\n', ""), None, "needs a docstring"),
}


def test_broken_packages_are_named_and_nothing_runs(folder: Path) -> None:
    for name, (source, entry, _) in BROKEN.items():
        install(folder, name, source, entry)
    ran = merge(folder, "run", "plain.yaml")
    assert ran.returncode == 4 and "Traceback" not in ran.stderr
    problems = {text.split("`")[1]: text for text in ran.stderr.split("\n\n")}
    assert problems.keys() == BROKEN.keys()
    for name, (_, _, says) in BROKEN.items():
        assert problems[name].startswith(f"error: the package `{name}` is broken: ")
        assert says in problems[name]
        assert f"hint: upgrade or uninstall the package `{name}`" in problems[name]
    assert not (folder / "out").exists()


def test_a_name_that_is_taken(folder: Path) -> None:
    install(folder, "merge_clash", HALVES.replace("halves", "linear"))
    install(folder, "merge_one", HALVES)
    install(folder, "merge_two", HALVES)
    ran = merge(folder, "run", "plain.yaml")
    assert ran.returncode == 4
    assert ran.stderr.count("error: ") == 2
    assert "the package `merge_clash` has a method `linear`, a name that `mergekit_lite` uses already" in ran.stderr
    assert "the package `merge_two` has a method `halves`, a name that `merge_one` uses already" in ran.stderr


@pytest.mark.parametrize(
    "body, says",
    [
        ("raise ValueError('not my day')", "method `halves` failed: ValueError('not my day')"),
        ("return xs[0][:1]", "method `halves` gave 1 number for a block of"),
        ("return None", "method `halves` gave a NoneType for a block of"),
    ],
)
def test_a_method_that_fails_is_named(body: str, says: str, folder: Path) -> None:
    install(folder, "merge_halves", HALVES.replace("return xs[0] * share + xs[1] * (1 - share)", body))
    ran = merge(folder, "run", "r.yaml")
    assert ran.returncode == 70
    assert ran.stderr.startswith(f"error: {says}")
    assert "hint: this is a fault of `merge_halves`, which brings the method" in ran.stderr
    assert not (folder / "out").exists()
