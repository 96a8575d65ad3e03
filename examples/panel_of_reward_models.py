"""Several reward models vote, and one without a vote watches for what only they like.

    python examples/panel_of_reward_models.py

Needs a GPU with 24 GB. Each reward model compares by itself, so their scales need not agree. Watch
`preferences/panel_disagreement`: if it rises during training, the policy has found what only one of them likes.
"""

from datasets import load_dataset
from peft import LoraConfig

from trl_sppo import SPPOConfig, SPPOTrainer


VOTERS = ["Skywork/Skywork-Reward-V2-Qwen3-0.6B", "Skywork/Skywork-Reward-V2-Llama-3.2-1B"]
WATCHER = "Skywork/Skywork-Reward-V2-Qwen3-1.7B"


def main(
    model: str = "Qwen/Qwen2.5-0.5B-Instruct",
    voters: list[str] = VOTERS,
    watcher: str = WATCHER,
    dataset: str = "trl-lib/ultrafeedback-prompt",
    **options,
) -> SPPOTrainer:
    args = SPPOConfig(
        **{
            "output_dir": "panel",
            "reward_weights": [*(1.0 for _ in voters), 0.0],
            "win_rate_threshold": 0.6,
            "per_device_train_batch_size": 8,
            "steps_per_generation": 8,
            "gradient_accumulation_steps": 4,
            "max_completion_length": 256,
            "learning_rate": 2e-5,
            "max_steps": 100,
            **options,
        }
    )
    trainer = SPPOTrainer(
        model=model,
        reward_funcs=[*voters, watcher],
        args=args,
        train_dataset=load_dataset(dataset, split="train"),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    main()
