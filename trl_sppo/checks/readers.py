"""Models as readers of prompts: each with its tokenizer and chat template, without weights."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

from torch import nn
from transformers import AutoConfig, AutoProcessor, PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import logging
from trl import apply_chat_template
from trl.data_utils import prepare_multimodal_messages

from ..config import SPPOConfig
from ..models.adapters import base_of
from ..trust import own_code_is_refused
from .models import POLICYS_OWN_CODE, policy_config


logger = logging.get_logger(__name__)


class Unreadable(ValueError):
    """A prompt that cannot be read: its place in the batch, the problem, and the fix."""

    def __init__(self, place: int, problem: str):
        super().__init__(problem)
        self.place = place


@dataclass
class Reader:
    """A model that reads prompts, without its weights. Raises `ValueError` for special tokens it cannot use."""

    name: str  # in messages
    processing_class: Any
    vocabulary: int | None  # rows of its embedding, if known
    args: SPPOConfig
    is_policy: bool = False  # completes prompts. A reward model reads them with a completion
    only_eval: bool = False
    tools: list | None = None
    room: int | None = None  # tokens that a prompt may have
    warned: set[str] = field(default_factory=set)
    seen: set[int] = field(default_factory=set)  # hashes of the prompts that were read at the start

    def __post_init__(self):
        if self.is_policy and self.tokenizer.eos_token_id is None:
            raise ValueError(
                f"the tokenizer of {self.name} has no EOS token, so no completion could end. Set "
                "`tokenizer.eos_token`, and save the tokenizer beside the model or pass it as `processing_class`."
            )
        for kind in ("pad", "eos") if self.is_policy else ("pad",):
            token = getattr(self.tokenizer, f"{kind}_token_id", None)
            if token is not None and self.vocabulary is not None and token >= self.vocabulary:
                raise ValueError(f"the tokenizer of {self.name} has the {kind} token {self._outside(token)}")

    @property
    def tokenizer(self) -> Any:
        return self.processing_class.tokenizer if self.reads_images else self.processing_class

    @property
    def reads_images(self) -> bool:
        return isinstance(self.processing_class, ProcessorMixin)

    def _outside(self, token: int) -> str:
        text = self.tokenizer.convert_ids_to_tokens(token)
        return (
            f"{text!r} with the id {token}, but the embedding of {self.name} has {self.vocabulary} rows. "
            "Use the tokenizer that belongs to the model, or call `model.resize_token_embeddings(len(tokenizer))`."
        )

    def read(self, prompts: list) -> list[list[int]]:
        """Token ids of prompts of one kind, as TRL makes them: for a reward model, with a completion."""
        kwargs: Any = self.args.chat_template_kwargs or {}
        if isinstance(prompts[0], str):
            if self.is_policy:
                return self.processing_class(text=prompts)["input_ids"]
            texts = [prompt + "a" for prompt in prompts]
            return self.tokenizer(text=texts, add_special_tokens=False)["input_ids"]
        if self.is_policy:
            if self.reads_images:
                prompts = [prepare_multimodal_messages(prompt) for prompt in prompts]
            return self.processing_class.apply_chat_template(
                prompts, tools=self.tools, add_generation_prompt=True, tokenize=True, return_dict=True, **kwargs
            )["input_ids"]
        completion = {"role": "assistant", "content": "a"}
        texts = [
            cast(Any, apply_chat_template({"messages": [*prompt, completion]}, self.tokenizer, **kwargs))["text"]
            for prompt in prompts
        ]
        return self.tokenizer(text=texts, add_special_tokens=False)["input_ids"]

    def read_new(self, prompts: list) -> dict[int, list[int]]:
        """Token ids, by place, of prompts that were not read at the start. Equal ones are read once."""
        new: dict[int, int] = {}
        for i, prompt in enumerate(prompts):
            if not _has_images(prompt) or (self.is_policy and not self.reads_images):  # else they are left to TRL
                new.setdefault(key_of_prompt(prompt), i)
        places = [i for key, i in new.items() if key not in self.seen]
        try:
            return dict(zip(places, self.look([prompts[i] for i in places]), strict=True)) if places else {}
        except Unreadable as error:
            raise Unreadable(places[error.place], str(error)) from error

    def look(self, prompts: list) -> list[list[int]]:
        """Token ids of prompts of one kind. Raises [`Unreadable`] for one that cannot be read."""
        is_text = isinstance(prompts[0], str)
        if not is_text and getattr(self.processing_class, "chat_template", None) is None:
            problem = f"is a list of messages, but the tokenizer of {self.name} has no chat template."
            raise Unreadable(0, f"{problem} Set `tokenizer.chat_template` and save it, or make all prompts texts.")
        try:
            all_ids = self.read(prompts)
        except Exception:  # templates raise any error. Find the first row
            all_ids = [self._read_one(i, prompt) for i, prompt in enumerate(prompts)]
        for i, (prompt, ids) in enumerate(zip(prompts, all_ids, strict=True)):
            if self.is_policy:
                check_length(i, len(ids), self.room)
            largest = max(ids, default=-1)
            if self.vocabulary is not None and largest >= self.vocabulary:
                raise Unreadable(i, f"has the token {self._outside(largest)}")
            if is_text:
                continue
            if self.is_policy and not self.reads_images and _has_images(prompt):
                raise Unreadable(i, f"has an image, but {self.name} has a tokenizer for texts only. Leave it out.")
            if self.is_policy and prompt[-1]["role"] == "assistant":
                problem = "ends with an assistant message, after which TRL would open another one."
                raise Unreadable(i, f"{problem} Leave out the last message of such rows: `row['prompt'][:-1]`.")
            if any(isinstance(message["content"], list) for message in prompt) and self._prints_parts:
                problem = f"has content in parts, which the chat template of {self.name} prints as a Python list."
                raise Unreadable(i, f"{problem} Make the content of each message one text.")
        return all_ids

    def _read_one(self, place: int, prompt: Any) -> list[int]:
        try:
            return self.read([prompt])[0]
        except Exception as error:
            what = "tokenizer" if isinstance(prompt, str) else "chat template"
            problem = f"is refused by the {what} of {self.name} ({type(error).__name__}: {error})."
            raise Unreadable(place, f"{problem} Change such rows, or leave them out with `dataset.filter`.") from error

    @cached_property
    def _prints_parts(self) -> bool:
        """Whether a template for texts takes a list of parts without an error."""
        message = {"role": "user", "content": [{"type": "text", "text": "a"}]}
        kwargs: Any = self.args.chat_template_kwargs or {}
        with suppress(Exception):  # of this conversation; the dataset's was rendered
            text = self.processing_class.apply_chat_template([message], tokenize=False, **kwargs)
            return "'type': 'text'" in text or '"type": "text"' in text
        return False

    def remark(self, where: str, texts: dict[int, list[int]]) -> None:
        """Warn, once per problem, about texts (token ids by row) that a policy can read but are probably wrong."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        special = set(self.tokenizer.all_special_ids) - {self.tokenizer.unk_token_id}
        added = sum(token in special for token in self.processing_class(text=["a"])["input_ids"][0])
        has_template = getattr(self.processing_class, "chat_template", None) is not None
        for i, ids in texts.items():
            if has_template and sum(token in special for token in ids) <= added:
                self._warn(
                    f"row {i} of {where}",
                    f"is a text, so the chat template of {self.name} is not applied to it. To train a chat model, "
                    "make each prompt a list of messages: `[{'role': 'user', 'content': text}]`.",
                )
            if bos is not None and ids[:2] == [bos, bos]:
                self._warn(f"row {i} of {where}", "begins with the BOS token twice. Remove it from the texts.")
            if ids[-1] == eos:
                self._warn(f"row {i} of {where}", "ends with the EOS token. Remove it from the texts.")

    def _warn(self, row: str, problem: str) -> None:
        if problem not in self.warned and self.args.process_index == 0:
            logger.warning(f"{row} {problem} Shown once.")
        self.warned.add(problem)


def policy_reader(
    args: SPPOConfig, model: str | nn.Module, processing_class: Any = None, tools: list | None = None
) -> Reader:
    """The policy as a reader of prompts. Raises an error if there is no tokenizer, or a wrong one."""
    config: Any = policy_config(model, args) if isinstance(model, str) else model.config
    path: Any = model if isinstance(model, str) else getattr(config, "_name_or_path", None)
    name = f"model {path!r}" if path else "the policy"
    if processing_class is None:
        if not path:
            raise ValueError("the policy was not loaded from a checkpoint. Pass its tokenizer as `processing_class`.")
        kwargs: Any = args.model_init_kwargs or {}
        revision = kwargs.get("revision") if isinstance(model, str) else None
        with own_code_is_refused(f"the tokenizer of {name}", POLICYS_OWN_CODE):
            processing_class = AutoProcessor.from_pretrained(
                path, revision=revision, trust_remote_code=args.trust_remote_code
            )
    if not isinstance(processing_class, (PreTrainedTokenizerBase, ProcessorMixin)):
        raise TypeError(f"processing_class must be a tokenizer or a processor, got {type(processing_class).__name__}.")
    room = room_for_prompts(args, config)
    return Reader(name, processing_class, _vocabulary(model, config), args, True, tools=tools or None, room=room)


def reward_readers(
    args: SPPOConfig, sources: Sequence[Any], tokenizers: Sequence[Any], num_judges: int = 0
) -> list[Reader]:
    """Reward models (none behind a server) as readers. The first `num_judges` judge in evaluations only."""
    readers = []
    for i, (source, tokenizer) in enumerate(zip(sources, tokenizers, strict=True)):
        if isinstance(source, str):
            trusted = source.rstrip("/") in [name.rstrip("/") for name in args.reward_trust_remote_code or ()]
            config: Any = AutoConfig.from_pretrained(base_of(source), trust_remote_code=trusted)
        elif isinstance(source, nn.Module):
            config = getattr(source, "config", None)
        else:
            continue
        name = source if isinstance(source, str) else getattr(config, "_name_or_path", "") or type(source).__name__
        vocabulary = _vocabulary(source, config)
        readers.append(Reader(f"reward model {name!r}", tokenizer, vocabulary, args, only_eval=i < num_judges))
    return readers


def _vocabulary(model: str | nn.Module, config: Any) -> int | None:
    """Rows of a model's embedding, if they can be known."""
    if isinstance(model, nn.Module):
        with suppress(AttributeError, NotImplementedError):
            return cast(Any, model).get_input_embeddings().num_embeddings
        return None
    return getattr(config.get_text_config(), "vocab_size", None)


def room_for_prompts(args: SPPOConfig, config: Any) -> int | None:
    """The most tokens that a prompt may have; `None` if there is no limit."""
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if args.use_vllm:  # which ends completions where the context ends, and refuses prompts that fill it
        context = args.vllm_max_model_length or context
        return context and context - 1
    return context and context - (args.max_completion_length or 0)


def check_length(place: int, length: int, room: int | None) -> None:
    """Raise [`Unreadable`] for a prompt that is empty or too long."""
    if length == 0:
        raise Unreadable(place, "has a prompt without tokens: there is nothing to begin a completion with.")
    if room is not None and length > room:
        raise Unreadable(
            place,
            f"has a prompt of {length} tokens, which does not fit into the policy's context: with its completion, a "
            f"prompt may have {room}. Leave out such prompts (docs/memory.md has a filter), or change "
            "max_completion_length (with vLLM, vllm_max_model_length).",
        )


def key_of_prompt(prompt: Any) -> int:
    return hash(repr(prompt))


def _has_images(prompt: Any) -> bool:
    """Whether a message has a part that is no text."""
    if isinstance(prompt, str):
        return False
    contents = [message["content"] for message in prompt if isinstance(message["content"], list)]
    return any(part["type"] != "text" for content in contents for part in content)
