"""`bob cache check`: are cached items still what the present code makes, and objects whole?"""

import importlib
import os
from collections.abc import Sequence

import click
from tqdm import tqdm

from bob.cache.check import CheckingCache
from bob.cache.lists import read_items
from bob.dvc.store import ObjectStore
from bob.errors import LINE, BobError, shown
from bob.formats import params
from bob.formats.layout import ITEMS


def check_objects() -> bool:
    """Hash the objects of all that DVC tracks here; True if all are whole.

    Only those are read that have changed since DVC last did. Prints a line for each that holds
    other bytes than its name says, and what to do.
    """
    with ObjectStore() as store:
        tracked = store.tracked()
        damaged = store.damaged(tqdm(tracked, "reading objects", disable=None))
        for oid in damaged:
            files = (*tracked[oid], os.path.relpath(store.path(oid)))
            names = ", ".join(map(str, files))
            click.echo(shown(f"written to since DVC put it there: {names}", LINE))
    if damaged:
        click.echo(
            "remove all of these files, then `dvc fetch` and `dvc checkout`; what no remote has, "
            "put there again and `dvc add`, or make with `dvc repro`"
        )
    else:
        click.echo(f"DVC's cache: {len(tracked):,} objects in use here, all of them whole")
    return not damaged


def check(stages: Sequence[str], share: float) -> bool:
    """Make a random share of the stages' items again and compare; True if all come out the same.

    Prints a line for each stage and for each item that does not, which is then forgotten. The items
    are those of the parameters and the workspace as they are. Raises BobError where some are not
    cached.
    """
    clean = True
    for stage in stages:
        module = importlib.import_module(f"bob.stages.{stage}")
        with CheckingCache(stage, share) as cache:
            try:
                module.take_items(params.for_stage(stage), cache)
            except BobError as error:
                raise BobError(f"{stage}: {error}") from None
        found = len(cache.differences)
        click.echo(
            f"{stage}: {cache.checked:,} of {cache.total:,} items made again, "
            + (f"{found:,} came out otherwise" if found else "all the same")
        )
        names = _names(stage) if found else {}
        for one in cache.differences:
            how = f" ({one.how})" if one.how else ""
            name = names.get(one.row.recipe, one.row.recipe[:12])
            click.echo(f"{stage}: {name} differs{how} and is forgotten")
        if found:
            click.echo(f"{stage}: `dvc repro -f -s {stage}` makes what is forgotten anew")
        clean &= not found
    return clean


def _names(stage: str) -> dict[str, str]:
    """Recipe -> what the stage's list of items has for it: a file, or a text in quotes."""
    path = ITEMS / f"{stage}.jsonl"
    items = read_items(path) if path.exists() else []
    return {item.recipe: item.file or f'"{item.text}"' for item in items}
