"""The files that the fuzzer kept (tests/faults/fuzz_header.py), and some that are made as it makes them."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from header_mutations import apart, mutate, seeds
from header_oracle import Disagreement, compare, library_accepts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from raw_safetensors import entry, raw

from mergekit_lite.checkpoint import header

CORPUS = sorted((Path(__file__).parents[1] / "faults" / "corpus").iterdir())


def test_the_corpus_is_judged_as_the_library_judges_it(tmp_path: Path) -> None:
    accepted = [compare(path.read_bytes(), tmp_path / "x.safetensors", metadata=True) for path in CORPUS]
    # Or the corpus would say nothing of one half of the verdicts.
    assert 10 < sum(accepted) < len(accepted) - 10


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(number=st.integers(0, 2**32), blob=st.sampled_from([*(path.read_bytes() for path in CORPUS), *seeds()]))
def test_mutated_files_are_judged_as_the_library_judges_them(number: int, blob: bytes, tmp_path: Path) -> None:
    compare(mutate(blob, random.Random(number)), tmp_path / "x.safetensors", metadata=True)


def test_the_mutations_make_valid_files_and_broken_ones() -> None:
    """A fuzzer whose files are all rejected at their first byte tries nothing."""
    r = random.Random(1)
    made = [mutate(blob, r) for blob in seeds() for _ in range(20)]
    accepted = sum(map(library_accepts, made))
    assert len(made) / 10 < accepted < len(made) / 2
    assert sum(apart(blob)[0] is not None for blob in made) > len(made) / 2


@pytest.mark.parametrize(
    "fault, blob",
    [
        ("_is_size", raw({"a": entry(shape=[True])}, b"1234")),
        ("_check_offsets", raw({"a": entry(offsets=[4, 8])}, bytes(8))),
        ("_is_unicode", raw('{"a\\ud800":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"1")),
    ],
)
def test_the_judge_sees_a_reader_without_its_checks(
    fault: str, blob: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare(blob, tmp_path / "x.safetensors")
    monkeypatch.setattr(header, fault, lambda *anything: True)
    with pytest.raises(Disagreement):
        compare(blob, tmp_path / "x.safetensors")


def test_the_judge_sees_a_message_that_drives_the_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blob = raw({"\x1b[2J": entry("F33")}, b"1234")
    compare(blob, tmp_path / "x.safetensors")
    monkeypatch.setattr("mergekit_lite.errors.printable", lambda text: text)
    with pytest.raises(Disagreement, match="a message"):
        compare(blob, tmp_path / "x.safetensors")


def test_a_long_word_is_not_compared_with_known_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """difflib takes 40 bytes for each letter: a dtype of 100 MB took 4 GB."""

    def never(*anything: object, **more: object) -> list[str]:
        raise AssertionError("compared")

    blob = raw({"a": entry("F33" * 100)}, b"1234")
    monkeypatch.setattr("difflib.get_close_matches", never)
    assert not compare(blob, tmp_path / "x.safetensors")
