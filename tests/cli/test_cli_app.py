"""Manners of the command line: help, wrong words, errors and their exit codes, streams, colours."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from cli_process import Ran, command, environ

import mergekit_lite.merge
from mergekit_lite.cli.app import COMMANDS, app

Merge = Callable[..., Ran]
NAMES = [each.__name__ for each in COMMANDS]
SEVERAL = """\
version: 1
models: {base: ./base, math: ./math}
steps:
  merged:
    use: ties
    base: bsae
    of:
      math: {weight: 1.0, desnity: 0.2}
save: {to: out/ties, dtype: int8}
"""
BIG = """\
version: 1
models: {base: big/base, math: big/math, code: big/code}
steps:
  merged: {use: dare_ties, base: base, of: [math, code], with: {drop_rate: 0.7}}
save: {to: out, shard: 10MB}
"""


def on_terminal(*arguments: str, **environment: str) -> tuple[int, str]:
    """Exit code and stderr of a command whose stderr is a terminal."""
    ours, theirs = pty.openpty()
    started = subprocess.Popen(
        command(*arguments),
        env=environ(**environment),
        stdout=subprocess.DEVNULL,
        stderr=theirs,
        stdin=subprocess.DEVNULL,
    )
    os.close(theirs)
    text = b""
    try:
        while part := os.read(ours, 4096):
            text += part
    except OSError:  # Linux ends a terminal so
        pass
    os.close(ours)
    return started.wait(timeout=60), text.decode()


def test_help_lists_the_commands_in_order(merge: Merge):
    for arguments in ([], ["--help"], ["-h"]):
        ran = merge(*arguments)
        assert (ran.code, ran.err) == (0, "")
        listed = re.findall(r"^  ([a-z]+)  ", ran.out.partition("Commands:")[2], re.M)
        assert listed == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_help_of_each_command(merge: Merge, name: str):
    """Plain text for a person: every option explained, no markup, escape or rich tag left over."""
    ran = merge(name, "--help")
    assert ran.code == 0
    assert ran.out.startswith(f"Usage: merge {name} ")
    assert not re.search(r"\x1b|\[/?(bold|red|green|dim|cyan|link)|``|\*\*|\\f", ran.out)
    assert max(map(len, ran.out.splitlines())) <= 100
    parsed = typer.main.get_command(app).commands[name]
    for param in parsed.params:
        assert param.help and param.help.endswith("."), param.name
        if param.name != "help":
            assert (param.opts[0] if param.param_type_name == "option" else param.metavar) in ran.out


@pytest.mark.parametrize("name", NAMES)
def test_each_command_has_json(name: str):
    parsed = typer.main.get_command(app).commands[name]
    assert any("--json" in param.opts for param in parsed.params)


def test_version(merge: Merge):
    ran = merge("--version")
    assert (ran.code, ran.err) == (0, "")
    assert re.fullmatch(r"mergekit_lite \S+\n", ran.out)


@pytest.mark.parametrize(
    "arguments, message, hint",
    [
        (["rnu", "x.yaml"], "there is no command `rnu`", "did you mean `merge run`?"),
        (["xyzzy"], "there is no command `xyzzy`", "`merge --help` lists them all"),
        (["--vrsion"], "`merge` has no option `--vrsion`", "did you mean `--version`?"),
        (["run", "x.yaml", "--ressume"], "`merge run` has no option `--ressume`", "did you mean `--resume`?"),
        (["run", "x.yaml", "--quux"], "`merge run` has no option `--quux`", "`merge run --help` explains it"),
        (["run"], "missing argument `RECIPE`", "`merge run --help` explains it"),
        (["run", "--set"], "option `--set` requires an argument", "`merge run --help` explains it"),
        (["convert"], "missing argument `RECIPE`", "name a recipe, or ask for the `--schema`"),
        (["methods", "tise"], "there is no method `tise`", "did you mean `ties`?"),
    ],
)
def test_a_wrong_command_line(merge: Merge, arguments: list[str], message: str, hint: str):
    assert merge(*arguments) == Ran(2, "", f"error: {message}\nhint: {hint}\n")


@pytest.mark.parametrize(
    "arguments", [["run", "x", "--threads", "0"], ["plan", "x", "--dag", "dot"], ["run", "a", "b"]]
)
def test_a_wrong_value(merge: Merge, arguments: list[str]):
    ran = merge(*arguments)
    assert (ran.code, ran.out) == (2, "")
    assert re.fullmatch(
        r"error: (invalid value for `--(threads|dag)`: |got unexpected extra arg).*\nhint: .*\n", ran.err
    )


def test_a_missing_file(merge: Merge, folder: Path):
    ran = merge("run", "tise.yaml")
    assert ran == Ran(4, "", "error: there is no recipe `tise.yaml`\nhint: did you mean `ties.yaml`?\n")


def test_all_faults_of_a_recipe_at_once(merge: Merge, folder: Path):
    Path("bad.yaml").write_text(SEVERAL, encoding="utf-8")
    ran = merge("plan", "bad.yaml")
    assert (ran.code, ran.out) == (3, "")
    assert (
        ran.err
        == """\
error: there is no model or step `bsae`
  --> bad.yaml:6:11
   |
 6 |     base: bsae
   |           ^^^^
hint: did you mean `base`?

error: `ties` has no per-input setting `desnity`
  --> bad.yaml:8:27
   |
 8 |       math: {weight: 1.0, desnity: 0.2}
   |                           ^^^^^^^
hint: did you mean `density`? `merge methods ties` lists them all

error: `dtype` must be a floating type, not the text `int8`
  --> bad.yaml:9:29
   |
 9 | save: {to: out/ties, dtype: int8}
   |                             ^^^^
hint: known here: `float64`, `float32`, `float16`, `bfloat16`, `float8_e4m3fn`, `float8_e5m2`
"""
    )


@pytest.mark.parametrize("name", ["run", "plan", "convert"])
def test_errors_as_json(merge: Merge, folder: Path, name: str):
    Path("bad.yaml").write_text(SEVERAL, encoding="utf-8")
    ran = merge(name, "bad.yaml", "--json")
    error = ran.json["error"]
    assert (ran.code, error["exit_code"], len(error["problems"])) == (3, 3, 3)
    assert error["problems"][0] == {
        "message": "there is no model or step `bsae`",
        "place": {"file": "bad.yaml", "line": 6, "column": 11},
        "hint": "did you mean `base`?",
    }
    assert ran.err.count("error: ") == 3


def test_a_wrong_command_line_as_json(merge: Merge):
    ran = merge("run", "--json", "--ressume")
    assert ran.json == {
        "error": {
            "exit_code": 2,
            "problems": [
                {"message": "`merge run` has no option `--ressume`", "place": None, "hint": "did you mean `--resume`?"}
            ],
        }
    }


def test_a_bug_says_so(merge: Merge, monkeypatch: pytest.MonkeyPatch, folder: Path):
    def broken(*arguments: object) -> None:
        raise ZeroDivisionError("no \x1b[31mred")

    monkeypatch.setattr(mergekit_lite.merge, "load_recipe", broken)
    ran = merge("plan", "ties.yaml", "--json")
    assert ran.code == ran.json["error"]["exit_code"] == 70
    assert "Traceback" in ran.err and "in broken" in ran.err
    assert re.search(
        r"error: this is a bug of mergekit_lite \S+: ZeroDivisionError: no \\x1b\[31mred\nhint: please report", ran.err
    )
    assert "\x1b" not in ran.err + ran.out


def test_text_of_a_recipe_cannot_drive_the_terminal(merge: Merge, folder: Path):
    Path("odd.yaml").write_text(
        'version: 1\nsteps: {m: {use: "l\\e[31mx", of: "./ba\\e]0;title\\a"}}\nsave: {to: o}\n', encoding="utf-8"
    )
    ran = merge("plan", "odd.yaml")
    assert ran.code == 3
    assert "`l\\x1b[31mx`" in ran.err
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", ran.err + ran.out)


def test_rich_markup_in_names_is_plain_text(merge: Merge, folder: Path):
    ran = merge("plan", "[red]x[/red].yaml")
    assert "`[red]x[/red].yaml`" in ran.err


def test_colours_on_a_terminal_only_and_not_under_no_color(process: Merge, folder: Path):
    code, coloured = on_terminal("plan", "none.yaml")
    assert code == 4
    assert coloured.startswith("\x1b[1;31merror:\x1b[0m there is no recipe `none.yaml`")
    plain = coloured.replace("\x1b[1;31m", "").replace("\x1b[1;36m", "").replace("\x1b[0m", "")
    assert on_terminal("plan", "none.yaml", NO_COLOR="1") == (4, plain)
    assert "\x1b" not in plain
    assert process("plan", "none.yaml").err == plain.replace("\r\n", "\n")


def test_a_reader_that_is_gone(folder: Path):
    """`merge methods --markdown | head -1`: no traceback, no message."""
    read, write = os.pipe()
    started = subprocess.Popen(command("methods", "--markdown"), env=environ(), stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    os.close(read)
    _, err = started.communicate(timeout=60)
    assert (started.returncode, err) == (141, b"")


@pytest.mark.parametrize("name", [signal.SIGINT, signal.SIGTERM])
def test_stopping_and_going_on(name: signal.Signals, folder: Path, tiny_checkpoint: Callable[..., Path]):
    """A run is stopped once it has shown a finished tensor; `--resume` gives the bytes of an undisturbed run."""
    names = {f"layers.{i}.weight": (512, 512) for i in range(64)}
    for seed, model in enumerate(("base", "math", "code")):
        tiny_checkpoint(Path("big") / model, names, seed=seed, config=None)
    Path("big.yaml").write_text(BIG, encoding="utf-8")
    ours, theirs = pty.openpty()
    words = command("run", "big.yaml", "--out", "out/a", "--threads", "1")
    started = subprocess.Popen(words, env=environ(COLUMNS="120"), stdout=subprocess.PIPE, stderr=theirs)
    os.close(theirs)
    shown = ""
    deadline = time.monotonic() + 60
    while not re.search(r" [1-9]\d*/64  shard \d/\d  [\d.]+ \wB/s", shown):
        assert time.monotonic() < deadline and started.poll() is None, shown
        shown += os.read(ours, 4096).decode()
    started.send_signal(name)
    try:
        while part := os.read(ours, 4096):
            shown += part.decode()
    except OSError:
        pass
    out, _ = started.communicate(timeout=60)
    os.close(ours)
    assert started.returncode == 130, shown
    assert out == b""
    assert "stopped by Ctrl-C" in shown and "the same command with `--resume` goes on" in shown
    assert not Path("out/a").exists() and Path("out/a.partial").is_dir()

    again = run_json("big.yaml", "--out", "out/a", "--resume")
    whole = run_json("big.yaml", "--out", "out/b")
    assert 1 <= again["resumed"] < 64 and whole["resumed"] == 0
    assert again["outputs"][0]["shards"] == whole["outputs"][0]["shards"]
    assert not Path("out/a.partial").exists()


def run_json(*arguments: str) -> dict:
    done = subprocess.run(
        command("run", "--json", *arguments), env=environ(), capture_output=True, timeout=60, check=True
    )
    assert done.stderr == b""
    return json.loads(done.stdout)
