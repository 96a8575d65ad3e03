"""Hold a large iteration's rollouts, and print what they take: the paper's is 20,000 prompts with 5 completions each.

    python benchmarks/rollout_memory.py                    # about half an hour on two cores; --prompts 1000 is quick

A tiny policy and made-up completions: the memory of a rollout does not depend on the policy. docs/memory.md has the
formula that this run is compared with.
"""

import argparse
import resource
import tempfile

import psutil
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, TrainerCallback

from trl_sppo import SPPOConfig, SPPOTrainer


GIB = 2**30


def resident() -> float:
    return psutil.Process().memory_info().rss / GIB


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=20_000)
    parser.add_argument("--num_generations", type=int, default=5)
    parser.add_argument("--prompt_tokens", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--micro_batch", type=int, default=50)
    args = parser.parse_args()

    words = {f"w{i}": i for i in range(1000)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", eos_token="w1", unk_token="w2")
    config = Qwen2Config(
        vocab_size=1000, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip

    def rollout(prompts, trainer):
        completion_ids = torch.randint(3, 1000, (len(prompts), args.tokens)).tolist()
        return {"prompt_ids": fast(prompts)["input_ids"], "completion_ids": completion_ids, "logprobs": None}

    class Report(TrainerCallback):
        def on_step_end(self, *unused, **kwargs):
            print(f"after the rollout and an optimizer step: {resident():.2f} GiB resident")

    num_rows = args.prompts * args.num_generations
    with tempfile.TemporaryDirectory() as folder:
        trainer = SPPOTrainer(
            Qwen2ForCausalLM(config),
            lambda completion_ids, **kwargs: [float(sum(ids)) for ids in completion_ids],
            SPPOConfig(
                folder,
                num_generations=args.num_generations,
                per_device_train_batch_size=args.micro_batch,
                steps_per_generation=num_rows // args.micro_batch,
                gradient_accumulation_steps=2,
                max_completion_length=args.tokens,
                max_steps=1,
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                report_to="none",
                save_strategy="no",
            ),
            Dataset.from_dict({"prompt": [" ".join(["w5"] * args.prompt_tokens)] * args.prompts}),
            processing_class=fast,
            rollout_func=rollout,
            callbacks=[Report()],
        )
        before = resident()
        print(f"{num_rows} rollouts of {args.tokens} tokens; {before:.2f} GiB resident before")
        trainer.train()

    slices = trainer._buffered_inputs
    assert slices is not None
    tensors = {name: value for name, value in slices[0].items() if isinstance(value, torch.Tensor) and value.ndim}
    for name, value in tensors.items():
        size = sum(piece[name].nbytes for piece in slices) / GIB
        print(f"  {name}: {value.dtype}, {tuple(value.shape[1:])} per row, {size:.3f} GiB")
    total = sum(piece[name].nbytes for piece in slices for name in tensors)
    # docs/memory.md: two int64 per token of prompt and completion, one float32 per token of the completion
    formula = num_rows * (16 * (args.prompt_tokens + args.tokens) + 4 * args.tokens + 9)
    print(f"rollouts: {total / GIB:.3f} GiB; by the formula of docs/memory.md: {formula / GIB:.3f} GiB")
    print(f"peak: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB resident")


if __name__ == "__main__":
    main()
