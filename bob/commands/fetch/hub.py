"""The Hugging Face Hub: revisions, lists of files, downloads, and what is said when they fail."""

import errno
import glob
import os
import re
import shutil
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from bob.errors import BobError, shown
from bob.formats.files import read_json

if TYPE_CHECKING:
    from huggingface_hub import HfApi, ModelInfo

REVISION = "main"
_ID = re.compile(r"[\w.-]+(?:/[\w.-]+)?")
_SHORT = re.compile(r"[0-9a-f]{4,39}")
_NOTES = ".cache"  # the Hub client's own, in the folder that it downloads to
_AT_ONCE = 2  # files; each that is under way is lost with the process


@dataclass(frozen=True)
class Snapshot:
    """A repository at a commit."""

    repository: str
    asked: str
    """The revision that was resolved: a branch, a tag, refs/pr/N, a commit."""
    commit: str
    sizes: Mapping[str, int]
    """Of each file, in bytes."""

    def __str__(self) -> str:
        return f"{self.repository}@{self.asked}"


def parse(model: str) -> tuple[str, str]:
    """Repository and revision of ID[@REVISION]; raises BobError where it is none."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    repository, at, revision = model.partition("@")
    with suppress(HFValidationError):
        validate_repo_id(repository)
        if _ID.fullmatch(repository) and (revision or not at):
            return repository, revision or REVISION
    raise BobError(
        f"{shown(model)!r} is not ID or ID@REVISION, such as timm/resnet50.tv_in1k@main; the "
        "model's page on the Hub shows its ID"
    )


def api() -> "HfApi":
    """The Hub's client, which prints no warnings: we tell of what came of a failure."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()
    return HfApi(library_name="bob")


def resolve(repository: str, revision: str) -> Snapshot:
    """The commit that a revision is now, and its files; raises BobError where there is none."""
    with translated(repository, revision):
        info = _info(repository, revision)
    files = info.siblings or []
    commit = info.sha or revision
    return Snapshot(repository, revision, commit, {one.rfilename: one.size or 0 for one in files})


def _info(repository: str, revision: str) -> "ModelInfo":
    from huggingface_hub.errors import RevisionNotFoundError

    try:
        return api().model_info(repository, revision=revision, files_metadata=True)
    except RevisionNotFoundError:
        if not _SHORT.fullmatch(revision):
            raise
    commits = [one.commit_id for one in api().list_repo_commits(repository)]
    found = [commit for commit in commits if commit.startswith(revision)]
    if len(found) != 1:
        raise BobError(
            f"{repository}: {len(found) or 'no'} commits of {REVISION} begin with {revision}; give "
            f"more digits of one ({page(repository)}/commits/{REVISION})"
        )
    return api().model_info(repository, revision=found[0], files_metadata=True)


def pull_requests(repository: str) -> list[str]:
    """The references of its pull requests, the newest first."""
    refs = api().list_repo_refs(repository, include_pull_requests=True).pull_requests or []
    numbered = {int(ref.ref.rpartition("/")[2]): ref.ref for ref in refs}
    return [numbered[number] for number in sorted(numbered, reverse=True)]


def read(snapshot: Snapshot, name: str) -> Any:
    """The content of a JSON file."""
    from huggingface_hub import hf_hub_download

    with TemporaryDirectory() as folder, translated(snapshot.repository, snapshot.asked):
        path = hf_hub_download(
            snapshot.repository, name, revision=snapshot.commit, local_dir=folder
        )
        return read_json(Path(path))


def download(snapshot: Snapshot, files: Collection[str], draft: Path) -> None:
    """Bring `files` into `draft`, except those that are there.

    Raises BobError; what is complete stays then.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():  # which it asks for some of its bars and not for all
        disable_progress_bars()
    for partial in draft.glob(f"{_NOTES}/**/*.incomplete"):  # of a process that was killed
        partial.unlink(missing_ok=True)
    with translated(snapshot.repository, snapshot.asked):
        snapshot_download(
            snapshot.repository,
            revision=snapshot.commit,
            local_dir=draft,
            allow_patterns=[glob.escape(name) for name in files],
            max_workers=_AT_ONCE,
        )


def verify(snapshot: Snapshot, files: Collection[str], draft: Path) -> None:
    """Hold `files` in `draft` to the Hub's checksums, and remove all else from it.

    Raises BobError where one is not as the Hub has it; that one is removed then.
    """
    with translated(snapshot.repository, snapshot.asked):
        check = api().verify_repo_checksums(
            snapshot.repository, revision=snapshot.commit, local_dir=draft
        )
    damaged = sorted(one["path"] for one in check.mismatches)
    for name in damaged:
        (draft / name).unlink()
    if bad := sorted({*damaged, *(set(files) & set(check.missing_paths))}):
        raise BobError(
            f"{snapshot}: {bad[0]}{f' and {len(bad) - 1} more' if len(bad) > 1 else ''} did not "
            "arrive as the Hub's checksums say; the same command fetches what is wrong again"
        )
    shutil.rmtree(draft / _NOTES, ignore_errors=True)
    for path in [path for path in draft.rglob("*") if path.is_file()]:
        if path.relative_to(draft).as_posix() not in files:
            path.unlink()


def page(repository: str) -> str:
    """The address of a model's page."""
    return f"{api().endpoint}/{repository}"


@contextmanager
def translated(repository: str, revision: str) -> Iterator[None]:
    """Raise what the Hub's client raises as a BobError of one line that says what to do."""
    # The base class of its HTTP client's errors, whichever client this version of it uses.
    from huggingface_hub.errors import HTTPError

    try:
        yield
    except (HTTPError, OSError, RuntimeError) as error:  # the last is of hf_xet
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES):
            raise
        cause = error.__cause__ if isinstance(error, FileNotFoundError) else None
        raise BobError(_told(cause or error, repository, revision)) from None


def _told(error: BaseException, repository: str, revision: str) -> str:
    from huggingface_hub import errors

    model, token = f"{repository}@{revision}", "HF_TOKEN" in os.environ
    own = f"set HF_TOKEN to a token of yours ({api().endpoint}/settings/tokens)"
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"{model}: HF_HUB_OFFLINE is set; unset it to fetch, or `dvc pull` what is tracked"
    if isinstance(error, errors.GatedRepoError):
        then = "with the account that HF_TOKEN is of" if token else f"and {own}"
        return f"{repository} is gated: accept its terms on {page(repository)} {then}"
    if status == 401 and token and not isinstance(error, errors.RepositoryNotFoundError):
        return f"{model}: the Hub does not know the token in HF_TOKEN; {own}, or unset it"
    if isinstance(error, errors.RepositoryNotFoundError):
        seen = "that the account of HF_TOKEN may see" if token else f"that is public; else {own}"
        name = repository.rpartition("/")[2]
        return (
            f"the Hub has no model {repository} {seen}; {api().endpoint}/models?search={name} "
            "finds how it is spelt"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repository} has no revision {revision!r}; {_revisions(repository)}"
    said = " ".join(str(error).split())[:200] or type(error).__name__
    if status == 429:
        wait = re.search(r"Retry after (\d+) seconds", said)
        more = "" if token else f", or {own}, which raises the limit"
        when = f"in {wait[1]} seconds" if wait else "in some minutes"
        return f"{model}: the Hub limits how much is asked; run it again {when}{more}"
    return f"{model} could not be fetched: {said}; the same command goes on with what is missing"


def _revisions(repository: str) -> str:
    """What revisions a repository has instead."""
    from huggingface_hub.errors import HTTPError

    with suppress(HTTPError, OSError):
        refs = api().list_repo_refs(repository)
        names = [ref.name for ref in (*refs.branches, *refs.tags)]
        more = f" and {len(names) - 20} more" if len(names) > 20 else ""
        return f"it has {', '.join(names[:20])}{more}, and commits"
    return f"{page(repository)}/tree/{REVISION} shows what it has"
