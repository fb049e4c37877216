"""What the loopback Hub answers when the client writes: repositories, branches, large files, commits, pull requests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

from store import DATE, Refused, Repo, is_large


def _create(ask: Any) -> None:
    asked = json.loads(ask.body)
    if ask.user is None:
        raise Refused(401, None, "Invalid username or password.")
    owner = asked.get("organization") or ask.user
    if owner != ask.user and owner not in ask.hub.orgs.get(ask.user, []):
        raise Refused(403, None, f'You don\'t have the rights to create a model under the namespace "{owner}"')
    name = f"{owner}/{asked['name']}"
    url = f"{ask.hub.address}/{name}"
    if name in ask.hub.repos:
        body = {"error": "You already created this model repo", "url": url}
        return ask.answer_json(body, 409)
    private = asked.get("visibility") == "private" or bool(asked.get("private"))
    ask.hub.repos[name] = Repo(name, private=private, readers={ask.user}, writers={ask.user})
    ask.answer_json({"url": url, "name": name, "id": name})


def _delete(ask: Any) -> None:
    asked = json.loads(ask.body)
    name = f"{asked.get('organization') or ask.user}/{asked['name']}"
    ask.repo(name, write=True)
    del ask.hub.repos[name]
    ask.answer_json({})


def _validate_yaml(ask: Any) -> None:
    ask.answer_json({"errors": [], "warnings": []})


def _preupload(ask: Any, org: str, name: str, revision: str) -> None:
    files = ask.repo(f"{org}/{name}", write=True).at(revision).files
    made = []
    for item in json.loads(ask.body)["files"]:
        mode = "lfs" if is_large(item["path"], item["size"]) else "regular"
        entry = {"path": item["path"], "uploadMode": mode, "shouldIgnore": False}
        if item["path"] in files:
            entry["oid"] = files[item["path"]].etag
        made.append(entry)
    ask.answer_json({"files": made})


def _batch(ask: Any, org: str, name: str) -> None:
    ask.repo(f"{org}/{name}", write=True)
    hub, made = ask.hub, []
    for item in json.loads(ask.body)["objects"]:
        oid, size = item["oid"], item["size"]
        entry: dict[str, Any] = {"oid": oid, "size": size}
        if oid not in hub.objects:
            signed = f"X-Amz-Signature={hub.signature}"
            upload: dict[str, Any] = {"href": f"{hub.cdn}/uploads/{oid}?{signed}"}
            if hub.part_size is not None and size > hub.part_size:
                count = -(-size // hub.part_size)
                parts = {str(n): f"{hub.cdn}/uploads/{oid}/{n}?{signed}" for n in range(1, count + 1)}
                upload = {
                    "href": f"{hub.address}/api/complete/{oid}",
                    "header": {"chunk_size": str(hub.part_size), **parts},
                }
            verify = {"href": f"{hub.address}/api/verify/{oid}"}
            entry["actions"] = {"upload": upload, "verify": verify}
        made.append(entry)
    ask.answer_json({"transfer": "multipart" if hub.part_size is not None else "basic", "objects": made})


def _signed(ask: Any) -> None:
    if ask.query.get("X-Amz-Signature") != ask.hub.signature:
        raise Refused(403, None, "Request has expired")


def _keep(ask: Any, oid: str, data: bytes) -> None:
    found = hashlib.sha256(data).hexdigest()
    if found != oid:
        raise Refused(400, None, f"the object's SHA-256 is {found}, not {oid}")
    ask.hub.objects[oid] = data


def _put(ask: Any, oid: str) -> None:
    _signed(ask)
    _keep(ask, oid, ask.body)
    ask.answer(200, b"", {"ETag": f'"{hashlib.md5(ask.body).hexdigest()}"'})


def _put_part(ask: Any, oid: str, number: str) -> None:
    _signed(ask)
    ask.hub.parts[oid, int(number)] = ask.body
    ask.answer(200, b"", {"ETag": f'"{hashlib.md5(ask.body).hexdigest()}"'})


def _complete(ask: Any, oid: str) -> None:
    asked = json.loads(ask.body)
    parts = []
    for item in sorted(asked["parts"], key=lambda part: part["partNumber"]):
        data = ask.hub.parts.get((oid, item["partNumber"]))
        if data is None or item["etag"].strip('"') != hashlib.md5(data).hexdigest():
            raise Refused(400, None, f"part {item['partNumber']} is not there")
        parts.append(data)
    _keep(ask, oid, b"".join(parts))
    ask.answer_json({})


def _verify(ask: Any, oid: str) -> None:
    asked = json.loads(ask.body)
    if asked["oid"] not in ask.hub.objects or len(ask.hub.objects[asked["oid"]]) != asked["size"]:
        raise Refused(404, None, "the object is not there")
    ask.answer_json({})


def _commit(ask: Any, org: str, name: str, revision: str) -> None:
    repo = ask.repo(f"{org}/{name}", write=True)
    with ask.hub.lock:
        made = repo.apply(revision, ask.body.splitlines(), ask.hub.objects, ask.query.get("create_pr") == "1")
    url = f"{ask.hub.address}/{repo.id}"
    answer = {"success": True, "commitOid": made["oid"], "commitUrl": f"{url}/commit/{made['oid']}", "hookOutput": ""}
    if made["number"] is not None:
        answer["pullRequestUrl"] = f"{url}/discussions/{made['number']}"
    ask.answer_json(answer)


def _branch(ask: Any, org: str, name: str, branch: str) -> None:
    repo = ask.repo(f"{org}/{name}", write=True)
    if ask.command == "DELETE":
        if repo.refs.pop(branch, None) is None:
            raise Refused(404, "RevisionNotFound", f"there is no branch {branch}")
        return ask.answer_json({})
    if branch.startswith("refs/"):
        raise Refused(400, None, f"Invalid reference for a branch: {branch}")
    if branch in repo.refs:
        raise Refused(409, None, f"Reference already exists: refs/heads/{branch}")
    asked = json.loads(ask.body or b"{}")
    repo.refs[branch] = repo.at(asked.get("startingPoint") or "main").oid
    ask.answer_json({}, 201)


def _tag(ask: Any, org: str, name: str, revision: str) -> None:
    repo = ask.repo(f"{org}/{name}", write=True)
    tag = json.loads(ask.body)["tag"]
    if tag in repo.refs:
        raise Refused(409, None, f"Tag reference exists already: {tag}")
    repo.refs[tag] = repo.at(revision).oid
    repo.tags.add(tag)
    ask.answer_json({}, 201)


def _discussions(ask: Any, org: str, name: str) -> None:
    if ask.command == "GET":
        repo = ask.repo(f"{org}/{name}")
        found = [_pull(repo, pull) for pull in repo.pulls]
        return ask.answer_json({"count": len(found), "start": 0, "discussions": found})
    repo, asked = ask.repo(f"{org}/{name}", write=True), json.loads(ask.body)
    number = repo.open_pull(asked["title"], asked.get("description", ""), repo.at("main").oid)
    ask.answer_json({"num": number, "url": f"{ask.hub.address}/{repo.id}/discussions/{number}"}, 201)


def _discussion(ask: Any, org: str, name: str, number: str) -> None:
    repo = ask.repo(f"{org}/{name}")
    if not 0 < int(number) <= len(repo.pulls):
        raise Refused(404, None, "Discussion not found")
    ask.answer_json(_pull(repo, repo.pulls[int(number) - 1]))


def _pull(repo: Repo, pull: dict[str, Any]) -> dict[str, Any]:
    return {
        "num": pull["num"], "title": pull["title"], "status": "draft", "isPullRequest": True, "createdAt": DATE,
        "author": {"name": "test"}, "repo": {"name": repo.id, "type": "model"}, "events": [],
        "changes": {"base": "refs/heads/main"}, "filesWithConflicts": [], "diff": "",
    }  # fmt: skip


UPLOADS: tuple[tuple[str, tuple[str, ...] | None, Callable[..., None]], ...] = (
    ("/api/repos/create", ("POST",), _create),
    ("/api/repos/delete", ("DELETE",), _delete),
    ("/api/validate-yaml", ("POST",), _validate_yaml),
    ("/api/models/*/*/preupload/*", ("POST",), _preupload),
    ("/api/models/*/*/commit/*", ("POST",), _commit),
    ("/api/models/*/*/branch/*", ("POST", "DELETE"), _branch),
    ("/api/models/*/*/tag/*", ("POST",), _tag),
    ("/api/models/*/*/discussions", ("GET", "POST"), _discussions),
    ("/api/models/*/*/discussions/*", ("GET",), _discussion),
    ("/*/*.git/info/lfs/objects/batch", ("POST",), _batch),
    ("/uploads/*", ("PUT",), _put),
    ("/uploads/*/*", ("PUT",), _put_part),
    ("/api/complete/*", ("POST",), _complete),
    ("/api/verify/*", ("POST",), _verify),
)
