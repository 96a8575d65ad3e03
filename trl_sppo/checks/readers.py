"""Models as readers of prompts: each with its tokenizer and chat template, without weights."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias, cast

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

LEAVE_OUT = "Leave out such rows, with `dataset.filter`, or complete them."
OTHER_TOKENIZER = (
    "Use the tokenizer that belongs to the model, or call `model.resize_token_embeddings(len(tokenizer))` and save "
    "the model."
)
DROP_LAST = (
    "`dataset.map(lambda row: {'prompt': row['prompt'][:-1] if row['prompt'][-1]['role'] == 'assistant' else "
    "row['prompt']})`"
)

# Place among the prompts, what is wrong with that one, and what helps
Problem: TypeAlias = tuple[int, str, str]


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
    room: tuple[int, int] | None = None  # the policy's context, and how much of it a prompt may fill, in tokens
    warned: set[str] = field(default_factory=set)
    lengths: dict[int, int] = field(default_factory=dict)  # tokens of the prompts read so far, by hash

    def __post_init__(self):
        if self.is_policy and self.tokenizer.eos_token_id is None:
            raise ValueError(
                f"the tokenizer of {self.name} has no EOS token, so no completion could end. Set "
                "`tokenizer.eos_token` to the token that ends the model's turn, and save the tokenizer beside the "
                "model or pass it as `processing_class`."
            )
        for kind in ("pad", "eos") if self.is_policy else ("pad",):
            token = getattr(self.tokenizer, f"{kind}_token_id", None)
            if token is not None and self.vocabulary is not None and token >= self.vocabulary:
                name = getattr(self.tokenizer, f"{kind}_token")
                raise ValueError(
                    f"the tokenizer of {self.name} has the {kind} token {name!r} {self._outside(token)}. "
                    f"{OTHER_TOKENIZER}"
                )

    @property
    def tokenizer(self) -> Any:
        return self.processing_class.tokenizer if self.reads_images else self.processing_class

    @property
    def reads_images(self) -> bool:
        return isinstance(self.processing_class, ProcessorMixin)

    def _outside(self, token: int) -> str:
        return f"with the id {token}, but the embedding of {self.name} has {self.vocabulary} rows"

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

    def reads(self, prompt: Any) -> bool:
        """Whether it can be told here what becomes of a prompt. Images are left to TRL."""
        return not _has_images(prompt) or (self.is_policy and not self.reads_images)

    def read_new(self, prompts: list) -> tuple[dict[int, list[int]], Problem | None]:
        """Read prompts that were not read at the start, equal ones once: token ids by place, and the first problem."""
        new: dict[int, int] = {}
        for i, prompt in enumerate(prompts):
            key = key_of_prompt(prompt)
            if key not in self.lengths and key not in new and self.reads(prompt):
                new[key] = i
        places = list(new.values())
        if not places:
            return {}, None
        ids, problem = self.look([prompts[i] for i in places])
        return dict(zip(places, ids, strict=False)), problem and (places[problem[0]], *problem[1:])

    def look(self, prompts: list) -> tuple[list[list[int]], Problem | None]:
        """Token ids of prompts of one kind, none if they cannot be read, and the first problem."""
        is_text = isinstance(prompts[0], str)
        for i, prompt in enumerate(prompts if self.is_policy and not is_text else ()):
            if _has_images(prompt) and not self.reads_images:
                problem = f"has an image, but {self.name} has a tokenizer for texts only"
                return [], (i, problem, "Use a model that reads images, or leave out such rows with `dataset.filter`.")
            if prompt[-1]["role"] == "assistant":
                problem = "ends with an assistant message, after which TRL would open another one"
                return [], (i, problem, f"Drop the last message of such rows: {DROP_LAST}.")
        if not is_text and getattr(self.processing_class, "chat_template", None) is None:
            problem = f"is a list of messages, but the tokenizer of {self.name} has no chat template"
            return [], (0, problem, (
                "Use an instruction-tuned model, or set `tokenizer.chat_template` and save it beside the model, or "
                "make all prompts texts."
            ))  # fmt: skip
        try:
            all_ids = self.read(prompts)
        except Exception as error:  # templates raise whatever they like
            for i, prompt in enumerate(prompts if len(prompts) > 1 else ()):
                _, found = self.look([prompt])
                if found is not None:
                    return [], (i, *found[1:])
            what = "tokenizer" if is_text else "chat template"
            cure = "" if is_text else ", or set a `tokenizer.chat_template` that accepts them"
            return [], (
                0,
                f"is refused by the {what} of {self.name} ({type(error).__name__}: {error})",
                f"Change such rows, or leave them out with `dataset.filter`{cure}.",
            )
        for i, (prompt, ids) in enumerate(zip(prompts, all_ids, strict=True)):
            if self.is_policy and not ids:
                problem = "has a prompt without tokens: there is nothing to begin a completion with"
                return all_ids, (i, problem, LEAVE_OUT)
            largest = max(ids, default=-1)
            if self.vocabulary is not None and largest >= self.vocabulary:
                token = self.tokenizer.convert_ids_to_tokens(largest)
                return all_ids, (i, f"has the token {token!r} {self._outside(largest)}", OTHER_TOKENIZER)
            if not is_text and any(isinstance(message["content"], list) for message in prompt) and self._prints_parts:
                problem = f"has content in parts, which the chat template of {self.name} prints as a Python list"
                return all_ids, (i, problem, "Make the content of each message one text, or set another template.")
        return all_ids, None

    @cached_property
    def _prints_parts(self) -> bool:
        """Whether a template for texts takes a list of parts without an error."""
        message = {"role": "user", "content": [{"type": "text", "text": "a"}]}
        kwargs: Any = self.args.chat_template_kwargs or {}
        with suppress(Exception):  # of this conversation; that of the dataset was rendered
            text = self.processing_class.apply_chat_template([message], tokenize=False, **kwargs)
            return "'type': 'text'" in text or '"type": "text"' in text
        return False

    def remark(self, where: str, texts: dict[int, list[int]]) -> None:
        """Warn, once of each kind, of texts (token ids by row) that a policy can read, but seldom should."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        special = set(self.tokenizer.all_special_ids) - {self.tokenizer.unk_token_id}
        added = sum(token in special for token in self.processing_class(text=["a"])["input_ids"][0])
        for i, ids in texts.items():
            templated = sum(token in special for token in ids) > added
            if getattr(self.processing_class, "chat_template", None) is not None and not templated:
                self._warn(
                    "template",
                    f"row {i} of {where} is a text, so the chat template of {self.name} is not applied to it. If the "
                    "policy is to be trained as a chat model, make each prompt a list of messages: "
                    "`dataset.map(lambda row: {'prompt': [{'role': 'user', 'content': row['prompt']}]})`.",
                )
            if bos is not None and ids[:2] == [bos, bos]:
                self._warn(
                    "bos",
                    f"row {i} of {where} begins with the BOS token {self.tokenizer.bos_token!r} twice: the text has "
                    "it, and the tokenizer adds it. Remove it from the texts.",
                )
            if ids[-1] == eos:
                self._warn(
                    "eos",
                    f"row {i} of {where} ends with the EOS token {self.tokenizer.eos_token!r}, after which the policy "
                    "expects no text. Remove it from the texts, or use a tokenizer that does not add it.",
                )

    def _warn(self, kind: str, message: str) -> None:
        if kind not in self.warned and self.args.process_index == 0:
            logger.warning(f"{message} Said once.")
        self.warned.add(kind)


def policy_reader(
    args: SPPOConfig, model: str | nn.Module, processing_class: Any = None, tools: list | None = None
) -> Reader:
    """The policy as a reader of prompts. Raises an error if there is no tokenizer, or a wrong one."""
    config: Any = policy_config(model, args) if isinstance(model, str) else model.config
    path: Any = model if isinstance(model, str) else getattr(config, "_name_or_path", None)
    name = f"model {path!r}" if path else "the policy"
    if processing_class is None:
        if not path:
            raise ValueError(
                f"the policy ({type(model).__name__}) was not loaded from a checkpoint, so no tokenizer is known for "
                "it. Pass one as `processing_class`."
            )
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


def room_for_prompts(args: SPPOConfig, config: Any) -> tuple[int, int] | None:
    """The policy's context and how much of it a prompt may fill, in tokens; `None` if nothing says."""
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if args.use_vllm:  # which ends completions where the context ends, and refuses prompts that fill it
        context = args.vllm_max_model_length or context
        return context and (context, context - 1)
    return context and (context, context - (args.max_completion_length or 0))


def key_of_prompt(prompt: Any) -> int:
    return hash(repr(prompt))


def _has_images(prompt: Any) -> bool:
    """Whether a message has a part that is no text."""
    if isinstance(prompt, str):
        return False
    contents = [message["content"] for message in prompt if isinstance(message["content"], list)]
    return any(part["type"] != "text" for content in contents for part in content)
