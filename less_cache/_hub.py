"""Folders that lie here or on the Hugging Face hub."""

from __future__ import annotations

import re
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from ._checks import check_path

if TYPE_CHECKING:
    from typing_extensions import Self


class Pretrained(ABC):
    """What lies in a folder of its own, here or on the Hugging Face hub."""

    _FILES: ClassVar[Sequence[str]]
    """What of a repository is fetched."""
    _MESSAGE: ClassVar[str]
    """Of the commit that uploads it."""

    @abstractmethod
    def save_pretrained(self, folder: str | Path) -> None:
        """Write it into a folder."""

    @classmethod
    @abstractmethod
    def _read(cls, folder: Path) -> Self:
        """Read what `save_pretrained` wrote."""

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *, subfolder: str = "", revision: str | None = None
    ) -> Self:
        """Read one from a folder, or from a repository of the Hugging Face hub.

        Parameters
        ----------
        name
            A folder's path; where there is none of that name, a hub repository's id.
        subfolder
            A folder inside it.
        revision
            Branch, tag or commit on the hub.

        Raises
        ------
        FileNotFoundError
            If there is neither.
        ValueError
            If a file is damaged, or what it holds does not go together.
        """
        check_path("name", name)
        return cls._read(locate(name, subfolder, revision, cls._FILES))

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
        """Upload it to a repository of the Hugging Face hub, made if need be.

        Returns
        -------
        str
            The address of the commit.
        """
        return upload(self.save_pretrained, repo_id, self._MESSAGE, private=private, token=token)


def locate(name: str | Path, subfolder: str, revision: str | None, files: Sequence[str]) -> Path:
    """The folder that `name` means; where it is no local one, `files` of it come from the hub.

    Raises
    ------
    FileNotFoundError
        If there is neither.
    """
    local = Path(name)
    if local.is_dir():
        return local / subfolder
    looks_like_id = re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) is not None
    if not looks_like_id:
        raise FileNotFoundError(f"{name}: no such folder, and not a hub id of the form owner/name")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise FileNotFoundError(
            f"{name}: no such folder; to fetch it from the hub, install less_cache[transformers]"
        ) from None
    prefix = f"{subfolder}/" if subfolder else ""
    patterns = [prefix + file for file in files]
    try:
        fetched = snapshot_download(str(name), revision=revision, allow_patterns=patterns)
    except Exception as error:  # Network, hub, rights: whatever it is, the name led to it.
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise FileNotFoundError(
            f"{name}: no such folder, and the hub gave no such repository: {reason}"
        ) from error
    return Path(fetched) / subfolder


def upload(
    save: Callable[[Path], None], repo_id: str, message: str, *, private: bool, token: str | None
) -> str:
    """Upload what `save` writes into a folder as one commit, and return its address.

    Raises
    ------
    ImportError
        If huggingface_hub is missing.
    """
    try:
        from huggingface_hub import HfApi
    except ImportError:
        raise ImportError(
            "push_to_hub needs huggingface_hub: install less_cache[transformers]"
        ) from None
    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder))
        commit = api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message)
    return str(commit.commit_url)
