"""Imports point one way, heavy ones stay where they belong, and the command line starts without them."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mergekit_lite"
# Top to bottom. Those on one line do not import each other.
ORDER = [
    {"__main__", "__init__"},
    {"cli"},
    {"choose"},
    {"merge"},
    {"calibrate"},
    {"publish", "report", "evaluate"},
    {"run"},
    {"plan"},
    {"align", "vocabulary"},
    {"recipe", "methods", "family", "checkpoint"},
    {"sandbox"},
    {"errors", "lazy", "redact", "limits"},
]
LEVEL = {part: level for level, parts in enumerate(ORDER) for part in parts}
CUDA_HOME, ACCELERATE_HOME = "run/device.py", "run/ranks.py"
WITHOUT_TORCH = ("recipe/", "family/", "checkpoint/meta.py", "checkpoint/header.py", "checkpoint/find.py", "errors.py")


def imported(tree: ast.AST, file: str) -> Iterator[tuple[int, str]]:
    """Every module that a file imports anywhere in it, as (line, dotted name). `file` is relative to the package."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                parents = ["mergekit_lite", *Path(file).parent.parts]
                module = ".".join([*parents[: len(parents) - node.level + 1], *filter(None, [module])])
            # `from package import name` may import a module of that name.
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def part_of(module: str) -> str | None:
    """The part of the package that a dotted name belongs to; None for other packages."""
    head, _, rest = module.partition(".")
    if head != "mergekit_lite":
        return None
    part = rest.partition(".")[0]
    return part if part in LEVEL else "__init__"


def faults(file: str, text: str) -> list[str]:
    """What a file of the package does against the layers. `file` is relative to the package."""
    tree = ast.parse(text)
    home = Path(file).parts[0].removesuffix(".py")
    if home not in LEVEL:
        return [f"{file}: `{home}` has no place in the order of layers"]
    found = []
    for line, module in imported(tree, file):
        part = part_of(module)
        if part is not None and part != home and LEVEL[part] <= LEVEL[home]:
            found.append(f"{file}:{line}: {home} imports {part} ({module})")
        root = module.partition(".")[0]
        if root == "torch" and file.startswith(WITHOUT_TORCH):
            found.append(f"{file}:{line}: imports torch")
        if root == "accelerate" and file != ACCELERATE_HOME:
            found.append(f"{file}:{line}: imports accelerate")
    if file != CUDA_HOME:
        found += [f"{file}:{line}: names cuda" for line in cuda_lines(tree)]
    return found


def cuda_lines(tree: ast.AST) -> Iterator[int]:
    """Where code, not prose, names cuda: `torch.cuda`, `.cuda()`, "cuda:0"."""
    for node in ast.walk(tree):
        named = (
            (isinstance(node, ast.Attribute) and node.attr == "cuda")
            or (isinstance(node, ast.Name) and node.id == "cuda")
            or (isinstance(node, ast.alias) and "cuda" in node.name.split("."))
            or (isinstance(node, ast.ImportFrom) and "cuda" in (node.module or "").split("."))
            or (isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.split(":")[0] == "cuda")
        )
        if named:
            yield node.lineno


def test_no_file_breaks_the_layers():
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 10
    found = [fault for f in files for fault in faults(f.relative_to(PACKAGE).as_posix(), f.read_text(encoding="utf-8"))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("plan/build.py", "from mergekit_lite.run.execute import go"),
        ("plan/build.py", "def f():\n    import mergekit_lite.run.execute"),
        ("plan/build.py", "from mergekit_lite import merge"),
        ("plan/build.py", "from mergekit_lite import load_recipe"),
        ("plan/build.py", "from ..run import execute"),
        ("recipe/read.py", "from mergekit_lite.checkpoint.meta import Checkpoint"),
        ("recipe/read.py", "from ..checkpoint.meta import Checkpoint"),
        ("errors.py", "from mergekit_lite.recipe.value import Value"),
        ("novel/a.py", ""),
        ("recipe/read.py", "import torch"),
        ("checkpoint/find.py", "def f():\n    from torch import Tensor"),
        ("run/execute.py", "import accelerate"),
        ("run/execute.py", "from accelerate import PartialState"),
        ("run/execute.py", "torch.cuda.is_available()"),
        ("run/execute.py", "x.cuda()"),
        ("run/execute.py", "from torch import cuda"),
        ("run/execute.py", "from torch.cuda import Stream"),
        ("run/execute.py", 'x.to("cuda:0")'),
    ],
)
def test_each_kind_of_fault_is_seen(file: str, text: str):
    assert len(faults(file, text)) >= 1


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("plan/build.py", "from mergekit_lite.recipe.value import Value\nfrom mergekit_lite.errors import Problem"),
        ("plan/build.py", "from .check import check\nfrom ..checkpoint.meta import Checkpoint"),
        ("run/device.py", "import torch\ntorch.cuda.is_available()"),
        ("run/ranks.py", "from accelerate import PartialState"),
        ("checkpoint/reader.py", "import torch"),
        ("cli/app.py", 'help = "where to compute: cpu or cuda"'),
    ],
)
def test_what_is_allowed_passes(file: str, text: str):
    assert faults(file, text) == []


def test_the_command_line_starts_without_heavy_imports():
    heavy = ["torch", "transformers", "huggingface_hub", "accelerate", "matplotlib", "numpy"]
    code = f"import sys, mergekit_lite.cli.app; print(*(m for m in {heavy} if m in sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == []
