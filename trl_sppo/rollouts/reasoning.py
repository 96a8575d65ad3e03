"""Reasoning of thinking policies: found in completions, and hidden from voters and judges."""

from itertools import groupby
from typing import Any, TypeAlias

from ..oracles.texts import Messages


Marks: TypeAlias = tuple[str, str]

# Where reasoning begins and ends, as chat templates write it: most models, Mistral's, and Gemma 4
MARKS: list[Marks] = [("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<|channel>thought", "<channel|>")]
KEYS = ("reasoning_content", "reasoning", "thinking")  # of messages that TRL has parsed
TAIL = 32  # tokens at the end of a prompt, which may open the reasoning


def find_marks(hide_reasoning: bool | None, processing_class: Any, name: str = "the policy") -> Marks | None:
    """The marks of the reasoning to hide, from the chat template. Raises `ValueError` if it must have some."""
    template = str(getattr(processing_class, "chat_template", None) or "")
    found = next((marks for marks in MARKS if marks[1] in template), None)
    if hide_reasoning and found is None:
        known = ", ".join(end for _, end in MARKS)
        raise ValueError(
            f"hide_reasoning=True, but the chat template of {name} has no mark that ends reasoning ({known}). Remove "
            "the option, or save a chat template with such a mark beside the policy."
        )
    return None if hide_reasoning is False else found


def split_reasoning(text: str, marks: Marks, is_open: bool = False) -> tuple[str, str | None]:
    """
    Split a text into the reasoning that it begins with, marks included, and what follows: `None` if the reasoning
    never ends. A block ends at its first end mark. Marks after the first visible character are text.

    Example:

    ```python
    >>> split_reasoning("<think>a</think> b", ("<think>", "</think>"))
    ('<think>a</think> ', 'b')

    >>> split_reasoning("a</think> b", ("<think>", "</think>"), is_open=True)
    ('a</think> ', 'b')

    >>> split_reasoning("<think>a", ("<think>", "</think>"))
    ('<think>a', None)

    ```
    """
    begin, end = marks
    rest = text
    while is_open or rest.lstrip().startswith(begin):
        _, mark, rest = rest.partition(end)
        if not mark:
            return text, None
        is_open, rest = False, rest.lstrip()
    return text[: len(text) - len(rest)], rest


class Reasoning:
    """The reasoning in completions of a policy whose chat template has these marks."""

    def __init__(self, tokenizer: Any, marks: Marks):
        self.tokenizer, self.marks = tokenizer, marks
        # TRL's texts lack special tokens, and the marks of some models are special tokens
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._left_out = (special | set(tokenizer.all_special_ids)) - set(self._tokenize("".join(marks)))

    def _tokenize(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode([token for token in ids if token not in self._left_out])

    def hide(
        self,
        prompt_ids: list[list[int]],
        completion_ids: list[list[int]],
        completions: list[Messages],
        tool_mask: list[list[int]] | None = None,  # 0 for tokens that are a tool's
    ) -> tuple[list[Messages], list[tuple[int, bool]]]:
        """What of each completion is visible; and its tokens of reasoning, and whether reasoning never ends."""
        masks = tool_mask or [[1] * len(ids) for ids in completion_ids]
        rows = list(zip(prompt_ids, completion_ids, completions, masks, strict=True))
        hidden = [self._hide(*row) for row in rows]
        return [visible for visible, *_ in hidden], [(length, unfinished) for _, length, unfinished in hidden]

    def _hide(
        self, prompt_ids: list[int], completion_ids: list[int], completion: Messages, mask: list[int]
    ) -> tuple[Messages, int, bool]:
        is_open = self._decode(prompt_ids[-TAIL:]).rstrip().endswith(self.marks[0])
        if isinstance(completion, str):
            return self._hide_turn(completion_ids, completion, is_open)
        messages = [{name: value for name, value in message.items() if name not in KEYS} for message in completion]
        assistant = [message for message in messages if message["role"] == "assistant"]
        pairs = groupby(zip(mask, completion_ids, strict=True), key=lambda pair: pair[0])
        turns = [[token for _, token in pair] for own, pair in pairs if own]
        if len(turns) != len(assistant):  # a `rollout_func` has put several turns into one message
            turns = [completion_ids]
        total, never_ends = 0, False
        for message, turn in zip(assistant, turns, strict=False):
            visible, length, unfinished = self._hide_turn(turn, message["content"], is_open)
            # TRL has parsed a message with tool calls, so that its content is neither reasoning nor a call
            if unfinished or not message.get("tool_calls"):
                message["content"] = visible
            total, never_ends = total + length, never_ends or unfinished
        return messages, total, never_ends

    def _hide_turn(self, ids: list[int], content: Any, is_open: bool) -> tuple[Any, int, bool]:
        """What is visible of a turn, which is all of its `content` if the turn has no reasoning."""
        hidden, visible = split_reasoning(self._decode(ids), self.marks, is_open)
        if visible is None:
            return "", sum(token not in self._left_out for token in ids), True
        return (visible, min(len(self._tokenize(hidden)), len(ids)), False) if hidden else (content, 0, False)
