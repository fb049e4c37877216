"""An output that has been verified, to a repository of the Hub: one commit, or a pull request, of exactly its files.

Large files go up first and stay at the Hub, so that a push that was stopped sends only what is missing; the commit
comes last, and whoever reads the repository sees all of it or nothing. The client for the Hub does the transfers.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_lite import redact, sandbox
from mergekit_lite.checkpoint.extras import is_read_with_a_model
from mergekit_lite.checkpoint.hub import is_hub_id
from mergekit_lite.errors import InputError, MergeError, StoppedError, UsageError
from mergekit_lite.plan.lock import NAME as LOCK
from mergekit_lite.plan.words import few
from mergekit_lite.publish import card
from mergekit_lite.publish.answers import explained, is_cut, patiently, status_of
from mergekit_lite.publish.parents import Card, lineage
from mergekit_lite.publish.shared import shared, told
from mergekit_lite.recipe.model import Push, Recipe
from mergekit_lite.recipe.read import parse

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack")


@dataclass(frozen=True, slots=True)
class Pushed:
    """What a push did. `commit` is None where nothing had changed; `url` is where to look: the pull request, the commit
    or the branch. `made` tells that the repository is new; `files` are those that the commit changed, `removed` those
    of an earlier push that it took away; `nbytes` counts the bytes of `files`."""

    repo: str
    url: str
    commit: str | None
    branch: str
    private: bool
    made: bool
    files: tuple[str, ...]
    removed: tuple[str, ...]
    nbytes: int
    notes: tuple[str, ...]


def check_ready(repo: str, offline: bool = False) -> str:
    """The token to push to `repo` with. Raises UsageError in a sandbox, `offline` or where HF_HUB_OFFLINE says so, and
    for what is no repository's id, InputError where there is no token."""
    if sandbox.current() is not None:
        raise UsageError("nothing can be pushed: a sandbox has no network", hint="push once the sandbox is left")
    if offline:
        raise UsageError("nothing can be pushed: the command is offline", hint="leave out `--offline`")
    if not is_hub_id(repo):
        hint = "`owner/name`, for example `me/merged`"
        raise UsageError(f"`{repo}` cannot be a repository of the Hub", hint=hint)
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise UsageError("nothing can be pushed: HF_HUB_OFFLINE is set", hint="unset it, then push again")
    token = get_token()
    redact.learn(token)
    if token is None:
        hint = "run `hf auth login` with a token of the kind `write`, or set HF_TOKEN"
        raise InputError("there is no token for the Hub", hint=hint)
    return token


def push(folder: Path, recipe: Recipe, number: int, to: Push) -> Pushed:
    """Publish the output in `folder`, which is number `number` of those in its lock `recipe`, as `to` says.

    The output must have been verified. Nothing is written into the folder. Raises what `check_ready` raises, InputError
    where token, rights or names are at fault, or the repository holds another model, StoppedError where the same
    command may go well later.
    """
    token = check_ready(to.repo)
    from huggingface_hub import HfApi

    try:
        with _progress_on_a_terminal_only():
            return _Push(HfApi(token=token, library_name="mergekit_lite"), folder, recipe, number, to).run()
    except MergeError:
        raise
    except Exception as error:
        raise explained(error, to.repo) from error


class _Push:
    def __init__(self, api: HfApi, folder: Path, recipe: Recipe, number: int, to: Push):
        self.api, self.folder, self.recipe, self.number, self.to = api, folder, recipe, number, to
        said = (recipe.lock or {})["outputs"][number]
        self.names = [*(file["file"] for file in (*said["shards"], *said["files"])), LOCK]
        self.branch = to.branch or "main"
        self.notes: list[str] = []

    def run(self) -> Pushed:
        private, made = self._repository()
        if self.to.branch is not None:
            patiently(lambda: self.api.create_branch(self.to.repo, branch=self.branch, exist_ok=True))
        head = str(patiently(lambda: self.api.repo_info(self.to.repo, revision=self.branch)).sha)
        there = self._tree(head)
        text = card.render(self.folder, self.recipe, self.number, ask=self._ask, repo=self.to.repo)
        changed_here = shared(self.folder, self.recipe, self.number)
        if changed_here.places:
            self.notes.append(f"folders of yours are pushed by their names alone: {told(changed_here.places)}")
        files = self._files(text, changed_here.texts, head, there)
        removed = self._stale(head, there)
        self._check_foreign(there, removed)
        changed = [file for file in files if not _same(file, there.get(file.path_in_repo))]
        url = f"{self.api.endpoint}/{self.to.repo}"
        commit, seen = None, url if self.to.branch is None else f"{url}/tree/{self.branch}"
        if changed or removed:
            commit, seen = self._commit(changed, removed, head)
        return Pushed(
            repo=self.to.repo,
            url=redact.redact(seen),
            commit=commit,
            branch=self.branch,
            private=private,
            made=made,
            files=tuple(file.path_in_repo for file in changed),
            removed=tuple(removed),
            nbytes=sum(file.upload_info.size for file in changed),
            notes=tuple(self.notes),
        )

    def _repository(self) -> tuple[bool, bool]:
        """Whether the repository is private, and whether it is new."""
        from huggingface_hub.errors import RepositoryNotFoundError

        repo, wanted = self.to.repo, self.to.private
        private, status = False, None
        try:
            private = bool(patiently(lambda: self.api.repo_info(repo)).private)
        except RepositoryNotFoundError as error:
            status = status_of(error)
        if status is not None:
            if status == 401:
                self.api.whoami()  # tells a token that is none from a repository that is none
            made = wanted is not False
            patiently(lambda: self.api.create_repo(repo, private=made, exist_ok=True))
            return made, True
        if wanted and not private:
            hint = "make it private in its settings, or choose another name, or say `--public`"
            raise InputError(f"`{repo}` exists and is public, and the push is to be private", hint=hint)
        if wanted is False and private:
            self.notes.append(f"`{repo}` is private and stays so; its settings on the Hub change that")
        return private, False

    def _tree(self, commit: str) -> dict[str, Any]:
        entries = patiently(lambda: list(self.api.list_repo_tree(self.to.repo, recursive=True, revision=commit)))
        return {entry.path: entry for entry in entries if hasattr(entry, "blob_id")}

    def _ask(self, repo: str, commit: str | None) -> Card | None:
        """The metadata of a parent's card; None where the Hub does not tell."""
        try:
            found = patiently(lambda: self.api.model_info(repo, revision=commit)).card_data
        except Exception:  # a parent that is gone, gated or out of reach has a licence that is not known
            return None
        return None if found is None else vars(found)

    def _files(
        self, text: str, texts: Mapping[str, bytes], head: str, there: Mapping[str, Any]
    ) -> list[CommitOperationAdd]:
        """What the repository is to hold: the files of the output, some with other `texts`, and the card unless it is
        the user's there."""
        from huggingface_hub import CommitOperationAdd

        own = self.folder / card.CARD
        mine = text.encode()
        if own.is_file() and not card.is_ours(own.read_bytes()):
            mine = own.read_bytes()
        files = [CommitOperationAdd(name, texts.get(name) or str(self.folder / name)) for name in self.names]
        if card.CARD in there:
            theirs = self._read(card.CARD, head)
            if theirs != mine and not card.is_ours(theirs):
                self.notes.append(
                    f"{card.CARD} of `{self.to.repo}` is not as a push has written it, and stays as it is; "
                    f"`hf upload {self.to.repo} FILE {card.CARD}` puts another in its place"
                )
                return files
        return [*files, CommitOperationAdd(card.CARD, mine)]

    def _read(self, name: str, commit: str) -> bytes:
        with tempfile.TemporaryDirectory() as place:
            path = self.api.hf_hub_download(self.to.repo, name, revision=commit, local_dir=place)
            return Path(path).read_bytes()

    def _stale(self, head: str, there: Mapping[str, Any]) -> list[str]:
        """Files of an earlier push that are not of this output: a program would load them with it."""
        if LOCK not in there:
            return []
        recipe, problems = parse(self._read(LOCK, head).decode("utf-8", "replace"), LOCK)
        if recipe is None or problems:
            return []
        listed = [
            file["file"]
            for output in (recipe.lock or {}).get("outputs") or []
            if isinstance(output, Mapping)
            for file in (*(output.get("shards") or ()), *(output.get("files") or ()))
        ]
        return sorted({name for name in listed if name in there} - set(self.names))

    def _check_foreign(self, there: Mapping[str, Any], removed: Sequence[str]) -> None:
        """Raises InputError where a model lies there that no push of this program has written."""
        homes = {name.rpartition("/")[0] for name in self.names}
        read = [n for n in there if n.rpartition("/")[0] in homes]
        if LOCK in there:
            strange = [n for n in read if n.endswith(_WEIGHTS) and n not in (*self.names, *removed)]
        else:
            strange = [n for n in read if n.endswith(_WEIGHTS) or is_read_with_a_model(n)]
        if strange:
            hint = "push to another repository, or remove these files there if they are not needed"
            what = f"`{self.to.repo}` holds files of a model that `merge push` has not written: {few(sorted(strange))}"
            raise InputError(what, hint=hint)

    def _commit(self, changed: Sequence[CommitOperationAdd], removed: Sequence[str], head: str) -> tuple[str, str]:
        """The new commit and where to look at it."""
        from huggingface_hub import CommitOperationDelete

        to, large = self.to, [file for file in changed if file.path_in_repo != card.CARD]
        self.api.preupload_lfs_files(to.repo, large, revision=self.branch, create_pr=to.pr, free_memory=False)
        operations: list[Any] = [*changed, *(CommitOperationDelete(name) for name in removed)]
        try:
            info = patiently(
                lambda: self.api.create_commit(
                    to.repo,
                    operations,
                    commit_message=to.message or lineage(self.recipe, self.recipe.saves[self.number], None).title,
                    revision=self.branch,
                    create_pr=to.pr,
                    parent_commit=head,
                ),
                cut=not to.pr,
            )
        except ValueError as error:
            hint = f"mend the lines between `---` at the top of {card.CARD}"
            raise InputError(f"the Hub does not accept the metadata of {card.CARD}: {error}", hint=hint) from error
        except Exception as error:
            if to.pr and is_cut(error):
                hint = "look whether it is there before you push again"
                raise StoppedError("the connection failed while the pull request was made", hint=hint) from error
            # An answer may have been lost, and the commit be there.
            now = None if to.pr else self._now()
            if now is None or now == head or self._missing(changed, removed, now):
                raise
            return now, f"{self.api.endpoint}/{to.repo}/commit/{now}"
        lost = self._missing(changed, removed, info.oid)
        if lost:
            hint = "a .gitignore in the repository may keep them out"
            raise StoppedError(f"the Hub has not taken these files: {few(lost)}", hint=hint)
        return str(info.oid), str(info.pr_url or info.commit_url)

    def _now(self) -> str | None:
        try:
            return str(self.api.repo_info(self.to.repo, revision=self.branch).sha)
        except Exception:
            return None

    def _missing(self, changed: Sequence[CommitOperationAdd], removed: Sequence[str], commit: str) -> list[str]:
        """What at the Hub, after a commit, is not as it was sent."""
        there = self._tree(commit)
        lost = [file.path_in_repo for file in changed if not _same(file, there.get(file.path_in_repo))]
        return [*lost, *(name for name in removed if name in there)]


def _same(file: CommitOperationAdd, there: Any) -> bool:
    """Whether the Hub's entry of a file has these bytes."""
    if there is None or there.size != file.upload_info.size:
        return False
    if there.lfs is not None:
        return bool(there.lfs.sha256 == file.upload_info.sha256.hex())
    with file.as_file() as stream:
        data = stream.read()
    return bool(there.blob_id == hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest())


@contextmanager
def _progress_on_a_terminal_only() -> Iterator[None]:
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if sys.stderr.isatty() or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
