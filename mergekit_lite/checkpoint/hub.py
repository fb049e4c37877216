"""What the Hugging Face Hub says of a model, and its files in the Hub's cache. No torch; huggingface_hub is imported
when it is needed."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from mergekit_lite import redact, sandbox
from mergekit_lite.checkpoint.retry import patiently
from mergekit_lite.errors import InputError

# The library matches these with fnmatch, whose `*` crosses folders: what lies in subfolders (exports to other runtimes,
# the original release) has to be taken out again. Chat templates may lie in a subfolder.
_WEIGHTS = "*.safetensors"
_BESIDE = ["*.json", "*.jinja", "*.txt", "*.model", "*.spm", "*.tiktoken"]
_WANTED = [_WEIGHTS, *_BESIDE]
_UNWANTED = [
    "consolidated*.safetensors",
    *(f"*/{pattern}" for pattern in _WANTED if pattern != "*.jinja"),
]


class Unreachable(InputError):
    """The Hub does not answer, or answers that it cannot now: the cache may have the model."""


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a model: size in bytes, and what its versions are told apart by. `large` files lie in LFS, and their
    `etag` is the SHA-256 of the file; that of others is the id of the git blob."""

    nbytes: int
    etag: str
    large: bool


@dataclass(frozen=True, slots=True)
class Listing:
    """A model's files at the commit that a revision stands for."""

    commit: str
    files: Mapping[str, HubFile]


def is_hub_id(location: str) -> bool:
    """True where `location` has the form of a Hub model id, `organisation/name`."""
    part = r"[A-Za-z0-9_](?:[\w.-]*[A-Za-z0-9_])?"
    return (
        re.fullmatch(f"{part}/{part}", location, re.ASCII) is not None
        and len(location) <= 96
        and not any(word in location for word in ("--", ".."))
        and not location.endswith((".safetensors", ".git"))
    )


def is_offline(offline: bool) -> bool:
    """Whether the Hub must not be asked: `offline`, or HF_HUB_OFFLINE is set."""
    from huggingface_hub import constants

    return offline or bool(constants.HF_HUB_OFFLINE)


def fetch(
    repo: str,
    revision: str | None,
    *,
    offline: bool = False,
    more: Sequence[str] = (),
    names: Sequence[str] | None = None,
) -> tuple[Path, str | None]:
    """The folder in the cache that holds the model's files, and the commit that `revision` (None: main) stands for.

    Downloads what the cache lacks, of weights the safetensors files and those that `more` matches, or the files of
    these `names` alone; with `offline`, or HF_HUB_OFFLINE set, only the cache is looked at. Raises InputError where the
    model, the revision or the network is missing. No message holds a signed URL or a token.
    """
    refuse_in_sandbox(repo)
    from huggingface_hub import snapshot_download

    offline = is_offline(offline)
    with explained(repo, revision, offline), _progress_on_a_terminal_only():
        folder = snapshot_download(
            repo,
            revision=revision,
            allow_patterns=[*_WANTED, *more] if names is None else list(names),
            ignore_patterns=_UNWANTED if names is None else None,
            local_files_only=offline,
        )
    path = Path(folder)
    return path, path.name if re.fullmatch("[0-9a-f]{40}", path.name) else None


def look(repo: str, revision: str | None) -> Listing:
    """The commit that `revision` (None: main) stands for and the files there, in one call. Raises Unreachable where the
    Hub does not answer, InputError where the model or the revision is missing or closed to this user."""
    refuse_in_sandbox(repo)
    from huggingface_hub import HfApi

    with explained(repo, revision):
        # Few tries: where the Hub is down, the cache may do.
        info = patiently(lambda: HfApi().model_info(repo, revision=revision, files_metadata=True), tries=5)
    files = {}
    for file in info.siblings or ():
        etag = file.lfs.sha256 if file.lfs is not None else file.blob_id
        if file.size is not None and etag is not None:
            files[file.rfilename] = HubFile(file.size, etag, file.lfs is not None)
    if info.sha is None or not re.fullmatch("[0-9a-f]{40}", info.sha):
        raise InputError(f"the Hub does not say which commit of `{repo}` is meant", hint="is HF_ENDPOINT a Hub?")
    return Listing(info.sha, files)


def fetch_beside(repo: str, commit: str, names: Sequence[str] | None = None) -> Path:
    """The model's folder in the cache, with what stands beside the weights: the files of these names, None for all that
    a merge takes over. No weights. Raises InputError."""
    refuse_in_sandbox(repo)
    from huggingface_hub import snapshot_download

    # The first file that fails ends the call, and a call begins where the last one has ended.
    wanted = list(_BESIDE if names is None else names)
    with explained(repo, commit), _progress_on_a_terminal_only():
        folder = patiently(
            lambda: snapshot_download(
                repo,
                revision=commit,
                allow_patterns=wanted,
                ignore_patterns=[_WEIGHTS, *(_UNWANTED if names is None else ())],
            ),
            tries=4 * (2 + len(wanted)),
        )
    return Path(folder)


def cached(repo: str, commit: str, names: Sequence[str]) -> bool:
    """Whether the cache holds all of these files of the commit."""
    from huggingface_hub import try_to_load_from_cache

    with suppress(Exception):
        return all(isinstance(try_to_load_from_cache(repo, name, revision=commit), str) for name in names)
    return False


def refuse_in_sandbox(repo: str) -> None:
    """Raises InputError within a sandbox."""
    if sandbox.current() is not None:
        raise InputError(
            f"`{repo}` is on the Hub, and a sandbox has no network", hint="download it first, into a folder"
        )


@contextmanager
def explained(repo: str, revision: str | None, offline: bool = False) -> Iterator[None]:
    """Turns what the Hub's library raises within the block into an InputError that says what to do. No message holds a
    signed URL or a token."""
    from huggingface_hub import constants, errors, get_token

    redact.learn(get_token())
    named = f"`{repo}`" if revision is None else f"`{repo}` at revision `{revision}`"
    again = f"`hf download {repo}`" if revision is None else f"`hf download {repo} --revision {revision}`"
    endpoint = re.sub("//[^/@]*@", "//", constants.ENDPOINT)  # a mirror's address may hold a password
    try:
        yield
    except InputError:
        raise
    except errors.GatedRepoError as error:
        hint = f"ask for access at {endpoint}/{repo}, then run `hf auth login` (older: `huggingface-cli login`)"
        raise InputError(f"{named} is gated, and this machine has no access to it", hint=hint) from error
    except errors.RepositoryNotFoundError as error:
        hint = "check the spelling; if the model is private, run `hf auth login` (older: `huggingface-cli login`)"
        raise InputError(f"there is no folder and no model on the Hub named `{repo}`", hint=hint) from error
    except errors.RevisionNotFoundError as error:
        hint = f"its branches, tags and commits are listed at {endpoint}/{repo}/commits/main"
        raise InputError(f"`{repo}` has no revision `{revision}`", hint=hint) from error
    except errors.LocalEntryNotFoundError as error:
        if offline:
            hint = f"go online once and run {again}, or leave out --offline and HF_HUB_OFFLINE"
            raise InputError(
                f"{named} is not, or not wholly, in the cache, and the run is offline", hint=hint
            ) from error
        hint = f"check the connection to {endpoint} and try {again}"
        reason = reason_of(error.__cause__ or error)
        raise Unreachable(f"{named} cannot be downloaded ({reason}) and is not in the cache", hint=hint) from error
    except Exception as error:
        # Transport errors belong to whichever HTTP library this version of huggingface_hub uses.
        hint = f"check the connection and the space left in {constants.HF_HUB_CACHE}, then try {again}"
        raise Unreachable(f"{named} cannot be downloaded: {reason_of(error)}", hint=hint) from error


def reason_of(error: BaseException) -> str:
    """What went wrong, without the error's own text, which may hold a signed URL."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return f"the Hub answered {status}"
    return os.strerror(error.errno) if isinstance(error, OSError) and error.errno else type(error).__name__


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
