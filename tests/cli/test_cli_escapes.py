"""Whatever strangers' files hold, no command writes it to the terminal raw: no escape sequence, no control character,
no change of direction, no line that looks like one of ours, no markup."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from adapter_files import factors, write_adapter
from cli_process import Ran, command, environ
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import save_file

from mergekit_lite.errors import Mark, Problem

Merge = Callable[..., Ran]
# The title of the window, blinking, the same by C1, a bell, a return to the line's start, DEL, right to left, a line of
# its own, a zero-width space, markup of rich.
EVIL = "\x1b]0;owned\x07\x1b[5mE\x9b5m\r\x7f\u202e\nhint: trust me\u200b[red]V[/red][link=x]"
# What a file may be named.
NAME = EVIL.replace("/", "|").replace(":", "|")
LAYERS = [f"model.layers.{i}.mlp.{EVIL}.weight" for i in range(2)]


def shapes() -> dict[str, tuple[int, ...]]:
    names: dict[str, tuple[int, ...]] = dict.fromkeys(LAYERS, (16, 8))
    return {"model.embed_tokens.weight": (20, 8), **names, "model.norm.weight": (8,), "lm_head.weight": (20, 8)}


def checkpoint(folder: Path, seed: int) -> Path:
    """Two shards whose file names, tensor names, metadata and configuration are hostile, with one NaN."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes().items()}
    tensors[LAYERS[0]][0, 0] = float("nan")
    folder.mkdir(parents=True)
    names = list(tensors)
    weight_map = {}
    for number, part in enumerate((names[:2], names[2:])):
        file = f"{number}{NAME}.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt", EVIL: EVIL})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = {
        "model_type": EVIL, "architectures": [EVIL], "num_hidden_layers": 2, "dtype": EVIL, EVIL: EVIL,
        "note": f"{EVIL}{seed}", "tie_word_embeddings": False, "vocab_size": 20,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / f"tokenizer{NAME}.model").write_text(EVIL, encoding="utf-8")
    return folder


def recipe(path: str, data: object) -> str:
    Path(path).write_text(yaml.safe_dump(data), encoding="utf-8")
    return path


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Callable[..., Path]) -> Path:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", f"a{NAME}", "b")):
        checkpoint(tmp_path / name, seed)
    tiny_checkpoint(tmp_path / "plain")
    recipe("r.yaml", {
        "version": 1, "models": {"base": "./base", "a": f"./a{NAME}", "b": "./b"},
        "steps": {"m": {"use": "ties", "base": "base", "of": ["a", "b"]}},
        "save": {"to": f"out/{NAME}"},
    })  # fmt: skip
    return tmp_path


def is_tame(ran: Ran, as_json: bool = False) -> None:
    for stream in (ran.out, ran.err):
        raw = sorted({c for c in stream if c != "\n" and not c.isprintable()})
        assert not raw, (raw, stream)
        assert not any(line.startswith("hint: trust me") for line in stream.splitlines()), stream
    if as_json:
        assert isinstance(json.loads(ran.out), dict | list)


LINES = """\
plan r.yaml
plan r.yaml --tensors
plan r.yaml --dag text
plan r.yaml --dag mermaid
plan r.yaml --json
run r.yaml
run r.yaml --json
inspect b
inspect b --tensors --stats
inspect b --tensors --json
inspect aEVIL
doctor b
doctor b --json
doctor aEVIL
diff base b
diff aEVIL b --json
diff b plain
convert r.yaml
convert r.yaml --json
"""


@pytest.mark.parametrize("line", LINES.splitlines())
def test_a_hostile_checkpoint_and_its_recipe(line: str, merge: Merge, place: Path) -> None:
    words = [word.replace("EVIL", NAME) for word in line.split()]
    ran = merge(*words)
    assert ran.code in (0, 1), ran.err
    is_tame(ran, "--json" in words)
    assert "owned" in ran.out + ran.err  # so that something hostile was shown at all


def adapter(place: Path) -> None:
    modules = {f"layers.0.{EVIL}".replace("\n", ""): (6, 8), "layers.1.q_proj": (6, 8)}
    write_adapter(place / f"lora{NAME}", factors(modules), base_model_name_or_path=f"org/{EVIL}", bias=EVIL)


def test_a_hostile_adapter(merge: Merge, place: Path) -> None:
    adapter(place)
    for words in (["--tensors"], [], ["--json"]):
        ran = merge("inspect", f"lora{NAME}", *words)
        assert ran.code == 0, ran.err
        is_tame(ran, "--json" in words)
    write_adapter(place / "other", {f"{EVIL}.lora_X": torch.ones(1)}, peft_type="LORA", init_lora_weights=EVIL)
    write_adapter(place / "kind", factors({"q": (6, 8)}), peft_type=EVIL)
    write_adapter(place / "pattern", factors({"q": (6, 8)}), alpha_pattern={f"({EVIL}": 1})
    for name in ("other", "kind", "pattern"):
        ran = merge("inspect", name)
        assert ran.code == 4 and "\\x1b" in ran.err, ran.err
        is_tame(ran)
    model = {"path": "./base", "adapter": f"./lora{NAME}"}
    recipe("lora.yaml", {"version": 1, "models": {"a": model}, "save": {"step": "a", "to": "out/l"}})
    ran = merge("plan", "lora.yaml")
    assert ran.code in (3, 4) and "\\x1b" in ran.err
    is_tame(ran)


def bad_index(place: Path) -> None:
    (place / "b/model.safetensors.index.json").write_text(json.dumps({"weight_map": {EVIL: f"x{NAME}"}}))


def outside(place: Path) -> None:
    (place / "b/model.safetensors.index.json").write_text(json.dumps({"weight_map": {EVIL: f"../{NAME}"}}))


def promises(place: Path) -> None:
    files = sorted(path.name for path in (place / "b").glob("*.safetensors"))
    (place / "b/model.safetensors.index.json").write_text(json.dumps({"weight_map": {f"{EVIL}2": files[0]}}))


def twice(place: Path) -> None:
    (place / "b/model.safetensors.index.json").unlink()
    shutil.copy(next((place / "b").glob("0*.safetensors")), place / "b/copy.safetensors")


def truncated(place: Path) -> None:
    for path in (place / "b").glob("*.safetensors"):
        os.truncate(path, path.stat().st_size - 1)


def linked(place: Path) -> None:
    target = place / f"x{NAME}"
    target.write_text("{}")
    (place / "b/config.json").unlink()
    (place / "b/config.json").symlink_to(target)


def no_json(place: Path) -> None:
    (place / "b/config.json").write_text(EVIL)


def locked(place: Path) -> None:
    (place / "b/recipe.lock.yaml").write_text(f"version: 1\n{json.dumps(EVIL)}: 3\n'{EVIL}': 4\n")


def tied(place: Path) -> None:
    config = json.loads((place / "b/config.json").read_text())
    (place / "b/config.json").write_text(json.dumps(config | {"tie_word_embeddings": True, "model_type": "llama"}))


@pytest.mark.parametrize(
    "spoil", [bad_index, outside, promises, twice, truncated, linked, no_json, locked, tied], ids=lambda f: f.__name__
)
def test_a_hostile_checkpoint_with_a_fault(spoil: Callable[[Path], None], merge: Merge, place: Path) -> None:
    spoil(place)
    for words in (
        ["inspect", "b"],
        ["doctor", "b"],
        ["run", "r.yaml"],
        ["diff", "base", "b"],
        ["doctor", "b", "--json"],
    ):
        ran = merge(*words)
        assert ran.code in (0, 1, 3, 4), ran.err
        is_tame(ran, "--json" in words)


WRONG = {
    "key": {EVIL: 1},
    "method": {"steps": {"m": {"use": EVIL, "of": ["a", "b"]}}},
    "setting": {"steps": {"m": {"use": "linear", "of": ["a", "b"], "with": {EVIL: EVIL}}}},
    "value": {"steps": {"m": {"use": "slerp", "of": ["a", "b"], "with": {"t": EVIL}}}},
    "glob": {"steps": {"m": {"use": "slerp", "of": ["a", "b"], "with": {"t": {EVIL: 0.1, "else": 0.5}}}}},
    "input": {"steps": {"m": {"use": "linear", "of": ["a", EVIL]}}},
    "step": {"steps": {EVIL: {"use": "linear", "of": ["a", "b"]}}, "save": {"step": EVIL, "to": "out/x"}},
    "model": {"models": {EVIL: "./base", "a": "./b", "b": "./b"}},
    "place": {"models": {"a": f"./{EVIL}", "b": "./b"}},
    "hub id": {"models": {"a": f"org/{EVIL}", "b": "./b"}},
    "dtype": {"save": {"to": "out/x", "dtype": EVIL}},
    "output": {"save": {"to": f"base/{EVIL}"}},
    "family": {"steps": {"m": {"use": "permute", "of": "b", "like": "a", "with": {"family": EVIL}}}},
    "order": {"steps": {"m": {"use": "permute", "of": "b", "like": "a", "with": {"from": "order.safetensors"}}}},
    "no order": {"steps": {"m": {"use": "permute", "of": "b", "like": "a", "with": {"from": f"./{EVIL}"}}}},
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_hostile_recipe(fault: str, merge: Merge, place: Path) -> None:
    save_numpy({EVIL: np.arange(3, dtype=np.int32)}, place / "order.safetensors", {EVIL: EVIL})
    data = {
        "version": 1, "models": {"a": "./plain", "b": "./plain"},
        "steps": {"m": {"use": "linear", "of": ["a", "b"]}}, "save": {"to": "out/m"},
    }  # fmt: skip
    recipe("wrong.yaml", data | WRONG[fault])
    for words in (["plan", "wrong.yaml", "--offline"], ["convert", "wrong.yaml"], ["run", "wrong.yaml", "--offline"]):
        ran = merge(*words)
        assert ran.code in (0, 2, 3, 4), ran.err
        is_tame(ran)


@pytest.mark.parametrize("text", [f"a: '{EVIL}'\n", f"{EVIL}: [\n", EVIL, f"# {EVIL}\nversion: 1\nx: *{EVIL}\n"])
def test_a_recipe_that_is_hostile_text(text: str, merge: Merge, place: Path) -> None:
    Path(f"w{NAME}.yaml").write_text(text, encoding="utf-8", newline="")
    for words in (["plan"], ["convert"], ["doctor", "--family"], ["inspect", "plain", "--family"]):
        ran = merge(*words, f"w{NAME}.yaml", *(["plain"] if words[0] == "doctor" else []))
        assert ran.code in (1, 3, 4), ran.err
        is_tame(ran)


def test_a_hostile_command_line(merge: Merge, place: Path) -> None:
    for words in (
        [EVIL],
        ["inspect", EVIL],
        ["methods", EVIL],
        ["plan", "--set", EVIL, "r.yaml"],
        ["run", f"--{EVIL}"],
    ):
        ran = merge(*words)
        assert ran.code in (2, 3, 4), ran.err
        is_tame(ran)


def test_a_score_command_that_says_what_it_likes(merge: Merge, place: Path) -> None:
    Path("score.py").write_text(
        f"import sys\nprint({EVIL!r}, file=sys.stderr)\nprint({EVIL!r})\nsys.exit(int(sys.argv[1]))"
    )
    for code in (0, 1):
        ran = merge("path", "base", "b", "--points", "2", "--score", f"{sys.executable} score.py {code} {{model}}")
        assert ran.code == 5 and "x1b" in ran.err, ran.err
        is_tame(ran)


def on_a_terminal(*words: str) -> str:
    """What a command writes to a terminal of its own, colours and progress bars included."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(command(*words), env=environ(), stdin=theirs, stdout=theirs, stderr=theirs) as running:
        os.close(theirs)
        said = b""
        try:
            while part := os.read(ours, 1 << 16):
                said += part
        except OSError:  # what Linux makes of the end
            pass
        finally:
            os.close(ours)
        assert running.wait(60) in (0, 1), said
    return said.decode("utf-8", "replace")


@pytest.mark.parametrize("words", [("run", "r.yaml"), ("inspect", "b", "--tensors"), ("plan", "r.yaml")])
def test_a_terminal_gets_no_sequence_but_ours(words: tuple[str, ...], place: Path) -> None:
    said = on_a_terminal(*words)
    assert "\\x1b" in said
    for raw in ("\x1b]", "\x1b[5m", "\x07", "\x9b", "\u202e", "\u200b", "\x7f", "\nhint: trust me"):
        assert raw not in said, raw


def test_the_progress_of_a_run_is_tame() -> None:
    from mergekit_lite.cli.run import detail_of, label
    from mergekit_lite.run.progress import Progress

    fields = dict.fromkeys(Progress.__dataclass_fields__, 1) | {"within": None, "label": EVIL, "step": EVIL}
    for phase in ("merge", "measure", "align"):
        progress = Progress(**(fields | {"phase": phase}))  # type: ignore[arg-type]
        assert (label(progress) + detail_of(progress, 1.0)).isprintable()


def test_of_a_long_line_the_place_is_shown() -> None:
    before, after = "a" * 70_000, "b" * 70_000
    said = Problem("no", Mark("r.yaml", 1, 70_001, before + "HERE" + after, 4)).render().splitlines()
    _, _, _, line, caret = said
    assert max(map(len, said)) < 300
    assert line[caret.index("^") : caret.rindex("^") + 1] == "HERE"
    assert Problem("no", Mark("r.yaml", 1, 3, "a b c", 1)).render().splitlines()[3:] == [" 1 | a b c", "   |   ^"]
