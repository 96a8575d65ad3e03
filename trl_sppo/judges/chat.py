"""Requests to language models that judge: an OpenAI-compatible endpoint, completions as data, and cost."""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from typing import Any

from ..oracles.endpoint import BadResponseError, Endpoint, read_response
from ..oracles.texts import last_part


NO_FORM = {"usage", "num_lost", "price", "max_concurrency", "base_url"}  # attributes that do not affect a verdict


class ChatJudge(Endpoint):
    """
    A language model behind an OpenAI-compatible endpoint. `usage` adds up its responses, input tokens and output
    tokens, and their `cost` if there is a price. The judges' docstrings describe the arguments.
    """

    def __init__(
        self,
        model: str,
        base_url: str,
        api_key: str | None,
        max_concurrency: int,
        timeout: float | None,
        max_retries: int,
        instructions: str,
        reasoning: bool,
        options: Mapping[str, Any],  # of each request, by default
        request_options: Mapping[str, Any] | None,
        price: tuple[float, float] | None,
    ):
        timeout = (600.0 if reasoning else 60.0) if timeout is None else timeout
        super().__init__(base_url, api_key or os.environ.get("OPENAI_API_KEY"), max_concurrency, timeout, max_retries)
        self.__name__ = last_part(model)
        self.model = model
        self.instructions = instructions
        self.reasoning = reasoning
        chosen = {**options, **(request_options or {})}
        taken = {"model", "messages", "stream", "response_format"} & chosen.keys() - options.keys()
        if taken:
            raise ValueError(f"request_options must not have {sorted(taken)}: the judge sets them. Remove them.")
        if not chosen.get("logprobs"):
            chosen.pop("top_logprobs", None)  # some servers refuse it alone
        # None leaves an option out, for models that refuse it
        self.request_options = {name: value for name, value in chosen.items() if value is not None}
        num_samples = self.request_options.get("n", 1)
        if not isinstance(num_samples, int) or num_samples < 1:
            raise ValueError(f"request_options must have n of at least 1, got {num_samples!r}.")
        if num_samples > 1 and self.request_options.get("temperature") == 0:
            problem = f"request_options has n={num_samples} samples, which are all the same"
            raise ValueError(f"{problem} at temperature 0. Set a temperature, such as 1.0.")
        is_price = price is None or [isinstance(p, int | float) and 0 <= p < math.inf for p in price] == [True] * 2
        if not is_price:
            raise ValueError(f"price must be two numbers, per million tokens in and out, got {price}.")
        self.price = price
        self.usage: dict[str, float] = {"requests": 0, "input_tokens": 0, "output_tokens": 0}
        if price is not None:
            self.usage["cost"] = 0.0

    async def _choices(self, client: Any, content: str, **options: Any) -> list[dict[str, Any]]:
        """The endpoint's choices for one message of the user."""
        # All in one message: some chat templates (Gemma's) refuse a system role
        message = {"role": "user", "content": content}
        response = await client.chat.completions.with_raw_response.create(
            model=self.model, messages=[message], **self.request_options, **options
        )
        self.usage["requests"] += 1
        choices, counts = read_response(response.text, _choices_and_tokens)
        for name, count, price in zip(("input_tokens", "output_tokens"), counts, self.price or (0, 0), strict=True):
            self.usage[name] += count
            if self.price is not None:
                self.usage["cost"] += count * price / 1e6
        if not choices:
            raise BadResponseError("the response has no choices")
        return choices

    @property
    def form(self) -> str:
        """A hash of what a question depends on besides prompt and completions."""
        own = {name: value for name, value in vars(self).items() if name not in NO_FORM and not name.startswith("_")}
        return hashlib.sha256(json.dumps(own, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _choices_and_tokens(body: Any) -> tuple[list[dict[str, Any]], tuple[int, int]]:
    usage = dict(body["usage"] or {}) if "usage" in body else {}
    counts = (int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens"))
    return [*map(dict, body["choices"])], tuple(counts)  # type: ignore[return-value]


def as_data(fields: dict[str, Any]) -> str:
    """A JSON object whose texts are data for a language model, and cannot be anything else."""
    # In a JSON string a completion cannot close a quote, so it stays inside its own field. Control tokens of chat
    # templates (<|im_end|>, </s>, [INST]), by which it could speak in another role, begin with "<" or "[": both are
    # written as JSON escapes.
    return json.dumps(fields, ensure_ascii=False).replace("<", "\\u003c").replace("[", "\\u005b")


def text_of(choice: dict[str, Any]) -> str:
    """The text of a choice after its reasoning."""
    try:
        text = str(choice["message"]["content"] or "")
    except (LookupError, TypeError) as error:
        raise BadResponseError(f"the response lacks the expected fields: {choice!r}") from error
    if is_json(text):
        return text.strip()
    rest = text.rpartition("</think>")[2].strip().removesuffix("```").rstrip()
    return "" if rest.startswith("<think>") else rest  # it never ends


def is_json(text: str) -> bool:
    """Whether a text is a JSON object."""
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def without_verdict(choice: dict[str, Any], expected: str) -> BadResponseError:
    """The error for a choice that does not end as requested."""
    if choice.get("finish_reason") == "length":
        return BadResponseError("it was cut off before its verdict. Raise max_tokens in request_options")
    return BadResponseError(f"it does not end with {expected}, but with {text_of(choice)[-60:]!r}")
