"""What the README says to type works: its Python runs, on tiny models, and its commands name files that are there."""

import re
from pathlib import Path

from datasets import Dataset
from helpers import encoder, make_tokenizer


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_python_example_trains(tiny_policy, tmp_path, monkeypatch):
    (code,) = blocks("python")
    encoder().save_pretrained(tmp_path / "reward")
    make_tokenizer().save_pretrained(tmp_path / "reward")
    prompts = Dataset.from_dict({"prompt": [[{"role": "user", "content": text}] for text in ["ab", "cde"] * 4]})
    monkeypatch.setattr("datasets.load_dataset", lambda name, split: prompts)
    replaced = {
        "Qwen/Qwen2.5-0.5B-Instruct": tiny_policy,
        "Skywork/Skywork-Reward-V2-Qwen3-0.6B": str(tmp_path / "reward"),
        'output_dir="Qwen2.5-0.5B-SPPO",': f'output_dir="{tmp_path}/out", use_cpu=True, bf16=False, max_steps=2, '
        'max_completion_length=4, report_to="none", gradient_checkpointing=False, save_strategy="no",',
    }
    for old, new in replaced.items():
        assert code.count(old) == 1, old
        code = code.replace(old, new)
    names: dict = {}
    exec(code, names)
    trainer = names["trainer"]
    assert trainer.state.global_step == 2 and trainer.args.generation_batch_size == 64


def test_the_commands_name_recipes_that_are_there():
    named = re.findall(r"recipes/\S+\.yaml", "\n".join(blocks("bash")))
    assert len(named) >= 2 and all((ROOT / name).is_file() for name in named)
    for link in re.findall(r"\]\(((?:docs|recipes)/[^)#]+)\)", README):
        assert (ROOT / link).is_file(), link
