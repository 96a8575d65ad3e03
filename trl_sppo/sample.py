"""The process of `trl-sppo rollout`: arguments in, files of rollouts out."""

from .quiet import say_interrupts


if __name__ == "__main__":
    say_interrupts()

from .train import make_rollouts as main


if __name__ == "__main__":
    trainer = main()
    if hasattr(trainer, "end"):  # finishes trackers and processes, since transformers 5.18
        trainer.end()
