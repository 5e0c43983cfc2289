"""A folder to the Hugging Face hub."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any


def reachable(repo: str, api: Any) -> None:
    """Asked before the work: is this a name, is there a network, are we logged in?

    Raises:
        ValueError: one of them is not so.
    """
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repo):
        raise ValueError(f"--push {repo}: give ORG/NAME")
    _told(repo, api.whoami)


def push(folder: Path, repo: str, private: bool, api: Any) -> str:
    """Upload a folder in one commit, into a repository that is made if it is not there; returns its
    address.

    Args:
        private: of a new repository; a public one that is there already is refused.
        api: a `huggingface_hub.HfApi`.

    Raises:
        ValueError: not logged in, no network, or no right to write there.
    """
    later = f"; the folder is complete, so `hf upload {repo} {folder}` is all that is left"
    _told(repo, lambda: api.create_repo(repo, private=private, exist_ok=True), later)
    if private and not _told(repo, lambda: api.repo_info(repo), later).private:
        raise ValueError(
            f"--push {repo}: --private, but it is there already and public; nothing was uploaded"
        )
    _told(
        repo,
        lambda: api.upload_folder(
            repo_id=repo, folder_path=folder, commit_message="clipsmall.export"
        ),
        later,
    )
    return f"https://huggingface.co/{repo}"


def _told(repo: str, call: Callable[[], Any], later: str = "") -> Any:
    """The call's result; what a hub's client raises is told in a line, which ends with `later`."""
    from huggingface_hub.errors import LocalTokenNotFoundError

    try:
        return call()
    except LocalTokenNotFoundError:
        raise ValueError(
            f"--push {repo}: not logged in; run `hf auth login`, or set HF_TOKEN"
        ) from None
    except Exception as error:
        # no network, HF_HUB_OFFLINE, a refusal: the client, httpx and urllib3 have their own
        status = getattr(getattr(error, "response", None), "status_code", 0)
        hint = {401: "; run `hf auth login`", 403: "; this account may not write there"}.get(
            status, ""
        )
        raise ValueError(
            f"--push {repo}: {' '.join(str(error).split())[:200]}{hint}{later}"
        ) from None
