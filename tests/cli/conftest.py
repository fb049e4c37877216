"""Running commands: in this process where that is enough, in one of their own where streams and signals matter."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_process import Ran, command, environ

from mergekit_lite.cli.app import execute

TIES = """\
version: 1
models: {base: ./base, math: ./math, code: ./code}
steps:
  merged:
    use: ties
    base: base
    of:
      math: {weight: 1.0, density: 0.2}
      code: {weight: 0.8, density: 0.3}
save: {to: out/ties, dtype: bfloat16}
"""


@pytest.fixture
def merge(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """`merge("run", "ties.yaml")` runs a command in this process."""

    def run(*arguments: str) -> Ran:
        capsys.readouterr()
        code = execute(arguments)
        out, err = capsys.readouterr()
        return Ran(code, out, err)

    return run


@pytest.fixture
def process() -> Callable[..., Ran]:
    """`process("run", "ties.yaml", NO_COLOR="1")` runs a command in a process of its own, with more environment."""

    def run(*arguments: str, **environment: str) -> Ran:
        done = subprocess.run(
            command(*arguments), env=environ(**environment), capture_output=True, text=True, timeout=60
        )
        return Ran(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Callable[..., Path]) -> Path:
    """A working directory with the checkpoints `base`, `math`, `code` and the recipe `ties.yaml` over them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_COLOR", "1")
    for seed, name in enumerate(("base", "math", "code")):
        tiny_checkpoint(tmp_path / name, seed=seed)
    (tmp_path / "ties.yaml").write_text(TIES, encoding="utf-8")
    return tmp_path
