"""Completions of policies, outside a training: sampled from models and adapters, or read from files."""

import gc
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets import Dataset
from datasets.exceptions import DatasetGenerationError
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from trl.data_utils import is_conversational

from .stored_rollouts import key_of, without_nulls
from .trust import check_safetensors, own_code_is_refused
from .weights import check_weights


ADAPTER = "adapter_config.json"
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the only sizes of adapters that vLLM makes room for
OWN_CODE = "If you trust it, set trust_remote_code=True."


@dataclass(frozen=True)
class Sampling:
    """
    How to sample.

    Args:
        num_generations (`int`):
            Completions per prompt, S.
        max_completion_length (`int`):
            Length limit, in tokens.
        temperature (`float`):
            Sampling temperature.
        seed (`int`):
            Seed of the sampling.
        batch_size (`int`):
            Completions that transformers samples at the same time. vLLM chooses for itself.
        use_vllm (`bool`):
            Whether vLLM samples.
        vllm_gpu_memory_utilization (`float`):
            Share of the GPU's memory that vLLM takes.
        trust_remote_code (`bool`):
            Whether policies may run Python code of their own.
    """

    num_generations: int = 4
    max_completion_length: int = 1024
    temperature: float = 0.8
    seed: int = 0
    batch_size: int = 64
    use_vllm: bool = False
    vllm_gpu_memory_utilization: float = 0.5
    trust_remote_code: bool = False


def is_file(policy: str) -> bool:
    """Whether a policy is given as a file of its completions."""
    return Path(policy).is_file()


def check_policy(policy: str, trust_remote_code: bool = False) -> None:
    """
    Check, without loading it, that a policy can be had.

    Args:
        policy (`str`):
            Model, adapter, or file of completions.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether it may run Python code of its own.

    Raises:
        `ValueError`: if not.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if is_file(policy):
        return
    check_safetensors("policy", policy)
    if (Path(policy) / ADAPTER).is_file():
        check_policy(_base_of(policy), trust_remote_code)
        return
    try:
        with own_code_is_refused(f"policy {policy!r}", OWN_CODE):
            AutoConfig.from_pretrained(policy, trust_remote_code=trust_remote_code)
            check_weights("policy", policy, AutoModelForCausalLM, trust_remote_code=trust_remote_code)
    except OSError as error:
        raise ValueError(
            f"policy {policy!r} is neither a file of completions, nor a folder with a config.json or {ADAPTER}, nor "
            f"a model that can be had from the Hugging Face hub. Check the path. ({error})"
        ) from error


def _base_of(adapter: str) -> str:
    return str(json.loads((Path(adapter) / ADAPTER).read_text())["base_model_name_or_path"])


def load_completions(path: str) -> list[dict[str, Any]]:
    """
    Read a file of completions.

    Args:
        path (`str`):
            Parquet, JSON lines or CSV with a column `"prompt"`, and `"completions"` (a list) or `"completion"` (one).
            Rows of the same prompt are put together. Files of rollouts and evaluations are such files.

    Returns:
        `list[dict]`: a row for each prompt, with `"completions"`.

    Raises:
        `ValueError`: if it cannot be read, lacks a column, or has more completions of one prompt than of another.
    """
    kind = {".jsonl": "json", ".json": "json", ".csv": "csv"}.get(Path(path).suffix, "parquet")
    try:
        rows: Any = datasets.load_dataset(kind, data_files=path, split="train")
    except (OSError, ValueError, DatasetGenerationError) as error:
        raise ValueError(
            f"{path!r} cannot be read as {kind}: {error}. Completions come as .parquet, .jsonl or .csv."
        ) from error
    columns = rows.column_names
    if "prompt" not in columns or not {"completions", "completion"} & set(columns):
        raise ValueError(f"{path!r} needs columns 'prompt' and 'completions' (or 'completion'), got {columns}.")
    groups: dict[str, dict[str, Any]] = {}
    for row in rows:
        missing = {name for name in ("completions", "completion", "scores", "lengths") if row.get(name) is None}
        row = {name: value for name, value in row.items() if name not in {"answers", *missing}}
        if not isinstance(row.get("scores", {}), dict):  # of nobody by name
            del row["scores"]
        completions = row.pop("completions", None) or [row.pop("completion", None)]
        if row.get("prompt") is None or None in completions:
            raise ValueError(f"{path!r} has a row without a prompt or without a completion: {row}. Leave it out.")
        group = groups.setdefault(key_of(row["prompt"]), {**row, "completions": []})
        group["completions"] += completions
        for name in {"scores", "lengths"} & group.keys():  # of one row, or no longer those of all completions
            if len(group["completions"]) > len(completions):
                del group[name]
    sizes = {len(group["completions"]) for group in groups.values()}
    if len(sizes) > 1:
        raise ValueError(f"{path!r} has {sorted(sizes)} completions per prompt: give as many for each of the prompts.")
    return list(groups.values())


def sample(policy: str, prompts: Dataset, sampling: Sampling) -> list[dict[str, Any]]:
    """
    Sample a policy's completions.

    Args:
        policy (`str`):
            Model or adapter.
        prompts ([`~datasets.Dataset`]):
            P rows with a column `"prompt"`, text or messages.
        sampling ([`Sampling`]):
            How.

    Returns:
        `list[dict]`: P rows, with S `"completions"` and their `"lengths"` in tokens.
    """
    base = _base_of(policy) if (Path(policy) / ADAPTER).is_file() else policy
    with own_code_is_refused(f"policy {policy!r}", OWN_CODE):
        # An adapter is saved with the tokenizer of its training
        has_tokenizer = (Path(policy) / "tokenizer_config.json").is_file()
        tokenizer: Any = AutoTokenizer.from_pretrained(
            policy if has_tokenizer else base, trust_remote_code=sampling.trust_remote_code
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    prompt_ids = [tokenize_prompt(tokenizer, prompt) for prompt in prompts["prompt"]]
    if sampling.use_vllm:
        ids = _sample_with_vllm(policy, base, prompt_ids, sampling)
    else:
        model: Any = AutoModelForCausalLM.from_pretrained(
            policy, dtype="auto", trust_remote_code=sampling.trust_remote_code, use_safetensors=True
        )
        model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        ids = sample_ids(model, tokenizer, prompt_ids, sampling, description=policy)
        del model
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    flat = tokenizer.batch_decode([each for group in ids for each in group], skip_special_tokens=True)
    size = sampling.num_generations
    return [
        {
            **row,
            "completions": [_as_completion(row["prompt"], text) for text in flat[p * size : (p + 1) * size]],
            "lengths": [len(each) for each in ids[p]],
        }
        for p, row in enumerate(prompts.to_list())
    ]


def tokenize_prompt(tokenizer: Any, prompt: Any) -> list[int]:
    """What the policy reads, as in TRL. Raises `ValueError` if it would need a chat template and has none."""
    if not is_conversational({"prompt": prompt}):
        return list(tokenizer(prompt)["input_ids"])
    if tokenizer.chat_template is None:
        raise ValueError(
            f"the prompts are conversational, but the tokenizer {tokenizer.name_or_path!r} has no chat template. Save "
            "one beside the policy, or give prompts as texts."
        )
    messages = [without_nulls(message) for message in prompt]
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"])


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
    """
    Sample with transformers, with a progress bar.

    Args:
        model, tokenizer:
            The policy.
        prompt_ids (sequence of `list[int]`):
            Tokens of P prompts.
        sampling ([`Sampling`]):
            How.
        description (`str`, *optional*):
            Text of the progress bar.

    Returns:
        P lists of S completions: their tokens, up to the first EOS token and with it.
    """
    torch.manual_seed(sampling.seed)
    repeated = [ids for ids in prompt_ids for _ in range(sampling.num_generations)]
    # What the checkpoint recommends (a repetition penalty, say) would sample from another policy than the one trained
    model.generation_config = GenerationConfig(  # type: ignore[assignment]
        eos_token_id=model.generation_config.eos_token_id,  # type: ignore[union-attr]
        bos_token_id=model.generation_config.bos_token_id,  # type: ignore[union-attr]
    )
    ends = set(torch.tensor(model.generation_config.eos_token_id or tokenizer.eos_token_id).view(-1).tolist())  # type: ignore[union-attr]
    completions: list[list[int]] = []
    for start in tqdm(range(0, len(repeated), sampling.batch_size), desc=description):
        batch = {"input_ids": repeated[start : start + sampling.batch_size]}
        inputs = tokenizer.pad(batch, padding_side="left", return_tensors="pt").to(model.device)
        output = model.generate(  # type: ignore[operator]
            **inputs,
            max_new_tokens=sampling.max_completion_length,
            do_sample=True,
            temperature=sampling.temperature,
            top_k=0,
            top_p=1.0,
            pad_token_id=tokenizer.pad_token_id,
        )
        for row in output[:, inputs["input_ids"].size(1) :].tolist():
            end = next((i for i, token in enumerate(row) if token in ends), len(row) - 1)
            completions.append(row[: end + 1])
    size = sampling.num_generations
    return [completions[i : i + size] for i in range(0, len(completions), size)]


def _sample_with_vllm(
    policy: str, base: str, prompt_ids: Sequence[list[int]], sampling: Sampling
) -> list[list[list[int]]]:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    adapter = {}
    if policy != base:
        rank = json.loads((Path(policy) / ADAPTER).read_text())["r"]
        adapter = {"enable_lora": True, "max_lora_rank": next(size for size in VLLM_RANKS if size >= rank)}
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
        ),  # no seed here: all prompts would have the same random numbers
        lora_request=LoRARequest("policy", 1, policy) if adapter else None,
    )
    return [[list(each.token_ids) for each in output.outputs] for output in outputs]
