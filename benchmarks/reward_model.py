"""Score real completions with a reward model: micro-batches of similar length against one padded forward, as in TRL.

    trl-sppo quickstart                                    # once: prepares the models in ./quickstart
    python benchmarks/reward_model.py                      # times of 64 completions, in turns; memory of up to 1,024

The completions are the quickstart policy's own answers to the questions below, of up to 448 tokens each (sampled once,
into ./quickstart/completions.json). For more than those they are repeated. Scores have to be equal.
"""

import argparse
import json
import multiprocessing
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from trl_sppo.oracles.reward_models import MicroBatchedRewardModel
from trl_sppo.quickstart.run import FOLDER


QUESTIONS = [
    "What is the capital of France? Answer with one word.", "How does a bicycle stay upright?",
    "Write a short poem about rain.", "Say hello.", "What is 2 + 2?", "Explain photosynthesis to a child.",
    "Name three colours.", "Write a story about a lost dog.", "Is the sun a star?", "How do I bake bread?",
    "Translate 'good morning' to Spanish.", "Give me a plan for learning to swim.", "What year is it?",
    "Write a letter of complaint about a late train.", "Why is the sky blue?", "Describe your favourite film.",
]  # fmt: skip


def sample(folder: Path) -> list[str]:
    """Four answers to each question, with the ends that the policy gives them."""
    path = folder / "completions.json"
    if not path.exists():
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_pretrained(folder / "policy")
        tokenizer = AutoTokenizer.from_pretrained(folder / "policy", padding_side="left")
        messages = [[{"role": "user", "content": question}] for question in QUESTIONS]
        inputs: Any = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
        )
        ids = model.generate(**inputs, do_sample=True, temperature=0.8, max_new_tokens=448, num_return_sequences=4)
        texts = tokenizer.batch_decode(ids[:, inputs["input_ids"].size(1) :], skip_special_tokens=True)
        path.write_text(json.dumps(texts, indent=0))
    return json.loads(path.read_text())


def load(folder: Path, completions: int) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    texts = sample(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder / "reward_model")
    texts = [texts[i % len(texts)] for i in range(completions)]
    inputs = tokenizer(texts, padding=True, padding_side="right", truncation=True, max_length=512, return_tensors="pt")
    return AutoModelForSequenceClassification.from_pretrained(folder / "reward_model").eval(), dict(inputs)


def score(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.inference_mode():  # as TRL does
        return model(**inputs).logits[:, 0]


def peak_memory(folder: Path, completions: int, batch_size: int | None, result) -> None:
    def peak() -> float:  # of this process alone; `resource` would count what its parent had before it
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**10

    model, inputs = load(folder, completions)
    before = peak()
    score(model if batch_size is None else MicroBatchedRewardModel(model, batch_size), inputs)
    result.put((before, peak()))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--batch_size", type=int, default=16, help="The option reward_batch_size.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", type=int, nargs="*", default=[64, 256, 1024], help="Numbers of completions.")
    parser.add_argument("--memory_of_one_forward", type=int, nargs="*", default=[64, 256])
    args = parser.parse_args()

    model, inputs = load(args.folder, 64)
    lengths = inputs["attention_mask"].sum(dim=1)
    quantiles = [int(lengths.float().quantile(q)) for q in (0, 0.25, 0.5, 0.75, 1)]
    padding = 1 - lengths.sum() / inputs["input_ids"].numel()
    print(f"64 completions, tokens (quartiles): {quantiles}; {padding:.0%} padding in one padded forward")
    ways = {"one padded forward": model, "micro-batches": MicroBatchedRewardModel(model, args.batch_size)}
    times: dict[str, list[float]] = {name: [] for name in ways}
    scores = {}
    for _ in range(args.rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            scores[name] = score(way, inputs)
            times[name].append(time.perf_counter() - start)
    difference = (scores["one padded forward"] - scores["micro-batches"]).abs().max()
    ratios = [a / b for a, b in zip(*times.values(), strict=True)][1:]  # the first round warms up
    for name, values in times.items():
        print(f"{name}: median {statistics.median(values[1:]):.2f} s")
    print(f"scores differ by at most {difference:.1e} (standard deviation {scores['micro-batches'].std():.2f})")
    print(
        f"one padded forward takes {statistics.median(ratios):.2f} times as long (of {len(ratios)} pairs, "
        f"{min(ratios):.2f} to {max(ratios):.2f})"
    )

    context = multiprocessing.get_context("spawn")  # a peak can only be reset with the process
    for name, batch_size, numbers in (
        ("micro-batches", args.batch_size, args.memory),
        ("one padded forward", None, args.memory_of_one_forward),
    ):
        for number in numbers:
            result = context.Queue()
            process = context.Process(target=peak_memory, args=(args.folder, number, batch_size, result))
            process.start()
            before, after = result.get()
            process.join()
            print(f"{name}, {number} completions: {after - before:.0f} MiB for scoring, peak {after:.0f} MiB")


if __name__ == "__main__":
    main()
