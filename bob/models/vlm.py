"""A captioner in a folder: a vision-language model that transformers loads."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import Any

import torch
from PIL import Image

from bob.errors import BobError
from bob.models.device import computing_device
from bob.models.loading import LOADING_ERRORS, load_checked, reason_of
from bob.models.precision import dtype_name, resolve_precision

# Named in an answer's key in the item cache: the modules that make it, and what they stand on.
MADE_BY = ("models.device", "models.loading", "models.precision", "models.vlm")
LIBRARIES = ("torch", "torchvision", "transformers")


TEMPLATE_LENGTH = 100_000  # characters, of which a question and its frame have hundreds
TEMPLATE_S = 60.0  # in which a chat template gives its text, which takes milliseconds


class VisionLanguageModel:
    """An image-text-to-text model, such as Qwen2.5-VL, loaded when it is first asked."""

    made_by: tuple[str, ...] = MADE_BY
    libraries: tuple[str, ...] = LIBRARIES
    elsewhere = True

    def __init__(self, folder: Path, precision: str, batch_size: int) -> None:
        self._folder, self._batch_size = folder, batch_size
        self._dtype = resolve_precision(precision)

    @property
    def settings(self) -> dict[str, object]:
        """What decides an answer besides the folder's content, image, question and code."""
        return {"precision": dtype_name(self._dtype), "batch_size": self._batch_size}

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        """Processor and model; raises BobError naming the folder where it is no such model."""
        from transformers import AutoModelForImageTextToText, AutoProcessor

        try:
            processor = AutoProcessor.from_pretrained(
                self._folder, local_files_only=True, trust_remote_code=False
            )
            model = load_checked(
                AutoModelForImageTextToText,
                self._folder,
                dtype=self._dtype,
                trust_remote_code=False,
            )
        except torch.OutOfMemoryError:  # a RuntimeError, but nothing is wrong with the model
            raise
        except LOADING_ERRORS as error:
            raise BobError(
                f"caption.model {self._folder} is no image-text-to-text model that transformers "
                f"loads, and has no endpoint.json ({' '.join(str(error).split())[:200]})"
            ) from None
        # The answer starts where the question ends, so padding goes before the question.
        processor.tokenizer.padding_side = "left"
        return processor, model.eval().to(computing_device())

    def answer(self, images: Sequence[Image.Image], question: str, max_tokens: int) -> list[str]:
        """Ask one question of at most `batch_size` images, greedily; returns the raw answers.

        Raises BobError where model and images do not fit into the GPU's memory.
        """
        try:
            return self._answer(images, question, max_tokens)
        except torch.OutOfMemoryError:
            raise BobError(
                f"the GPU has too little memory for caption.model {self._folder} with "
                f"{self._batch_size} images at once; lower caption.batch_size or caption.image_side"
            ) from None

    def _prompt(self, processor: Any, messages: list[dict[str, Any]]) -> str:
        """The chat template's text; raises BobError where it fails, or has no end."""
        said: Queue[str | Exception] = Queue()

        def render() -> None:
            try:
                said.put(processor.apply_chat_template(messages, add_generation_prompt=True))
            except Exception as error:  # templates raise whatever they like
                said.put(error)

        # It cannot be stopped, and ends with the process.
        Thread(target=render, daemon=True).start()
        try:
            text = said.get(timeout=TEMPLATE_S)
        except Empty:
            text = TimeoutError(f"it has not ended in {TEMPLATE_S:g} s")
        if isinstance(text, str) and len(text) > TEMPLATE_LENGTH:
            text = ValueError(f"it gives more than {TEMPLATE_LENGTH:,} characters")
        if isinstance(text, Exception):
            raise BobError(
                f"caption.model {self._folder}: its chat template does not give a question "
                f"({reason_of(text)}); fetch the model again, or take another"
            )
        return text

    @torch.inference_mode()
    def _answer(self, images: Sequence[Image.Image], question: str, max_tokens: int) -> list[str]:
        processor, model = self._loaded
        # Padded to full size: what a model says must not depend on how many are asked with it.
        padded = [*images, *[images[-1]] * (self._batch_size - len(images))]
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = self._prompt(processor, [{"role": "user", "content": content}])
        inputs = processor(
            text=[text] * len(padded),
            images=[[image] for image in padded],
            padding=True,
            return_tensors="pt",
        ).to(model.device, dtype=model.dtype)
        output = model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)
        answers = output[: len(images), inputs["input_ids"].shape[1] :]
        return processor.batch_decode(answers, skip_special_tokens=True)
