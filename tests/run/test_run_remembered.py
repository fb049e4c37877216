"""Digests that are remembered: only of files that cannot have changed since, whatever lies in the cache's place."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from blake3 import blake3
from recipes_for_runs import STEPS, merged, write_models, write_recipe

from mergekit_lite import RecipeError
from mergekit_lite.run import remembered
from mergekit_lite.run.remembered import Remembered


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, whose files need no rest."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(remembered.SWITCH)
    monkeypatch.setattr(remembered, "REST", 0)
    return tmp_path / "cache" / "mergekit_lite" / "digests.json"


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "a.safetensors").write_bytes(b"some weights")
    return str(tmp_path / "a.safetensors")


def digest_of(path: str) -> str:
    return blake3(Path(path).read_bytes()).hexdigest()


def remember(*paths: str) -> None:
    Remembered(paths).keep({path: digest_of(path) for path in paths})


def test_a_digest_is_found_again_under_any_name(file: str, cache: Path, tmp_path: Path) -> None:
    assert Remembered([file]).known == {}
    remember(file)
    (tmp_path / "link").symlink_to(file)
    for path in (file, str(tmp_path / "link")):
        assert Remembered([path, str(tmp_path / "gone")]).known == {path: digest_of(file)}
    assert cache.stat().st_mode & 0o777 == 0o600


def test_a_changed_file_with_its_size_and_mtime_restored_is_another_one(file: str, cache: Path) -> None:
    remember(file)
    before = os.stat(file)
    with open(file, "r+b") as opened:
        opened.write(b"SOME")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = os.stat(file)
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (before.st_size, before.st_mtime_ns, before.st_ino)
    assert Remembered([file]).known == {}


def test_a_replaced_file_is_another_one(file: str, cache: Path, tmp_path: Path) -> None:
    remember(file)
    before = os.stat(file)
    (tmp_path / "new").write_bytes(b"SOME WEIGHTS")
    os.utime(tmp_path / "new", ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(tmp_path / "new", file)
    assert Remembered([file]).known == {}


def test_a_file_that_changes_while_it_is_digested_is_not_remembered(file: str, cache: Path) -> None:
    now = Remembered([file])
    digest = digest_of(file)
    os.utime(file, ns=(0, 0))
    now.keep({file: digest})
    assert Remembered([file]).known == {}


def test_a_file_written_just_now_is_not_remembered(file: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remembered, "REST", 3600 * 10**9)
    os.utime(file, ns=(0, 0))  # an old mtime does not help: its ctime is new
    remember(file)
    monkeypatch.setattr(remembered, "REST", 0)
    assert Remembered([file]).known == {}


DAMAGE = {
    "empty": b"",
    "torn": b'{"format":1,"digests":{"1:2:3:4:5":"00',
    "not_text": bytes(range(256)),
    "a list": b"[]",
    "no table": b'{"format":1,"digests":[]}',
    "no digest": b'{"format":1,"digests":{"1:2:3:4:5":7}}',
    "short digest": b'{"format":1,"digests":{"1:2:3:4:5":"00ff"}}',
    "other key": b'{"format":1,"digests":{"/etc/passwd":"%s"}}' % (b"0" * 64),
    "other format": b'{"format":2,"digests":{"1:2:3:4:5":"%s"}}' % (b"0" * 64),
    "deep": b"[" * 100_000,
    "large": b" " * (remembered.MAX_BYTES + 1),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_is_empty_and_made_anew(file: str, cache: Path, damage: str) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_bytes(DAMAGE[damage])
    assert Remembered([file]).known == {}
    remember(file)
    assert Remembered([file]).known == {file: digest_of(file)}
    assert len(json.loads(cache.read_bytes())["digests"]) == 1


@pytest.mark.parametrize("how", ["writable by others", "link", "folder", "parent is a file"])
def test_what_is_not_a_file_of_the_users_own_is_left_alone(file: str, cache: Path, how: str, tmp_path: Path) -> None:
    remember(file)
    if how == "writable by others":
        cache.chmod(0o666)
    elif how == "link":
        cache.rename(tmp_path / "elsewhere")
        cache.symlink_to(tmp_path / "elsewhere")
    else:
        cache.unlink()
        if how == "folder":
            cache.mkdir()
        else:
            cache.parent.rmdir()
            cache.parent.write_text("")
    assert Remembered([file]).known == {}
    remember(file)  # raises nothing


def test_the_cache_can_be_switched_off(file: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(remembered.SWITCH, "0")
    remember(file)
    assert not cache.exists()


def test_the_latest_files_are_kept(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remembered, "MOST", 3)
    paths = [str(tmp_path / str(number)) for number in range(5)]
    for path in paths:
        Path(path).write_text(path)
        remember(path)
    assert list(Remembered(paths).known) == paths[2:]


WORK = """
import sys
from mergekit_lite.run import remembered
remembered.REST = 0
for path in sys.argv[1:]:
    now = remembered.Remembered(sys.argv[1:])
    assert set(now.known.values()) <= {"0" * 64}
    now.keep({path: "0" * 64})
"""


def test_processes_that_write_at_once_leave_a_sound_cache(cache: Path, tmp_path: Path) -> None:
    paths = [str(tmp_path / str(number)) for number in range(120)]
    for path in paths:
        Path(path).write_text(path)
    workers = [subprocess.Popen([sys.executable, "-c", WORK, *paths[i:], *paths[:i]]) for i in (0, 40, 80)]
    while any(worker.poll() is None for worker in workers):
        if cache.exists():
            assert json.loads(cache.read_bytes())["format"] == 1  # never torn
    assert [worker.returncode for worker in workers] == [0, 0, 0]
    assert len(Remembered(paths).known) == 120
    assert os.listdir(cache.parent) == [cache.name]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    return write_models(tmp_path_factory.mktemp("models"))


def locked(out: Path) -> set[str]:
    """The digests that a lock gives of the inputs' files."""
    inputs = yaml.safe_load((out / "recipe.lock.yaml").read_text(encoding="utf-8"))["lock"]["inputs"]
    return {value for value in _texts(inputs) if len(value) >= 64}


def _texts(part: object) -> Iterator[str]:
    if isinstance(part, dict):
        for below in part.values():
            yield from _texts(below)
    elif isinstance(part, list):
        for below in part:
            yield from _texts(below)
    elif isinstance(part, str):
        yield part.removeprefix("blake3:")


def test_a_second_run_takes_what_is_remembered_and_a_lock_does_not(models: Path, cache: Path, tmp_path: Path) -> None:
    first = write_recipe(tmp_path / "r.yaml", models, STEPS["linear"], tmp_path / "first")
    merged(first)
    sound = locked(tmp_path / "first")
    stored = json.loads(cache.read_bytes())
    assert set(stored["digests"].values()) == sound and len(sound) == 6
    # False ones, to see which are taken.
    false = {key: f"{number:064x}" for number, key in enumerate(stored["digests"])}
    cache.write_text(json.dumps({**stored, "digests": false}))
    merged(write_recipe(tmp_path / "r.yaml", models, STEPS["linear"], tmp_path / "second"))
    assert locked(tmp_path / "second") == set(false.values())
    # A lock is held against the files themselves: the sound one is met, the false one refused.
    for name in ("first", "second"):
        text = (tmp_path / name / "recipe.lock.yaml").read_text(encoding="utf-8")
        (tmp_path / f"{name}.yaml").write_text(text.replace(f"to: {tmp_path / name}", f"to: {tmp_path / name}_again"))
    merged(tmp_path / "first.yaml")
    cache.write_text(json.dumps({**stored, "digests": false}))
    with pytest.raises(RecipeError):
        merged(tmp_path / "second.yaml")
