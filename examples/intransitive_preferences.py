"""Preferences that go in circles: rock beats scissors beats paper beats rock. No reward model can say that.

    python examples/intransitive_preferences.py

Needs a GPU with 16 GB. A pairwise oracle can: its answers are used as they are, and not squeezed into
scores. `preferences/intransitive` is the share of circles among three answers. Self-play does not settle on a
favourite: a policy that says one thing only is beaten by the next. (docs/method.md has games with known solutions.)
"""

import re

from datasets import Dataset
from peft import LoraConfig

from trl_sppo import SPPOConfig, SPPOTrainer


BEATS = {"rock": "scissors", "scissors": "paper", "paper": "rock"}


def hand(completion) -> str | None:
    """What an answer shows first."""
    found = re.search("|".join(BEATS), completion[0]["content"].lower())
    return found and found[0]


def rock_paper_scissors(prompts, first, second, **kwargs):
    """P(first beats second): 1, 0, or ½ for a draw. An answer that shows no hand loses to one that does."""
    preferences = []
    for a, b in zip(map(hand, first), map(hand, second), strict=True):
        if a == b:
            preferences.append(0.5)
        elif a is None or b is None:
            preferences.append(float(b is None))
        else:
            preferences.append(float(BEATS[a] == b))
    return preferences


def main(model: str = "Qwen/Qwen2.5-0.5B-Instruct", **options) -> SPPOTrainer:
    prompt = [{"role": "user", "content": "Rock, paper, scissors! Answer with one of the three words."}]
    args = SPPOConfig(
        **{
            "output_dir": "rock-paper-scissors",
            "temperature": 1.0,
            "eta": 1.0,
            "per_device_train_batch_size": 16,
            "steps_per_generation": 4,
            "gradient_accumulation_steps": 2,
            "max_completion_length": 8,
            "learning_rate": 2e-5,
            "max_steps": 60,
            "logging_steps": 2,
            **options,
        }
    )
    trainer = SPPOTrainer(
        model=model,
        preference_func=rock_paper_scissors,
        args=args,
        train_dataset=Dataset.from_list([{"prompt": prompt}] * 64),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    main()
