"""A captioner behind an endpoint that speaks OpenAI's protocol: vLLM, llama.cpp, a vendor.

Its folder holds one file, `endpoint.json`: the model's name and where it is served. A key, where it
wants one, is taken from the environment variable OPENAI_API_KEY and goes nowhere else.
"""

import base64
import io
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from bob.errors import BobError
from bob.formats.files import read_json
from bob.formats.params import check

if TYPE_CHECKING:
    import httpx2
    import openai

# Named in an answer's key in the item cache. Not the version of the client: it only carries.
MADE_BY = ("models.endpoint",)
LIBRARIES = ("pillow",)

FILE = "endpoint.json"
SCHEMA: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["url", "model"],
    "properties": {
        "url": {
            "type": "string",
            "pattern": r"^https?://[\w-]+(\.[\w-]+)*(:\d{1,5})?(/[^\s?#@]*)?$",
            "description": "http://host:port/v1 or the like, without a key",
        },
        "model": {
            "type": "string",
            "pattern": r"\S",
            "description": "the name that the endpoint knows the model by",
        },
        "timeout_s": {"type": "number", "exclusiveMinimum": 0},
        "retries": {"type": "integer", "minimum": 0},
    },
}
DEFAULTS = {"timeout_s": 60, "retries": 5}

KEY = "OPENAI_API_KEY"
NO_KEY = "no-key"  # the client insists on one; servers without keys ignore it


def is_endpoint(folder: Path) -> bool:
    """Whether the captioner in `folder` is one."""
    return (folder / FILE).is_file()


class UnansweredError(BobError):
    """Not every question was answered; `answers` has those that were, by their place."""

    def __init__(self, message: str, answers: Mapping[int, str]) -> None:
        super().__init__(message)
        self.answers = answers


class Endpoint:
    """A model that is asked over HTTP, `batch_size` questions at a time.

    Raises BobError where `endpoint.json` is malformed.
    """

    made_by: tuple[str, ...] = MADE_BY
    libraries: tuple[str, ...] = LIBRARIES
    elsewhere = False  # it is asked from here, where its key is

    def __init__(self, folder: Path, batch_size: int) -> None:
        self._file, self._batch_size = folder / FILE, batch_size
        values = read_json(self._file)
        check(self._file, values, SCHEMA)
        values = DEFAULTS | values
        self._url, self._model = values["url"], values["model"]
        self._timeout_s, self._retries = values["timeout_s"], values["retries"]

    @property
    def settings(self) -> dict[str, object]:
        """What decides an answer besides image, question and code: not where the model is."""
        return {"model": self._model}

    def answer(self, images: Sequence[Image.Image], question: str, max_tokens: int) -> list[str]:
        """Ask one question of each image at the same time; returns the raw answers.

        A busy or failing server is asked again, after as long as it says or else ever longer.
        Raises UnansweredError when all questions are answered or given up.
        """
        from openai import OpenAIError

        def ask(image: Image.Image) -> str | OpenAIError:
            try:
                return self._ask(image, question, max_tokens)
            except OpenAIError as error:
                return error

        with ThreadPoolExecutor(self._batch_size) as pool:
            outcomes = list(pool.map(ask, images))
        answers = {i: outcome for i, outcome in enumerate(outcomes) if isinstance(outcome, str)}
        for outcome in outcomes:
            if isinstance(outcome, OpenAIError):
                raise UnansweredError(self._explain(outcome), answers)
        return list(answers.values())

    def _ask(self, image: Image.Image, question: str, max_tokens: int) -> str:
        completion = self._client.chat.completions.create(
            model=self._model,
            messages=[
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": _data_url(image)}},
                        {"type": "text", "text": question},
                    ],
                }
            ],
            temperature=0,
            seed=0,
            max_tokens=max_tokens,  # deprecated by OpenAI, and the one that every server knows
        )
        return completion.choices[0].message.content or ""

    @cached_property
    def _key(self) -> str:
        key = os.environ.get(KEY, "").strip() or NO_KEY
        if not key.isascii() or not key.isprintable():
            raise BobError(f"{KEY} holds a character that no key has; set it again")
        return key

    @cached_property
    def _client(self) -> "openai.OpenAI":
        from openai import DefaultHttpxClient, OpenAI

        return OpenAI(
            api_key=self._key,
            base_url=self._url,
            timeout=self._timeout_s,
            max_retries=self._retries,
            http_client=DefaultHttpxClient(event_hooks={"response": [_check_answer]}),
        )

    def _explain(self, error: "openai.OpenAIError") -> str:
        """One line: which endpoint, why there is no answer, and what to do."""
        from openai import APIConnectionError, APITimeoutError

        status = getattr(error, "status_code", None)
        reason = str(error)
        if isinstance(error, APITimeoutError):
            reason = f"nothing came within {self._timeout_s} s"
        elif isinstance(error, APIConnectionError):
            reason = str(error.__cause__ or "") or reason
        # A server may say what it was sent.
        reason = " ".join(reason.replace(self._key, f"<{KEY}>").split())[:200]
        if status in (401, 403):
            advice = f"check the environment variable {KEY}"
        elif status == 404:
            advice = "check url and model there"
        elif status is not None and status < 500 and status not in (408, 409, 429):
            advice = "check model there, and whether it takes images"
        else:
            advice = (
                f"gave up after {self._retries} retries; what was answered is kept: run the stage "
                "again later, or raise timeout_s or retries there"
            )
        return f"{self._file}: no answer from {self._model} at {self._url} ({reason}); {advice}"


def _check_answer(response: "httpx2.Response") -> None:
    """Raise what the client takes for a broken connection, and so retries, at a broken answer."""
    import httpx2

    if not response.is_success:
        return
    response.read()
    try:
        (response.json()["choices"][0]["message"].get("content") or "").encode()
    except (ValueError, LookupError, TypeError, AttributeError):
        raise httpx2.DecodingError("it sent no chat completion", request=response.request) from None


def _data_url(image: Image.Image) -> str:
    # JPEG: a photo was one before, and PNG is several times the bytes to send.
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
