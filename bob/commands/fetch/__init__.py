"""`bob fetch`: models from the Hugging Face Hub, each at one commit, tracked by DVC.

A model is downloaded to `models/.fetch/<name>/<commit>`, which a download that breaks off leaves
there for the next call, and gets its place when it is complete.
"""

import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from bob.commands.configuration import MODELS as NAMED
from bob.commands.fetch import hub
from bob.commands.fetch.hub import Snapshot
from bob.commands.fetch.tracked import (
    MODELS,
    Origin,
    add,
    check_free,
    folders,
    read_origin,
    size,
    tell_tracked,
    track,
    tracking_file,
    write_origin,
)
from bob.commands.fetch.wanted import INDEX, Wanted, wanted
from bob.dvc.store import ObjectStore
from bob.errors import LINE, BobError, shown
from bob.formats import params
from bob.formats.files import locked, read_json, write_json

__all__ = ["check_free", "fetch", "list_models", "track", "update"]

_ASKED = 10  # pull requests that are looked into for safetensors


def fetch(model: str, folder: Path | None = None) -> None:
    """Download `model` ("ID[@REVISION]") into `folder` ("models/<name>") and `dvc add` it.

    The revision, by default main, is resolved to its commit. The folder is by default named after
    the model. A download that broke off goes on.

    Raises BobError where the folder is taken or not in models/, the Hub does not give the files,
    the disk is too full, or the model has no safetensors weights.
    """
    repository, revision = hub.parse(model)
    folder = folder or default_folder(repository)
    if _placing(folder).exists():
        with locked(_drafts(folder)):
            _recover(folder)
    check_free(folder, "models")
    snapshot = hub.resolve(repository, revision)
    chosen = _choose(snapshot, folder)
    with locked(_drafts(folder)):
        check_free(folder, "models")
        _download(snapshot, chosen, folder)
        _place(folder, _origin(snapshot, chosen))
    tell_tracked(folder)


def update(folder: Path | None) -> None:
    """Resolve again the revision that a model was fetched at, and bring what it is now.

    Of all models from the Hub without a `folder`. Raises BobError where there is none, or where the
    new commit cannot be had; the old one stays then.
    """
    origins = {one: origin for one in folders() if (origin := read_origin(one))}
    if folder is not None and folder not in origins:
        known = f"; those that are: {', '.join(map(str, origins))}" if origins else ""
        raise BobError(f"{folder} is not from the Hub by `bob fetch`{known}")
    if not origins:
        raise BobError("no model here is from the Hub; `bob fetch ID` brings one")
    for one in [folder] if folder else origins:
        _update(one, origins[one])


def _update(folder: Path, old: Origin) -> None:
    with locked(_drafts(folder)):
        _recover(folder)
        snapshot = hub.resolve(old.repository, old.revision)
        if snapshot.commit == old.commit:
            _say(f"{folder}: nothing new; {snapshot} is still {old.commit}")
            return
        chosen = _choose(snapshot, folder)
        _download(snapshot, chosen, folder)
        _place(folder, _origin(snapshot, chosen))
    _say(f"{folder}: {old.commit} -> {snapshot.commit}; git add {tracking_file(folder)}")


def _place(folder: Path, origin: Origin) -> None:
    """Let the draft be what lies at `folder` and is tracked; what was there stays until it is."""
    tracking = tracking_file(folder)
    text = tracking.read_text(encoding="utf-8") if tracking.exists() else None
    write_json(_placing(folder), {"commit": origin.commit, "tracking": text})
    try:
        if folder.exists():
            folder.rename(_old(folder))
        _draft(folder, origin.commit).rename(folder)
        add(folder)
        write_origin(folder, origin)
    finally:
        _recover(folder)
    for draft in _drafts(folder).iterdir():
        if draft.is_dir():  # of a commit that was never completed
            shutil.rmtree(draft, ignore_errors=True)


def _recover(folder: Path) -> None:
    """End what `_place` began, or a process that was killed: undo it unless all was tracked."""
    if not _placing(folder).exists():
        return
    begun, origin = read_json(_placing(folder)), read_origin(folder)
    draft, old, tracking = _draft(folder, begun["commit"]), _old(folder), tracking_file(folder)
    if origin is None or origin.commit != begun["commit"]:
        if folder.exists() and not draft.exists():
            folder.rename(draft)
        if old.exists():
            old.rename(folder)
        if begun["tracking"] is None:
            tracking.unlink(missing_ok=True)
        else:
            tracking.write_text(begun["tracking"], encoding="utf-8")
    shutil.rmtree(old, ignore_errors=True)
    _placing(folder).unlink()


def _drafts(folder: Path) -> Path:
    return MODELS / ".fetch" / folder.name


def _draft(folder: Path, commit: str) -> Path:
    return _drafts(folder) / commit


def _old(folder: Path) -> Path:
    return _drafts(folder) / "old"


def _placing(folder: Path) -> Path:
    """Says which commit takes its place just now, and how the `.dvc` file was before."""
    return _drafts(folder) / "placing"


def default_folder(repository: str) -> Path:
    """models/<name> by the last part of a repository's ID, as params.yaml may name it."""
    return MODELS / repository.rpartition("/")[2].lower()


def _origin(snapshot: Snapshot, chosen: frozenset[str]) -> Origin:
    left_out = tuple(sorted(snapshot.sizes.keys() - chosen))
    return Origin(snapshot.repository, snapshot.asked, snapshot.commit, left_out)


def _choose(snapshot: Snapshot, folder: Path) -> frozenset[str]:
    """The files of a snapshot that bob reads; raises BobError where these make no model.

    `folder` is where they are to come to, for what is said then.
    """
    names = snapshot.sizes.keys()
    index = hub.read(snapshot, INDEX) if INDEX in names else None
    if index is None and "config.json" not in names:
        raise BobError(
            f"{snapshot} is no model in the format of diffusers, transformers or timm: it has "
            f"neither {INDEX} nor config.json; take a repository that has"
        )
    if not isinstance(index, Mapping | None):
        raise BobError(f"{snapshot}: its {INDEX} is no JSON object; take another")
    try:
        found = wanted(names, index)
    except BobError as error:
        raise BobError(f"{snapshot} {error}; take another") from None
    if not found.lacking:
        return found.files
    part = f" of its {found.lacking[0][:-1]}" if found.lacking[0] else ""
    if found.variant:
        raise BobError(
            f"{snapshot} has{part} only the variant {found.variant}, which nothing here loads; take"
            f" a revision or a repository that has {_plain(found)} ({hub.page(snapshot.repository)}"
            "/tree/main)"
        )
    raise BobError(
        f"{snapshot} has no safetensors weights{part}, and pickled ones are not loaded; "
        f"{_elsewhere(snapshot.repository, index, folder)}"
    )


def _plain(found: Wanted) -> str:
    folder, stem = found.lacking[0], (found.variant or "").removeprefix(found.lacking[0])
    return f"{folder}{stem.partition('.')[0]}.safetensors"


def _elsewhere(repository: str, index: Mapping[str, Any] | None, folder: Path) -> str:
    """Where else a repository may have safetensors: on pull requests, which bots make of them."""
    found = []
    with suppress(BobError), hub.translated(repository, hub.REVISION):
        for reference in hub.pull_requests(repository)[:_ASKED]:
            if not wanted(hub.resolve(repository, reference).sizes.keys(), index).lacking:
                found.append(reference)
    if found:
        has = "has them" if len(found) == 1 else "have them"
        return f"{', '.join(found)} {has}: bob fetch {repository}@{found[0]} {folder}"
    return (
        f"{hub.page(repository)}/discussions may have a pull request with them: "
        f"bob fetch {repository}@refs/pr/N {folder}"
    )


def _download(snapshot: Snapshot, chosen: frozenset[str], folder: Path) -> None:
    """Download the chosen files of a snapshot to the draft of the folder, and check them."""
    draft, sizes = _draft(folder, snapshot.commit), snapshot.sizes
    stay = [sizes[name] for name in sizes if name not in chosen]
    come = sum(sizes[name] for name in chosen)
    there = sum(sizes[name] for name in chosen if (draft / name).is_file())
    _say(
        f"{snapshot} is commit {snapshot.commit}: {_files(len(chosen), come)} come to {folder}, "
        f"{_files(len(stay), sum(stay))} stay away"
        + (f"; {bytes_in_words(there)} are here from a call before" if there else "")
    )
    draft.mkdir(parents=True, exist_ok=True)
    _check_space(come - there, come, draft)
    hub.download(snapshot, chosen, draft)
    _say(f"{snapshot} is here, to be checked and taken in by DVC; gigabytes take minutes")
    hub.verify(snapshot, chosen, draft)


def _check_space(missing: int, whole: int, draft: Path) -> None:
    """Raise BobError unless the disks have room for what is missing, and for DVC's copy of all."""
    with ObjectStore() as store:
        cache = store.root
        copy = 0 if store.stores_once(draft) else whole
    together = draft.stat().st_dev == cache.stat().st_dev
    needs = {draft: missing + copy} if together else {draft: missing, cache: whole}
    for place, needed in needs.items():
        if needed > (free := shutil.disk_usage(place).free):
            words = f", of which {bytes_in_words(copy)} are DVC's copy" if together and copy else ""
            raise BobError(
                f"{place} has {bytes_in_words(free)} free, and {bytes_in_words(needed)} are needed"
                f"{words}; free space and run it again"
            )


def _files(count: int, bytes_: int) -> str:
    return f"{count} file{'' if count == 1 else 's'} ({bytes_in_words(bytes_)})"


def bytes_in_words(count: int) -> str:
    """As in "5.2 GB"."""
    for power, unit in ((9, "GB"), (6, "MB"), (3, "kB")):
        if count >= 10**power:
            return f"{count / 10**power:.1f} {unit}"
    return f"{count} byte{'' if count == 1 else 's'}"


def _say(line: str) -> None:
    print(shown(line, LINE), flush=True)


def list_models() -> None:
    """Print the models that are here or tracked: where from, how big, and what names them."""
    values = params.load()
    rows = [("folder", "id", "revision", "commit", "size", "used by")]
    for folder in folders():
        origin = read_origin(folder)
        named = [
            f"{section}.{key}" for section, key in NAMED if _names(values, section, key, folder)
        ]
        where = ("-",) * 3
        if origin:
            where = (origin.repository, origin.revision, origin.commit[:12])
        here = "" if folder.is_dir() else " (not here: dvc pull)"
        rows.append(
            (str(folder), *where, bytes_in_words(size(folder)) + here, ", ".join(named) or "-")
        )
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    for row in rows:
        _say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _names(values: Mapping[str, Any], section: str, key: str, folder: Path) -> bool:
    return Path(values[section][key]) == folder
