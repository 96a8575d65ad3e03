"""Concurrent requests to a server, for judges and reward models behind an endpoint."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from importlib.util import find_spec
from typing import Any, TypeVar

from tqdm.asyncio import tqdm
from transformers.utils import logging

from ..errors import check_positive
from ..trust import check_url, is_url


logger = logging.get_logger(__name__)

T = TypeVar("T")


class BadResponseError(Exception):
    """A server's response lacks what was requested."""


def read_response(body: str, read: Callable[[Any], T]) -> T:
    """The value that `read` finds in a server's JSON, which may have any form."""
    try:
        return read(json.loads(body))
    except (ValueError, LookupError, TypeError, OverflowError) as error:
        raise BadResponseError(f"the response lacks the expected fields: {body!r}") from error


USAGE = ("requests", "input_tokens", "output_tokens", "cost")


def usage_of(judge: Any) -> dict[str, float]:
    """What a judge says that it has used so far, by the names in `USAGE`. Empty if it does not count."""
    usage = getattr(judge, "usage", None)
    if not isinstance(usage, dict):
        return {}
    return {name: float(usage[name]) for name in USAGE if isinstance(usage.get(name), int | float)}


class Endpoint:
    """A server that receives many requests at a time. Those that fail are counted in `num_lost`, and reported once."""

    __name__: str
    _url_option, _extra = "base_url", "judges"

    def __init__(self, base_url: str, api_key: str | None, max_concurrency: int, timeout: float, max_retries: int):
        if find_spec("openai") is None:
            raise ImportError(
                f"{type(self).__name__} needs openai, which is not installed: `pip install trl-sppo[{self._extra}]`."
            )
        check_positive(max_concurrency=max_concurrency, timeout=timeout)
        if max_retries < 0:
            raise ValueError(f"max_retries must not be negative, got {max_retries}. For one attempt, set it to 0.")
        check_url(self._url_option, base_url, "Pass a key as `api_key`.")
        if api_key is not None and not api_key.isascii():
            raise ValueError("api_key must be ASCII, like the header that carries it. Check that it is a key.")
        if not is_url(base_url):
            raise ValueError(f"{self._url_option} must be an http(s) URL, got {base_url!r}.")
        self.base_url = base_url
        self.max_concurrency = max_concurrency
        self.num_lost = 0
        self._api_key = api_key or "no-key"  # the client requires one
        self._client_options: Any = {"api_key": self._api_key, "timeout": timeout, "max_retries": max_retries}

    async def _ask_all(
        self, ask: Callable[..., Awaitable[T]], questions: Sequence[tuple]
    ) -> tuple[list[T | None], list[Exception]]:
        """`await ask(client, *question)` for each: the results, `None` where it failed, and the errors."""
        from openai import AsyncOpenAI, OpenAIError

        problems: list[Exception] = []
        limit = asyncio.Semaphore(self.max_concurrency)
        # One client per call: a client belongs to an event loop, and each call may run in one of its own
        async with AsyncOpenAI(base_url=self.base_url, **self._client_options) as client:

            async def ask_one(question: tuple) -> T | None:
                async with limit:
                    try:
                        return await ask(client, *question)
                    except (OpenAIError, BadResponseError) as error:
                        problems.append(error)
                        return None

            results = await tqdm.gather(*map(ask_one, questions), desc=self.__name__, disable=None, leave=False)
        return results, problems

    def _count_lost(self, problems: Sequence[Exception], what: str) -> None:
        if problems and not self.num_lost:
            logger.warning(f"{self.__name__} gave {what} (shown once). The first: {self._reason(problems[0])}")
        self.num_lost += len(problems)

    def _reason(self, error: Exception) -> str:
        # An endpoint may repeat the key that it received
        return f"{type(error).__name__}: {error}".replace(self._api_key, "***")[:500]
