"""Stage caption: the caption bank, one (background, pose) pair for every shot (paper: step 1)."""

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from bob.data import Photo, Task, batches, open_image, read_photos, read_task
from bob.device import best_device, resolve_precision
from bob.errors import BobError
from bob.files import replacing
from bob.layout import BANK, CAPTION, TRAIN
from bob.params import Params
from bob.prompts import Context, Entry, read_bank, write_bank

ATTRIBUTES = ("background", "pose")

QUESTION = (
    "describe the {attribute} of the {descriptor} in as few words as possible. "
    "Refer to the {descriptor} as simply 'a {descriptor}'"
)
# What is added when an answer was refused. Never the class name: it is what must not be said.
INSISTENCE = (
    "",
    ". Do not say which {descriptor} it is",
    ". Answer in at most three words, and do not say which {descriptor} it is",
)
MAX_NEW_TOKENS = 32
MAX_WORDS = 12  # two phrases and a class name have to fit into CLIP's 77 tokens

Ask = Callable[[Sequence[Image.Image], str], list[str]]
"""Images of one batch and a question -> the raw answers."""


class Captioner:
    """An image-text-to-text model from a folder that transformers loads."""

    def __init__(self, folder: Path, precision: str) -> None:
        """Load the model; raises BobError naming the folder where it is no such model."""
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.device = best_device()
        dtype = resolve_precision(precision, self.device)
        try:
            self.processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
            model = AutoModelForImageTextToText.from_pretrained(
                folder, dtype=dtype, local_files_only=True, use_safetensors=True
            )
        except (OSError, ValueError) as error:
            raise BobError(
                f"caption.model {folder} is no image-text-to-text model that transformers loads "
                f"({' '.join(str(error).split())[:200]})"
            ) from None
        self.model = model.eval().to(self.device)
        # The answer starts where the question ends, so padding goes before the question.
        self.processor.tokenizer.padding_side = "left"

    @torch.inference_mode()
    def ask(self, images: Sequence[Image.Image], question: str) -> list[str]:
        """Ask one question of every PIL image, greedily; returns the raw answers."""
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        inputs = self.processor(
            text=[text] * len(images),
            images=[[image] for image in images],
            padding=True,
            return_tensors="pt",
        ).to(self.device, dtype=self.model.dtype)
        output = self.model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        answers = output[:, inputs["input_ids"].shape[1] :]
        return self.processor.batch_decode(answers, skip_special_tokens=True)


def run(params: Params) -> None:
    """Write the caption bank of the shots to `results/caption/bank.jsonl`."""
    task, photos = read_task(), read_photos(TRAIN)
    if params.caption.bank != "captioner":
        with replacing(CAPTION) as folder:
            write_bank(folder / BANK.name, entries_of(photos, Path(params.caption.bank)))
        print(f"caption: {len(photos)} photos, contexts from {params.caption.bank}")
        return
    captioner = Captioner(Path(params.caption.model), params.caption.precision)
    answers = {
        attribute: accepted_answers(
            captioner.ask, photos, attribute, task, params.caption.batch_size
        )
        for attribute in ATTRIBUTES
    }
    entries = []
    for index, photo in enumerate(photos):
        background, pose = (answers[attribute].get(index) for attribute in ATTRIBUTES)
        context = Context(background, pose) if background and pose else None
        entries.append(Entry(photo.sha256, photo.class_name, context))
    without = [
        photo.path for photo, entry in zip(photos, entries, strict=True) if entry.context is None
    ]
    if without:
        print(
            f"caption: warning: no usable answer in {len(INSISTENCE)} tries for "
            f"{len(without)} of {len(photos)} photos, which keep the caption without context: "
            f"{', '.join(without[:5])}{' ...' if len(without) > 5 else ''}",
            file=sys.stderr,
        )
    with replacing(CAPTION) as folder:
        write_bank(folder / BANK.name, entries)
    distinct = len({entry.context for entry in entries if entry.context})
    print(f"caption: {len(photos)} photos, {distinct} distinct contexts")


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
    ask: Ask, photos: Sequence[Photo], attribute: str, task: Task, batch_size: int
) -> dict[int, str]:
    """Index of a photo -> accepted phrase for `attribute`; photos that got none are left out.

    An empty answer, or one that names a class of the task, is refused and asked for again in other
    words: decoding is greedy, so the same words would get the same answer.
    """
    accepted: dict[int, str] = {}
    for insistence in INSISTENCE:
        question = (QUESTION + insistence).format(attribute=attribute, descriptor=task.descriptor)
        asked = [index for index in range(len(photos)) if index not in accepted]
        for batch in tqdm(list(batches(asked, batch_size)), attribute, disable=None):
            # Padded to full size: what a model says must not depend on how many are asked with it.
            padded = batch + batch[-1:] * (batch_size - len(batch))
            images = [open_image(photos[index].path) for index in padded]
            for index, answer in zip(batch, ask(images, question), strict=False):
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
