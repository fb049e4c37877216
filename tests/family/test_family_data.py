"""Family files: the ones in the package are sound, and a faulty one is refused."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mergekit_lite.errors import InputError, MergeError
from mergekit_lite.family.data import families, load_family, parse

GOOD = {"name": "x", "model_types": ["x"], "stacks": [{"name": "s", "template": "{body}h.{i}.", "count": "n"}]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stakcs": []}, "no key `stakcs`.*\n*hint: did you mean `stacks`"),
        ({"prefixes": [{"body": "", "haed": ""}]}, "no key `haed`"),
        ({"tied": [{"alias": "a", "canonical": "b", "whne": "c"}]}, "no key `whne`"),
        ({"tied": [{"alias": "a"}]}, "lacks `canonical`"),
        ({"tied": [{"alias": "a", "canonical": "b", "when": "c"}]}, "`when` and `default`"),
        ({"stacks": [{"name": "s", "template": "h.{i}", "count": "n"}]}, "must end in"),
        ({"stacks": [{"name": "s", "template": "h{i}.", "count": "n"}]}, "must end in"),
        ({"stacks": [{"name": "s", "template": "h.{i}.", "count": "n", "count_like": "t"}]}, "names no stack"),
        ({"stacks": [["s"]]}, "is a mapping"),
        ({"experts": ["experts.{i}."]}, "must end in"),
    ],
)
def test_a_faulty_family_file_is_refused(change: dict, message: str):
    assert parse(GOOD, "x.yaml").stacks[0].count == ("n",)
    with pytest.raises(MergeError, match=message) as caught:
        parse(GOOD | change, "x.yaml")
    assert "x.yaml" in str(caught.value)


def test_the_families_load_without_torch():
    code = "import sys, mergekit_lite.family.family as f; f.family_of({}, []); sys.exit('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], check=False, env={"PYTHONPATH": ":".join(sys.path)}).returncode
        == 0
    )
    assert len({family.name for family in families().values()}) >= 12


@pytest.mark.parametrize("target", ["/dev/zero", "pipe", "folder"])
def test_a_family_file_that_is_no_file(target: str, tmp_path: Path) -> None:
    """Reading would take all memory, or wait for ever."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="is not a regular file"):
        load_family(tmp_path / target)


LAUGHS = "a: &a0 [x, x]\n" + "".join(f"b{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60))


@pytest.mark.parametrize(
    "text, message",
    [
        (LAUGHS, "aliases are not read in a family file: `*a0`"),
        ("a: &a [*a]\n", "aliases are not read in a family file: `*a`"),
        ("[" * 50_000, "nested too deeply"),
        ("a: " + "x" * (1 << 20), "larger than 1 MiB"),
        ("? [a, b]\n: 1\n", ""),
        ("? {a: b}\n: 1\n", ""),
        ("!!python/object/apply:os.system ['exit 1']\n", ""),
    ],
    ids=["laughs", "endless", "deep", "large", "list as key", "mapping as key", "code"],
)
def test_a_family_file_that_is_a_bomb(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "family.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=re.escape(message) or None):
        load_family(path)
