"""The paper's prompts, for the recipes `*/paper.yaml`: UltraFeedback in three parts, one for each iteration.

    python examples/paper_prompts.py [--output_dir paper_prompts]

The parts are those of snorkelai/Snorkel-Mistral-PairRM-DPO-Dataset, on which the paper's experiments were made
(Section 5). Of each part as many prompts are taken as make 300 optimizer steps of 64, without those that are longer
than 3,500 bytes: no prompt has more tokens than bytes, so all fit into the recipes' 4,096 with their templates. The
split `train` has the parts one after the other: with `shuffle_dataset: false` an iteration trains on its own part.
Each part is also a split of its own, `iteration_1` to `iteration_3`. Needs the Hugging Face hub; 460 MB.
"""

import argparse
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets, load_dataset


PARTS = [f"train_iteration_{i}" for i in (1, 2, 3)]
PROMPTS = 300 * 64  # of each part; the smallest has 19.8 thousand
LONGEST = 3500  # bytes


def first_user_turn(row: dict[str, Any]) -> dict[str, Any]:
    """The prompt as a message, without the tags of a chat template that some copies of the dataset carry."""
    text = row["prompt"].removeprefix("<s>").strip().removeprefix("[INST]").removesuffix("[/INST]").strip()
    return {"prompt": [{"role": "user", "content": text}]}


def prepare(parts: list[Dataset]) -> dict[str, Dataset]:
    """Prompts by split. Raises `ValueError` if a part has too few."""
    splits = {}
    for i, (name, part) in enumerate(zip(PARTS, parts, strict=True), start=1):
        short = part.filter(lambda row: len(row["prompt"].encode()) <= LONGEST)
        if len(short) < PROMPTS:
            raise ValueError(
                f"{name} has {len(short)} prompts of at most {LONGEST} bytes, fewer than the {PROMPTS} of an "
                "iteration."
            )
        chosen = short.select(range(PROMPTS)).map(first_user_turn, remove_columns=part.column_names)
        splits[f"iteration_{i}"] = chosen
    return {"train": concatenate_datasets(list(splits.values())), **splits}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("paper_prompts"))
    args = parser.parse_args()
    parts: Any = load_dataset("snorkelai/Snorkel-Mistral-PairRM-DPO-Dataset", split=PARTS)
    (args.output_dir / "data").mkdir(parents=True, exist_ok=True)
    for split, prompts in prepare(parts).items():
        prompts.to_parquet(args.output_dir / "data" / f"{split}-00000-of-00001.parquet")
    print(f"Wrote {len(PARTS)} x {PROMPTS} prompts to {args.output_dir}.")


if __name__ == "__main__":
    main()
