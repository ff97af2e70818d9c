"""Model folders that DVC tracks, and where they came from: `meta` in `models/<name>.dvc`."""

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from bob.errors import LINE, BobError, shown
from bob.formats.files import replacing_file
from bob.formats.params import read_yaml

MODELS = Path("models")
_META = "hub"


@dataclass(frozen=True)
class Origin:
    """Where on the Hub a folder is from."""

    repository: str
    revision: str
    """As it was asked for; `bob fetch --update` resolves it again."""
    commit: str
    left_out: tuple[str, ...]
    """Files of the commit that did not come."""


def check_free(folder: Path, parent: str) -> None:
    """Raise BobError unless `folder` is `<parent>/<name>` and neither exists nor is tracked."""
    if folder.parent != Path(parent):
        raise BobError(
            f"{folder}: {parent} live in {parent}/<name>, which is what params.yaml names"
        )
    if folder.name.startswith("."):
        raise BobError(f"{folder}: take a name that does not begin with a dot")
    if folder.exists():
        raise BobError(f"{folder} exists; remove it, or take another name")
    if (tracking := tracking_file(folder)).exists():
        raise BobError(f"{tracking} tracks one; `dvc pull {tracking}` brings it")


def track(folder: Path) -> None:
    """`dvc add` the folder and say so; raises BobError with DVC's words where that fails."""
    try:
        add(folder)
    except BobError as error:
        raise BobError(f"{folder} is there, but {error}") from None
    tell_tracked(folder)


def add(folder: Path) -> None:
    """`dvc add` the folder; raises BobError with DVC's words where that fails."""
    added = subprocess.run(
        [sys.executable, "-m", "dvc", "add", "--quiet", str(folder)],
        check=False,
        capture_output=True,
        text=True,
    )
    if added.returncode:
        raise BobError(f"`dvc add {folder}` failed: {' '.join(added.stderr.split())}")


def tell_tracked(folder: Path) -> None:
    """Say that DVC tracks the folder, and what is left to do."""
    tracking = f"{folder}.dvc {folder.parent}/.gitignore"
    print(shown(f"DVC tracks {folder}; for queued experiments: git add {tracking}", LINE))


def tracking_file(folder: Path) -> Path:
    """DVC's file of a folder."""
    return folder.with_name(f"{folder.name}.dvc")


def write_origin(folder: Path, origin: Origin) -> None:
    """Keep the origin of a tracked folder in the `meta` of its `.dvc` file, all else as it is."""
    path, yaml = tracking_file(folder), YAML()
    values = yaml.load(path.read_text(encoding="utf-8"))
    fields = {**vars(origin), "left_out": list(origin.left_out)}
    values.setdefault("meta", {})[_META] = fields
    with replacing_file(path) as draft, draft.open("w", encoding="utf-8") as file:
        yaml.dump(values, file)


def read_origin(folder: Path) -> Origin | None:
    """What `write_origin` wrote; None where nothing tracks the folder or it is from elsewhere."""
    kept = _read(folder).get("meta")
    fields = kept.get(_META) if isinstance(kept, Mapping) else None
    if fields is None:
        return None
    try:
        return Origin(**{**fields, "left_out": tuple(fields["left_out"])})
    except (TypeError, KeyError):
        raise BobError(
            f"{tracking_file(folder)}: meta.{_META} is not as `bob fetch` writes it; remove it, "
            "or fetch the model anew"
        ) from None


def size(folder: Path) -> int:
    """Bytes of a folder, as DVC noted them, or else as they lie there."""
    outs = _read(folder).get("outs") or [{}]
    if "size" in outs[0]:
        return int(outs[0]["size"])
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _read(folder: Path) -> Mapping[str, Any]:
    path = tracking_file(folder)
    values = read_yaml(path) if path.is_file() else {}
    return values if isinstance(values, Mapping) else {}


def folders() -> list[Path]:
    """The model folders that are here or tracked, by name."""
    found = {path for path in MODELS.glob("[!.]*") if path.is_dir()}
    return sorted(found | {path.with_suffix("") for path in MODELS.glob("[!.]*.dvc")})
