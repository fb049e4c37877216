"""What the loopback Hub answers when the client reads: who asks, what there is, and the files themselves."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

import yaml
from store import DATE, Commit, Refused
from xet import bridge_of, hash_of, headers_of


def _whoami(ask: Any) -> None:
    if ask.user is None:
        raise Refused(401, None, "Invalid username or password.")
    orgs = [{"type": "org", "name": name} for name in ask.hub.orgs.get(ask.user, [])]
    auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
    ask.answer_json({"type": "user", "id": ask.user, "name": ask.user, "orgs": orgs, "auth": auth})


def _info(ask: Any, org: str, name: str, revision: str = "main") -> None:
    repo = ask.repo(f"{org}/{name}")
    commit = repo.at(revision)
    blobs = ask.query.get("blobs", "").lower() in ("true", "1")
    siblings = []
    for path, file in sorted(commit.files.items()):
        item: dict[str, Any] = {"rfilename": path}
        if blobs:
            entry = file.entry(path)
            item |= {"size": file.size, "blobId": file.blob}
            if "lfs" in entry:
                item["lfs"] = {"sha256": file.sha256, "size": file.size, "pointerSize": entry["lfs"]["pointerSize"]}
        siblings.append(item)
    made = {
        "_id": repo.id, "id": repo.id, "modelId": repo.id, "author": org, "sha": commit.oid, "private": repo.private,
        "gated": "manual" if repo.gated else False, "disabled": False, "tags": [], "downloads": 0, "likes": 0,
        "lastModified": DATE, "createdAt": DATE, "siblings": siblings, "usedStorage": 0, "spaces": [],
    }  # fmt: skip
    card = commit.files.get("README.md")
    front = re.match(r"---\n(.*?)^---$", card.read(0, card.size).decode(), re.M | re.S) if card is not None else None
    if front is not None:
        made["cardData"] = yaml.load(front[1], Loader=yaml.BaseLoader)
    if ask.query.get("securityStatus"):
        made["securityRepoStatus"] = {"scansDone": True, "filesWithIssues": []}
    ask.answer_json(made)


def _tree(ask: Any, org: str, name: str, revision: str, path: str = "") -> None:
    files = ask.repo(f"{org}/{name}").at(revision).files
    recursive = ask.query.get("recursive", "").lower() in ("true", "1")
    head = f"{path.strip('/')}/" if path else ""
    entries: dict[str, Any] = {}
    for file_path, file in sorted(files.items()):
        if not file_path.startswith(head):
            continue
        *folders, _ = file_path[len(head) :].split("/")
        for depth in range(len(folders)):
            folder = head + "/".join(folders[: depth + 1])
            if recursive or depth == 0:
                entries.setdefault(folder, {"type": "directory", "oid": "0" * 40, "size": 0, "path": folder})
        if recursive or not folders:
            entries[file_path] = file.entry(file_path)
            if file.large and ask.hub.xet:
                entries[file_path] |= {"xetHash": hash_of(file)}
    if path and not entries:
        raise Refused(404, "EntryNotFound", f"{path} does not exist on {revision}")
    # The real one gives a thousand a page; fewer here, so that the pages are followed.
    first = int(ask.query.get("cursor", 0))
    page = list(entries.values())[first : first + 100]
    headers = {}
    if first + 100 < len(entries):
        url = f"{ask.hub.address}{urlsplit(ask.path).path}?recursive={recursive}&cursor={first + 100}"
        headers["Link"] = f'<{url}>; rel="next"'
    ask.answer_json(page, headers=headers)


def _paths_info(ask: Any, org: str, name: str, revision: str) -> None:
    files = ask.repo(f"{org}/{name}").at(revision).files
    if "json" in ask.headers.get("Content-Type", ""):
        paths = json.loads(ask.body)["paths"]
    else:
        paths = parse_qs(ask.body.decode())["paths"]
    ask.answer_json([files[path].entry(path) for path in paths if path in files])


def _refs(ask: Any, org: str, name: str) -> None:
    repo = ask.repo(f"{org}/{name}")

    def listed(kind: str, names: list[str]) -> list[dict[str, str]]:
        full = [(n, n if n.startswith("refs/") else f"refs/{kind}/{n}") for n in names]
        return [{"name": short, "ref": ref, "targetCommit": repo.refs[short]} for short, ref in full]

    pulls = [ref for ref in repo.refs if ref.startswith("refs/pr/")]
    branches = [ref for ref in repo.refs if ref not in repo.tags and ref not in pulls]
    made: dict[str, Any] = {"branches": listed("heads", branches), "converts": [], "tags": listed("tags", [*repo.tags])}
    if ask.query.get("include_prs"):
        made["pullRequests"] = listed("pr", pulls)
    ask.answer_json(made)


def _commits(ask: Any, org: str, name: str, revision: str) -> None:
    repo = ask.repo(f"{org}/{name}")
    made = []
    at: Commit | None = repo.at(revision)
    while at is not None:
        made.append({"id": at.oid, "title": at.title, "message": at.description, "date": DATE, "authors": []})
        at = repo.commits.get(at.parent or "")
    ask.answer_json(made)


def _resolve(ask: Any, org: str, name: str, revision: str, path: str) -> None:
    repo = ask.repo(f"{org}/{name}")
    if repo.gated and ask.user not in repo.readers:
        what = "Access to model is restricted. You must have access to it and be authenticated to access it."
        raise Refused(401 if ask.user is None else 403, "GatedRepo", what)
    commit = repo.at(revision)
    if path not in commit.files:
        message = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found", "X-Repo-Commit": commit.oid}
        return ask.answer(404, b"Entry not found", message)
    file = commit.files[path]
    etag = (ask.fault.etag if ask.fault is not None else None) or file.etag
    size = file.size if ask.fault is None or ask.fault.size is None else ask.fault.size
    headers = {"X-Repo-Commit": commit.oid, "X-Linked-Size": str(size), "X-Linked-ETag": f'"{etag}"'}
    if file.large and ask.hub.xet:
        headers |= headers_of(ask, repo.id, commit.oid, file)
        return ask.answer(302, b"", {**headers, "Location": bridge_of(ask, repo.id, file)})
    if file.large:
        where = f"{ask.hub.cdn}/objects/{repo.id}/{file.sha256}?X-Amz-Signature={ask.hub.signature}"
        return ask.answer(302, b"", {**headers, "Location": where})
    where = f"/api/resolve-cache/models/{repo.id}/{commit.oid}/{quote(path)}?etag={quote(etag)}"
    ask.answer(307, b"", {**headers, "Location": where})


def _resolve_cache(ask: Any, org: str, name: str, oid: str, path: str) -> None:
    repo = ask.repo(f"{org}/{name}")
    if repo.gated and ask.user not in repo.readers:
        raise Refused(403, "GatedRepo", "Access to model is restricted.")
    ask.answer_file(repo.at(oid).files[path], {"X-Repo-Commit": oid})


def _object(ask: Any, org: str, name: str, sha256: str) -> None:
    """The store of large files, which knows signatures and no tokens."""
    if ask.query.get("X-Amz-Signature") != ask.hub.signature:
        return ask.answer(403, b"<Error><Code>AccessDenied</Code></Error>", {"Content-Type": "application/xml"})
    repo = ask.hub.repos[f"{org}/{name}"]
    for commit in reversed(list(repo.commits.values())):
        for file in commit.files.values():
            if file.large and file.sha256 == sha256:
                return ask.answer_file(file, {})
    ask.answer(404, b"<Error><Code>NoSuchKey</Code></Error>", {"Content-Type": "application/xml"})


READS: tuple[tuple[str, tuple[str, ...] | None, Callable[..., None]], ...] = (
    ("/api/whoami-v2", ("GET",), _whoami),
    ("/api/models/*/*/revision/*", ("GET", "HEAD"), _info),
    ("/api/models/*/*/tree/*", ("GET",), _tree),
    ("/api/models/*/*/tree/*/**", ("GET",), _tree),
    ("/api/models/*/*/paths-info/*", ("POST",), _paths_info),
    ("/api/models/*/*/refs", ("GET",), _refs),
    ("/api/models/*/*/commits/*", ("GET",), _commits),
    ("/api/models/*/*", ("GET", "HEAD"), _info),
    ("/api/resolve-cache/models/*/*/*/**", ("GET", "HEAD"), _resolve_cache),
    ("/objects/*/*/*", ("GET", "HEAD"), _object),
    ("/*/*/resolve/*/**", ("GET", "HEAD"), _resolve),
)
