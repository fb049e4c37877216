"""Model cards: what stands in them, and what of strangers and of the user's machine does not."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from mergekit_lite import load_recipe, plan, run
from mergekit_lite.checkpoint.header import read_header
from mergekit_lite.publish.card import is_ours, render
from mergekit_lite.publish.parents import front_matter

EVIL = "x`</script><img src=x onerror=alert(1)>|**b**[l](javascript:1)"
STEPS = "steps: {merged: {use: ties, base: base, of: [math, code], with: {density: 0.2}}}"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Callable[..., Path]) -> Path:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "math", "code")):
        tiny_checkpoint(tmp_path / name, seed=seed)
    return tmp_path


def write_card(folder: str, **data: Any) -> None:
    Path(folder, "README.md").write_text(f"---\n{yaml.safe_dump(data)}---\n# parent\n")


def made(recipe: str, out: str = "out") -> str:
    Path("r.yaml").write_text(f"version: 1\n{recipe}\n")
    run(plan(load_recipe("r.yaml"), out=out))
    return Path(out, "README.md").read_text()


def metadata(card: str) -> dict[str, Any]:
    """As the Hub's own client reads it."""
    return ModelCard(card).data.to_dict()


def test_a_run_writes_a_card(folder: Path) -> None:
    write_card("base", license="mit", language=["en", "no"], pipeline_tag="text-generation")
    write_card("math", license="mit", language="de", pipeline_tag="text-generation")
    write_card("code", license="MIT", pipeline_tag="text-generation", datasets=["secret/data"])
    card = made(f"models: {{base: ./base, math: {folder}/math, code: ./code}}\n{STEPS}")
    assert metadata(card) == {
        "language": ["de", "en", "no"],
        "license": "mit",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["merge", "mergekit_lite", "ties"],
    }
    blocks = dict(re.findall(r"^```(\w+)\n(.*?)^```$", card, re.M | re.S))
    shown = yaml.safe_load(blocks["yaml"])
    assert shown["models"] == {"base": "base", "math": "math", "code": "code"}
    assert shown["steps"] == yaml.safe_load(STEPS)["steps"]
    edges = set(re.findall(r"(\w+) (?:-->|-\. base \.->) (\w+)", blocks["mermaid"]))
    assert edges == {("model0", "step0"), ("model1", "step0"), ("model2", "step0"), ("step0", "out0")}
    header = read_header(Path("out/model.safetensors"), "model.safetensors")
    assert f"| parameters | {sum(meta.numel for meta in header.tensors):,} |" in card
    lock = load_recipe("out/recipe.lock.yaml").lock
    assert lock is not None
    for files in lock["inputs"].values():
        assert all(file["blake3"] in card for file in files)
    assert str(folder) not in card and "/" + folder.name not in card
    assert is_ours(card.encode())


def test_the_same_card_each_time(folder: Path) -> None:
    recipe = f"models: {{base: ./base, math: ./math, code: ./code}}\n{STEPS}"
    first = made(recipe)
    assert made(recipe, "elsewhere") == first and "# Merge of base, math, code by ties\n" in first
    lock = load_recipe("out/recipe.lock.yaml")
    assert render(Path("out"), lock, 0) == first


def test_locations_in_place_are_shown_by_folder(folder: Path) -> None:
    shutil.copytree("math", "deep/er/math")
    steps = f"steps: {{m: {{use: linear, of: ['{folder}/math', './deep/er/math', ./base]}}}}"
    card = made(f"models: {{}}\n{steps}")
    assert str(folder) not in card and "deep" not in card
    shown = yaml.safe_load(re.findall(r"^```yaml\n(.*?)^```$", card, re.M | re.S)[0])
    assert shown["steps"]["m"]["of"] == ["math", "math-2", "base"] == [*shown["models"]]


def test_only_what_leads_to_an_output_is_its_parent(folder: Path) -> None:
    steps = "steps: {one: {use: linear, of: [base, math]}, two: {use: slerp, of: [base, code], with: {t: 0.5}}}"
    Path("r.yaml").write_text(
        f"version: 1\nmodels: {{base: ./base, math: ./math, code: ./code}}\n{steps}\n"
        "save: [{step: one, to: out/one}, {step: two, to: out/two}]\n"
    )
    run(plan(load_recipe("r.yaml")))
    one, two = (Path("out", name, "README.md").read_text() for name in ("one", "two"))
    assert "| math |" in one and "| code |" not in one and metadata(one)["tags"] == ["merge", "mergekit_lite", "linear"]
    assert "| code |" in two and "| math |" not in two and metadata(two)["tags"] == ["merge", "mergekit_lite", "slerp"]
    assert "--set save.0.to=merged-0 --set save.1.to=merged-1" in two


def test_words_of_strangers_do_nothing(folder: Path) -> None:
    evil = EVIL.replace("/", "")
    shutil.copytree("math", evil)
    write_card(evil, license=f"mit\n---\n{EVIL}", license_name=EVIL, language=[EVIL, "en\n- x"], pipeline_tag="a: b")
    card = made(f"models: {{base: ./base, math: {json.dumps('./' + evil)}}}\n"
                "steps: {merged: {use: linear, of: [base, math]}}", evil.replace("x`", "out`"))  # fmt: skip
    assert set(metadata(card)) == {"library_name", "tags"}
    html = MarkdownIt("commonmark").enable("table").render(card.split("\n---\n", 1)[1])
    assert "<img" not in html and "<script" not in html and 'href="javascript' not in html
    assert "<strong>" not in html
    rows = re.findall(r"<tr>(.*?)</tr>", html.partition("Parents</h2>")[2].partition("</table>")[0], re.S)
    assert [row.count("<td>") for row in rows] == [0, 3, 3]
    fences = re.findall(r'<code class="language-(\w+)">', html)
    assert fences == ["yaml", "mermaid", "sh"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (b"---\nlicense: mit\n---\n# x", {"license": "mit"}),
        (b"\xef\xbb\xbf---\r\nlanguage: no\r\n---\r\n", {"language": "no"}),
        (b"# no card", None),
        (b"---\n- a\n---\n", None),
        (b"---\na: [1\n---\n", None),
        (b"---\na: !!python/object/apply:os.system [ls]\n---\n", {"a": ["ls"]}),
        (b"---\n" + b"a: " + b"[" * 1000 + b"\n---\n", None),
        (b"---\nlicense: mit\nx: " + b"x" * 2**15 + b"\n---\n", None),
        (b"---\nlicense: \xff\n---\n", {"license": "\ufffd"}),
    ],
)
def test_front_matter(text: bytes, found: object) -> None:
    assert front_matter(text) == found


def test_a_card_of_the_users_is_not_ours(folder: Path) -> None:
    card = made(f"models: {{base: ./base, math: ./math, code: ./code}}\n{STEPS}").encode()
    assert is_ours(card)
    for other in (
        b"",
        b"# mine\n",
        card + b"more\n",
        card.replace(b"## Recipe", b"## My recipe"),
        card[:-30],
        card[5:],
    ):
        assert not is_ours(other)


def test_no_secret_reaches_a_card(folder: Path) -> None:
    token = "hf_" + "canaryCARD0123456789"
    write_card(
        "base", license="other", license_name=token, license_link=f"https://x.org/{token}", language=["en", token]
    )
    card = made("models: {base: ./base, again: ./base}\nsteps: {merged: {use: linear, of: [base, again]}}")
    assert token not in card and "canary" not in card
    assert metadata(card)["license"] == "other" and metadata(card)["language"] == ["en"]
    assert card.count("| base |") == 1
