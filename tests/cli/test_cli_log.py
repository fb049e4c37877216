"""`merge run --log json`: every line of stderr is an event, seldom enough, whole, and without secrets."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_process import Ran, command, environ

from mergekit_lite.cli import log, show
from mergekit_lite.run.progress import Progress

Merge = Callable[..., Ran]
SECRET = "hf_loggedTOKEN0123456789"


def events(text: str) -> list[dict[str, Any]]:
    """The events of a log, each line of which must be one."""
    found = [json.loads(line) for line in text.splitlines()]
    for event in found:
        assert event["level"] in ("info", "warning", "error") and event["time"].endswith("Z") and event["event"]
    assert text.isascii() and not any((ord(sign) < 32 and sign != "\n") or sign == "\x7f" for sign in text)
    return found


def merged(done: int, phase: str = "merge", total: int = 100) -> Progress:
    return Progress(phase, "a\x1b[31mtensor", "step", done, total, done, total, 1, 1, done)


def test_a_run(merge: Merge, folder: Path):
    ran = merge("run", "ties.yaml", "--log", "json")
    found = events(ran.err)
    assert ran.code == 0 and ran.out.startswith("wrote out/ties")
    order = [event["event"] for event in found]
    assert order[:2] == ["start", "plan"] and order[-2:] == ["wrote", "end"]
    assert found[0]["command"] == "run" and found[-1]["exit_code"] == 0
    size = (folder / "out/ties/model.safetensors").stat().st_size
    assert found[1]["bytes_written"] == found[-2]["bytes"] == size
    last = [event for event in found if event["event"] == "progress"][-1]
    assert (last["phase"], last["unit"], last["percent"], last["tensors"]) == ("merge", "bytes", 100.0, 7)
    # The result is the same.
    assert merge("run", "ties.yaml", "--out", "again").code == 0
    assert (folder / "again/model.safetensors").read_bytes() == (folder / "out/ties/model.safetensors").read_bytes()


def test_warnings_and_errors(merge: Merge, folder: Path):
    text = (folder / "ties.yaml").read_text()
    (folder / "ties.yaml").write_text(
        text.replace("steps:\n", "steps:\n  idle: {use: linear, of: [math, code]}\n").replace(
            "save: {", "save: {step: merged, "
        )
    )
    warning = next(e for e in events(merge("run", "ties.yaml", "--log=json").err) if e["event"] == "warning")
    assert warning["level"] == "warning" and "`idle`" in warning["message"] and warning["hint"]
    assert warning["place"] == {"file": "ties.yaml", "line": 4, "column": 3}
    *_, error, end = events(merge("run", "ties.yaml", "--log", "json").err)
    line = 1 + next(n for n, told in enumerate((folder / "ties.yaml").read_text().splitlines()) if "save" in told)
    assert (error["event"], error["level"], error["place"]["line"]) == ("error", "error", line)
    assert (end["event"], end["level"], end["exit_code"]) == ("end", "error", 3)


@pytest.mark.parametrize(
    ("words", "code"),
    [(["--blok", "3"], 2), (["--threads", "0"], 2), (["--set", "nonsense"], 3), (["--device", "tpu"], 2)],
)
def test_a_wrong_command_line_is_an_event_too(merge: Merge, folder: Path, words: list[str], code: int):
    ran = merge("run", "ties.yaml", *words, "--log", "json")
    assert ran.code == code
    assert [event["event"] for event in events(ran.err)][-2:] == ["error", "end"]


def test_a_form_that_is_none(merge: Merge, folder: Path):
    ran = merge("run", "ties.yaml", "--log", "jsn")
    assert ran.code == 2 and ran.err.startswith("error: ") and "`--log`" in ran.err


def test_a_bug_of_ours(merge: Merge, folder: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(*words: Any) -> None:
        raise ZeroDivisionError("one\nby nothing")

    monkeypatch.setattr("mergekit_lite.merge.load_recipe", broken)
    ran = merge("run", "ties.yaml", "--log", "json")
    assert ran.code == 70
    found = events(ran.err)
    assert found[-2]["event"] == "error" and "ZeroDivisionError" in found[-2]["message"]
    assert any("test_cli_log" in event["message"] for event in found if event["event"] == "note")


def test_what_libraries_write_to_stderr(
    merge: Merge, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """A line for each line, whatever parts it came in; secrets taken out."""
    monkeypatch.setenv("HF_TOKEN", SECRET)

    def noisy(*words: Any) -> None:
        sys.stderr.write("50%|##\r100%|####")
        sys.stderr.write(f" with {SECRET}\nUserWarning: \x1b[31mred\n\n")
        show.note("said")
        sys.stderr.write("no end")
        raise SystemExit(9)

    monkeypatch.setattr("mergekit_lite.merge.load_recipe", noisy)
    with pytest.raises(SystemExit):
        merge("run", "ties.yaml", "--log", "json")
    assert not isinstance(sys.stderr, log.Lines) and log.current() is None
    found = [(event["event"], event.get("message")) for event in events(capsys.readouterr().err)]
    assert found == [
        ("start", None), ("text", "50%|##"), ("text", "100%|#### with ***"), ("text", "UserWarning: \x1b[31mred"),
        ("note", "said"), ("text", "no end"),
    ]  # fmt: skip


def test_lines_of_text():
    out = io.StringIO()
    made = log.Log(out)
    lines = log.Lines(made)
    for text in ("50%|##\r100%|####", " done\nUserWarning: \x1b[31mred\n\n", "no end"):
        lines.write(text)
    lines.rest()
    assert [event["message"] for event in events(out.getvalue())] == [
        "50%|##", "100%|#### done", "UserWarning: \x1b[31mred", "no end",
    ]  # fmt: skip


def test_no_secret_is_in_it(monkeypatch: pytest.MonkeyPatch):
    from mergekit_lite import redact

    monkeypatch.setenv("HF_TOKEN", "plain-word-token")
    redact.refresh()
    out = io.StringIO()
    made = log.Log(out)
    made.event("note", message=f"{SECRET} and plain-word-token and https://me:geheim99@host/x?X-Amz-Signature=abc123")
    made.event("warning", "warning", place={"file": SECRET}, hint=["plain-word-token"], **{"plain-word-token": 1})
    log.Lines(made).write("Authorization: Bearer plain-word-token\n")
    events(out.getvalue())
    for secret in (SECRET, "plain-word-token", "geheim99", "abc123"):
        assert secret not in out.getvalue()
    monkeypatch.undo()
    redact.refresh()


def test_progress_is_seldom_and_begins_and_ends_every_phase(monkeypatch: pytest.MonkeyPatch):
    """A clock that gains a tenth of a second with each of 1,000 steps of two phases."""
    clock = [100.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: clock[0])
    out = io.StringIO()
    made = log.Log(out)
    for phase in ("measure", "merge"):
        for done in range(1, 501):
            clock[0] += 0.1
            made.progress(merged(done, phase, 500))
    made.end(0)
    found = events(out.getvalue())
    for phase in ("measure", "merge"):
        done = [event["done"] for event in found if event.get("phase") == phase]
        assert (done[0], done[-1]) == (1, 500) and done == sorted(set(done))
        assert len(done) <= 2 + 50 / log.EVERY
    assert [event["event"] for event in found][-1] == "end"
    assert [event["seconds"] for event in found if event.get("phase") == "merge"][-1] == pytest.approx(49.9)


def test_passes_over_all_tensors_and_nothing_to_do(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(log, "EVERY", 0.0)
    out = io.StringIO()
    made = log.Log(out)
    for done, total in ((0, 10), (10, 10), (11, 10), (20, 10)):
        made.progress(merged(done, "measure", total))
    made.progress(merged(0, "align", 0))
    assert [event["percent"] for event in events(out.getvalue())] == [0.0, 100.0, 10.0, 100.0, 100.0]


def test_events_of_many_threads_are_whole_lines(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(log, "EVERY", 0.0)
    out = io.StringIO()
    made = log.Log(out)
    lines = log.Lines(made)

    def talk(number: int) -> None:
        for turn in range(50):
            made.progress(merged(turn))
            lines.write(f"thread {number}\n")

    threads = [threading.Thread(target=talk, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = events(out.getvalue())
    assert sum(event["event"] == "text" for event in found) == 400


def test_a_log_that_nobody_reads_any_more_stops_nothing():
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    made = log.Log(Gone())
    made.progress(merged(1))
    made.end(0)


def test_no_bar_where_colours_are_forced(process: Callable[..., Ran], folder: Path):
    ran = process("run", "ties.yaml", "--log", "json", FORCE_COLOR="1", TTY_COMPATIBLE="1")
    assert ran.code == 0
    assert [event["event"] for event in events(ran.err)][-1] == "end"


def test_a_run_that_is_stopped(folder: Path, tiny_checkpoint: Callable[..., Path]):
    """SIGTERM, as a CI system sends it: the last lines say so, and that `--resume` goes on."""
    code = (
        "import sys, time\nfrom mergekit_lite.cli import app\n"
        "from mergekit_lite.plan import build\n"
        "def wait(*a, **k):\n    open('begun', 'w').close()\n    time.sleep(60)\n"
        "build.build_plan = wait\nsys.argv = ['merge', *sys.argv[1:]]\napp.main()\n"
    )
    words = [sys.executable, "-c", code, *command("run", "ties.yaml", "--log", "json")[3:]]
    with subprocess.Popen(words, env=environ(), stderr=subprocess.PIPE, text=True) as running:
        while not os.path.exists("begun"):
            assert running.poll() is None
            time.sleep(0.05)
        running.send_signal(signal.SIGTERM)
        _, err = running.communicate(timeout=60)
    found = events(err)
    assert running.returncode == 130 and found[-1]["exit_code"] == 130 and found[-2]["event"] == "error"
