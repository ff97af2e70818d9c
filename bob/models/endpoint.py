"""A captioner behind an endpoint that speaks OpenAI's protocol: vLLM, llama.cpp, a vendor.

Its folder holds one file, `endpoint.json`: the model's name and where it is served. A key, where it
wants one, is taken from the environment variable OPENAI_API_KEY and goes nowhere else: no redirect
is followed, and an answer that holds the key is none.
"""

import asyncio
import base64
import io
import os
from collections.abc import Awaitable, Mapping, Sequence
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
        "timeout_s": {"type": "number", "exclusiveMinimum": 0, "maximum": 86400},
        "retries": {"type": "integer", "minimum": 0, "maximum": 1000},
    },
}
DEFAULTS = {"timeout_s": 60, "retries": 5}

WHOLE = 10  # times `timeout_s`, in which an answer that has begun must have ended
MOST = 1_000_000  # bytes of an answer, of which a few dozen are words

KEY = "OPENAI_API_KEY"
NO_KEY = "no-key"  # the client insists on one; servers without keys ignore it
SECRET = 8  # letters; a shorter key, such as "none", is no secret and may stand in an answer


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

        async def ask_all() -> list[str | BaseException]:
            async with self._client() as client:
                asked = (_ask(client, self._model, image, question, max_tokens) for image in images)
                return await asyncio.gather(*asked, return_exceptions=True)

        outcomes = asyncio.run(ask_all())
        answers = {i: outcome for i, outcome in enumerate(outcomes) if isinstance(outcome, str)}
        for outcome in outcomes:
            if isinstance(outcome, OpenAIError):
                raise UnansweredError(self._explain(outcome), answers)
            if isinstance(outcome, BaseException):
                raise outcome
        return list(answers.values())

    @cached_property
    def _key(self) -> str:
        key = os.environ.get(KEY, "").strip() or NO_KEY
        if not key.isascii() or not key.isprintable():
            raise BobError(f"{KEY} holds a character that no key has; set it again")
        return key

    def _client(self) -> "openai.AsyncOpenAI":
        from openai import AsyncOpenAI, DefaultAsyncHttpxClient

        bounded = self._bounded

        class Client(DefaultAsyncHttpxClient):
            async def send(self, request: "httpx2.Request", **options: Any) -> "httpx2.Response":
                return await bounded(request, super().send(request, **options | {"stream": True}))

        return AsyncOpenAI(
            api_key=self._key,
            base_url=self._url,
            timeout=self._timeout_s,
            max_retries=self._retries,
            http_client=Client(follow_redirects=False),
            default_headers={"Accept-Encoding": "identity"},
        )

    async def _bounded(
        self, request: "httpx2.Request", sent: "Awaitable[httpx2.Response]"
    ) -> "httpx2.Response":
        """The whole response; raises what the client takes for a broken connection, and retries.

        That is for one that does not end or is too long, and for a success that is no answer.
        """
        import httpx2

        try:
            async with asyncio.timeout(WHOLE * self._timeout_s):
                response = await sent
                try:
                    content = await _read(response)
                finally:
                    await response.aclose()
        except TimeoutError:
            reason = f"no whole answer came within {WHOLE * self._timeout_s:g} s"
            raise httpx2.ReadTimeout(reason, request=request) from None
        except ValueError as error:
            raise httpx2.DecodingError(str(error), request=request) from None
        whole = httpx2.Response(
            response.status_code, headers=response.headers, content=content, request=request
        )
        if whole.is_success:
            try:
                said = whole.json()["choices"][0]["message"].get("content") or ""
                said.encode()
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
                raise httpx2.DecodingError("it sent no chat completion", request=request) from None
            if self._masked(said) != said:
                raise httpx2.DecodingError(f"its answer holds the {KEY}", request=request)
        return whole

    def _masked(self, text: str) -> str:
        """A text that the key does not stand in, as it is or as Python shows it."""
        if len(self._key) < SECRET or self._key == NO_KEY:
            return text
        return text.replace(self._key, f"<{KEY}>").replace(repr(self._key)[1:-1], f"<{KEY}>")

    def _explain(self, error: "openai.OpenAIError") -> str:
        """One line: which endpoint, why there is no answer, and what to do."""
        from openai import APIConnectionError, APIStatusError, APITimeoutError

        status = getattr(error, "status_code", None)
        reason = str(error)
        if isinstance(error, APITimeoutError):
            reason = str(error.__cause__ or "") or f"nothing came within {self._timeout_s} s"
        elif isinstance(error, APIConnectionError):
            reason = _deepest(error) or reason
        elif isinstance(error, APIStatusError) and "Location" in error.response.headers:
            reason = f"it redirects to {error.response.headers['Location']}"
        # A server may say what it was sent.
        reason = " ".join(self._masked(reason).split())[:200]
        if status in (401, 403):
            advice = f"check the environment variable {KEY}"
        elif status is not None and 300 <= status < 400:
            advice = "set url there to where the model is; no redirect is followed, with a key"
        elif status == 404:
            advice = "check url and model there"
        elif status is not None and status < 500 and status not in (408, 409, 429):
            advice = "check model there, and whether it takes images"
        else:
            advice = (
                f"gave up after {self._retries} retries; what was answered is kept: run the stage "
                "again later, or raise timeout_s or retries there"
            )
        said = f"{self._file}: no answer from {self._model} at {self._url} ({reason}); {advice}"
        return self._masked(said)  # as `endpoint.json` may say it, too


async def _ask(
    client: "openai.AsyncOpenAI", model: str, image: Image.Image, question: str, max_tokens: int
) -> str:
    completion = await client.chat.completions.create(
        model=model,
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


def _deepest(error: BaseException) -> str:
    """What the system said of a connection, or else what the client did."""
    said = ""
    cause: BaseException | None = error.__cause__
    while cause is not None:
        if isinstance(cause, BaseExceptionGroup):  # one for each address of the host
            cause = cause.exceptions[0]
        number = cause.errno if isinstance(cause, OSError) else None
        said = os.strerror(number) if number and number > 0 else said or str(cause)
        cause = cause.__cause__ or cause.__context__
    return said


async def _read(response: "httpx2.Response") -> bytes:
    """The body; raises ValueError where it is too long, or compressed, as a bomb would be."""
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise ValueError("it compressed its answer, which was not asked for")
    content = bytearray()
    async for chunk in response.aiter_raw():
        content += chunk
        if len(content) > MOST:
            raise ValueError(f"it sent more than {MOST:,} bytes")
    return bytes(content)


def _data_url(image: Image.Image) -> str:
    # JPEG: a photo was one before, and PNG is several times the bytes to send.
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
