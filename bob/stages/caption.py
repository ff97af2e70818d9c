"""Stage caption: the caption bank, one (background, pose) pair for every shot (paper: step 1)."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bob.cache.items import ItemCache
from bob.cache.lists import Item, write_items
from bob.cache.recipe import item_key, maker_of
from bob.cache.wanted import Wanted
from bob.cache.work import Work
from bob.errors import BobError, tell
from bob.formats.files import replacing
from bob.formats.layout import BANK, CAPTION, CAPTION_ITEMS, TRAIN
from bob.formats.params import Params
from bob.formats.photos import Photo, Task, read_photos, read_task
from bob.formats.prompts import ATTRIBUTES, QUESTION, Context, Entry, read_bank, write_bank
from bob.models.captioner import Captioner, open_captioner
from bob.models.endpoint import UnansweredError, is_endpoint

# What is added when an answer was refused. Never the class name: it is what must not be said.
INSISTENCE = (
    "",
    ". Do not say which {descriptor} it is",
    ". Answer in at most three words, and do not say which {descriptor} it is",
)
MAX_WORDS = 12  # two phrases and a class name have to fit into CLIP's 77 tokens

Ask = Callable[[Sequence[Photo], str], list[str]]
"""Photos and a question -> the raw answers."""


def run(params: Params) -> None:
    """Write the caption bank of the shots to `results/caption/bank.jsonl`.

    Answers that this repository has had before come from the item cache.
    """
    settings = params.caption
    items: list[Item] = []
    with ItemCache("caption") as cache:
        entries = take_items(params, cache, items)
    asked = f"contexts from {settings.bank}"
    if settings.bank == "captioner":
        asked = f"answers: {cache.account}"
        if cache.made and not is_endpoint(Path(settings.model)):
            from bob.models.precision import device_name  # late: torch, which made the answers

            asked += f" on {device_name()}"
    with replacing(CAPTION) as folder:
        write_bank(folder / BANK.name, entries)
    write_items(CAPTION_ITEMS, items)
    distinct = len({entry.context for entry in entries if entry.context})
    print(f"caption: {len(entries)} photos, {distinct} distinct contexts ({asked})")


def take_items(params: Params, cache: ItemCache, items: list[Item] | None = None) -> list[Entry]:
    """The shots' entries in the bank; the answers that they are made of are added to `items`."""
    settings, photos = params.caption, read_photos(TRAIN)
    if settings.bank != "captioner":
        return entries_of(photos, Path(settings.bank))
    return captioned(cached_ask(cache, settings, items), photos, read_task())


def cached_ask(cache: ItemCache, settings: Any, items: list[Item] | None = None) -> Ask:
    """Ask the captioner of `settings`, the parameters of `caption`, through the item cache.

    The model is loaded for the first answer that is not there; what was asked is added to `items`.
    """
    captioner = captioner_of(settings)
    wanted_of = answers_wanted(cache, Path(settings.model), captioner)
    model = cache.reading(Path(settings.model))

    def ask(photos: Sequence[Photo], question: str) -> list[str]:
        def inputs(numbers: list[int]) -> tuple[list[Photo], str]:
            return [photos[number] for number in numbers], question

        def keeping(asked: Sequence[Photo], question: str) -> list[str]:
            try:
                return captioner.ask(asked, question)
            except UnansweredError as error:
                recipe = dict(zip((photo.sha256 for photo in photos), wanted.recipes, strict=True))
                cache.keep(
                    wanted,
                    {
                        recipe[asked[place].sha256]: answer.encode()
                        for place, answer in error.answers.items()
                    },
                )
                raise

        def files(numbers: list[int]) -> Mapping[Path, str]:
            shown = [photos[number] for number in numbers]
            return model(numbers) | {Path(photo.path): photo.sha256 for photo in shown}

        wanted = wanted_of(photos, question)
        # What an endpoint has answered of a batch that fails is kept: it may have been paid for.
        make = captioner.ask if captioner.elsewhere else keeping
        work = Work(make, inputs, str.encode, files, elsewhere=captioner.elsewhere)
        rows = cache.take(wanted, work, settings.batch_size, "captioning")
        answers = [cache.read(row.oid).decode() for row in rows]
        if items is not None:
            items.extend(
                Item(row.recipe, row.maker, row.oid, text=answer)
                for row, answer in zip(rows, answers, strict=True)
            )
        return answers

    return ask


def captioner_of(settings: Any) -> Captioner:
    """The captioner by `settings`, the parameters of `caption`; nothing is loaded yet."""
    return open_captioner(
        Path(settings.model),
        precision=settings.precision,
        batch_size=settings.batch_size,
        image_side=settings.image_side,
    )


def answers_wanted(
    cache: ItemCache, folder: Path, captioner: Captioner
) -> Callable[[Sequence[Photo], str], Wanted]:
    """Photos and a question -> the answers of what is in `folder`, as the item cache takes them."""
    common = {
        # The folder's content is the model, unless the captioner says that it is elsewhere.
        "model": cache.content_hash(folder),
        **captioner.settings,
    }
    maker = maker_of(captioner.made_by, captioner.libraries)

    def wanted(photos: Sequence[Photo], question: str) -> Wanted:
        asking = {"item": "answer", **common, "question": question}
        recipes = [item_key(**asking, photo=photo.sha256) for photo in photos]
        return Wanted(recipes, asking, maker)

    return wanted


def captioned(ask: Ask, photos: Sequence[Photo], task: Task) -> list[Entry]:
    """The photos' entries in the bank; warns of those that got no usable answer."""
    accepted = {
        attribute: accepted_answers(ask, photos, attribute, task) for attribute in ATTRIBUTES
    }
    entries = []
    for index, photo in enumerate(photos):
        background, pose = (accepted[attribute].get(index) for attribute in ATTRIBUTES)
        context = Context(background, pose) if background and pose else None
        entries.append(Entry(photo.sha256, photo.class_name, context))
    without = [
        photo.path for photo, entry in zip(photos, entries, strict=True) if entry.context is None
    ]
    if without:
        tell(
            f"caption: warning: no usable answer in {len(INSISTENCE)} tries for "
            f"{len(without)} of {len(photos)} photos, which keep the caption without context: "
            f"{', '.join(without[:5])}{' ...' if len(without) > 5 else ''}"
        )
    return entries


def entries_of(photos: Sequence[Photo], path: Path) -> list[Entry]:
    """The photos' own entries in a caption bank that was written or corrected by hand.

    Raises BobError naming a photo that has none.
    """
    contexts = {entry.image: entry.context for entry in read_bank(path)}
    for photo in photos:
        if photo.sha256 not in contexts:
            raise BobError(
                f'{path} has no line for {photo.path}; add one with "image": "{photo.sha256}", or '
                "start from results/caption/bank.jsonl, as caption.bank: captioner makes it"
            )
    return [Entry(photo.sha256, photo.class_name, contexts[photo.sha256]) for photo in photos]


def accepted_answers(
    ask: Ask, photos: Sequence[Photo], attribute: str, task: Task
) -> dict[int, str]:
    """Index of a photo -> accepted phrase for `attribute`; photos that got none are left out.

    An empty answer, or one that names a class of the task, is refused and asked for again in other
    words: decoding is greedy, so the same words would get the same answer.
    """
    accepted: dict[int, str] = {}
    for insistence in INSISTENCE:
        asked = [index for index in range(len(photos)) if index not in accepted]
        if not asked:
            break
        question = (QUESTION + insistence).format(attribute=attribute, descriptor=task.descriptor)
        answers = ask([photos[index] for index in asked], question)
        for index, answer in zip(asked, answers, strict=True):
            phrase = clean(answer, attribute)
            if phrase and not names_class(answer, task.classes):
                accepted[index] = phrase
    return accepted


def clean(answer: str, attribute: str) -> str:
    """Cut an answer down to the phrase that fits `in the [background] background`.

    The first sentence, without lead-ins ("The background is"), articles, quotes, a repeated
    attribute word and closing punctuation, in lower case. May be empty.
    """
    phrase = answer.strip().split("\n")[0].strip(" \"'`*.")
    phrase = re.split(r"[.;!?](?:\s|$)", phrase)[0].lower()
    phrase = re.sub(rf"^.*\b{attribute}\b[^,]*?(?:\b(?:is|shows|features)\b|:)\s*", "", phrase)
    phrase = re.sub(r"^(?:a|an|the)\s+", "", phrase)
    phrase = re.sub(rf"\s+{attribute}$", "", phrase)
    return " ".join(phrase.split()[:MAX_WORDS]).strip(" \"'`*.,:")


def names_class(answer: str, classes: Sequence[str]) -> bool:
    """Whether a class name stands in the answer, whatever its case and punctuation."""
    said = f" {_words(answer)} "
    return any(f" {_words(name)} " in said or f" {_words(name)}s " in said for name in classes)


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))
