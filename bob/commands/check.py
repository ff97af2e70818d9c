"""`bob cache check`: are cached items still what the present code makes?"""

import importlib
from collections.abc import Sequence

import click

from bob.cache.check import CheckingCache
from bob.cache.lists import read_items
from bob.errors import BobError
from bob.formats import params
from bob.formats.layout import ITEMS


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
