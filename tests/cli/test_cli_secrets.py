"""Tokens and passwords: from wherever they come, they reach nothing that is shown or written."""

from __future__ import annotations

import base64
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from cli_process import Ran, command, environ

from mergekit_lite import redact

# Each is a secret of its own, so that what leaks can be told.
SECRETS = {
    "token": "hf_canaryTOKEN0123456789",
    "older": "hf_canaryOLDER0123456789",
    "plain": "canary-without-a-prefix-1",  # a mirror may give tokens of another form
    "mirror": "canaryMIRRORpassword",
    "proxy": "canaryPROXYpassword",
    "home": "canary-in-the-token-file-2",
    "config": "hf_canaryCONFIG0123456789",
    "nested": "canaryNESTEDpassword",
    "tokenizer": "hf_canaryTOKENIZER012345",
}


def check(*texts: str) -> None:
    for text in texts:
        for name, value in SECRETS.items():
            assert value not in text, (name, text)


def check_files(folder: Path) -> None:
    """No file below `folder` holds a secret, in its name or its bytes."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    for path in files:
        check(str(path), path.read_bytes().decode("latin-1"))


@pytest.fixture
def parent(folder: Path) -> Path:
    """The folder with secrets in the configurations of `base`."""
    config = json.loads((folder / "base" / "config.json").read_text())
    config |= {
        "use_auth_token": SECRETS["config"],
        "_name_or_path": f"https://user:{SECRETS['nested']}@hub.example/org/name",
        "rope_scaling": {"deep": [{"token": SECRETS["config"]}], "factor": 2.0},
        "eos_token": "</s>",
    }
    (folder / "base" / "config.json").write_text(json.dumps(config))
    tokenizer = {"tokenizer_class": "X", "_auth_token": SECRETS["tokenizer"], "mask_token": "<mask>"}
    (folder / "base" / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "base" / "generation_config.json").write_text('{ "eos_token_id":  2 }')
    return folder


def environment(address: str = "http://127.0.0.1:9", home: Path | None = None) -> dict[str, str]:
    scheme, _, host = address.partition("://")
    given = {
        "HF_TOKEN": SECRETS["token"],
        "HUGGING_FACE_HUB_TOKEN": SECRETS["older"],
        "HF_ENDPOINT": f"{scheme}://user:{SECRETS['mirror']}@{host}",
        "HTTPS_PROXY": f"http://user:{SECRETS['proxy']}@127.0.0.1:9",
        "NO_PROXY": "127.0.0.1",
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }
    if home is not None:
        home.mkdir(exist_ok=True)
        (home / "token").write_text(SECRETS["home"])
        given["HF_HOME"] = str(home)
    return given


def test_a_run_leaves_no_secret(parent: Path, merge: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    for words in (["run", "ties.yaml"], ["run", "ties.yaml", "--json", "--out", "again"]):
        ran = merge(*words)
        assert ran.code == 0, ran.err
        assert "hold a secret are left out" in ran.err and "use_auth_token" in ran.err
        check(ran.out, ran.err)
    for name in ("out", "again"):
        check_files(parent / name)
    made = json.loads((parent / "again" / "config.json").read_text())
    assert made["rope_scaling"] == {"deep": [{}], "factor": 2.0} and made["eos_token"] == "</s>"
    assert not {"use_auth_token", "_name_or_path"} & made.keys()
    tokenizer = json.loads((parent / "again" / "tokenizer_config.json").read_text())
    assert tokenizer == {"tokenizer_class": "X", "mask_token": "<mask>"}
    # What holds none is copied byte for byte.
    assert (parent / "again" / "generation_config.json").read_text() == '{ "eos_token_id":  2 }'
    for words in (
        ["inspect", "base", "--json", "--tensors"], ["doctor", "base"], ["diff", "base", "again"],
        ["diff", "base", "again", "--json"], ["plan", "ties.yaml", "--json", "--out", "x"], ["convert", "ties.yaml"],
    ):  # fmt: skip
        ran = merge(*words)
        assert ran.code in (0, 1), ran.err
        check(ran.out, ran.err)


@pytest.fixture
def hub() -> Iterator[tuple[str, dict[str, int], list[str]]]:
    """A server that answers with `status["code"]` and all that it was asked with; what it was asked with, too."""
    status = {"code": 500}
    heard: list[str] = []

    class Echo(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            heard.append(str(self.headers))
            told = " ".join(str(self.headers).split())
            body = json.dumps({"error": f"no: {told} {self.path}"}).encode()
            self.send_response(status["code"])
            self.send_header("X-Error-Message", told)
            self.send_header("X-Error-Code", "GatedRepo" if status["code"] == 403 else "RepoNotFound")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", status, heard
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize(
    "code, source", [(401, "token"), (403, "plain"), (404, "home"), (500, "mirror"), (500, "token")]
)
def test_a_hub_that_says_no_and_repeats_what_it_was_told(
    code: int, source: str, folder: Path, process: Callable[..., Ran], hub: tuple[str, dict[str, int], list[str]]
) -> None:
    address, status, heard = hub
    status["code"] = code
    (folder / "hub.yaml").write_text("version: 1\nmodels: {m: org/name}\nsave: {step: m, to: out/hub}\n")
    given = environment(address, folder / "hub") | {"HF_HUB_VERBOSITY": "debug"}
    sent = base64.b64encode(f"user:{SECRETS['mirror']}".encode()).decode()  # instead of a token
    if source != "mirror":
        sent = SECRETS[source]
        given |= {"HF_ENDPOINT": address, "HF_TOKEN": sent, "HUGGING_FACE_HUB_TOKEN": SECRETS["older"]}
    if source == "home":
        given |= {"HF_TOKEN": "", "HUGGING_FACE_HUB_TOKEN": ""}
    ran = process("run", "hub.yaml", "--json", **given)
    assert ran.code == 4, ran.err
    assert any(sent in text for text in heard)  # so it had something to repeat
    check(ran.out, ran.err)
    assert sent not in ran.out + ran.err


def test_a_killed_run_leaves_no_secret(parent: Path) -> None:
    """What lies on the disk at any moment, the journal among it."""
    stopped = parent / "ties.partial"
    run = subprocess.Popen(
        [*command("run", "ties.yaml", "--out", "ties")],
        env=environ(**environment()), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while run.poll() is None and not (stopped / "journal.jsonl").exists():
        time.sleep(0.001)
    run.send_signal(signal.SIGKILL)
    told = run.communicate()
    check(*told)
    if stopped.exists():
        check_files(stopped)
    else:
        check_files(parent / "ties")


BUG = """
import sys
from mergekit_lite.cli import app
import mergekit_lite.merge as merge
import os, threading
def broken(*arguments, **more):
    local = os.environ["HF_TOKEN"]
    try:
        raise KeyError(local)
    except KeyError as fault:
        raise RuntimeError("Authorization: Bearer " + local + " at " + os.environ["HF_ENDPOINT"]) from fault
merge.plan = broken
def thread():
    raise ValueError(os.environ["HTTPS_PROXY"])
def main():
    sys.argv = ["merge", "run", "ties.yaml", *sys.argv[1:]]
    app.main()
import mergekit_lite.cli.run as run
made = app._report
def report(*words):
    alone = threading.Thread(target=thread)
    alone.start()
    alone.join()
    import warnings
    warnings.warn(os.environ["HF_TOKEN"])
    return made(*words)
app._report = report
main()
"""


@pytest.mark.parametrize("token", ["token", "plain"])
def test_a_bug_tells_no_secret(token: str, folder: Path) -> None:
    """The traceback, that of another thread, a warning, and the JSON of an error that quotes its surroundings."""
    given = environment() | {"HF_TOKEN": SECRETS[token]}
    ran = subprocess.run(
        [sys.executable, "-c", BUG, "--json"], env=environ(**given), capture_output=True, text=True, timeout=60
    )
    assert ran.returncode == 70, ran.stderr
    assert "RuntimeError" in ran.stderr and "KeyError" in ran.stderr and "ValueError" in ran.stderr
    assert "UserWarning" in ran.stderr and redact.HIDDEN in json.loads(ran.stdout)["error"]["problems"][0]["message"]
    check(ran.stdout, ran.stderr)


@pytest.mark.parametrize(
    "text, line",
    [
        ("models: {{m: 'https://user:{mirror}@hub.example/org/name'}}", 2),
        ("models: {{m: ./base}} # {token}", 2),
        ("models: {{m: ./base}}\n# see https://hub.example/org/name?token={plain}", 3),
        ("models: {{m: 'hf://org/name?access_token={plain}'}}", 2),
        ("models: {{m: './{token}'}}", 2),
    ],
)
def test_a_recipe_with_a_secret_is_refused(text: str, line: int, folder: Path, merge: Callable[..., Ran]) -> None:
    made = f"version: 1\n{text.format(**SECRETS)}\nsave: {{step: m, to: out/x}}\n"
    (folder / "r.yaml").write_text(made)
    for words in (["run", "r.yaml"], ["run", "r.yaml", "--json"], ["plan", "r.yaml"], ["convert", "r.yaml"]):
        ran = merge(*words)
        assert ran.code == 3 and "holds a secret" in ran.err and f"r.yaml:{line}:" in ran.err, ran.err
        check(ran.out, ran.err)
    assert not (folder / "out").exists()


def test_a_change_with_a_secret_is_refused(folder: Path, merge: Callable[..., Ran]) -> None:
    ran = merge("run", "ties.yaml", "--set", f"models.math=https://user:{SECRETS['mirror']}@hub.example/org/name")
    assert ran.code == 3 and "holds a secret" in ran.err
    check(ran.out, ran.err)
    assert not (folder / "out").exists()


def test_a_command_line_with_a_secret_is_not_repeated(folder: Path, merge: Callable[..., Ran]) -> None:
    address = f"https://user:{SECRETS['mirror']}@hub.example/org/name"
    for words in (["inspect", address], ["diff", "base", address], ["run", address], ["inspect", SECRETS["token"]]):
        for more in ([], ["--json"]):
            ran = merge(*words, *more)
            assert ran.code == 4 and redact.HIDDEN in ran.err
            check(ran.out, ran.err)
    ran = merge("doctor", address)
    assert ran.code == 1 and redact.HIDDEN in ran.out
    check(ran.out, ran.err)


@pytest.mark.parametrize(
    "text",
    [
        "model.hf_embeddings.weight", "hf_transfer", "hf_hub_download", "org/name@main", "a:b@c", "user@host",
        "out/hf_small", "https://huggingface.co/org/name", "x?token", "lm_head.weight (3), b (1)", "hf_",
    ],
)  # fmt: skip
def test_names_that_are_no_secret_are_shown(text: str) -> None:
    assert redact.redact(text) == text


@pytest.mark.parametrize(
    "text",
    ["hf_" + "a1" * 17, "'hf_AbCdEfGhIjKl'", "api_org_AbCdEfGhIjKl", "(hf_" + "q" * 34 + ")"],
)
def test_tokens_are_hidden_whatever_stands_around(text: str) -> None:
    assert redact.HIDDEN in redact.redact(text) and redact.redact(redact.redact(text)) == redact.redact(text)


def test_hostile_texts_take_no_time_to_look_through() -> None:
    """Repetitions that make a careless pattern look at every pair of places: half a million characters each."""
    for part in ("a", "a:/", "hf_", "authorization:", "?token=", "a.b+", "hf_a", "://"):
        redact.redact(part * (500_000 // len(part)))
