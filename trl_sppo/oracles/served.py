"""A reward model behind a vLLM server, on another GPU or another machine."""

import math
import os
from collections.abc import Sequence
from typing import Any, cast
from urllib.parse import urlsplit

from .endpoint import BadResponseError, Endpoint, read_response
from .texts import Messages, last_part


class ServedRewardModel(Endpoint):
    """
    A classifier with one label behind a vLLM server (`vllm serve MODEL --runner pooling`), as a reward function.

    The score of a completion is the model's logit, without an activation function. The server renders messages with
    its own chat template, and adds no special tokens to a text, so the model reads the same text as in this process.
    Texts are not truncated. If the server gives no score, for example because a text is too long, the score is `None`.

    Args:
        url (`str`):
            URL of the server, such as `http://localhost:8000`.
        model (`str`, *optional*):
            Name of the model at the server. By default the first one that the server names.
        api_key (`str`, *optional*):
            Key for the server. By default the environment variable `VLLM_API_KEY`, if there. It is never shown.
        max_concurrency, timeout, max_retries:
            As in [`LLMJudge`]: 32 requests at a time, 60 seconds, 3 further attempts.
        chat_template_kwargs (`dict`, *optional*):
            Further arguments of the served model's chat template.

    Raises:
        `ImportError`: if `openai` is not installed.
        `ValueError`: if an option is out of range.
        `RuntimeError`: from a call for which the server gave no score at all, unless it has given some before and only
        refuses these texts.

    Example:

    ```python
    reward = ServedRewardModel("http://localhost:8000")
    asyncio.run(reward(["What is 2 + 2? "], ["4"]))  # [score of "What is 2 + 2? 4"]
    reward.num_lost  # completions so far without a score
    SPPOTrainer(..., reward_funcs=reward)  # or reward_funcs="http://localhost:8000"
    ```
    """

    _url_option, _extra = "url", "served"

    def __init__(
        self,
        url: str,
        model: str | None = None,
        api_key: str | None = None,
        max_concurrency: int = 32,
        timeout: float = 60.0,
        max_retries: int = 3,
        chat_template_kwargs: dict[str, Any] | None = None,
    ):
        api_key = api_key or os.environ.get("VLLM_API_KEY")
        super().__init__(url.rstrip("/").removesuffix("/v1"), api_key, max_concurrency, timeout, max_retries)
        self.__name__ = last_part(model) if model else urlsplit(url).netloc
        self.model = model
        self.chat_template_kwargs = chat_template_kwargs
        self._has_scored = False

    async def __call__(
        self, prompts: Sequence[Messages], completions: Sequence[Messages], **kwargs: Any
    ) -> list[float | None]:
        """Scores of N completions, texts or lists of messages, `None` where the server gave none."""
        from openai import BadRequestError

        requests = [(self._request(*pair),) for pair in zip(prompts, completions, strict=True)]

        async def ask(client: Any, request: dict[str, Any]) -> float:
            return read_response(await client.post("/classify", body=request, cast_to=str), _score)

        scores, problems = await self._ask_all(ask, requests)
        if len(problems) < len(scores):
            self._has_scored = True
        elif problems and not (self._has_scored and all(isinstance(error, BadRequestError) for error in problems)):
            raise RuntimeError(
                f"the reward model at {self.base_url!r} gave no score to any of {len(scores)} completions. The first: "
                f"{self._reason(problems[0])}"
            )
        self._count_lost(problems, f"no score to {len(problems)} of {len(scores)} completions")
        return scores

    def check(self, conversational: bool) -> None:
        """Raise `ValueError` if the server does not score a trial."""
        from openai import OpenAI, OpenAIError

        trial: tuple[Messages, Messages] = "a", "b"
        if conversational:
            trial = [{"role": "user", "content": "a"}], [{"role": "assistant", "content": "b"}]
        try:
            with OpenAI(base_url=self.base_url, **self._client_options) as client:
                if self.model is None:
                    models = client.get("/v1/models", cast_to=str)
                    self.model = read_response(models, lambda response: str(response["data"][0]["id"]))
                    self.__name__ = last_part(self.model)
                read_response(client.post("/classify", body=self._request(*trial), cast_to=str), _score)
        except (OpenAIError, BadResponseError) as error:
            raise ValueError(
                f"no vLLM server at {self.base_url!r} gives a score. Start one with `vllm serve MODEL --runner "
                "pooling`: MODEL is a classifier with one label, and has a chat template if prompts are "
                f"conversational. A key is the environment variable VLLM_API_KEY. ({self._reason(error)})"
            ) from None  # the client's own messages may repeat the key
        self._has_scored = True

    def _request(self, prompt: Messages, completion: Messages) -> dict[str, Any]:
        """The request for one completion."""
        # Without its activation function, vLLM gives the logit; with it, the default, the sigmoid of the logit
        request: dict[str, Any] = {"use_activation": False, "add_special_tokens": False}
        if self.model is not None:
            request["model"] = self.model
        if isinstance(prompt, str):
            return {**request, "input": prompt + cast(str, completion)}
        if self.chat_template_kwargs:
            request["chat_template_kwargs"] = self.chat_template_kwargs
        return {**request, "messages": [_text_message(message) for message in [*prompt, *completion]]}


def _text_message(message: Any) -> dict[str, str]:
    """A message that vLLM renders as transformers does. It drops or rewrites other fields."""
    fields = {name: value for name, value in message.items() if value is not None}
    if fields.keys() - {"role", "name", "content"} or not isinstance(fields.get("content"), str):
        raise ValueError(
            f"a served reward model reads messages of a role and a text, but got one with {sorted(fields)}. Remove "
            "the other fields; for tool calls and images, load the reward model in this process."
        )
    return fields


def _score(response: Any) -> float:
    """The score in the response of a classification endpoint: one finite number."""
    (result,) = response["data"]
    (score,) = result["probs"]
    if type(score) not in (int, float) or not math.isfinite(score):
        raise ValueError(score)
    return float(score)
