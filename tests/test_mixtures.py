"""A mixture of datasets in a recipe, end to end."""

import json
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset
from helpers import count_abc

from trl_sppo import train


SEEN: list[str] = []


def counted(prompts, completions, **kwargs) -> list[float]:
    """A reward function that keeps the prompts."""
    SEEN.extend(prompt[0]["content"] for prompt in prompts)
    return count_abc(completions)


def conversations(texts: list[str]) -> list[dict]:
    return [{"prompt": [{"role": "user", "content": text}]} for text in texts]


def test_a_mixture_trains_and_is_evaluated_on_its_test_split(tiny_policy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("letters.jsonl").write_text("\n".join(map(json.dumps, conversations(["ab", "cd", "ef", "gh", "ij"]))))
    more = {"train": ["kl", "mn", "op", "qr", "st"], "ignored": ["xy"]}
    DatasetDict({name: Dataset.from_list(conversations(texts)) for name, texts in more.items()}).save_to_disk("more")
    recipe = {
        "model_name_or_path": "policy", "reward_funcs": "test_mixtures.counted", "output_dir": "out",
        "datasets": [{"path": "letters.jsonl"}, {"path": "more", "split": "train"}], "test_split_size": 0.2,
        "num_generations": 4, "per_device_train_batch_size": 8, "per_device_eval_batch_size": 8,
        "max_completion_length": 4, "num_train_epochs": 1, "eval_strategy": "epoch", "use_cpu": True, "bf16": False,
        "report_to": "none", "save_strategy": "no", "gradient_checkpointing": False,
    }  # fmt: skip
    Path("recipe.yaml").write_text("\n".join(f"{name}: {json.dumps(value)}" for name, value in recipe.items()))
    SEEN.clear()
    trainer = train.main(["--config", "recipe.yaml"])

    def prompts_of(files: str) -> set[str]:
        return {row[0]["content"] for row in load_dataset("parquet", data_files=files, split="train")["prompt"]}

    first, second = {"ab", "cd", "ef", "gh", "ij"}, set(more["train"])
    trained, evaluated = prompts_of("out/rollouts/*.parquet"), prompts_of("out/evaluations/*.parquet")
    assert trainer.state.global_step == 4
    assert len(trained) == 8 and len(evaluated) == 2 and trained | evaluated == first | second == set(SEEN)
    assert trained & first and trained & second
    assert any("eval_win_rate_vs_initial/counted" in row for row in trainer.state.log_history)
