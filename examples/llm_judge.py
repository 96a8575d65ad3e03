"""A language model judges pairs of answers, behind an OpenAI-compatible endpoint.

    vllm serve Qwen/Qwen2.5-7B-Instruct --port 8000      # on one GPU
    python examples/llm_judge.py                         # on another

Needs `pip install trl-sppo[judges]`. Each pair is asked about in both orders: the metric
`preferences/Qwen2.5-7B-Instruct/order_disagreement` says how far the judge goes by place. With groups of 4 a prompt
costs 12 questions of one token each.
"""

from datasets import load_dataset
from peft import LoraConfig

from trl_sppo import SPPOConfig, SPPOTrainer
from trl_sppo.judges import LLMJudge


def main(
    model: str = "Qwen/Qwen2.5-0.5B-Instruct",
    judge: str = "Qwen/Qwen2.5-7B-Instruct",
    base_url: str = "http://localhost:8000/v1",
    dataset: str = "trl-lib/ultrafeedback-prompt",
    **options,
) -> SPPOTrainer:
    args = SPPOConfig(
        **{
            "output_dir": "llm-judge",
            "num_generations": 4,
            "per_device_train_batch_size": 8,
            "steps_per_generation": 4,
            "gradient_accumulation_steps": 2,
            "max_completion_length": 256,
            "learning_rate": 2e-5,
            "max_steps": 100,
            **options,
        }
    )
    trainer = SPPOTrainer(
        model=model,
        preference_func=LLMJudge(judge, base_url=base_url),
        args=args,
        train_dataset=load_dataset(dataset, split="train"),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    main()
