"""Caption banks of the miniature's shots with the true contexts, and with some of them wrong.

`python -m bob.commands.study.banks 16 17 18 19 20` writes them for these data seeds. They stand for
a captioner that never errs and for one that errs often, and reach the pipeline as a user's own
corrected bank does, through `caption.bank`.
"""

import csv
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from bob.commands.study.drawn import run_module, sandbox
from bob.formats.files import replacing_file
from bob.formats.layout import CONTEXTS, MINIATURE, TRAIN
from bob.formats.photos import read_photos
from bob.formats.presets import overridden
from bob.formats.prompts import Context, Entry, write_bank
from bob.miniature.world import BACKGROUNDS, POSES

TRUE = CONTEXTS / "miniature-true.jsonl"
WRONG = CONTEXTS / "miniature-wrong.jsonl"
WRONG_SHARE = 0.3


def true_entries(seed: int) -> list[Entry]:
    """The shots under a data seed, at the number of shots in `params.yaml`, with true contexts."""
    values = overridden({"data.seed": seed, "data.name": "miniature"}, "params.yaml")
    with sandbox(values) as folder:
        for module in ("bob draw", "bob split"):
            run_module(module, folder)
        with (folder / MINIATURE / "contexts.csv").open(encoding="utf-8", newline="") as file:
            truth = {
                row["path"]: Context(row["background"], row["pose"]) for row in csv.DictReader(file)
            }
        photos = read_photos(folder / TRAIN)
    return [
        Entry(photo.sha256, photo.class_name, truth["/".join(Path(photo.path).parts[-3:])])
        for photo in photos
    ]


def with_errors(entries: Sequence[Entry], share: float, seed: int) -> list[Entry]:
    """Give `share` of the entries a background and a pose that are both wrong, drawn uniformly."""
    random = np.random.default_rng(seed)
    wrong = set(random.permutation(len(entries))[: round(share * len(entries))].tolist())

    def other(values: Sequence[str], true: str) -> str:
        return str(random.choice([value for value in values if value != true]))

    return [
        Entry(
            entry.image,
            entry.class_name,
            Context(other(BACKGROUNDS, entry.context.background), other(POSES, entry.context.pose)),
        )
        if number in wrong and entry.context
        else entry
        for number, entry in enumerate(entries)
    ]


def write_banks(seeds: Iterable[int]) -> None:
    """Write TRUE and WRONG, each with the shots of all `seeds`."""
    true, wrong = [], []
    for seed in seeds:
        entries = true_entries(seed)
        true += entries
        wrong += with_errors(entries, WRONG_SHARE, seed)
    for path, written in ((TRUE, true), (WRONG, wrong)):
        with replacing_file(path) as draft:
            write_bank(draft, written)


if __name__ == "__main__":
    write_banks([int(seed) for seed in sys.argv[1:]])
