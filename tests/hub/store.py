"""The repositories of a Hub in memory: commits, branches, files, pull requests, large objects."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

# What the Hub's first .gitattributes gives to LFS, in part.
LARGE = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".onnx", ".msgpack", ".model")
LARGE_ABOVE = 10 * 2**20  # bytes
DATE = "2025-01-01T00:00:00.000Z"


class File:
    """One version of a file: bytes, or a path on the disk whose bytes are read when they are asked for."""

    def __init__(self, data: bytes | Path, large: bool):
        self.data, self.large = data, large
        self.size = len(data) if isinstance(data, bytes) else data.stat().st_size

    def read(self, start: int, stop: int) -> bytes:
        if isinstance(self.data, bytes):
            return self.data[start:stop]
        with open(self.data, "rb") as file:
            file.seek(start)
            return file.read(stop - start)

    @cached_property
    def sha256(self) -> str:
        if isinstance(self.data, bytes):
            return hashlib.sha256(self.data).hexdigest()
        with open(self.data, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @cached_property
    def blob(self) -> str:
        """The git object id: that of the pointer file where the file is large."""
        text = self.pointer if self.large else self.read(0, self.size)
        return hashlib.sha1(b"blob %d\0" % len(text) + text).hexdigest()

    @property
    def pointer(self) -> bytes:
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n".encode()

    @property
    def etag(self) -> str:
        """What the Hub gives as X-Linked-ETag: the SHA-256 of a large file, the git id of another."""
        return self.sha256 if self.large else self.blob

    def entry(self, path: str) -> dict[str, Any]:
        """As the tree and paths-info list it."""
        made: dict[str, Any] = {"type": "file", "oid": self.blob, "size": self.size, "path": path}
        if self.large:
            made["lfs"] = {"oid": self.sha256, "size": self.size, "pointerSize": len(self.pointer)}
        return made


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    title: str
    description: str
    files: Mapping[str, File]


class Refused(Exception):
    """An answer of the Hub that is an error: its status, its `X-Error-Code` and its message."""

    def __init__(self, status: int, code: str | None, message: str):
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


@dataclass(repr=False)
class Repo:
    """`refs` maps `main`, other branches, tags and `refs/pr/1` to commit ids. `readers` are the users who may see a
    private or a gated repository, `writers` those who may commit (empty: every user)."""

    id: str
    private: bool = False
    gated: bool = False
    readers: set[str] = field(default_factory=set)
    writers: set[str] = field(default_factory=set)
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    tags: set[str] = field(default_factory=set)
    pulls: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if "main" not in self.refs:
            self.commit("main", {".gitattributes": File(b"*.safetensors filter=lfs\n", False)}, "initial commit")

    def at(self, revision: str) -> Commit:
        """The commit of a branch, a tag or an id. Raises Refused where there is none."""
        oid = self.refs.get(revision) or self.refs.get(revision.removeprefix("refs/heads/"), revision)
        if oid not in self.commits:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return self.commits[oid]

    @property
    def files(self) -> Mapping[str, File]:
        return self.at("main").files

    def commit(self, ref: str, files: Mapping[str, File], title: str = "commit", description: str = "") -> Commit:
        """Makes `files` all that `ref` holds."""
        parent = self.refs.get(ref)
        listing = json.dumps([parent, title, len(self.commits), {name: file.blob for name, file in files.items()}])
        made = Commit(
            hashlib.sha1(f"{self.id} {listing}".encode()).hexdigest(), parent, title, description, dict(files)
        )
        self.commits[made.oid] = made
        self.refs[ref] = made.oid
        return made

    def put(self, files: Mapping[str, bytes | Path], ref: str = "main", title: str = "files") -> str:
        """Adds `files` to what `ref` holds, as one commit; gives its id."""
        kept = dict(self.at(ref).files) if ref in self.refs else dict(self.files)
        for name, data in files.items():
            small = File(data, False)
            kept[name] = File(data, is_large(name, small.size))
        return self.commit(ref, kept, title).oid

    def put_folder(self, folder: Path, ref: str = "main") -> str:
        """Adds the files of a folder, in memory, so that the folder may go; gives the commit's id."""
        names = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        return self.put({path.relative_to(folder).as_posix(): path.read_bytes() for path in names}, ref)

    def apply(self, ref: str, lines: Iterable[bytes], objects: Mapping[str, bytes], create_pr: bool) -> dict[str, Any]:
        """A commit as the client sends it, a JSON object on each line."""
        header: dict[str, Any] = {}
        onto = self.at(ref)
        files = dict(onto.files)
        for line in lines:
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header":
                header = value
            elif key == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), False)
            elif key == "lfsFile":
                if value["oid"] not in objects:
                    raise Refused(400, None, f"LFS pointer pointed to a file that does not exist: {value['path']}")
                files[value["path"]] = File(objects[value["oid"]], True)
            elif key == "deletedFile":
                if files.pop(value["path"], None) is None:
                    raise Refused(404, "EntryNotFound", "A file with this name doesn't exist")
            elif key == "deletedFolder":
                head = value["path"].rstrip("/") + "/"
                files = {name: file for name, file in files.items() if not name.startswith(head)}
            else:
                raise Refused(400, None, f"unknown operation {key}")
        if header.get("parentCommit") not in (None, onto.oid):
            raise Refused(412, None, "A commit has happened since. Please refresh and try again.")
        number = None
        if create_pr:
            number = self.open_pull(header["summary"], header.get("description", ""), onto.oid)
            ref = f"refs/pr/{number}"
        made = self.commit(ref, files, header["summary"], header.get("description", ""))
        return {"oid": made.oid, "number": number}

    def open_pull(self, title: str, description: str, onto: str) -> int:
        number = len(self.pulls) + 1
        self.refs[f"refs/pr/{number}"] = onto
        self.pulls.append({"num": number, "title": title, "description": description, "base": "main"})
        return number


@dataclass(repr=False)
class Store:
    """All repositories by id, the objects of LFS by SHA-256, and who a token belongs to."""

    repos: dict[str, Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    parts: dict[tuple[str, int], bytes] = field(default_factory=dict)  # of an object that is on its way
    users: dict[str, str] = field(default_factory=dict)
    orgs: dict[str, list[str]] = field(default_factory=dict)  # of a user
    lock: threading.RLock = field(default_factory=threading.RLock)

    def add(self, repo: str, files: Mapping[str, bytes | Path] | Path | None = None, **more: Any) -> Repo:
        """A new repository with these files, or those of a folder, on `main`."""
        made = self.repos[repo] = Repo(repo, **more)
        if isinstance(files, Path):
            made.put_folder(files)
        elif files:
            made.put(files)
        return made

    def find(self, repo: str, user: str | None) -> Repo:
        """The repository, if `user` may know of it. Raises Refused as the Hub does, which hides what is private."""
        found = self.repos.get(repo)
        if found is None or (found.private and user not in found.readers):
            status = 401 if user is None else 404
            raise Refused(status, "RepoNotFound", "Repository not found" if user else "Invalid username or password.")
        return found


def is_large(path: str, size: int) -> bool:
    return path.endswith(LARGE) or size > LARGE_ABOVE
