"""Train the quickstart's policy with each form of the objective, and print its win rates: which default is best?

    trl-sppo quickstart                                    # once: prepares the models in ./quickstart
    python benchmarks/objectives.py --seeds 0 1 2

The quickstart's recipe, with completions of 20 tokens instead of 40 to make it cheaper. Win rates are on held-out
prompts against the initial policy. What is there already (in ./quickstart/objectives) is not run again.
"""

import argparse

from trl_sppo import train
from trl_sppo.evaluation.ladder import stored_players
from trl_sppo.evaluation.play import play
from trl_sppo.quickstart import assets
from trl_sppo.quickstart.run import FOLDER


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
LAST_STEP = 12
# What the recipe was when these numbers were measured: one voter, a smaller learning rate, fewer steps
OPTIONS += ["--reward_weights", "1", "0", "--learning_rate", "4e-4", "--max_steps", "12", "--eval_steps", "12"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--variants", type=int, nargs="+", default=range(len(VARIANTS)), help="Numbers of lines of the table, from 0."
    )
    args = parser.parse_args()
    variants = {name: options for i, (name, options) in enumerate(VARIANTS.items()) if i in args.variants}

    folder = FOLDER / "objectives"
    results: dict[str, list[dict]] = {name: [] for name in variants}
    for seed in args.seeds:
        for name, options in variants.items():
            run = folder / "_".join(["seed", str(seed), *options]).replace("--", "")
            players = stored_players(run) if run.is_dir() else {}
            if LAST_STEP not in players:
                with assets.recipe("quickstart.yaml") as recipe:
                    argv = ["--config", str(recipe), *OPTIONS, *options, "--seed", str(seed)]
                    train.main([*argv, "--output_dir", str(run)])
                players = stored_players(run)
            rates = {judge: plain for judge, (plain, _) in play(players[LAST_STEP], players[0]).items()}
            results[name].append(rates)
            print(name, seed, {judge: str(rate) for judge, rate in rates.items()}, flush=True)

    judges = list(next(iter(results.values()))[0])
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
