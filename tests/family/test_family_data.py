"""Family files: the ones in the package are sound, and a faulty one is refused."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mergekit_lite.errors import MergeError
from mergekit_lite.family.data import families, parse

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
