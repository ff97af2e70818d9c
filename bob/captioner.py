"""Asking about photos: photos and a question in, raw answers out. Here is all that decides them."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from bob.data import Photo, open_image
from bob.device import best_device, dtype_name, resolve_precision
from bob.errors import BobError
from bob.files import sha256

# Named in an answer's key in the item cache: the modules that make it, and what they stand on.
MADE_BY = ("captioner", "data", "device")
LIBRARIES = ("pillow", "torch", "torchvision", "transformers")

MAX_NEW_TOKENS = 32


class Captioner:
    """An image-text-to-text model from a folder that transformers loads, when it is first asked."""

    def __init__(self, folder: Path, precision: str, batch_size: int) -> None:
        self._folder, self._batch_size = folder, batch_size
        self._device = best_device()
        self._dtype = resolve_precision(precision, self._device)

    @property
    def settings(self) -> dict[str, object]:
        """What decides an answer besides model, photo, question and code."""
        return {"precision": dtype_name(self._dtype), "batch_size": self._batch_size}

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        """Processor and model; raises BobError naming the folder where it is no such model."""
        from transformers import AutoModelForImageTextToText, AutoProcessor

        try:
            processor = AutoProcessor.from_pretrained(self._folder, local_files_only=True)
            model = AutoModelForImageTextToText.from_pretrained(
                self._folder, dtype=self._dtype, local_files_only=True, use_safetensors=True
            )
        except (OSError, ValueError) as error:
            raise BobError(
                f"caption.model {self._folder} is no image-text-to-text model that transformers "
                f"loads ({' '.join(str(error).split())[:200]})"
            ) from None
        # The answer starts where the question ends, so padding goes before the question.
        processor.tokenizer.padding_side = "left"
        return processor, model.eval().to(self._device)

    def ask(self, photos: Sequence[Photo], question: str) -> list[str]:
        """Ask one question of at most `batch_size` photos, greedily; returns the raw answers."""
        for photo in photos:
            _check(photo)
        return self.answer([open_image(photo.path) for photo in photos], question)

    @torch.inference_mode()
    def answer(self, images: Sequence[Image.Image], question: str) -> list[str]:
        """The same of images that are no files."""
        processor, model = self._loaded
        # Padded to full size: what a model says must not depend on how many are asked with it.
        padded = [*images, *[images[-1]] * (self._batch_size - len(images))]
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        inputs = processor(
            text=[text] * len(padded),
            images=[[image] for image in padded],
            padding=True,
            return_tensors="pt",
        ).to(self._device, dtype=model.dtype)
        output = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        answers = output[: len(images), inputs["input_ids"].shape[1] :]
        return processor.batch_decode(answers, skip_special_tokens=True)


def _check(photo: Photo) -> None:
    # An answer is kept under the photo's hash, for every branch: it must be about that photo.
    if sha256(Path(photo.path)) != photo.sha256:
        raise BobError(f"{photo.path} is not the photo that was split off; run `dvc repro split`")
