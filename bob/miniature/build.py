"""Trains the miniature's models, and measures them: `python -m bob miniature`.

Three folders, each in the format of the real model it stands for and read by the same stock
libraries, all trained on the corpus of `bob.miniature.world`, in which no task class occurs:

* `miniature-base` for Stable Diffusion: an autoencoder, a tokenizer, a text encoder and a UNet;
* `miniature-captioner` for Qwen2.5-VL: answers the paper's two questions;
* `miniature-backbone` for an ImageNet-pretrained network: a timm model that knows the corpus.

Every training writes a checkpoint each minute (a new file, renamed) and goes on from it. Batches
follow from (seed, step) alone, so a run that was killed sees the batches it would have seen.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from bob.errors import BobError
from bob.formats.files import replacing
from bob.miniature import backbone, base, captioner, measures
from bob.miniature.corpus import load_corpus
from bob.miniature.recipes import SCALES
from bob.miniature.training import trainings_of, write_card

# In this order, because the first two judge the third.
PARTS = {"captioner": captioner, "backbone": backbone, "base": base}


def train(
    out: Path = Path("models"),
    work: Path = Path(".miniature"),
    size: Literal["full", "tiny"] = "full",
    only: str | None = None,
) -> None:
    """Draw the corpus, train the models and write `out/miniature-{captioner,backbone,base}`.

    `work` holds the corpus and the checkpoints: run the command again to go on after a kill.
    `only` names one of PARTS. `tiny` runs through everything in a minute and teaches nothing.
    """
    scale, work = SCALES[size], work / size
    corpus = load_corpus(scale, work)
    for name in (only,) if only else PARTS:
        folder, part = out / f"miniature-{name}", PARTS[name]
        with replacing(folder) as draft:
            trainings = part.train(corpus, scale, draft, work)
            measured = dict(measures.MEASURES[name](draft, out, scale.judged))
            write_card(draft, folder.name, part.ABOUT, trainings, measured, work)


def train_further(
    out: Path = Path("models"),
    work: Path = Path(".miniature"),
    size: Literal["full", "tiny"] = "full",
) -> None:
    """Train the UNet of `out/miniature-base` further, and write the folder anew.

    Raises BobError where there is none.
    """
    scale, work = SCALES[size], work / size
    folder = _present(out / "miniature-base")
    earlier = trainings_of(folder)
    corpus = load_corpus(scale, work)
    with replacing(folder) as draft:
        trainings = base.train_further(corpus, scale, folder, draft, work)
        measured = dict(measures.of_base(draft, out, scale.judged))
        write_card(draft, folder.name, base.ABOUT, trainings, measured, work, earlier)


def measure(models: Path = Path("models")) -> Iterator[tuple[str, str, str]]:
    """Measure the models in `models`, at full size: (model, what, value), as each is known.

    Raises BobError where one of the three is missing.
    """
    for name in PARTS:
        folder = _present(models / f"miniature-{name}")
        for what, value in measures.MEASURES[name](folder, models, SCALES["full"].judged):
            yield folder.name, what, value


def _present(folder: Path) -> Path:
    if not folder.is_dir():
        raise BobError(f"{folder} is missing; `git checkout {folder}` brings it back")
    return folder
