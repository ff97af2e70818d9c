"""Asking about photos: photos and a question in, raw answers out, whoever answers.

A captioner is a folder. In it lies a model that transformers loads (`bob.models.vlm`), or the one
file `endpoint.json`, which says where a model is served (`bob.models.endpoint`).
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from PIL import Image

from bob.errors import BobError
from bob.formats.files import sha256
from bob.formats.photos import Photo, open_image
from bob.models import endpoint

# Named in an answer's key in the item cache, besides what the model itself is made by.
MADE_BY = ("models.captioner", "formats.photos")
LIBRARIES = ("pillow",)

MAX_NEW_TOKENS = 32  # a lead-in and the dozen words that the stage keeps


class Model(Protocol):
    """What answers, wherever it is."""

    made_by: tuple[str, ...]
    """The modules of bob that decide an answer."""
    libraries: tuple[str, ...]
    """The libraries whose version decides an answer."""
    elsewhere: bool
    """Whether another machine could be asked as well: it has the model where this one has it."""

    @property
    def settings(self) -> dict[str, object]:
        """What else decides an answer: `model` among it where the folder's content does not."""

    def answer(self, images: Sequence[Image.Image], question: str, max_tokens: int) -> list[str]:
        """The raw answers to one question about each of the images."""


class Captioner:
    """A model that is shown images no larger than `image_side` pixels."""

    def __init__(self, model: Model, image_side: int) -> None:
        self._model, self._image_side = model, image_side
        self.made_by = (*MADE_BY, *model.made_by)
        self.libraries = (*LIBRARIES, *model.libraries)
        self.elsewhere = model.elsewhere

    @property
    def settings(self) -> dict[str, object]:
        """What decides an answer besides the folder's content, photo, question and code."""
        return {"image_side": self._image_side, **self._model.settings}

    def ask(self, photos: Sequence[Photo], question: str) -> list[str]:
        """Ask one question of at most `batch_size` photos; returns the raw answers."""
        with ThreadPoolExecutor() as threads:  # a GPU would wait for one core to decode a batch
            shown = list(threads.map(self._read, photos))
        return self._model.answer(shown, question, MAX_NEW_TOKENS)

    def answer(self, images: Sequence[Image.Image], question: str) -> list[str]:
        """The same of images that are no files."""
        shown = [_shrunk(image, self._image_side) for image in images]
        return self._model.answer(shown, question, MAX_NEW_TOKENS)

    def _read(self, photo: Photo) -> Image.Image:
        _check(photo)
        return _shrunk(open_image(photo.path), self._image_side)


def open_captioner(folder: Path, *, precision: str, batch_size: int, image_side: int) -> Captioner:
    """The captioner in `folder`; a model is loaded, and an endpoint called, when first asked.

    `batch_size` is how many images a model sees at once, or how many questions are under way at an
    endpoint, for which `precision` says nothing. Raises BobError for an `endpoint.json` that is
    none.
    """
    if endpoint.is_endpoint(folder):
        return Captioner(endpoint.Endpoint(folder, batch_size), image_side)
    from bob.models.vlm import (
        VisionLanguageModel,  # late: who asks an endpoint need not wait for torch
    )

    return Captioner(VisionLanguageModel(folder, precision, batch_size), image_side)


def _shrunk(image: Image.Image, side: int) -> Image.Image:
    """A copy whose longer side has at most `side` pixels."""
    copy = image.copy()
    copy.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=None)
    return copy


def _check(photo: Photo) -> None:
    # An answer is kept under the photo's hash, for every branch: it must be about that photo.
    if sha256(Path(photo.path)) != photo.sha256:
        raise BobError(f"{photo.path} is not the photo that was split off; run `dvc repro split`")
