"""Run by test_distributed.py in one process or more: small trainings, whose logs and weights go to a folder."""

import os
import sys
from pathlib import Path

from helpers import COMPLETIONS, TINY, alphabet_score, make_tokenizer


if FSDP := os.environ.get("ACCELERATE_USE_FSDP") == "true":
    # PyTorch shards on the CPU too, but accelerate only where it has found GPUs: tell it that these are some
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)

import torch
import transformers
from accelerate.utils import gather_object
from datasets import Dataset
from packaging.version import Version
from peft import LoraConfig
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import Qwen2Config, Qwen2ForCausalLM
from trl.distributed import DistributedBackend
from trl.generation.vllm_generation import VLLMGeneration

from trl_sppo import SPPOConfig, SPPOTrainer
from trl_sppo.rollouts.weight_sync import prepare_weight_sync


WORLD, RANK = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
PROMPTS = list(COMPLETIONS)[:3]  # 12 completions: of two processes, each has one and a half groups
MODEL = {**TINY, "intermediate_size": 6400}  # DeepSpeed shards no matrix of less than 100,000 entries


def rollout(prompts, trainer):
    """The k-th copy of a prompt, over all processes, gets the k-th completion of the table."""
    first = RANK * len(prompts)
    completion_ids = [COMPLETIONS[prompt][(first + i) % 4] for i, prompt in enumerate(prompts)]
    prompt_ids = [trainer.processing_class(prompt)["input_ids"] for prompt in prompts]
    return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": None}


def score(prompts, completion_ids, **kwargs):
    """The last prompt's completions tie, so that in two processes the second has little to train on."""
    scores = alphabet_score(completion_ids)
    return [0.0 if prompt == PROMPTS[2] else s for prompt, s in zip(prompts, scores, strict=True)]


def score_of_first_half(prompts, completion_ids, **kwargs):
    """Only the first six completions can be scored, so that in two processes the second has nothing to train on."""
    scores = alphabet_score(completion_ids)
    half = [*COMPLETIONS[PROMPTS[0]], *COMPLETIONS[PROMPTS[1]][:2]]
    return [s if ids in half else None for ids, s in zip(completion_ids, scores, strict=True)]


def oracle(prompts, first, second, marker, log_metric, **kwargs):
    """Intransitive, biased towards the first place, at times silent; the columns must be those of the prompts."""
    assert [PROMPTS[m] for m in marker] == prompts
    log_metric("asked", len(first))
    oracle.usage["requests"] += len(first)  # as a judge behind an endpoint counts
    oracle.usage["input_tokens"] += sum(map(len, first))
    return [
        None if len(a) == 3 and len(b) == 2 else 0.2 + 0.8 * ((ord(a[0]) - ord(b[0])) % 7) / 7
        for a, b in zip(first, second, strict=True)
    ]


oracle.usage = {"requests": 0, "input_tokens": 0, "output_tokens": 0}


def lora() -> LoraConfig:
    return LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)


def arguments(case: str, folder: Path) -> tuple[dict, dict]:
    """Of a case: options, and arguments of the trainer."""
    # Two processes take smaller micro-batches than one, which must not matter
    micro_batches = {"best_and_worst": 3, "everything": 2}.get(case, 1) if WORLD > 1 else 1
    options = {"gradient_accumulation_steps": micro_batches, "max_steps": 2}
    kwargs = {"reward_funcs": score, "rollout_func": rollout}
    if case == "best_and_worst":
        options |= {"train_on": "best_and_worst"}
    elif case == "everything":
        # LoRA, a pairwise oracle beside the scores, soft comparisons, the group's log Z and the KL term
        options |= {
            "beta": 1.0, "forward_kl_share": 0.5, "baseline": "log_mean_exp", "comparison": "bradley_terry",
        }  # fmt: skip
        kwargs |= {"peft_config": lora(), "preference_func": oracle}
    elif case in ("pairs", "moves"):
        # INPO on whole groups, with LoRA. In "moves" the reference becomes the policy after the second step
        options |= {"loss_type": "inpo", "beta": 0.05, "max_steps": 4, "per_device_train_batch_size": 8 // WORLD}
        if case == "moves":
            options |= {"sync_ref_model": True, "ref_model_mixup_alpha": 1.0, "ref_model_sync_steps": 2}
        kwargs |= {"reward_funcs": alphabet_score, "peft_config": lora()}
    elif case == "nothing":
        # Three optimizer steps, of two micro-batches each, twice over the generation batch
        options |= {"steps_per_generation": 6, "gradient_accumulation_steps": 2, "max_steps": 6}
        options |= {"shuffle_dataset": False}
        kwargs |= {"reward_funcs": score_of_first_half}
    elif case.startswith("sampled"):
        # The policy's own completions, a reward model, the best and worst of several iterations, evaluation, KL term
        options |= {"steps_per_generation": 2, "max_steps": 6, "train_on": "best_and_worst", "reward_batch_size": 4}
        options |= {"eval_strategy": "steps", "eval_steps": 3, "max_completion_length": 8}
        if Version(transformers.__version__) >= Version("5.23"):  # before, FSDP could not load the initial policy
            options |= {"beta": 0.1}
        kwargs |= {"reward_funcs": str(folder / "reward_model"), "rollout_func": None}
        if case == "sampled_lora":
            kwargs |= {"peft_config": lora()}
    return options, kwargs


def sent_to_vllm(trainer: SPPOTrainer) -> dict[str, torch.Tensor]:
    """What this process would send in a weight sync, without a vLLM that receives it."""
    generation = object.__new__(VLLMGeneration)
    generation.model, generation.accelerator, generation.mode = trainer.model, trainer.accelerator, "server"
    generation._dist = DistributedBackend(trainer.accelerator)
    prepare_weight_sync(generation)
    return {name: tensor.detach().clone() for name, tensor in generation._iter_named_params()}


def run(case: str, folder: Path) -> SPPOTrainer:
    torch.manual_seed(0)
    options, kwargs = arguments(case, folder)
    slices = options.get("steps_per_generation", options["gradient_accumulation_steps"])
    args = SPPOConfig(**{
        "output_dir": str(folder / case), "use_cpu": not FSDP, "bf16": False, "report_to": "none",
        "save_strategy": "no", "num_generations": 4, "per_device_train_batch_size": 12 // WORLD // slices,
        "per_device_eval_batch_size": 6, "num_iterations": 2, "optim": "sgd", "learning_rate": 1e-3,
        "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "logging_steps": 1, "gradient_checkpointing": False,
        "disable_tqdm": True, "temperature": 1.0, "ddp_timeout": 600, "preference_batch_size": 5, **options,
    })  # fmt: skip
    prompts = PROMPTS[:2] if case in ("pairs", "moves") else PROMPTS
    dataset = Dataset.from_dict({"prompt": prompts, "marker": list(range(len(prompts)))})
    trainer = SPPOTrainer(
        str(folder / "policy") if case == "sampled" else Qwen2ForCausalLM(Qwen2Config(**MODEL)),
        args=args,
        train_dataset=dataset,
        # Uneven: the processes see two prompts again to fill the last batch
        eval_dataset=Dataset.from_dict({"prompt": [*PROMPTS, "a", "b"]}) if case.startswith("sampled") else None,
        processing_class=make_tokenizer(),
        **kwargs,
    )
    assert trainer.accelerator.num_processes == WORLD
    if WORLD > 1:
        group = torch.distributed.distributed_c10d._get_default_group()
        assert group._get_backend(torch.device("cpu")).options._timeout.total_seconds() == 600
    kept = []  # rows with a target, of each micro-batch of this process
    compute_loss = trainer._compute_loss

    def counting(model, inputs):
        kept.append(int(inputs["kept"].sum()))
        return compute_loss(model, inputs)

    trainer._compute_loss = counting
    trainer.train()
    trainer.save_model()
    if "peft_config" in arguments(case, folder)[1]:
        sync = [sent_to_vllm(trainer) for _ in range(2)][1]
        torch.save(sync, folder / f"{case}.sent-{RANK}.pt")

    # Between steps, FSDP has a shard of each parameter, and ZeRO-3 an empty tensor in the place of what is sharded
    held = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in trainer.model.parameters())
    kept = gather_object([kept])
    if RANK == 0:
        log = trainer.state.log_history
        # "asked" and step_time depend on the processes
        prefixes = "loss", "win_rate/", "preferences/", "completions/", "log_ratio", "kl_", "entropy", "eval_"
        logged = {
            name: torch.tensor([row[name] for row in log if name in row and row[name] is not None])
            for name in sorted({name for row in log for name in row})
            if name.startswith(prefixes) and not name.endswith(("time", "runtime", "per_second"))
        }
        (weights,) = (folder / case).glob("*.safetensors")
        torch.save({**logged, **load_file(weights)}, folder / f"{case}.pt")
        torch.save({"kept": torch.tensor(kept), "held": held}, folder / f"{case}.counts.pt")
    return trainer


if __name__ == "__main__":
    for case in sys.argv[2:]:
        trainer = run(case, Path(sys.argv[1]))
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
