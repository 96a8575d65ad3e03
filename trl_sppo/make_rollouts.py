"""What `trl-sppo rollout` runs in each process: arguments in, scored completions out."""

from .train import make_rollouts


if __name__ == "__main__":
    trainer = make_rollouts()
    if hasattr(trainer, "end"):  # finishes trackers and processes, since transformers 5.18
        trainer.end()
