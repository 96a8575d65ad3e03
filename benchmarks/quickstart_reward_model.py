"""Train the quickstart's reward model: a LoRA adapter that turns all-MiniLM-L6-v2 into a sentiment reward model.

    python benchmarks/quickstart_reward_model.py [--output_dir trl_sppo/quickstart/reward_model]

The labels are human ratings: 10,605 movie-review snippets, each rated by about 20 people from -4 to 4 (Hutto &
Gilbert, ICWSM 2014). They are third-party text, so they are fetched with pip at run time and are not kept in this
repository; only the trained adapter is. The last lines printed are the held-out figures: Pearson correlation with
the human mean, and pair accuracy (how often the reward model orders two snippets as people do, over all held-out pairs
whose human means differ by more than 0.5). Takes about 20 minutes on one CPU core; needs the `quickstart` extra.
"""

import argparse
import ast
import io
import json
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_linear_schedule_with_warmup

from trl_sppo.quickstart import assets


MEMBERS = "hutto_ICWSM_2014/movieReviewSnippets_{}.txt"
PAIR_MARGIN = 0.5  # pairs that people rate closer than this have no reliable order


def read_ratings(num_raters: int | None = None) -> tuple[list[str], torch.Tensor]:
    """Fetch the rated movie snippets: texts without duplicates, and their mean human ratings in [-4, 4].

    With `num_raters` a mean over only so many of the people who rated a text, the first in its list.
    """
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            f"{sys.executable} -m pip download -q --no-deps --no-binary :all: vaderSentiment==0.5 -d {folder}".split(),
            check=True,
        )
        archive = zipfile.ZipFile(next(Path(folder).glob("*.zip")))
        inner = next(name for name in archive.namelist() if name.endswith("hutto_ICWSM_2014.tar.gz"))
        with tarfile.open(fileobj=io.BytesIO(archive.read(inner))) as tar:
            lines, single = (_lines(tar, MEMBERS.format(name)) for name in ("GroundTruth", "anonDataRatings"))
    means = {number: float(mean) for number, mean, _ in (line.split("\t", 2) for line in lines)}
    if num_raters is not None:
        for number, _, _, ratings in (line.split("\t") for line in single):
            chosen = ast.literal_eval(ratings)[:num_raters]
            means[number] = sum(chosen) / len(chosen)
    rated = {text: means[number] for number, _, text in (line.split("\t", 2) for line in lines)}
    return list(rated), torch.tensor(list(rated.values()))


def _lines(tar: tarfile.TarFile, name: str) -> list[str]:
    member = tar.extractfile(name)
    assert member is not None, name
    return member.read().decode("latin-1").splitlines()


def pair_accuracy(scores: torch.Tensor, ratings: torch.Tensor) -> float:
    """Share of pairs that `scores` (N,) order as `ratings` (N,) do, among pairs rated further apart than a margin."""
    clear = ratings[:, None] - ratings[None, :] > PAIR_MARGIN
    return (scores[:, None] > scores[None, :])[clear].float().mean().item()


@torch.no_grad()
def score(model, tokenizer, texts: list[str]) -> torch.Tensor:
    model.eval()
    chunks = [texts[i : i + 128] for i in range(0, len(texts), 128)]
    return torch.cat([model(**encode(tokenizer, chunk)).logits[:, 0] for chunk in chunks])


def encode(tokenizer, texts: list[str]):
    return tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt")


def fit(texts: list[str], ratings: torch.Tensor, epochs: int, learning_rate: float):
    """Train a LoRA adapter on all-MiniLM-L6-v2 to say the ratings; returns the model and its tokenizer."""
    encoder = assets.models() / assets.ENCODER
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    model = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=1, use_safetensors=True)
    lora = LoraConfig(
        task_type="SEQ_CLS", r=8, lora_alpha=16, lora_dropout=0.05, target_modules=["query", "key", "value", "dense"]
    )
    model = get_peft_model(model, lora)
    model.print_trainable_parameters()

    batch_size = 32
    steps = epochs * (len(texts) // batch_size)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    scheduler = get_linear_schedule_with_warmup(optimizer, steps // 20, steps)
    step = 0
    for epoch in range(epochs):
        model.train()
        shuffled = torch.randperm(len(texts)).tolist()
        for start in range(0, len(shuffled) - batch_size + 1, batch_size):
            rows = shuffled[start : start + batch_size]
            predicted = model(**encode(tokenizer, [texts[i] for i in rows])).logits[:, 0]
            loss = torch.nn.functional.mse_loss(predicted, ratings[rows])
            loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            step += 1
            if step % 50 == 0:
                print(f"epoch {epoch + 1}  step {step}/{steps}  mean squared error {loss.item():.3f}", flush=True)
    return model, tokenizer


def held_out_figures(model, tokenizer, texts: list[str], ratings: torch.Tensor) -> dict[str, float]:
    scores = score(model, tokenizer, texts)
    return {
        "pearson": round(torch.corrcoef(torch.stack([scores, ratings]))[0, 1].item(), 3),
        "pair_accuracy": round(pair_accuracy(scores, ratings), 3),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("trl_sppo/quickstart/reward_model"))
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--num_train", type=int, default=8000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    texts, ratings = read_ratings()
    order = torch.randperm(len(texts))
    train, held_out = order[: args.num_train].tolist(), order[args.num_train :].tolist()

    model, tokenizer = fit([texts[i] for i in train], ratings[train], args.epochs, args.learning_rate)
    figures = held_out_figures(model, tokenizer, [texts[i] for i in held_out], ratings[held_out])
    metrics = {"num_train": len(train), "num_held_out": len(held_out), **figures}
    model.peft_config["default"].base_model_name_or_path = "sentence-transformers/all-MiniLM-L6-v2"  # not a local path
    model.save_pretrained(args.output_dir)
    (args.output_dir / "README.md").unlink(missing_ok=True)  # a card with blanks: metrics.json says what this is
    (args.output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    print(json.dumps(metrics, indent=2))


if __name__ == "__main__":
    main()
