"""A model repo on the Hugging Face Hub, through huggingface_hub: its head, its files, and new commits.

It knows nothing about versions. Every failure becomes an EditsError. huggingface_hub (`vllm-edits[hub]`) is imported
where it is used. It finds endpoint and token by itself (HF_ENDPOINT, HF_TOKEN, `hf auth login`) unless they are given.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_edits.edit_store.canonical import sha256
from vllm_edits.edit_store.errors import (
    BundleRefused,
    Conflict,
    EditsError,
    NotFound,
    Reason,
    StoreUnavailable,
    nearest,
)

DEFAULT_REVISION = "main"
MAX_FILES = 100_000
_CLIENT_NAME = "vllm-edits"
_TIMEOUT_SECONDS = 30
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


@dataclass(frozen=True)
class Content:
    """The digests by which a repo names the content of a file: the git blob's, or for a large file the sha256."""

    git: str
    sha256: str

    @classmethod
    def of(cls, data: bytes) -> Content:
        git = hashlib.sha1(b"blob %d\0" % len(data), usedforsecurity=False)
        git.update(data)
        return cls(git.hexdigest(), sha256(data))


@dataclass(frozen=True)
class File:
    """A file in the listing of a repo. `sha256` is known for large files only."""

    size: int
    git: str
    sha256: str | None

    def holds(self, content: Content) -> bool:
        return self.sha256 == content.sha256 if self.sha256 is not None else self.git == content.git


class NoRepo(NotFound):
    """The repo does not exist, or this token cannot see it."""


class HubRepo:
    """A revision of a model repo."""

    def __init__(self, name: str, revision: str, *, endpoint: str | None = None, token: str | None = None) -> None:
        try:
            from huggingface_hub import HfApi
        except ImportError:
            raise EditsError("huggingface_hub is not installed. Install vllm-edits[hub]") from None
        if not _REPO.fullmatch(name):
            raise EditsError(
                f"{name!r} is not the name of a repo on the Hub: expected owner/name, e.g. my-lab/my-edits"
            )
        self.name = name
        self.revision = revision
        self._api = HfApi(endpoint=endpoint and endpoint.rstrip("/"), token=token, library_name=_CLIENT_NAME)

    def __str__(self) -> str:
        return self.name if self.revision == DEFAULT_REVISION else f"{self.name} ({self.revision})"

    def head(self) -> str:
        """The present commit of the revision."""
        return str(self._info().sha)

    def head_to_push_on(self, *, private: bool) -> str:
        """The present commit. The repo is created if it does not exist. With `private`, a public repo is an error."""
        try:
            info = self._info()
        except NoRepo as missing:
            if self.revision != DEFAULT_REVISION:
                raise NotFound(f"{missing} Push to {DEFAULT_REVISION} first: this creates the repo") from None
            with self._explained():
                self._api.create_repo(self.name, private=private, exist_ok=True)
            info = self._info()
        if private and not info.private:
            raise EditsError(
                f"expected a private repo, but {self.name} is public. Nothing was pushed. Make the repo private on the "
                "Hub, or leave out --private"
            )
        return str(info.sha)

    def files(self, commit: str) -> dict[str, File]:
        """Every file of a commit by path."""
        from huggingface_hub import RepoFile

        files: dict[str, File] = {}
        with self._explained():
            for entry in self._api.list_repo_tree(self.name, revision=commit, recursive=True):
                if isinstance(entry, RepoFile):
                    size, digest = (entry.lfs.size, entry.lfs.sha256) if entry.lfs else (entry.size, None)
                    files[entry.path] = File(max(size, entry.size), entry.blob_id, digest)
                if len(files) > MAX_FILES:
                    raise BundleRefused(
                        str(self), [Reason("too_large", f"expected at most {MAX_FILES} files, found more")]
                    )
        return files

    def download(self, path: str, commit: str, folder: Path) -> Path:
        """Fetch a file of a commit into a folder. Its size is checked, its content is not."""
        with self._explained():
            return Path(self._api.hf_hub_download(self.name, path, revision=commit, local_dir=folder))

    def upload(self, files: Mapping[str, bytes]) -> list[Any]:
        """The operations that add files in a commit. Large files are uploaded now, so memory need not hold them all."""
        from huggingface_hub import CommitOperationAdd

        operations = [CommitOperationAdd(path, data) for path, data in files.items()]
        with self._explained():
            self._api.preupload_lfs_files(self.name, operations, revision=self.revision)
        return operations

    def commit(self, operations: list[Any], summary: str, description: str, *, parent: str) -> str:
        """Commit on top of `parent`. Conflict, and no commit, if the branch has moved."""
        lost = "It is unknown whether the commit was made. Push again later: files in the repo are not pushed twice"
        with self._explained(lost):
            made = self._api.create_commit(
                self.name,
                operations,
                commit_message=summary,
                commit_description=description,
                revision=self.revision,
                parent_commit=parent,
            )
        return str(made.oid)

    def _info(self) -> Any:
        with self._explained():
            return self._api.model_info(self.name, revision=self.revision, timeout=_TIMEOUT_SECONDS)

    @contextmanager
    def _explained(self, lost: str = "Check the network and HF_ENDPOINT, then try again") -> Iterator[None]:
        """Translate errors of huggingface_hub. It raises its own errors, its network library's and plain ones."""
        from huggingface_hub.errors import HTTPError, OIDCError  # type: ignore[attr-defined]  # httpx's or httpx2's

        try:
            yield
        except (HTTPError, OIDCError, OSError, RuntimeError, ValueError) as error:
            raise self._translated(list(_causes(error)), HTTPError, lost) from error

    def _translated(self, causes: list[BaseException], network_error: type[Exception], lost: str) -> EditsError:
        """The EditsError for the first error in the chain that has a meaning. The client wraps some in vaguer ones."""
        from huggingface_hub import errors

        where = self._api.endpoint
        for cause in causes:
            if isinstance(cause, errors.OfflineModeIsEnabled):
                return StoreUnavailable(
                    f"{where} was not contacted, because HF_HUB_OFFLINE is set. Unset it, or move versions as files: "
                    "vllm-edits export and import"
                )
            if isinstance(cause, errors.GatedRepoError):
                return StoreUnavailable(f"{self.name} is gated. Ask for access at {where}/{self.name}")
            if isinstance(cause, errors.RepositoryNotFoundError):
                return NoRepo(
                    f"{where} has no model repo {self.name}, or this token cannot see it. Check the name; log in with "
                    "`hf auth login` or set HF_TOKEN."
                )
            if isinstance(cause, errors.RevisionNotFoundError):
                return NotFound(
                    f"{self.name} has no revision {self.revision!r}.{nearest(self.revision, self._branches())} "
                    f"Make a branch with: hf repos branch create {self.name} {self.revision}"
                )
            if isinstance(cause, errors.HfHubHTTPError):
                return self._refused(cause.response.status_code, cause.server_message or str(cause))
            if isinstance(cause, network_error):
                return StoreUnavailable(f"{where} cannot be reached: {cause or type(cause).__name__}. {lost}")
        told, root = str(causes[0]), str(causes[-1])
        told += "" if root in told else f": {root}"
        xet = isinstance(causes[0], ConnectionError)  # what hf_xet raises
        hint = ". If only Xet is out of reach, set HF_HUB_DISABLE_XET=1" if xet else ""
        return StoreUnavailable(f"{self.name} at {where}: {told}{hint}")

    def _refused(self, status: int, told: str) -> EditsError:
        """The EditsError for an unsuccessful answer of the Hub."""
        where = self._api.endpoint
        if status in (409, 412):
            return Conflict(
                f"another commit was made to {self} at the same time, so nothing was pushed or overwritten. Push again"
            )
        if status == 401:
            return StoreUnavailable(
                f"{where} does not accept this token for {self.name}, or there is no such repo: {told}. Log in with "
                "`hf auth login` or set HF_TOKEN"
            )
        if status == 403:
            return StoreUnavailable(
                f"this token has no write permission for {self.name}: {told}. Use a token that has it"
            )
        if status == 429:
            return StoreUnavailable(f"{where} limits the rate of requests: {told}. Try again later")
        return StoreUnavailable(f"{where} answered {status} for {self.name}: {told}")

    def _branches(self) -> list[str]:
        """The branches, for an error message. Empty if they cannot be read."""
        from huggingface_hub.errors import HfHubHTTPError

        try:
            return [branch.name for branch in self._api.list_repo_refs(self.name).branches]
        except (HfHubHTTPError, OSError):
            return []


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
