"""Run the quickstart with several seeds, and print the win rates and times of each and their means.

    python benchmarks/quickstart_seeds.py --seeds 0 1 2

Runs in the working directory, like the quickstart. The win rates are on held-out prompts against the initial policy.
"""

import argparse
import json
import subprocess
import time


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()

    rows = []
    for seed in args.seeds:
        start = time.monotonic()
        output_dir = f"quickstart/seed-{seed}"
        subprocess.run(["trl-sppo", "quickstart", "--seed", str(seed), "--output_dir", output_dir], check=True)
        with open(f"{output_dir}/win_rates.json") as file:
            rows.append((seed, time.monotonic() - start, json.load(file)))

    judges = list(rows[0][2])
    print("| seed | seconds | " + " | ".join(judges) + " |")
    print("|---|---|" + "---|" * len(judges))
    for seed, seconds, rates in rows:
        cells = [f"{rates[j]['mean']:.3f} [{rates[j]['low']:.3f}, {rates[j]['high']:.3f}]" for j in judges]
        print(f"| {seed} | {seconds:.0f} | " + " | ".join(cells) + " |")
    means = [f"{sum(rates[judge]['mean'] for _, _, rates in rows) / len(rows):.3f}" for judge in judges]
    print(f"| mean | {sum(seconds for _, seconds, _ in rows) / len(rows):.0f} | " + " | ".join(means) + " |")


if __name__ == "__main__":
    main()
