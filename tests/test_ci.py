"""docs/ci.md: its workflows fit the schemas of GitHub and GitLab, and every command in them works, with a loopback Hub.

The Dockerfile is held against pyproject.toml and .dockerignore; no test builds it, for want of an engine.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where pytest brings this one
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests/hub"))
from hub_models import model, recipe  # noqa: E402
from hub_process import TOKEN, environ  # noqa: E402
from server import Hub  # noqa: E402

SCHEMAS = {
    ".github/workflows/merge.yml": ["vendor.github-workflows"],
    ".gitlab-ci.yml": ["vendor.gitlab-ci", "--data-transform", "gitlab-ci"],
}


def template(name: str) -> str:
    """The block of docs/ci.md that begins with the name of this file."""
    text = (ROOT / "docs/ci.md").read_text(encoding="utf-8")
    (found,) = re.findall(rf"^```yaml\n(# {re.escape(name)}\n.*?)^```$", text, re.M | re.S)
    return str(found)


@dataclass(frozen=True)
class Job:
    """The commands of a job, each with the environment it is given."""

    name: str
    commands: Sequence[tuple[str, Mapping[str, str]]]


def github(workspace: Path) -> list[Job]:
    made = yaml.safe_load(template(".github/workflows/merge.yml"))
    put = {"github.workspace": str(workspace), "secrets.HF_TOKEN": TOKEN}

    def filled(given: Mapping[str, str]) -> dict[str, str]:
        return {k: re.sub(r"\$\{\{ *([\w.]+) *\}\}", lambda m: put[m[1]], str(v)) for k, v in given.items()}

    return [
        Job(name, [(s["run"], {**filled(made["env"]), **filled(s.get("env", {}))}) for s in job["steps"] if "run" in s])
        for name, job in made["jobs"].items()
    ]


def gitlab(workspace: Path) -> list[Job]:
    made = yaml.safe_load(template(".gitlab-ci.yml"))
    given = {k: v.replace("$CI_PROJECT_DIR", str(workspace)) for k, v in made["variables"].items()}
    given["HF_TOKEN"] = TOKEN  # a variable of the project
    jobs = {name: job for name, job in made.items() if isinstance(job, dict) and "script" in job}
    return [Job(n, [(c, given) for c in (*made["default"]["before_script"], *j["script"])]) for n, j in jobs.items()]


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as made:
        made.users[TOKEN] = "OWNER"
        for seed, name in enumerate(("base", "math", "code")):
            made.add(f"org/{name}", model(seed))
        yield made


@pytest.fixture
def workspace(tmp_path: Path, hub: Hub) -> Path:
    """A checkout with a recipe and its lock, `python` and `merge` in `bin`, and packages that pip finds installed."""
    tools, about = tmp_path / "bin", tmp_path / "site/mergekit_lite-0.1.0.dist-info"
    tools.mkdir()
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: mergekit_lite\nVersion: 0.1.0\n")
    for name, words in (("python", []), ("merge", ["-m", "mergekit_lite"])):
        (tools / name).write_text(f'#!/bin/sh\nexec {shlex.join([sys.executable, *words])} "$@"\n')
        (tools / name).chmod(0o755)
    folder = tmp_path / "checkout"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(recipe("linear", "out/mine"))
    ran = shell("merge run recipe.yaml --fetch stream && mv out/mine/recipe.lock.yaml .", {}, folder, hub)
    assert ran.returncode == 0, ran.stderr
    return folder


def shell(command: str, given: Mapping[str, str], folder: Path, hub: Hub) -> subprocess.CompletedProcess[str]:
    """Run as the runners do: bash that stops at the first command that fails. pip may not go out."""
    here = environ(hub, folder / ".home")
    # What pip is to install is what it finds installed; everything else is the template's.
    more = {**given, "MERGEKIT_LITE": "mergekit_lite", "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    more |= {"PATH": f"{folder.parent / 'bin'}{os.pathsep}{here['PATH']}"}
    more |= {"PYTHONPATH": os.pathsep.join([str(folder.parent / "site"), str(ROOT)])}
    words = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", command]
    return subprocess.run(words, cwd=folder, env={**here, **more}, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_template_fits_the_schema(name: str, tmp_path: Path):
    """Those of SchemaStore, which check-jsonschema carries; a misspelt key is found by them."""

    def check(text: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "t.yml").write_text(text, encoding="utf-8")
        words = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", *SCHEMAS[name], str(tmp_path / "t.yml")]
        return subprocess.run(words, capture_output=True, text=True, timeout=60)

    ran = check(template(name))
    assert ran.returncode == 0, ran.stdout + ran.stderr
    wrong = template(name).replace("    timeout-minutes: 15\n", "    timeout: 15\n").replace("rules:", "rule:")
    assert wrong != template(name) and check(wrong).returncode == 1


@pytest.mark.parametrize("jobs", [github, gitlab])
def test_every_command_of_a_template_works(jobs: Callable[[Path], list[Job]], workspace: Path, hub: Hub):
    done: set[tuple[str, str]] = set()
    shown = ""
    for job in jobs(workspace):
        for command, given in job.commands:
            # Both jobs install; once is enough here.
            if "pip install" in command and (command, str(given)) in done:
                continue
            done.add((command, str(given)))
            ran = shell(command, given, workspace, hub)
            assert ran.returncode == 0, f"{job.name}: {command}\n{ran.stdout}{ran.stderr}"
            shown += ran.stdout + ran.stderr
            if "--log json" in command:
                assert [json.loads(line)["event"] for line in ran.stderr.splitlines()][-1] == "end"
    assert TOKEN not in shown
    assert {word.split()[1] for command, _ in done for word in re.findall(r"^merge \w+", command, re.M)} == {
        "plan", "doctor", "run", "verify", "push",
    }  # fmt: skip
    pushed = hub.repos["OWNER/merged"].files
    assert pushed["model.safetensors"].sha256 and "recipe.lock.yaml" in pushed
    assert (workspace / "out/merged/model.safetensors").read_bytes() == pushed["model.safetensors"].read(0, 1 << 40)
    # The cache that is kept between runs is where the template says, and without a token.
    assert any((workspace / ".hf/hub").rglob("*.safetensors"))
    assert not [
        path for path in (workspace / ".hf").rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()
    ]


@pytest.mark.parametrize("jobs", [github, gitlab])
def test_a_branch_that_moved_fails_the_check(jobs: Callable[[Path], list[Job]], workspace: Path, hub: Hub):
    hub.repos["org/math"].put({"README.md": b"new words"})
    check = jobs(workspace)[0]
    (command, given), *_ = ((c, g) for c, g in check.commands if "--check" in c)
    ran = shell(command, given, workspace, hub)
    assert ran.returncode == 1 and "revision  math: org/math@main" in ran.stdout


def test_secrets_and_strangers_words_stay_out_of_commands():
    """What `${{ }}` puts into a command is run as a part of it and stands in the log; `env` is safe."""
    made = yaml.safe_load(template(".github/workflows/merge.yml"))
    steps = [(name, step) for name, job in made["jobs"].items() for step in job["steps"]]
    assert not [step for _, step in steps if "${{" in step.get("run", "")]
    assert [(name, step["name"]) for name, step in steps if "secrets." in str(step)] == [("merge", "push")]
    assert "pull_request_target" not in template(".github/workflows/merge.yml")
    assert made["permissions"] == {"contents": "read"} and "secrets." not in str(made["env"])


# The container


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"), flags=re.M)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in lines if line]


def test_the_image_has_what_the_package_is_built_from():
    copied = [
        w for what, words in instructions() if what == "COPY" and "--from" not in words for w in words.split()[:-1]
    ]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {project["project"]["readme"], *project["project"]["license-files"], *wheel["packages"], "pyproject.toml"}
    assert needed | set(wheel["force-include"]) | {"constraints.txt"} == set(copied)
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for path in copied:
        assert (ROOT / path).exists() and any(path == name or path.startswith(f"{name}/") for name in allowed), path
    # Whatever else lies in the folder stays out of it: environments, demos, outputs.
    assert "*" in (ROOT / ".dockerignore").read_text().splitlines()


def test_the_image_runs_merge_as_a_user_without_rights():
    last = max(place for place, (what, _) in enumerate(instructions()) if what == "FROM")
    final = instructions()[last:]
    found: dict[str, str] = dict(final)
    assert found["FROM"] == "python:${PYTHON}-slim" and ("ARG", "TORCH=cpu") in instructions()
    assert json.loads(found["ENTRYPOINT"]) == ["merge"]
    user = found["USER"].split(":")[0]
    assert user.isdecimal() and int(user) > 0
    home = re.search(r"HF_HOME=(\S+)", found["ENV"])
    assert home is not None and home[1].startswith(f"{found['VOLUME']}/")
    assert [what for what, _ in final].index("RUN") < [what for what, _ in final].index("USER")
