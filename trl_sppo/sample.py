"""The process of `trl-sppo rollout`: arguments in, files of rollouts out."""

from .quiet import say_interrupts


if __name__ == "__main__":
    say_interrupts()

from .train import run


if __name__ == "__main__":
    run(only_rollouts=True)
