"""What an evaluation costs besides sampling: with log-probabilities, as TRL computes them, and without.

    trl-sppo quickstart                      # once: prepares the policy
    python benchmarks/evaluation_cost.py

Evaluates the quickstart's initial policy on 16 held-out prompts, in turns, and prints the ratio of the times.
"""

import argparse
import statistics
import time

from trl import GRPOTrainer

from trl_sppo import SPPOTrainer, train
from trl_sppo.quickstart import assets


class WithLogProbabilities(SPPOTrainer):
    """Passes over the completions like GRPO: once for the log-probabilities under π_t, once for the loss."""

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        return GRPOTrainer._get_per_token_logps_and_entropies(self, *args, **kwargs)

    def _compute_loss(self, model, inputs):
        ids = inputs["completion_ids"]
        self._get_per_token_logps_and_entropies(
            model,
            self._cat(inputs["prompt_ids"], ids),
            self._cat(inputs["prompt_mask"], inputs["completion_mask"]),
            ids.size(1),
            compute_entropy=True,
        )
        return super()._compute_loss(model, inputs)

    @staticmethod
    def _cat(first, second):
        return second.new_tensor([[*a, *b] for a, b in zip(first.tolist(), second.tolist(), strict=True)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with assets.recipe("quickstart.yaml") as recipe:
        options = ["--config", str(recipe), "--output_dir", "quickstart/evaluation_cost", "--disable_tqdm", "true"]
        trainer = train.build_trainer(options)
    prompts = trainer.eval_dataset.select(range(16))
    seconds: dict[type, list[float]] = {WithLogProbabilities: [], SPPOTrainer: []}
    for _ in range(args.rounds):
        for kind, times in seconds.items():
            trainer.__class__ = kind
            start = time.monotonic()
            trainer.evaluate(prompts)
            times.append(time.monotonic() - start)
    before, after = (statistics.median(times) for times in seconds.values())
    print(f"with log-probabilities {before:.1f} s, without {after:.1f} s: {before / after:.2f} times as fast")


if __name__ == "__main__":
    main()
