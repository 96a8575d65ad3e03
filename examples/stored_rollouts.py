"""Sample and score first, look at what came out, and train on it: on another machine, if you like.

    python examples/stored_rollouts.py

Needs a GPU with 16 GB. The files are Parquet: completions, scores, win rates, log-probabilities.
`trl-sppo rollout` and `trl-sppo train --rollouts` do the same from the command line (docs/reliability.md).
"""

from pathlib import Path

from datasets import load_dataset
from peft import LoraConfig

from trl_sppo import SPPOConfig, SPPOTrainer


OPTIONS = {
    "per_device_train_batch_size": 8,
    "steps_per_generation": 8,
    "gradient_accumulation_steps": 4,
    "max_completion_length": 256,
    "learning_rate": 2e-5,
    "max_steps": 8,
}


def main(
    model: str = "Qwen/Qwen2.5-0.5B-Instruct",
    reward_model: str = "Skywork/Skywork-Reward-V2-Qwen3-0.6B",
    dataset: str = "trl-lib/ultrafeedback-prompt",
    output_dir: str = "stored-rollouts",
    **options,
) -> SPPOTrainer:
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    sampled, trained = (str(Path(output_dir, name)) for name in ("sampled", "trained"))
    sampler = SPPOTrainer(
        model=model,
        reward_funcs=reward_model,
        args=SPPOConfig(sampled, **{**OPTIONS, **options}),
        train_dataset=load_dataset(dataset, split="train"),
        peft_config=lora,
    )
    folder = sampler.rollout()

    rows = load_dataset("parquet", data_files=f"{folder}/*.parquet", split="train")
    group = rows[0]
    print(f"{len(rows)} groups in {folder}, with {', '.join(rows.column_names)}")
    for completion, win_rate in zip(group["completions"], group["win_rates"], strict=True):
        print(f"{win_rate:.2f}  {completion[0]['content'][:70]!r}")

    trainer = SPPOTrainer(
        model=model, args=SPPOConfig(trained, rollouts=folder, **{**OPTIONS, **options}), peft_config=lora
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    main()
