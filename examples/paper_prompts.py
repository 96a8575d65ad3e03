"""The paper's prompts, for the recipes `*/paper.yaml`: UltraFeedback in three parts, one for each iteration.

    python examples/paper_prompts.py [--output_dir paper_prompts]

The parts are those of snorkelai/Snorkel-Mistral-PairRM-DPO-Dataset, on which the paper's experiments were made
(Section 5). Of each part as many prompts are taken as make whole optimizer steps of 64, and the parts are written one
after the other: with `shuffle_dataset: false` an iteration trains on its own part. Needs the Hugging Face hub; 460 MB.
"""

import argparse
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets, load_dataset


PARTS = [f"train_iteration_{i}" for i in (1, 2, 3)]
PROMPTS = 308 * 64  # of each part; the smallest has 19.8 thousand


def first_user_turn(row: dict[str, Any]) -> dict[str, Any]:
    """The prompt as a message, without the tags of a chat template that some copies of the dataset carry."""
    text = row["prompt"].removeprefix("<s>").strip().removeprefix("[INST]").removesuffix("[/INST]").strip()
    return {"prompt": [{"role": "user", "content": text}]}


def prepare(parts: list[Dataset]) -> Dataset:
    """Prompts of all parts, in their order. Raises `ValueError` if a part has too few."""
    chosen = []
    for name, part in zip(PARTS, parts, strict=True):
        if len(part) < PROMPTS:
            raise ValueError(f"{name} has {len(part)} prompts, fewer than the {PROMPTS} of an iteration.")
        chosen.append(part.select(range(PROMPTS)).map(first_user_turn, remove_columns=part.column_names))
    return concatenate_datasets(chosen)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("paper_prompts"))
    args = parser.parse_args()
    parts: Any = load_dataset("snorkelai/Snorkel-Mistral-PairRM-DPO-Dataset", split=PARTS)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    prepare(parts).to_parquet(args.output_dir / "train.parquet")
    print(f"Wrote {len(PARTS)} x {PROMPTS} prompts to {args.output_dir}.")


if __name__ == "__main__":
    main()
