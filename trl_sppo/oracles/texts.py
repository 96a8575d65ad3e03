"""Texts that judges read: prompts and completions, as data and never as instructions."""

import re
from typing import Any, TypeAlias

from transformers import PreTrainedTokenizerBase


Messages: TypeAlias = str | list[dict[str, Any]]


def completion_text(completion: Messages) -> str:
    """The text of a completion: the assistant's messages."""
    if isinstance(completion, str):
        return completion
    return "\n".join(_content_text(message) for message in completion if message["role"] == "assistant")


def prompt_text(prompt: Messages) -> str:
    """The text of a prompt, for models without a chat template: one user message as it is, several as `role: text`."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1 and prompt[0]["role"] == "user":
        return _content_text(prompt[0])
    return "\n".join(f"{message['role']}: {_content_text(message)}" for message in prompt)


def _content_text(message: dict[str, Any]) -> str:
    """The text of a message. Of several parts, such as a text and an image, the parts with text."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else " ".join(part["text"] for part in content if "text" in part)


def special_tokens(tokenizer: PreTrainedTokenizerBase, *more: str) -> re.Pattern[str]:
    """A pattern of texts that a model reads as control: special tokens and tokens of the template."""
    template = str(tokenizer.chat_template or "")
    added = tokenizer.added_tokens_decoder.values()
    # Added tokens that only stand for white space are text, though templates have it too
    tokens = {
        token.content for token in added if token.special or (token.content.strip() and token.content in template)
    }
    return re.compile("|".join(re.escape(token) for token in sorted(tokens | set(more)) if len(token) > 1) or "(?!)")


def break_up(special: re.Pattern[str], text: str) -> str:
    """Put a space into each special token that a text spells, so that the model reads it as ordinary text."""
    return special.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)


def break_up_messages(special: re.Pattern[str], messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The roles and texts of messages, for a chat template."""
    return [{"role": message["role"], "content": break_up(special, _content_text(message))} for message in messages]


def last_part(name: str) -> str:
    return name.rstrip("/").split("/")[-1]
