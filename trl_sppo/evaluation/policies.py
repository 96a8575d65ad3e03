"""Completions of policies, outside a training: sampled from models and adapters, or read from files."""

import gc
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import datasets
import torch
from datasets import Dataset
from datasets.exceptions import DatasetGenerationError
from peft import LoraConfig, PeftModel, PeftType
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

from ..files import read_beginning
from ..models.adapters import CONFIG, base_of, check_whole_model, config_of, is_adapter, misfits, some, tokenizer_of
from ..models.generation import end_tokens, only_requested_generation
from ..models.weights import check_weights, whole_and_silent
from ..rollouts.files import COLUMNS
from ..rows import without_nulls
from ..trust import check_safetensors, own_code_is_refused
from .files import Groups, group_of, row_of, with_messages


logger = logging.get_logger(__name__)

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the only sizes of adapters that vLLM makes room for
# Options of an adapter that vLLM reads, or that say nothing about its forward pass. It ignores most others in silence
VLLM_READS = {
    "r", "lora_alpha", "use_rslora", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "fan_in_fan_out", "lora_dropout", "init_lora_weights", "eva_config", "peft_type", "peft_version", "task_type",
    "inference_mode", "auto_mapping", "base_model_name_or_path", "runtime_config",
}  # fmt: skip
KEEPS_BASE = (True, False, "gaussian", "eva", "orthogonal")  # ways to begin an adapter that leave the base as it is
OWN_CODE = "If you trust it, set trust_remote_code=True."


@dataclass(frozen=True)
class Sampling:
    """How policies are sampled."""

    num_generations: int = 4  # completions per prompt, S
    max_completion_length: int = 1024  # tokens
    temperature: float = 0.8
    seed: int = 0
    batch_size: int = 64  # completions that transformers samples at the same time. vLLM chooses for itself
    use_vllm: bool = False
    vllm_gpu_memory_utilization: float = 0.5  # share of the GPU's memory
    trust_remote_code: bool = False
    chat_template_kwargs: dict[str, Any] | None = None


def is_file(policy: str) -> bool:
    """Whether a policy is given as a file of its completions."""
    return Path(policy).is_file()


def run_of(policy: str) -> dict[str, Any]:
    """The facts that a run wrote down when it began, for a policy that is its folder or its checkpoint; else empty."""
    folder = Path(policy).resolve()
    return (read_beginning(str(folder)) or read_beginning(str(folder.parent))) if Path(policy).is_dir() else {}


def check_policy(policy: str, trust_remote_code: bool = False, use_vllm: bool = False) -> None:
    """Raise `ValueError` if a policy cannot be loaded or sampled. No weights are loaded."""
    if is_file(policy):
        return
    if run_of(policy).get("images"):
        raise ValueError(
            f"policy {policy!r} was trained on images, and policies are sampled here from texts only. Evaluate during "
            "the training (eval_strategy), or give files of completions."
        )
    check_safetensors("policy", policy)
    check_whole_model("policy", policy)
    if not is_adapter(policy):
        _check_model(f"policy {policy!r}", policy, trust_remote_code, f"nor a folder with a config.json or {CONFIG}")
        return
    base = base_of(policy)
    if is_adapter(base):
        raise ValueError(
            f"the base of adapter {policy!r} is itself an adapter, {base!r}. Merge that one into its own base "
            "(`merge_and_unload`), save the result, and name it as base_model_name_or_path in the adapter's "
            f"{CONFIG}."
        )
    check_safetensors(f"the base of adapter {policy!r}, model", base)
    _check_model(
        f"the base model {base!r} of adapter {policy!r}",
        base,
        trust_remote_code,
        "nor a folder with a config.json",
        f"Its path is relative to the current directory: run this where the adapter was trained, or set "
        f"base_model_name_or_path in {Path(policy) / CONFIG}.",
    )
    if config_of(policy).peft_type == PeftType.PREFIX_TUNING:
        raise ValueError(
            f"adapter {policy!r} is of prefix tuning, whose prefix `generate` of PEFT and transformers leaves out: "
            "completions would be those of the base model. Sample it elsewhere, and give the file of its completions."
        )
    if use_vllm:
        _check_vllm_serves(policy)
    with whole_and_silent(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load_policy(policy, trust_remote_code=trust_remote_code, device_map="meta")


def _check_model(what: str, path: str, trust_remote_code: bool, nor: str, cure: str = "Check the path.") -> None:
    try:
        with own_code_is_refused(what, OWN_CODE):
            AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
            check_weights(what, path, AutoModelForCausalLM, trust_remote_code=trust_remote_code)
    except OSError as error:
        raise ValueError(
            f"{what} is neither a file of completions, {nor}, nor a model that is available on the Hugging Face hub. "
            f"{cure} ({error})"
        ) from error


def _check_vllm_serves(adapter: str) -> None:
    """Raise `ValueError` if vLLM would refuse an adapter, or sample from another policy than the one trained."""
    config = config_of(adapter).to_dict()
    defaults, kind = LoraConfig().to_dict(), getattr(config["peft_type"], "value", config["peft_type"])
    problem = ""
    if kind != "LORA":
        problem = f"peft_type={kind}"
    elif config["r"] > VLLM_RANKS[-1]:
        problem = f"r={config['r']}, of at most {VLLM_RANKS[-1]}"
    elif config["init_lora_weights"] not in KEEPS_BASE:
        problem = f"init_lora_weights={config['init_lora_weights']!r}, which changes the base model"
    else:
        changed = [name for name in config.keys() - VLLM_READS if config[name] and config[name] != defaults.get(name)]
        problem = ", ".join(f"{name}={config[name]!r}" for name in sorted(changed))
    if problem:
        raise ValueError(
            f"use_vllm=True with adapter {adapter!r}, which has {problem}: vLLM samples with plain LoRA only. Set "
            "use_vllm=False, or merge the adapter into its base (`merge_and_unload`) and save the result."
        )


def load_policy(policy: str, trust_remote_code: bool = False, **kwargs: Any) -> PreTrainedModel | PeftModel:
    """
    Load a policy as it was trained: an adapter by PEFT, onto the base model that its `adapter_config.json` names.
    Raises `ValueError` if the weights of an adapter do not fit.
    """
    kwargs = {"dtype": "auto", "use_safetensors": True, "trust_remote_code": trust_remote_code, **kwargs}
    if not is_adapter(policy):
        return AutoModelForCausalLM.from_pretrained(policy, **kwargs)
    # AutoModelForCausalLM.from_pretrained(adapter) would silently leave out parts of some adapters: DoRA's magnitudes
    revision = config_of(policy).revision
    model: Any = AutoModelForCausalLM.from_pretrained(base_of(policy), revision=revision, **kwargs)
    options: Any = {"low_cpu_mem_usage": True, "torch_device": "cpu"} if model.device.type == "meta" else {}
    fit = f"its base model {base_of(policy)!r} and its own {CONFIG}"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".*missing adapter keys")
            model = PeftModel.from_pretrained(model, policy, **options)
        found = model.load_adapter(policy, "default", **options)
    except (UserWarning, KeyError, RuntimeError) as error:
        raise ValueError(
            f"the weights of adapter {policy!r} do not fit {fit}: {' '.join(str(error).split())[:500]}. Save it again "
            "with all of its weights, or give another one."
        ) from error
    for problem, names in zip(("lacks", "has more than"), misfits(model, policy, found), strict=True):
        if names:
            raise ValueError(
                f"adapter {policy!r} {problem} the weights that {fit} ask for: {some(names)}. Save it again with all "
                "of its weights, or give another one."
            )
    return model


def load_completions(path: str) -> Groups:
    """
    Read completions, and `"lengths"` and `"scores"` if there are any, from Parquet, JSON lines or CSV with the columns
    `"prompt"` and `"completions"` (a list) or `"completion"` (one). Of the latter, rows are put together that are
    equal in all other columns. Raises `ValueError` if groups differ in size.
    """
    kind = {".jsonl": "json", ".json": "json", ".csv": "csv"}.get(Path(path).suffix, "parquet")
    try:
        rows: Any = datasets.load_dataset(kind, data_files=path, split="train")
    except (OSError, ValueError, DatasetGenerationError, StopIteration) as error:
        raise ValueError(
            f"{path!r} cannot be read as {kind}: {error or 'it is empty'}. Completions come as .parquet, .jsonl or "
            ".csv."
        ) from error
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
            f"{path!r} has {sorted(sizes)} completions per prompt: give as many for each of the prompts. Rows with "
            f"one completion each are put together if they are equal in all other columns, of {columns}: leave "
            "out those that say something of the completion."
        )
    return list(groups.values())


def _group_in_file(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a file as a group: separates columns of the dataset from those of the group."""
    row = dict(row)
    own: dict[str, Any] = {"completions": row.pop("completions", None) or [row.pop("completion", None)]}
    scores, lengths = row.get("scores"), row.get("lengths")
    if scores is None or isinstance(scores, dict):
        row.pop("scores", None)
        own |= {} if scores is None else {"scores": scores}
    if lengths is None or (isinstance(lengths, list) and len(lengths) == len(own["completions"])):
        row.pop("lengths", None)
        own |= {} if lengths is None else {"lengths": lengths}
    stored = row.pop("dataset_columns", None) if isinstance(row.get("dataset_columns"), dict | None) else None
    if isinstance(row.get("versions"), dict) and "trl_sppo" in row["versions"]:  # of a run: so are these names
        row = {name: value for name, value in row.items() if name not in COLUMNS}
    return with_messages(group_of({**row, **(stored or {})}, **own))


def sample(policy: str, prompts: Dataset, sampling: Sampling) -> Groups:
    """Sample completions of each of P prompts: groups with S `"completions"` and their `"lengths"` in tokens."""
    tools = run_of(policy).get("tools")
    if tools:
        logger.warning(
            f"{policy!r} was trained with tools ({', '.join(tools)}), which it does not have here: its prompts differ "
            "from those of its training."
        )
    base = base_of(policy)
    tokenizer, prompt_ids = read_prompts(policy, prompts, sampling)
    if sampling.use_vllm:
        ids = _sample_with_vllm(policy, base, tokenizer, prompt_ids, sampling)
    else:
        model: Any = load_policy(policy, sampling.trust_remote_code)
        model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        ids = sample_ids(model, tokenizer, prompt_ids, sampling, description=policy)
        del model
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    flat = tokenizer.batch_decode([each for group in ids for each in group], skip_special_tokens=True)
    size = sampling.num_generations
    return [
        group_of(
            row,
            completions=[_as_completion(row["prompt"], text) for text in flat[p * size : (p + 1) * size]],
            lengths=[len(each) for each in ids[p]],
        )
        for p, row in enumerate(prompts)
    ]


def read_prompts(policy: str, prompts: Dataset, sampling: Sampling) -> tuple[Any, list[list[int]]]:
    """The tokenizer of a policy, and the token ids of each prompt. Raises `ValueError` if a prompt cannot be read."""
    with own_code_is_refused(f"policy {policy!r}", OWN_CODE):  # an adapter is saved with the tokenizer of its training
        tokenizer: Any = AutoTokenizer.from_pretrained(
            tokenizer_of(policy), trust_remote_code=sampling.trust_remote_code
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    found = []
    for i, prompt in enumerate(prompts["prompt"]):
        try:
            found.append(tokenize_prompt(tokenizer, prompt, sampling.chat_template_kwargs))
        except Exception as error:  # chat templates raise whatever they like
            raise ValueError(
                f"prompt {i} cannot be read by policy {policy!r}: {error} Leave out such prompts, or change them."
            ) from error
    return tokenizer, found


def tokenize_prompt(tokenizer: Any, prompt: Any, chat_template_kwargs: dict[str, Any] | None = None) -> list[int]:
    """What the policy reads, as in TRL. Raises `ValueError` if it would need a chat template and has none."""
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
    kwargs: Any = chat_template_kwargs or {}
    return list(
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, **kwargs)["input_ids"]
    )


def _as_completion(prompt: Any, text: str) -> Any:
    return [{"role": "assistant", "content": text}] if is_conversational({"prompt": prompt}) else text


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
        with only_requested_generation(model):
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
    policy: str, base: str, tokenizer: Any, prompt_ids: Sequence[list[int]], sampling: Sampling
) -> list[list[list[int]]]:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    adapter = {}
    if policy != base:
        rank = cast(LoraConfig, config_of(policy)).r
        adapter = {"enable_lora": True, "max_lora_rank": next(size for size in VLLM_RANKS if size >= rank)}
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
