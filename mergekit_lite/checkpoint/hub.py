"""Fetches a model from the Hugging Face Hub into its cache. No torch; huggingface_hub is imported when it is needed."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mergekit_lite import redact, sandbox
from mergekit_lite.errors import InputError

# The library matches these with fnmatch, whose `*` crosses folders: what lies in subfolders (exports to other runtimes,
# the original release) has to be taken out again. Chat templates may lie in a subfolder.
_WANTED = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.spm", "*.tiktoken"]
_UNWANTED = [
    "consolidated*.safetensors",
    *(f"*/{pattern}" for pattern in _WANTED if pattern != "*.jinja"),
]


def is_hub_id(location: str) -> bool:
    """True where `location` has the form of a Hub model id, `organisation/name`."""
    part = r"[A-Za-z0-9_](?:[\w.-]*[A-Za-z0-9_])?"
    return (
        re.fullmatch(f"{part}/{part}", location, re.ASCII) is not None
        and len(location) <= 96
        and not any(word in location for word in ("--", ".."))
        and not location.endswith((".safetensors", ".git"))
    )


def fetch(
    repo: str, revision: str | None, *, offline: bool = False, more: Sequence[str] = ()
) -> tuple[Path, str | None]:
    """The folder in the cache that holds the model's files, and the commit that `revision` (None: main) stands for.

    Downloads what the cache lacks, of weights the safetensors files and those that `more` matches; with `offline`, or
    HF_HUB_OFFLINE set, only the cache is looked at. Raises InputError where the model, the revision or the network is
    missing. No message holds a signed URL or a token.
    """
    if sandbox.current() is not None:
        raise InputError(
            f"`{repo}` is on the Hub, and a sandbox has no network", hint="download it first, into a folder"
        )
    from huggingface_hub import constants, errors, get_token, snapshot_download

    redact.learn(get_token())
    offline = offline or bool(constants.HF_HUB_OFFLINE)
    named = f"`{repo}`" if revision is None else f"`{repo}` at revision `{revision}`"
    again = f"`hf download {repo}`" if revision is None else f"`hf download {repo} --revision {revision}`"
    endpoint = re.sub("//[^/@]*@", "//", constants.ENDPOINT)  # a mirror's address may hold a password
    try:
        with _progress_on_a_terminal_only():
            folder = snapshot_download(
                repo,
                revision=revision,
                allow_patterns=[*_WANTED, *more],
                ignore_patterns=_UNWANTED,
                local_files_only=offline,
            )
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
        reason = _reason(error.__cause__ or error)
        raise InputError(f"{named} cannot be downloaded ({reason}) and is not in the cache", hint=hint) from error
    except Exception as error:
        # Transport errors belong to whichever HTTP library this version of huggingface_hub uses.
        hint = f"check the connection and the space left in {constants.HF_HUB_CACHE}, then try {again}"
        raise InputError(f"{named} cannot be downloaded: {_reason(error)}", hint=hint) from error
    path = Path(folder)
    return path, path.name if re.fullmatch("[0-9a-f]{40}", path.name) else None


def _reason(error: BaseException) -> str:
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
