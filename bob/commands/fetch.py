"""`bob fetch`: a model from the Hugging Face Hub, at a pinned commit, tracked by DVC."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

from bob.errors import LINE, BobError, shown
from bob.formats.files import replacing

_MODEL = re.compile(r"(?P<id>[\w.-]+(?:/[\w.-]+)?)@(?P<commit>[0-9a-f]{40})")
# Configuration, tokenizers and weights; no pickles, which run code when they are loaded.
_WANTED = ["*.json", "*.txt", "*.model", "*.jinja", "*.md", "*LICENSE*", "*.safetensors"]
# Second copies of the same weights, gigabytes each.
_UNWANTED = ["*.fp16.safetensors", "*.bf16.safetensors", "*.non_ema.safetensors"]


def fetch(model: str, folder: Path) -> None:
    """Download `model` ("ID@COMMIT") into `folder` ("models/<name>") and `dvc add` it.

    Raises BobError where the commit is not a full one, the folder is taken or not in models/, the
    Hub does not give the files, or the model has no safetensors weights.
    """
    match = _MODEL.fullmatch(model)
    if match is None:
        raise BobError(
            f"{model!r} is not ID@COMMIT with a full 40-digit commit, such as "
            f"org/name@{'0123456789' * 4}; the model's page on the Hub lists its commits"
        )
    check_free(folder, "models")

    from huggingface_hub import HfApi, snapshot_download

    # The base class of its HTTP client's errors, whichever client this version of it uses.
    from huggingface_hub.errors import HTTPError
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # it tells of every retry, and we of what came of them
    repository, commit = match["id"], match["commit"]
    try:
        files = HfApi().list_repo_files(repository, revision=commit)
        if not any(name.endswith(".safetensors") for name in files):
            raise BobError(f"{model} has no safetensors weights; pickled weights are not loaded")
        unwanted = list(_UNWANTED)
        if "model_index.json" in files:
            # A pipeline has its weights in its parts' folders; beside them lie single-file copies.
            unwanted += [name for name in files if re.fullmatch(r"[^/]+\.safetensors", name)]
        with replacing(folder) as draft:
            snapshot_download(
                repository,
                revision=commit,
                local_dir=draft,
                allow_patterns=_WANTED,
                ignore_patterns=unwanted,
            )
            shutil.rmtree(draft / ".cache", ignore_errors=True)  # the Hub client's notes
    except (HTTPError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise BobError(f"{model} could not be fetched: {reason}") from None

    track(folder)


def check_free(folder: Path, parent: str) -> None:
    """Raise BobError unless `folder` is `<parent>/<name>` and does not exist yet."""
    if folder.parent != Path(parent):
        raise BobError(
            f"{folder}: {parent} live in {parent}/<name>, which is what params.yaml names"
        )
    if folder.exists():
        raise BobError(f"{folder} exists; remove it, or take another name")


def track(folder: Path) -> None:
    """`dvc add` the folder; raises BobError with DVC's words where that fails."""
    added = subprocess.run(
        [sys.executable, "-m", "dvc", "add", "--quiet", str(folder)],
        check=False,
        capture_output=True,
        text=True,
    )
    if added.returncode:
        raise BobError(
            f"{folder} is there, but `dvc add {folder}` failed: {' '.join(added.stderr.split())}"
        )
    tracking = f"{folder}.dvc {folder.parent}/.gitignore"
    print(shown(f"DVC tracks {folder}; for queued experiments: git add {tracking}", LINE))
