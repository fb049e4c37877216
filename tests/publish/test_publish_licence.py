"""What is said of the licence of a merge, from what its parents say."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_lite.publish.licence import Licence, combine, read

IDS = ["apache-2.0", "mit", "llama2", "llama3.1", "gemma", "cc-by-nc-4.0", "cc-by-sa-4.0", "cc-by-nc-nd-4.0", "gpl-3.0",
       "agpl-3.0", "openrail", "bigcode-openrail-m", "other", "cc0-1.0"]  # fmt: skip


def outcome(**parents: str | None) -> tuple[str | None, str]:
    found = combine({name: Licence(one) if one else None for name, one in parents.items()})
    return found.licence.id if found.licence else None, " ".join(found.words)


def test_one_licence_is_taken_over() -> None:
    assert outcome(a="mit", b="mit") == ("mit", "All parents have the licence mit.")
    assert outcome(a="other") == ("other", "All parents have the licence other.")


@pytest.mark.parametrize(
    ("one", "two", "told"),
    [
        ("llama2", "apache-2.0", "llama2 (a) is its maker's own licence, whose terms go along with changed versions; "
         "apache-2.0 does not have these terms."),
        ("cc-by-nc-4.0", "mit", "cc-by-nc-4.0 (a) covers non-commercial use or research only; mit does not say so."),
        ("gpl-3.0", "apache-2.0", "gpl-3.0 (a) asks that changed versions are shared under the same licence; "
         "apache-2.0 is another one."),
        ("gpl-2.0", "gpl-3.0", "gpl-2.0 (a) asks that changed versions are shared under the same licence; gpl-3.0 is"),
        ("cc-by-nd-4.0", "mit", "does not allow changed versions to be shared, and a merge is a changed version"),
        ("openrail", "mit", "restricts some uses, and asks that changed versions restrict them too; mit does not"),
        ("llama2", "gemma", "llama2 (a) is its maker's own licence, whose terms go along with changed versions; gemma"),
    ],
)  # fmt: skip
def test_known_conflicts_are_told(one: str, two: str, told: str) -> None:
    for parents in ({"a": one, "b": two}, {"b": two, "a": one}):
        licence, words = outcome(**parents)
        assert licence is None and told in words
        assert f"{one}: a" in words and f"{two}: b" in words


def test_what_is_the_same_for_all_is_told_without_a_conflict() -> None:
    licence, words = outcome(a="cc-by-nc-4.0", b="cc-by-nc-4.0")
    assert licence == "cc-by-nc-4.0" and words.endswith("(a, b) covers non-commercial use or research only.")


def test_what_is_not_known_is_told() -> None:
    licence, words = outcome(a="mit", b=None)
    assert licence is None
    assert (
        words
        == "What the cards of parents say: mit: a. The licence of b is not known, so none is stated for the merge."
    )
    assert outcome(a=None) == (None, "The licence of a is not known, so none is stated for the merge.")


def test_other_twice_may_be_two_licences() -> None:
    licence, words = outcome(a="other", b="other")
    assert licence is None and "may have two licences" in words
    named = {name: Licence("other", "my-licence", "https://x.org/l") for name in "ab"}
    assert combine(named).licence == Licence("other", "my-licence", "https://x.org/l")


@given(st.dictionaries(st.sampled_from("abcdef"), st.none() | st.sampled_from(IDS), min_size=1))
def test_nothing_is_resolved_silently(parents: dict[str, str | None]) -> None:
    """A licence comes out only where everyone has it; else each parent stands in the words beside what it has."""
    licence, words = outcome(**parents)
    kinds = set(parents.values())
    if len(kinds) == 1 and None not in kinds and ("other" not in kinds or len(parents) == 1):
        assert licence in kinds
    else:
        assert licence is None
        for one in kinds - {None}:
            names = ", ".join(name for name, has in parents.items() if has == one)
            assert f"{one}: {names}" in words
        for name, has in parents.items():
            assert has is not None or name in words.partition("The licence of ")[2]


@pytest.mark.parametrize(
    ("card", "found"),
    [
        ({"license": "MIT"}, Licence("mit")),
        ({"license": ["mit"]}, Licence("mit")),
        ({"license": ["mit", "gpl"]}, None),
        ({"license": "unknown"}, None),
        ({"license": "mit\n---\nx: 1"}, None),
        ({"license": "<b>"}, None),
        ({"license": "mit` | x"}, None),
        ({"license": 3}, None),
        ({}, None),
        ({"license": "other", "license_name": "x", "license_link": "LICENSE"}, Licence("other", "x")),
        ({"license": "other", "license_name": "x\ny", "license_link": "javascript:x"}, Licence("other")),
        ({"license": "mit", "license_name": "ignored"}, Licence("mit")),
    ],
)
def test_reading_a_card(card: dict[str, object], found: Licence | None) -> None:
    assert read(card) == found
