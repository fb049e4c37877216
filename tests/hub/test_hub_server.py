"""The loopback Hub against the real client: what is put there comes back, and the faults are what they say."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hub_process import TOKEN
from huggingface_hub import CommitOperationAdd, HfApi, errors, hf_hub_download, snapshot_download
from server import Fault, Hub

DATA = random.Random(1).randbytes(300_000)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def api(hub: Hub) -> HfApi:
    return HfApi(endpoint=hub.address, token=TOKEN)


def test_what_is_there_comes_back(hub: Hub, api: HfApi, tmp_path: Path) -> None:
    files = {"config.json": b"{}", "model.safetensors": DATA, "sub/a.txt": b"a", "sub/deep/b.txt": b"b"}
    repo = hub.add("org/name", files | {f"many/{n}.txt": b"x" for n in range(250)})
    first = repo.refs["main"]
    second = repo.put({"config.json": b'{"new": 1}'})
    info = api.model_info("org/name", revision=first, files_metadata=True)
    assert info.sha == first
    assert {s.rfilename: s.lfs.size for s in info.siblings if s.lfs} == {"model.safetensors": len(DATA)}
    assert api.model_info("org/name").sha == second
    assert (
        len(list(api.list_repo_tree("org/name", recursive=True))) == 250 + 4 + 1 + 3
    )  # files, .gitattributes, folders
    assert {entry.path for entry in api.list_repo_tree("org/name", "sub")} == {"sub/a.txt", "sub/deep"}
    assert [p.size for p in api.get_paths_info("org/name", ["config.json", "no"], revision=first)] == [2]
    folder = snapshot_download("org/name", endpoint=hub.address, token=TOKEN, cache_dir=tmp_path, revision=first)
    assert {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}.items() >= (
        files.items()
    )
    assert all(request.token is None for request in hub.log if request.path.startswith("/objects/"))
    assert api.whoami()["name"] == "me"


def test_who_may_see_what(hub: Hub, api: HfApi, tmp_path: Path) -> None:
    hub.add("org/private", {"config.json": b"{}"}, private=True)
    hub.add("org/gated", {"config.json": b"{}"}, gated=True)
    for name in ("private", "nothing"):
        with pytest.raises(errors.RepositoryNotFoundError):
            api.model_info(f"org/{name}")
    assert api.model_info("org/gated").gated == "manual"
    with pytest.raises(errors.GatedRepoError):
        hf_hub_download("org/gated", "config.json", endpoint=hub.address, cache_dir=tmp_path, token=TOKEN)
    hub.repos["org/private"].readers = hub.repos["org/gated"].readers = {"me"}
    for name in ("private", "gated"):
        hf_hub_download(f"org/{name}", "config.json", endpoint=hub.address, cache_dir=tmp_path, token=TOKEN)
    with pytest.raises(errors.RevisionNotFoundError):
        api.model_info("org/gated", revision="nowhere")


@pytest.mark.parametrize("part_size", [None, 100_000])
def test_what_is_uploaded_is_there(hub: Hub, api: HfApi, part_size: int | None, tmp_path: Path) -> None:
    hub.part_size = part_size
    api.create_repo("me/made", private=True)
    assert hub.repos["me/made"].private
    (tmp_path / "model.safetensors").write_bytes(DATA)
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    done = api.upload_folder(repo_id="me/made", folder_path=tmp_path, commit_message="made")
    files = hub.repos["me/made"].files
    assert hub.repos["me/made"].refs["main"] == done.oid
    assert files["model.safetensors"].data == DATA and files["README.md"].data == b"---\nlicense: mit\n---\n"
    again = len([r for r in hub.log if r.method == "PUT"])
    assert again == (1 if part_size is None else 3)
    api.upload_folder(repo_id="me/made", folder_path=tmp_path, commit_message="made", delete_patterns="*.txt")
    assert len([r for r in hub.log if r.method == "PUT"]) == again  # the object is known
    pull = api.create_commit(
        "me/made", [CommitOperationAdd("a.txt", b"a")], commit_message="more", create_pr=True, parent_commit=done.oid
    )
    assert pull.pr_num == 1 and hub.repos["me/made"].at("refs/pr/1").files["a.txt"].data == b"a"
    api.create_branch("me/made", branch="other", revision=done.oid)
    with pytest.raises(errors.HfHubHTTPError):
        api.create_branch("me/made", branch="other")
    api.create_commit("me/made", [CommitOperationAdd("b.txt", b"b")], commit_message="b", revision="other")
    assert "b.txt" not in hub.repos["me/made"].files and api.file_exists("me/made", "b.txt", revision="other")
    assert {b.name for b in api.list_repo_refs("me/made").branches} == {"main", "other"}
    assert api.create_pull_request("me/made", "by hand").num == 2
    assert [d.title for d in api.get_repo_discussions("me/made")] == ["more", "by hand"]
    assert [c.title for c in api.list_repo_commits("me/made", revision="other")] == ["b", "made", "initial commit"]
    stranger = HfApi(endpoint=hub.address, token="hf_nobody")
    with pytest.raises(errors.HfHubHTTPError):
        stranger.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id="me/made")
    with pytest.raises(errors.HfHubHTTPError):
        api.create_commit("me/made", [CommitOperationAdd("a", b"a")], commit_message="late", parent_commit="0" * 40)


def test_faults_strike_as_told(hub: Hub, tmp_path: Path) -> None:
    from huggingface_hub.utils import get_session

    hub.add("org/name", {"model.safetensors": DATA})
    url = f"{hub.address}/org/name/resolve/main/model.safetensors"

    def get(first: int, last: int) -> object:
        return get_session().get(url, headers={"Range": f"bytes={first}-{last}"})

    assert get(10, 19).content == DATA[10:20] and hub.sent("/objects/") == 10
    hub.faults[:] = [Fault("/objects/", status=503, after=1, times=2, headers={"Retry-After": "3"})]
    answers = [get(0, 0) for _ in range(4)]
    assert [a.status_code for a in answers] == [206, 503, 503, 206] and answers[1].headers["Retry-After"] == "3"
    hub.faults[:] = [Fault("/objects/", cut=7)]
    with pytest.raises(Exception, match=r"(?i)peer|incomplete|closed"):
        get(0, 99)
    hub.faults[:] = [Fault("/objects/", whole=True)]
    assert get(5, 9).status_code == 200
    hub.faults[:] = [Fault("/objects/", shift=2, etag="other")]
    answer = get(5, 9)
    assert answer.headers["Content-Range"] == f"bytes 7-11/{len(DATA)}" and answer.headers["ETag"] == '"other"'
    hub.faults[:] = [Fault("/objects/", share=0.2, status=500)]
    struck = sum(get(0, 0).status_code == 500 for _ in range(100))
    assert struck == hub.faults[0].hit and 5 <= struck <= 40  # of a seeded generator
    hub.faults.clear()
    seen = get_session().get(url, follow_redirects=False).headers["Location"]
    hub.expire()
    assert get_session().get(seen).status_code == 403 and get(0, 0).status_code == 206
