"""Commands leave out what libraries say in vain, and nothing else."""

import subprocess
import sys

import pytest


SPEAK = """
import logging, warnings

{before}
logging.basicConfig(format="%(message)s")
for name in ("gradient_checkpointing", "is_gradient_checkpointing", "gradient_checkpointing_enable", "learning_rate"):
    warnings.warn("`" + name + "` is deprecated", FutureWarning)
kernels = logging.getLogger("bitsandbytes.backends.cpu.ops")
kernels.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s", 1)
kernels.warning("no AVX at all")
launch = logging.getLogger("accelerate.commands.launch")
defaults = "The following values were not passed to `accelerate launch` and had defaults used instead:\\n"
launch.warning(defaults + "\\t`--num_machines` was set to a value of `1`")
launch.warning(defaults + "\\t\\tMore than one GPU was found, enabling multi-GPU training.")
"""


@pytest.mark.parametrize("before", ["from trl_sppo.quiet import hush; hush()", "import trl_sppo.train"])
def test_what_is_left_out(before):
    run = [sys.executable, "-c", SPEAK.format(before=before)]
    said = subprocess.run(run, capture_output=True, text=True, check=True).stderr
    for words in ("gradient_checkpointing", "kernels", "num_machines"):
        assert words not in said
    for words in ("`learning_rate` is deprecated", "no AVX at all", "More than one GPU was found"):
        assert words in said
