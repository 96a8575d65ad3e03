"""Train the quickstart's policy with each form of the objective, and print its win rates: which default is best?

    trl-sppo quickstart                                    # once: prepares the models in ./quickstart
    python benchmarks/objectives.py --seeds 0 1 2

The quickstart's recipe, with completions of 20 tokens instead of 40 to make it cheaper. Win rates are on held-out
prompts against the initial policy. What is there already (in ./quickstart/objectives) is not run again.
"""

import argparse
import json
from pathlib import Path

import torch
from datasets import load_dataset

from trl_sppo import cli, train
from trl_sppo.evaluation import outcomes_of_scores, win_rate
from trl_sppo.quickstart.run import FOLDER, reward_model_judge, sample, vader_judge


SOFT = ["--comparison", "bradley_terry"]  # of hard comparisons best and worst always have win rates 1 and 0
ALL = ["--train_on", "all"]  # the recipe trains on the best and the worst
VARIANTS = {
    "b = ½ (default)": [],
    "b = log-mean-exp": ["--baseline", "log_mean_exp"],
    "trained on all, b = ½": ALL,
    "trained on all, b = log-mean-exp": [*ALL, "--baseline", "log_mean_exp"],
    "Bradley–Terry, sppo": SOFT,
    "Bradley–Terry, sppo_single": [*SOFT, "--loss_type", "sppo_single"],
    "η = 1000, b = ½": ["--eta", "1000"],
    "η = 1000, b = log-mean-exp": ["--eta", "1000", "--baseline", "log_mean_exp"],
}
OPTIONS = ["--max_completion_length", "20", "--disable_tqdm", "true", "--logging_strategy", "no"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--variants", type=int, nargs="+", default=range(len(VARIANTS)), help="Numbers of lines of the table, from 0."
    )
    args = parser.parse_args()
    variants = {name: options for i, (name, options) in enumerate(VARIANTS.items()) if i in args.variants}

    folder = FOLDER / "objectives"
    folder.mkdir(parents=True, exist_ok=True)
    prompts = load_dataset(str(FOLDER / "prompts"), split="test")["prompt"]
    judges = {"training reward model": reward_model_judge(), "VADER (not trained on)": vader_judge()}

    def scores(name: str, path: Path, training_args) -> dict[str, list[list[float]]]:
        """Of the policy's completions under each judge, kept in a file."""
        file = folder / f"{name}.json"
        if not file.is_file():
            completions = sample(name, path, prompts, training_args)
            values = {judge: [score(group) for group in completions] for judge, score in judges.items()}
            file.write_text(json.dumps(values))
        return json.loads(file.read_text())

    results: dict[str, list[dict]] = {name: [] for name in variants}
    for seed in args.seeds:
        for name, options in variants.items():
            run = f"{'_'.join(['seed', str(seed), *options]).replace('--', '')}"
            with cli.recipe("quickstart.yaml") as recipe:
                argv = ["--config", str(recipe), *OPTIONS, *options, "--seed", str(seed)]
                argv += ["--output_dir", str(folder / run)]
                training_args = train.parse_arguments(argv)[1]
                if not (folder / f"{run}.json").is_file():
                    train.main(argv)
            trained = scores(run, folder / run, training_args)
            initial = scores(f"initial_{seed}", FOLDER / "policy", training_args)
            rates = {
                j: win_rate(outcomes_of_scores(torch.tensor(trained[j]), torch.tensor(initial[j]))) for j in judges
            }
            results[name].append(rates)
            print(name, seed, {judge: str(rate) for judge, rate in rates.items()}, flush=True)

    print("| objective | " + " | ".join(f"{judge}: each seed | mean" for judge in judges) + " |")
    print("|---|" + "---|---|" * len(judges))
    for name, runs in results.items():
        cells = []
        for judge in judges:
            means = [rates[judge].mean for rates in runs]
            cells += [", ".join(f"{mean:.3f}" for mean in means), f"{sum(means) / len(means):.3f}"]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
