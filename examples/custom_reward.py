"""A reward function of your own: answers shall use the words that the prompt's row asks for, and be short.

    python examples/custom_reward.py

Needs a GPU with 16 GB. A reward function gets all completions and the dataset's other columns by name.
It returns a number for each, or None where it cannot say: what is unscorable takes part in no comparison.
"""

from datasets import Dataset
from peft import LoraConfig

from trl_sppo import SPPOConfig, SPPOTrainer


TOPICS = {"the sea": ["salt", "wave"], "a forest": ["moss", "leaf"], "a city": ["street", "light"]}


def uses_the_words(completions, words, **kwargs):
    """Share of the wanted words that an answer uses, less a little for its length."""
    texts = [completion[0]["content"].lower() for completion in completions]
    return [
        sum(word in text for word in wanted) / len(wanted) - len(text) / 10_000
        for text, wanted in zip(texts, words, strict=True)
    ]


def prompts(repeats: int = 16) -> Dataset:
    rows = [
        {"prompt": [{"role": "user", "content": f"Write two sentences about {topic}."}], "words": words}
        for topic, words in TOPICS.items()
    ]
    return Dataset.from_list(rows * repeats)


def main(model: str = "Qwen/Qwen2.5-0.5B-Instruct", **options) -> SPPOTrainer:
    args = SPPOConfig(
        **{
            "output_dir": "custom-reward",
            "per_device_train_batch_size": 8,
            "steps_per_generation": 8,  # an iteration: 8 prompts x 8 answers ...
            "gradient_accumulation_steps": 4,  # ... for two optimizer steps
            "max_completion_length": 64,
            "learning_rate": 2e-5,
            "max_steps": 20,
            **options,
        }
    )
    trainer = SPPOTrainer(
        model=model,
        reward_funcs=uses_the_words,
        args=args,
        train_dataset=prompts(),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    main()
