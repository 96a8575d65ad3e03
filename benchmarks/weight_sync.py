"""Weight syncs of a LoRA policy to vLLM, without a receiver: their time, and what they do to the frozen weights.

    python benchmarks/weight_sync.py                  # 1.5B parameters in bf16: five minutes, and 10 GB of memory
    python benchmarks/weight_sync.py --parts drift    # a small model, trained between 1,000 syncs
    python benchmarks/weight_sync.py --parts memory   # what the process grows by: three minutes
    python benchmarks/weight_sync.py --parts changed  # 1.5B parameters, received by a copy: a minute, and 10 GB

Compared, in turns: TRL's merge in place, the same with the base weights restored from a copy in CPU memory, which this
package did before, and this package's merge into copies. The last part leaves out the weights that do not change.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from gpu_tools import LORA
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from published_models import POLICIES
from transformers import AutoModelForCausalLM, Qwen2Config
from trl.generation.vllm_generation import VLLMGeneration

from trl_sppo.rollouts.weight_sync import prepare_weight_sync


SMALL = Qwen2Config(
    vocab_size=64, hidden_size=512, intermediate_size=1024, num_hidden_layers=1, num_attention_heads=8,
    num_key_value_heads=8,
)  # fmt: skip


def generation_of(config: Any, **options: Any) -> Any:
    """TRL's side of vLLM, with a policy of random weights in bf16 and an adapter that changes them."""
    generation: Any = object.__new__(VLLMGeneration)
    torch.manual_seed(0)
    policy = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    generation.model = get_peft_model(policy, LoraConfig(**{**LORA, **options}, init_lora_weights=False))
    for name, parameter in generation.model.named_parameters():
        if "lora_" in name:  # smaller than its initial values
            parameter.data *= 0.1
    generation.mode = "server"
    generation._dist = SimpleNamespace(is_fsdp=False, gather_params=lambda parameters: nullcontext())
    return generation


def in_place(generation: Any) -> None:
    for _ in VLLMGeneration._iter_named_params(generation):
        pass


@torch.no_grad()
def restored(generation: Any) -> None:
    layers = [module for module in generation.model.modules() if isinstance(module, BaseTunerLayer)]
    kept = [(p, p.detach().to("cpu", copy=True)) for layer in layers for p in layer.get_base_layer().parameters()]
    for _, tensor in VLLMGeneration._iter_named_params(generation):
        tensor.clone()
    for parameter, value in kept:
        parameter.copy_(value)


def into_copies(generation: Any) -> None:
    for _ in generation._iter_named_params():
        pass


WAYS: dict[str, Callable[[Any], None]] = {
    "TRL: in place": in_place,
    "in place, restored from a copy": restored,
    "this package: into copies": into_copies,
}


def cost(rounds: int) -> None:
    generation = generation_of(POLICIES["Qwen/Qwen2.5-1.5B-Instruct"])
    prepare_weight_sync(generation)
    measured: dict[str, list[float]] = {name: [] for name in WAYS}
    for number in range(rounds + 1):
        for name, sync in WAYS.items():
            start = time.perf_counter()
            sync(generation)
            if number:  # the first warms up
                measured[name].append(time.perf_counter() - start)
    of_all = measured["in place, restored from a copy"]
    print("| weight sync | seconds | relative to the restoring one |")
    print("|---|---|---|")
    for name, seconds in measured.items():
        ratios = [a / b for a, b in zip(seconds, of_all, strict=True)]
        spread = f"{statistics.mean(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"| {name} | {statistics.mean(seconds):.2f} | {spread} |")


def memory() -> None:
    """What the process grows by in two syncs, at most. Each way has its own, since freed memory is used again."""
    print("| weight sync | GB more memory |")
    print("|---|---|")
    for name in WAYS:
        done = subprocess.run([sys.executable, __file__, "--grow", name], capture_output=True, text=True, check=True)
        print(f"| {name} | {done.stdout.splitlines()[-1]} |", flush=True)


def grow(name: str) -> None:
    small = generation_of(SMALL)
    prepare_weight_sync(small)
    WAYS[name](small)  # the libraries' own memory is not that of a sync
    generation = generation_of(POLICIES["Qwen/Qwen2.5-1.5B-Instruct"])
    prepare_weight_sync(generation)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS")
    for _ in range(2):
        WAYS[name](generation)
    print(f"{resident('VmHWM') - before:.2f}")


def resident(which: str) -> float:
    """GB of this process in memory: `VmRSS` now, `VmHWM` at most."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(which))
    return int(line.split()[1]) * 1024 / 1e9


def changed(rounds: int) -> None:
    """What it would save to push only weights that have an adapter: bytes, and seconds with a copy for a receiver."""
    print("| adapter on | pushed | GB | seconds |")
    print("|---|---|---|---|")
    for targets in ("all-linear", ["q_proj", "v_proj"]):
        generation = generation_of(POLICIES["Qwen/Qwen2.5-1.5B-Instruct"], target_modules=targets)
        prepare_weight_sync(generation)
        received = {name: tensor.clone() for name, tensor in generation._iter_named_params()}
        frozen = {name: tensor.data_ptr() for name, tensor in generation.model.get_base_model().named_parameters()}
        measured: dict[bool, list[float]] = {False: [], True: []}
        sizes = {}
        for only_changed in [False, True] * rounds:
            start, size = time.perf_counter(), 0
            for name, tensor in generation._iter_named_params():
                if not only_changed or tensor.data_ptr() != frozen.get(name):
                    received[name].copy_(tensor)
                    size += tensor.nbytes
            measured[only_changed].append(time.perf_counter() - start)
            sizes[only_changed] = size / 1e9
        where = targets if isinstance(targets, str) else " and ".join(targets)
        for only_changed, what in ((False, "everything"), (True, "what has an adapter")):
            print(
                f"| {where} | {what} | {sizes[only_changed]:.2f} | {statistics.median(measured[only_changed]):.2f} |"
            )


def drift(syncs: int) -> None:
    print("| weight sync | syncs | weights moved | by, of their norm | by, of the adapter's update |")
    print("|---|---|---|---|---|")
    for name in ("TRL: in place", "this package: into copies"):
        generation = generation_of(SMALL)
        prepare_weight_sync(generation)
        layer = generation.model.base_model.model.model.layers[0].self_attn.q_proj
        weight = layer.base_layer.weight
        before, update = weight.detach().float(), layer.get_delta_weight("default").detach().float().norm()
        trained = [p for name, p in generation.model.named_parameters() if "lora_B" in name]
        for number in range(1, syncs + 1):
            for parameter in trained:  # an optimizer step, of a hundredth
                parameter.data += 0.01 * parameter.std() * torch.randn_like(parameter)
            WAYS[name](generation)
            if number in (1, 10, 100, syncs):
                moved = weight.detach().float() - before
                share, size = (moved != 0).float().mean(), moved.norm()
                print(f"| {name} | {number:,} | {share:.3f} | {size / before.norm():.1e} | {size / update:.1e} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parts", nargs="+", choices=["cost", "memory", "drift", "changed"], default=["cost", "drift"]
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--syncs", type=int, default=1000)
    parser.add_argument("--grow", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.grow:
        grow(args.grow)
        return
    if "cost" in args.parts:
        cost(args.rounds)
    if "memory" in args.parts:
        memory()
    if "changed" in args.parts:
        changed(args.rounds)
    if "drift" in args.parts:
        drift(args.syncs)


if __name__ == "__main__":
    main()
