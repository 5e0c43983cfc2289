"""Uploading a folder to the Hugging Face hub."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any


def check_access(repo: str, api: Any) -> None:
    """Check repository name, network and login before the export starts.

    Raises:
        ValueError: one of them fails.
    """
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repo):
        raise ValueError(f"--push {repo}: give ORG/NAME")
    _ask(repo, api.whoami)


def upload_folder(folder: Path, repo: str, private: bool, api: Any) -> str:
    """Upload a folder in one commit; the repository is created if it does not exist.

    Args:
        private: make a new repository private; an existing public one is refused.
        api: a `huggingface_hub.HfApi`.

    Returns:
        The repository's address.

    Raises:
        ValueError: not logged in, no network, or no right to write there.
    """
    ending = f"; the folder is complete, so `hf upload {repo} {folder}` is all that is left"

    def upload() -> None:
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="clipsmall.export")

    _ask(repo, lambda: api.create_repo(repo, private=private, exist_ok=True), ending)
    if private and not _ask(repo, lambda: api.repo_info(repo), ending).private:
        raise ValueError(
            f"--push {repo}: --private, but it is there already and public; nothing was uploaded"
        )
    _ask(repo, upload, ending)
    return f"https://huggingface.co/{repo}"


def _ask(repo: str, call: Callable[[], Any], ending: str = "") -> Any:
    """Call the hub; errors of its client become a one-line ValueError.

    Args:
        ending: appended to the message.
    """
    from huggingface_hub.errors import LocalTokenNotFoundError

    try:
        return call()
    except LocalTokenNotFoundError:
        raise ValueError(
            f"--push {repo}: not logged in; run `hf auth login`, or set HF_TOKEN"
        ) from None
    except Exception as error:
        # no network, HF_HUB_OFFLINE, a refusal: the client, httpx and urllib3 all have their own
        # exceptions
        hints = {401: "; run `hf auth login`", 403: "; this account may not write there"}
        status = getattr(getattr(error, "response", None), "status_code", 0)
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"--push {repo}: {reason}{hints.get(status, '')}{ending}") from None
