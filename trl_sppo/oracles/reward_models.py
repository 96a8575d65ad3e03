"""Reward models: checks before they are loaded, and scores in micro-batches."""

from collections.abc import Callable, Coroutine, Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
import transformers
from accelerate.utils import patch_environment
from peft import get_peft_model
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import logging

from ..models.adapters import (
    base_of,
    check_whole_model,
    config_of,
    is_adapter,
    kind_of,
    load_weights,
    not_found,
    tokenizer_of,
    weights_of,
)
from ..models.weights import check_weights, silent
from ..trust import check_safetensors, is_url, own_code_error, own_code_is_refused
from .served import ServedRewardModel


logger = logging.get_logger(__name__)

Scores = Sequence[float | None]
RewardSource = str | PreTrainedModel | Callable[..., Scores | Coroutine[Any, Any, Scores]]

# Names of the scoring head in transformers' sequence classifiers. It is small, and rounding it would round the score
HEADS = ["score", "classifier", "classification_head", "logits_proj"]

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class MicroBatchedRewardModel(nn.Module):
    """A reward model, whose first logit is the score, in micro-batches of texts of similar length."""

    def __init__(self, model: nn.Module, batch_size: int):
        super().__init__()
        model.eval()  # DeepSpeed's returns None
        self.model = model
        self.batch_size = batch_size
        config = getattr(getattr(model, "module", model), "config", None)  # DeepSpeed's own is not the model's
        self._context: int | None = None
        if isinstance(config, PreTrainedConfig):
            self._name = f"reward model {config._name_or_path!r}"
            config = config.get_text_config()
            config.use_cache = False  # decoders keep keys and values by default, and nothing reads them
            self._context = getattr(config, "max_position_embeddings", None)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **kwargs: torch.Tensor
    ) -> SequenceClassifierOutput:
        """Score right-padded texts: all inputs have shape `(N, L)`, the logits have shape `(N, 1)`, in float32."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **kwargs}
        lengths = attention_mask.sum(dim=1)
        if self._context is not None and input_ids.size(1) > self._context:
            logger.warning(
                f"{self._name} has a context of {self._context} tokens, and is given texts of up to "
                f"{input_ids.size(1)}: it fails on them, or their scores mean little. Leave out long prompts, lower "
                "max_completion_length, or take a reward model with a longer context. Shown once."
            )
            self._context = None
        scores = torch.empty(len(input_ids), device=input_ids.device)
        # Longest first: a lack of memory shows at once
        for rows in lengths.argsort(descending=True).split(self.batch_size):
            longest = int(lengths[rows[0]].clamp(min=1))
            logits = self.model(**{name: value[rows, :longest] for name, value in inputs.items()}).logits
            scores[rows] = logits[:, 0].float()
        return SequenceClassifierOutput(logits=scores.unsqueeze(1))


def in_micro_batches(sources: Sequence[Any], batch_size: int) -> list[Any]:
    """Let the reward models among these score in micro-batches."""
    return [
        MicroBatchedRewardModel(source, batch_size) if isinstance(source, nn.Module) else source for source in sources
    ]


def without_slash(sources: Sequence[Any]) -> list[Any]:
    """Paths without a final slash: the last part becomes the name of the reward source."""
    return [source.rstrip("/") if isinstance(source, str) and not is_url(source) else source for source in sources]


def load_reward_models(
    reward_funcs: Sequence[RewardSource],
    processing_classes: Sequence[PreTrainedTokenizerBase | None],
    conversational: bool,
    trust_remote_code: Sequence[str] = (),
    chat_template_kwargs: dict[str, Any] | None = None,  # for those given by URL: TRL passes them to the others
    quantization: str | None = None,
    check: Callable[[list[Any], list[Any]], None] | None = None,  # gets sources and tokenizers before weights load
) -> tuple[list[Any], list[Any]]:
    """
    Check all reward models, then load the ones given by path, in their own dtype. Returns all reward sources and their
    tokenizers. Raises `ValueError` for one that cannot be found or used.
    """
    reward_funcs = [
        ServedRewardModel(source, chat_template_kwargs=chat_template_kwargs)
        if isinstance(source, str) and is_url(source)
        else source
        for source in reward_funcs
    ]
    if quantization is not None:
        check_reward_quantization(quantization, reward_funcs)
    tokenizers = []
    for source, tokenizer in zip(reward_funcs, processing_classes, strict=True):
        if isinstance(source, ServedRewardModel):
            if tokenizer is not None:
                raise ValueError(
                    f"the reward model at {source.base_url!r} has a tokenizer and a chat template of its own: its "
                    "entry in `reward_processing_classes` must be None."
                )
            source.check(conversational)
        elif isinstance(source, (str, nn.Module)):
            tokenizer = check_reward_model(source, tokenizer, conversational, source in trust_remote_code)
        tokenizers.append(tokenizer)
    if check is not None:
        check(reward_funcs, tokenizers)
    models: list[Any] = []
    for source, tokenizer in zip(reward_funcs, tokenizers, strict=True):
        if isinstance(source, str):
            source = _load(source, source in trust_remote_code, quantization)
        if isinstance(source, PreTrainedModel):
            # A classifier finds the last token of a text by it. An adapter's base has another one, or none
            source.config.get_text_config().pad_token_id = cast(Any, tokenizer).pad_token_id
        models.append(source)
    return models, tokenizers


def check_reward_model(source: str | nn.Module, tokenizer: Any, conversational: bool, trusted: bool) -> Any:
    """Raise `ValueError` if a reward model, given by path or loaded, cannot be used. Returns its tokenizer."""
    name = source if isinstance(source, str) else ""
    if isinstance(source, str):
        _check_config(source, trusted)
    elif isinstance(source, PreTrainedModel):
        name = source.config._name_or_path
        _check_labels(name, source.config.num_labels)
    if tokenizer is None and not name:
        raise ValueError(
            f"no tokenizer is known for reward model {type(source).__name__}, which was not loaded from a "
            "checkpoint: pass one in `reward_processing_classes`. For an adapter, pass its path, or merge it first."
        )
    with own_code_is_refused(*_own_code(name)):
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(tokenizer_of(name), trust_remote_code=trusted)
    name = name or type(source).__name__
    if tokenizer.pad_token_id is None:
        raise ValueError(
            f"the tokenizer of reward model {name!r} has no padding token. Set `tokenizer.pad_token` to a token that "
            "never ends a text (the EOS token would move the position that is scored) and save it beside the model, "
            "or pass it in `reward_processing_classes`."
        )
    if conversational and tokenizer.chat_template is None:
        raise ValueError(
            f"the prompts are conversational, but the tokenizer of reward model {name!r} has no chat template. Set "
            "`tokenizer.chat_template` to the one of its training and save it beside the model, or pass such a "
            "tokenizer in `reward_processing_classes`."
        )
    if isinstance(source, str):
        kind, brought = AutoModelForSequenceClassification, _head_of(source)
        with own_code_is_refused(*_own_code(name)):
            check_weights("reward model", base_of(name), kind, brought, num_labels=1, trust_remote_code=trusted)
    return tokenizer


def _load(path: str, trusted: bool, quantization: str | None) -> PreTrainedModel:
    head = _head_of(path)
    # The dtype that it was trained in: no weight of the head is rounded
    dtype = {"dtype": DTYPES[next(iter(head.values()))[1]]} if head else {}
    # For FSDP, transformers may load weights in the first process only, and the others would stay empty
    environment = patch_environment(FSDP_CPU_RAM_EFFICIENT_LOADING="false")
    with environment, own_code_is_refused(*_own_code(path)), silent() if head else nullcontext():
        model = AutoModelForSequenceClassification.from_pretrained(
            base_of(path),
            num_labels=1,
            trust_remote_code=trusted,
            use_safetensors=True,
            quantization_config=_quantization_config(quantization),
            **dtype,
        )
    if is_adapter(path):
        config = config_of(path)
        config.inference_mode = True
        load_weights("reward model", get_peft_model(model.eval(), config), path)  # in place, and not merged: exact
        model.config._name_or_path = path  # TRL's name of this reward source
    return model


def _head_of(path: str) -> dict[str, tuple[list[int], str]]:
    """The weights of the scoring head that an adapter brings, with shapes and dtypes."""
    if not is_adapter(path):
        return {}
    weights = weights_of("reward model", path)
    return {name: value for name, value in weights.items() if name.split(".")[0] in HEADS and "lora_" not in name}


def check_reward_quantization(quantization: str, reward_funcs: Sequence[RewardSource]) -> None:
    """Raise `ValueError` if there is nothing to quantize here."""
    if not any(isinstance(source, str) and not is_url(source) for source in reward_funcs):
        raise ValueError(
            f"reward_quantization={quantization!r} applies to reward models given by path, but there is none."
        )


def _own_code(name: str) -> tuple[str, str]:
    """The checkpoint with its own code, and the fix, for messages."""
    return f"reward model {name!r}", (
        f"If you trust it, set `reward_trust_remote_code`: [{name!r}]. For a loaded model, pass its tokenizer in "
        "`reward_processing_classes`."
    )


def _quantization_config(quantization: str | None) -> BitsAndBytesConfig | None:
    if quantization is None:
        return None
    return BitsAndBytesConfig(
        load_in_8bit=quantization == "8bit",
        load_in_4bit=quantization == "4bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=HEADS,  # despite its name it also applies in 4 bit
    )


def _check_config(path: str, trusted: bool) -> None:
    """Raise `ValueError` if a checkpoint would not load as a classifier with a trained head of one label."""
    check_safetensors("reward model", path)
    check_whole_model("reward model", path)
    try:
        config, _ = PreTrainedConfig.get_config_dict(base_of(path))
    except OSError as error:
        raise not_found("reward model", path, error) from error
    if is_adapter(path):
        check_safetensors("reward model", base_of(path))
        if config_of(path).is_prompt_learning:
            raise ValueError(
                f"reward model {path!r} is an adapter of learned prompts ({kind_of(config_of(path))}), which is not "
                "supported here. Use LoRA, or wrap the model in a reward function."
            )
        head = _head_of(path)
        if head:
            _check_labels(path, min(shape[0] for shape, _ in head.values()))
            return
    architectures = config.get("architectures") or []
    heads = [name for name in architectures if name.endswith("ForSequenceClassification")]
    own_code = "AutoModelForSequenceClassification" in config.get("auto_map", {})
    if own_code and not trusted and not any(hasattr(transformers, name) for name in heads):
        raise own_code_error(*_own_code(path))
    if not heads and not own_code:
        raise ValueError(
            f"reward model {path!r} has no scoring head: the config.json of {base_of(path)!r} names "
            f"{architectures or 'no architecture'}. Use a `...ForSequenceClassification` model with one label, as "
            "TRL's RewardTrainer saves it, or an adapter that was trained with lora_task_type SEQ_CLS."
        )
    # Two labels are the default, and then not written to config.json
    labels = PreTrainedConfig(**{name: config[name] for name in ("num_labels", "id2label") if config.get(name)})
    _check_labels(path, labels.num_labels)


def _check_labels(name: str, labels: int | None) -> None:
    if labels != 1:
        raise ValueError(
            f"reward model {name!r} has {labels} labels, but a reward is one number: it must have num_labels=1. To "
            "use one of several logits, wrap it in a reward function."
        )
