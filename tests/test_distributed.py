"""Two real processes (gloo) give what one gives, when groups straddle them and one has little to train on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


def run(processes: int, output: Path, *options: str) -> list[torch.Tensor]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    subprocess.run(
        [*command, str(Path(__file__).parent / "two_processes.py"), str(output), *options],
        check=True,
        env={**os.environ, "TRL_EXPERIMENTAL_SILENCE": "1", "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    return torch.load(output, weights_only=True)


@pytest.mark.parametrize(
    ("micro_batches", "train_on", "kept"), [("1", "all", 8 / 12), ("3", "best_and_worst", 4 / 12)]
)
def test_two_processes_equal_one(tmp_path, micro_batches, train_on, kept):
    one = run(1, tmp_path / "one.pt", "1", train_on)
    two = run(2, tmp_path / "two.pt", micro_batches, train_on)
    assert one[1].item() == two[1].item() == pytest.approx(kept)
    assert one[0][1] < one[0][0]  # it did train
    for expected, actual in zip(one, two, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
