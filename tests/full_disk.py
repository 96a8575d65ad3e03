"""Trains like `python -m trl_sppo.train`, on a disk that takes no file above some bytes from the second step on."""

import resource
import signal
import sys

from transformers import TrainerCallback

from trl_sppo import train


class FullDisk(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))


build_trainer = train.build_trainer


def build_with_full_disk(argv):
    trainer = build_trainer(argv)
    trainer.add_callback(FullDisk())
    return trainer


if __name__ == "__main__":  # pytest imports it, in search of doctests
    train.build_trainer = build_with_full_disk
    train.main(sys.argv[2:])
