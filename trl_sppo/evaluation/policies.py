"""Completions of policies outside of training: sampled from models and adapters, or read from files."""

import gc
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import datasets
import torch
from datasets import Dataset
from datasets.exceptions import DatasetGenerationError
from peft import LoraConfig, PeftModel, PeftType, get_peft_model
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging
from trl.data_utils import is_conversational

from ..arguments.loading import dataset_source
from ..checks.arguments import check_vllm_is_installed
from ..files import read_beginning
from ..models.adapters import base_of, check_whole_model, config_of, is_adapter, load_weights, tokenizer_of
from ..models.generation import end_tokens, only_requested_generation, shared_prompts
from ..models.weights import check_weights, whole_and_silent
from ..rollouts.files import COLUMNS
from ..rollouts.reasoning import Reasoning, find_marks
from ..rows import without_nulls
from ..trust import check_safetensors, own_code_is_refused
from .files import Groups, group_of, row_of, with_messages


logger = logging.get_logger(__name__)

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the only sizes of adapters that vLLM makes room for
# Options of an adapter that vLLM reads, or that do not affect its forward pass. It silently ignores most others
VLLM_READS = {
    "r", "lora_alpha", "use_rslora", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "fan_in_fan_out", "lora_dropout", "eva_config", "peft_version", "task_type",
    "inference_mode", "auto_mapping", "base_model_name_or_path", "runtime_config",
}  # fmt: skip
KEEPS_BASE = (True, False, "gaussian", "eva", "orthogonal")  # ways to begin an adapter that leave the base as it is
OWN_CODE = "If you trust it, set trust_remote_code=True."


@dataclass
class Sampling:
    """How policies are sampled. The metadata describes each option."""

    num_generations: int = field(default=4, metadata={"help": "Completions per prompt of each policy."})
    max_completion_length: int = field(default=1024, metadata={"help": "Longest completion, in tokens."})
    temperature: float = field(default=0.8, metadata={"help": "Sampling temperature."})
    seed: int = field(default=0, metadata={"help": "Seed of the sampling."})
    batch_size: int = field(default=64, metadata={"help": "Completions that transformers samples at the same time."})
    use_vllm: bool = field(default=False, metadata={"help": "Let vLLM sample."})
    vllm_gpu_memory_utilization: float = field(default=0.5, metadata={"help": "vLLM's share of the GPU's memory."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Whether the policies' own Python code may run."})
    chat_template_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Arguments of chat templates, as JSON. By default the training's."}
    )
    hide_reasoning: bool | None = field(
        default=None, metadata={"help": "Whether judges read no reasoning of policies. By default as in the training."}
    )


def run_of(policy: str) -> dict[str, Any]:
    """Facts recorded at the start of the run whose folder or checkpoint a policy is; else empty."""
    folder = Path(policy).resolve()
    return (read_beginning(str(folder)) or read_beginning(str(folder.parent))) if Path(policy).is_dir() else {}


def check_policy(policy: str, trust_remote_code: bool = False, use_vllm: bool = False) -> None:
    """Raise `ValueError` if a policy cannot be loaded or sampled. No weights are loaded."""
    if Path(policy).is_file():  # of its completions
        return
    if use_vllm:
        check_vllm_is_installed()
    if run_of(policy).get("images"):
        raise ValueError(
            f"policy {policy!r} was trained on images, and policies are sampled here from texts only. Evaluate during "
            "the training (eval_strategy), or give files of completions."
        )
    check_whole_model("policy", policy)
    base, what = base_of(policy), f"policy {policy!r}"
    if base != policy:
        check_safetensors("policy", policy)
        what = f"the base model {base!r} of adapter {policy!r}"
    if is_adapter(base):
        raise ValueError(f"{what} is itself an adapter. Merge that into its own base first (`merge_and_unload`).")
    check_safetensors("policy", base)
    try:
        with own_code_is_refused(what, OWN_CODE):
            AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
            check_weights(what, base, AutoModelForCausalLM, trust_remote_code=trust_remote_code)
    except OSError as error:
        raise ValueError(
            f"{what} is neither a file or folder here nor a model that is available on the Hugging Face hub. Check "
            "the path, which is relative to the current directory, or base_model_name_or_path in adapter_config.json. "
            f"({error})"
        ) from error
    if base == policy:
        return
    if config_of(policy).peft_type == PeftType.PREFIX_TUNING:
        raise ValueError(
            f"adapter {policy!r} uses prefix tuning, and `generate` of PEFT and transformers ignores the prefix: the "
            "base model would be sampled. Sample it elsewhere, and pass the file of its completions."
        )
    if use_vllm:
        _check_vllm_serves(policy)
    with whole_and_silent(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load_policy(policy, trust_remote_code=trust_remote_code, device_map="meta")


def _check_vllm_serves(adapter: str) -> None:
    """Raise `ValueError` if vLLM would refuse an adapter, or sample from another policy than the one trained."""
    config, defaults = config_of(adapter).to_dict(), LoraConfig().to_dict()
    changed = {name for name in config.keys() - VLLM_READS if config[name] and config[name] != defaults.get(name)}
    if config.get("r", 0) > VLLM_RANKS[-1]:
        changed.add("r")
    if config.get("init_lora_weights") in KEEPS_BASE:
        changed.discard("init_lora_weights")
    if changed:
        problem = ", ".join(f"{name}={config[name]!r}" for name in sorted(changed))
        raise ValueError(
            f"use_vllm=True with adapter {adapter!r}, which has {problem}: vLLM samples with plain LoRA only. Set "
            "use_vllm=False, or merge the adapter into its base (`merge_and_unload`) and save the result."
        )


def load_policy(policy: str, trust_remote_code: bool = False, **kwargs: Any) -> PreTrainedModel | PeftModel:
    """Load a policy as it was trained. Raises `ValueError` if the weights of an adapter do not fit its base model."""
    kwargs = {"dtype": "auto", "use_safetensors": True, "trust_remote_code": trust_remote_code, **kwargs}
    if not is_adapter(policy):
        return AutoModelForCausalLM.from_pretrained(policy, **kwargs)
    # AutoModelForCausalLM.from_pretrained(adapter) would silently leave out parts of some adapters: DoRA's magnitudes
    config = config_of(policy)
    base: Any = AutoModelForCausalLM.from_pretrained(base_of(policy), revision=config.revision, **kwargs)
    model = get_peft_model(base.eval(), config, low_cpu_mem_usage=base.device.type == "meta")
    load_weights("policy", cast(PeftModel, model), policy)
    return model


def load_completions(path: str) -> Groups:
    """
    Read completions, `"lengths"` and `"scores"` from Parquet, JSON lines or CSV with columns `"prompt"` and
    `"completions"` (a list) or `"completion"` (one; rows whose other columns are all equal become one group).
    """
    try:
        rows: Any = datasets.load_dataset(**dataset_source(path, option="completions"), split="train")
    except (OSError, ValueError, DatasetGenerationError, StopIteration) as error:
        raise ValueError(f"completions {path!r} cannot be read: {str(error) or 'the file is empty'}.") from error
    columns = rows.column_names
    if "prompt" not in columns or not {"completions", "completion"} & set(columns):
        raise ValueError(f"{path!r} needs columns 'prompt' and 'completions' (or 'completion'), got {columns}.")
    groups: dict[str, dict[str, Any]] = {}
    for i, row in enumerate(rows):
        group = _group_in_file(row)
        if group.get("prompt") is None or None in group["completions"]:
            raise ValueError(f"{path!r} has a row without a prompt or without a completion: {row}. Leave it out.")
        key = str(i) if row.get("completions") is not None else json.dumps(row_of(group), sort_keys=True, default=str)
        if key not in groups:
            groups[key] = group
        else:
            groups[key]["completions"] += group["completions"]
            for name in {"scores", "lengths"} & groups[key].keys():  # of the first completion only
                del groups[key][name]
    sizes = {len(group["completions"]) for group in groups.values()}
    if len(sizes) > 1:
        raise ValueError(
            f"{path!r} has {sorted(sizes)} completions per prompt, but needs the same number for each. Rows "
            f"with one completion are grouped if all other columns of {columns} are equal: leave out columns that "
            "describe the completion."
        )
    return list(groups.values())


def _group_in_file(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a file as a group: separates columns of the dataset from the group's own."""
    row = dict(row)
    own: dict[str, Any] = {"completions": row.pop("completions", None) or [row.pop("completion", None)]}
    for name, kind in (("scores", dict), ("lengths", list), ("dataset_columns", dict)):
        if isinstance(row.get(name), kind) and (kind is dict or len(row[name]) == len(own["completions"])):
            own[name] = row.pop(name)
        elif row.get(name) is None:
            row.pop(name, None)
    stored = own.pop("dataset_columns", {})
    if isinstance(row.get("versions"), dict) and "trl_sppo" in row["versions"]:  # a run wrote these columns
        row = {name: value for name, value in row.items() if name not in COLUMNS}
    return with_messages(group_of({**row, **stored}, **own))


def sample(policy: str, prompts: Dataset, sampling: Sampling) -> Groups:
    """Sample completions of each of P prompts: groups with S `"completions"`, as judges read them, and `"lengths"`."""
    if tools := run_of(policy).get("tools"):
        logger.warning(f"{policy!r} was trained with tools ({', '.join(tools)}), which are not available here.")
    tokenizer, prompt_ids = read_prompts(policy, prompts, sampling)
    if sampling.use_vllm:
        ids = _sample_with_vllm(policy, tokenizer, prompt_ids, sampling)
    else:
        model: Any = load_policy(policy, sampling.trust_remote_code)
        model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        ids = sample_ids(model, tokenizer, prompt_ids, sampling, description=policy)
        del model
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    flat_ids = [each for group in ids for each in group]
    flat: list[Any] = tokenizer.batch_decode(flat_ids, skip_special_tokens=True)
    lengths = [len(each) for each in flat_ids]
    size = sampling.num_generations
    marks = find_marks(sampling.hide_reasoning, tokenizer)
    if marks is not None:
        repeated = [each for each in prompt_ids for _ in range(size)]
        flat, facts = Reasoning(tokenizer, marks).hide(repeated, flat_ids, flat)
        lengths = [length - hidden for length, (hidden, _) in zip(lengths, facts, strict=True)]
    return [
        group_of(
            row,
            completions=[
                [{"role": "assistant", "content": text}] if is_conversational({"prompt": row["prompt"]}) else text
                for text in flat[p * size : (p + 1) * size]
            ],
            lengths=lengths[p * size : (p + 1) * size],
        )
        for p, row in enumerate(prompts)
    ]


def read_prompts(policy: str, prompts: Dataset, sampling: Sampling) -> tuple[Any, list[list[int]]]:
    """The tokenizer of a policy, and the token ids of each prompt. Raises `ValueError` if one cannot be read."""
    with own_code_is_refused(f"policy {policy!r}", OWN_CODE):  # an adapter is saved with the tokenizer of its training
        tokenizer: Any = AutoTokenizer.from_pretrained(
            tokenizer_of(policy), trust_remote_code=sampling.trust_remote_code
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    find_marks(sampling.hide_reasoning, tokenizer, f"policy {policy!r}")
    found = []
    for i, prompt in enumerate(prompts["prompt"]):
        try:
            found.append(tokenize_prompt(tokenizer, prompt, sampling.chat_template_kwargs))
        except Exception as error:  # chat templates raise any error
            raise ValueError(
                f"prompt {i} cannot be read by policy {policy!r}: {error} Leave out such prompts, or change them."
            ) from error
    return tokenizer, found


def tokenize_prompt(tokenizer: Any, prompt: Any, chat_template_kwargs: Any = None) -> list[int]:
    """Token ids of a prompt, as in TRL. Raises `ValueError` if it needs a chat template and there is none."""
    if not is_conversational({"prompt": prompt}):
        return list(tokenizer(prompt)["input_ids"])
    if tokenizer.chat_template is None:
        raise ValueError(
            f"the prompts are conversational, but the tokenizer {tokenizer.name_or_path!r} has no chat template. Save "
            "one beside the policy, or give prompts as texts."
        )
    if prompt[-1]["role"] == "assistant":
        raise ValueError("it ends with an assistant message, after which another one would be opened.")
    messages = [without_nulls(message) for message in prompt]
    kwargs = {"add_generation_prompt": True, "return_dict": True, **(chat_template_kwargs or {})}
    return list(tokenizer.apply_chat_template(messages, **kwargs)["input_ids"])


@torch.inference_mode()
def sample_ids(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[list[int]],
    sampling: Sampling,
    description: str = "sampling",
) -> list[list[list[int]]]:
    """Sample with transformers: the tokens of S completions of each of P prompts, including the first EOS token."""
    torch.manual_seed(sampling.seed)
    repeated = [ids for ids in prompt_ids for _ in range(sampling.num_generations)]
    ends = end_tokens(model.generation_config, tokenizer)
    completions: list[list[int]] = []
    for start in tqdm(range(0, len(repeated), sampling.batch_size), desc=description):
        batch = {"input_ids": repeated[start : start + sampling.batch_size]}
        inputs = tokenizer.pad(batch, padding_side="left", return_tensors="pt").to(model.device)
        with only_requested_generation(model), shared_prompts(model):
            output = model.generate(  # type: ignore[operator]
                **inputs,
                max_new_tokens=sampling.max_completion_length,
                do_sample=True,
                temperature=sampling.temperature,
                top_k=0,
                top_p=1.0,
                eos_token_id=ends,
                pad_token_id=tokenizer.pad_token_id,
            )
        for row in output[:, inputs["input_ids"].size(1) :].tolist():
            end = next((i for i, token in enumerate(row) if token in ends), len(row) - 1)
            completions.append(row[: end + 1])
    size = sampling.num_generations
    return [completions[i : i + size] for i in range(0, len(completions), size)]


def _sample_with_vllm(
    policy: str, tokenizer: Any, prompt_ids: Sequence[list[int]], sampling: Sampling
) -> list[list[list[int]]]:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    base, adapter = base_of(policy), {}
    if policy != base:
        rank = cast(LoraConfig, config_of(policy)).r
        adapter = {"enable_lora": True, "max_lora_rank": next((size for size in VLLM_RANKS if size >= rank), rank)}
    try:
        recommended = GenerationConfig.from_pretrained(base)
    except OSError:  # there is no such file
        config = AutoConfig.from_pretrained(base, trust_remote_code=sampling.trust_remote_code)
        recommended = GenerationConfig.from_model_config(config)
    ends = end_tokens(recommended, tokenizer)
    engine = LLM(
        model=base,
        seed=sampling.seed,
        gpu_memory_utilization=sampling.vllm_gpu_memory_utilization,
        trust_remote_code=sampling.trust_remote_code,
        generation_config="vllm",  # not what the checkpoint recommends
        **adapter,
    )
    outputs = engine.generate(
        [{"prompt_token_ids": ids} for ids in prompt_ids],
        SamplingParams(
            n=sampling.num_generations,
            temperature=sampling.temperature,
            max_tokens=sampling.max_completion_length,
            stop_token_ids=ends,
        ),  # no seed here: all prompts would have the same random numbers
        lora_request=LoRARequest("policy", 1, policy) if adapter else None,
    )
    return [[list(each.token_ids) for each in output.outputs] for output in outputs]
