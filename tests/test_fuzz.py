"""Bad configuration: whatever a recipe or a command line says, it is trained as asked for, or refused by one message.

Each case is a recipe that trains, with something changed. It must train two steps; or end with status 2, one message
that names an option that was changed (or the recipe), and no new file, in seconds.
"""

import datetime
import io
import logging
import os
import random
import shutil
import signal
import time
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import get_type_hints
from unittest import mock

import pytest
import torch
import transformers
import yaml
from conftest import TINY, make_tokenizer
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.trainer_callback import DefaultFlowCallback

from trl_sppo import train


RECIPE = {
    "model_name_or_path": "policy", "reward_funcs": "conftest.count_abc", "dataset_name": "prompts",
    "output_dir": "out", "num_generations": 4, "per_device_train_batch_size": 8, "max_completion_length": 4,
    "max_steps": 2, "use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no",
    "gradient_checkpointing": False, "disable_tqdm": True,
}  # fmt: skip
PROMPTS = "ab", "fgh", "cd e", "xyz"
SECONDS = 20  # for a case; the machine may be busy

# Right values of these have effects outside, or need what is not here. Wrong ones are tried.
NEEDS = {
    **dict.fromkeys(["push_to_hub", "report_to"], "the network"),
    **dict.fromkeys(["deepspeed", "fsdp", "use_vllm"], "a GPU, or an extra"),
    **dict.fromkeys(["torch_compile", "torch_compile_backend", "torch_compile_mode"], "a compiler, and minutes"),
    "dataloader_num_workers": "that many processes",
}

PARSER = train.make_parser()
HINTS = {name: hint for each in PARSER.dataclass_types for name, hint in get_type_hints(each).items()}
OPTIONS = sorted({action.dest for action in PARSER._actions} - {"help"})
FLAGS = [option for action in PARSER._actions for option in action.option_strings if option not in ("-h", "--help")]
LAUNCHING = ["num_processes", "accelerate_config", "main_process_port", "mixed_precision", "num_machines", "gpu_ids"]

INTEGERS = st.sampled_from([0, 1, 2, 3, 4, 7, 8, 1000, -1, -5, 2**31, 2**63, -(2**63), 10**30, 10**400])
FLOATS = st.sampled_from(
    [0.0, -0.0, 0.3, 1.0, 1.5, 2.0, -1.0, -1e-3, 1e-300, 1e38, 1e308, float("nan"), float("inf"), -float("inf")]
)
TEXTS = st.sampled_from(
    [
        "", " ", "none", "null", "true", "no", "auto", "eight", "1e-6", "nan", "-inf", "0", "-1", "3.5", "./nowhere",
        "policy/config.json", "policy/nowhere", "conftest", "conftest.TINY", "a.b", ".", "é☃", "\U0001f600", "x" * 5000,
        "{", "{}", '{"a": 1}', '{"a": [', "{1: 2}", "[1, 2]", "--eta", "-x", "--", "a b", "a\nb", "a\tb", "%s {0} %(x)d",
        "$HOME", "=", "a=1,b=2", "lr", "all-linear", "1" * 5000,
    ]  # fmt: skip
) | st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="/~"), max_size=8)
LISTS = st.sampled_from(
    [[], [1, 2], [0.5], [float("nan")], [-1.0], ["a"], ["a", "b"], ["0.5"], [None], [[1]], [{}], [True], [{"path": 1}],
     [{"path": "prompts"}], [{"path": "./nowhere"}], [{"pth": "prompts"}], [{"path": "prompts", "fraction": -1.0}],
     [{"path": "prompts", "split": "nowhere"}], list(range(1000))]  # fmt: skip
)
DICTS = st.sampled_from(
    [{}, {"a": 1}, {1: 2}, {None: None}, {"a": {"b": [1, {"c": None}]}}, {"path": "prompts"}, {"temperature": "hot"},
     {"max_new_tokens": 2}, {"num_beams": 0}, {"torch_dtype": "float32"}, {"dtype": 7}, {"revision": 1},
     {"split_batches": "perhaps"}, {"use_reentrant": 1}, {"num_cycles": "x"}, {True: False}, {"self": 1}]  # fmt: skip
)
ODD = st.sampled_from([datetime.date(2026, 2, 28), datetime.datetime(2026, 2, 28, 1, 2), b"\x00\xff", {1, 2}])
ANY = st.none() | st.booleans() | INTEGERS | FLOATS | TEXTS | LISTS | DICTS | ODD
WRONG = st.sampled_from([[1, 2], {1: 2}, [{}], 2.5, datetime.date(2026, 2, 28), b"\x00\xff", float("nan"), {"a"}])

outcomes: Counter[str] = Counter()


def cases(number: int):
    """So many cases, the same in each run."""
    return settings(
        max_examples=number,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """A working directory with a policy and prompts. Training ends after two steps, however many are asked for."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("fuzz")
        patch.chdir(folder)
        torch.manual_seed(0)
        Qwen2ForCausalLM(Qwen2Config(**TINY)).save_pretrained("policy")
        make_tokenizer().save_pretrained("policy")
        Path("prompts").mkdir()
        for split in ("train", "test"):
            Path(f"prompts/{split}.jsonl").write_text("\n".join(f'{{"prompt": "{text}"}}' for text in PROMPTS))

        on_step_end = DefaultFlowCallback.on_step_end

        def stop_after_two(self, args, state, control, **kwargs):
            control = on_step_end(self, args, state, control, **kwargs)
            control.should_training_stop |= state.global_step >= 2
            return control

        patch.setattr(DefaultFlowCallback, "on_step_end", stop_after_two)
        yield folder


def files() -> set[str]:
    return {str(path) for path in Path().rglob("*")}


def reset() -> None:
    """Undo what options set in the process."""
    torch.use_deterministic_algorithms(False)
    transformers.logging.set_verbosity_warning()
    logging.disable(logging.NOTSET)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def check(argv: list[str], *names: str) -> None:
    """Run a case, and check what came of it. `names`: what a message has to name one of."""
    before, stderr, start = files(), io.StringIO(), time.monotonic()
    try:
        with mock.patch.dict(os.environ), redirect_stderr(stderr), redirect_stdout(io.StringIO()):
            trainer = train.main(argv)
    except SystemExit as exit:
        assert exit.code == 2
        trainer = None
    finally:
        reset()
        left = files() - before
        for path in map(Path, left):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    assert time.monotonic() - start < SECONDS
    if trainer is None:
        outcomes["refused"] += 1
        (message,) = stderr.getvalue().split("trl-sppo: error: ")[1:]
        assert any(name in message for name in names), f"{names} are not in: {message}"
        assert "Traceback" not in stderr.getvalue()
        assert not left
    else:
        outcomes["trained"] += 1
        assert trainer.state.global_step == min(2, trainer.state.max_steps) > 0
        assert left


def write(recipe: dict | bytes) -> list[str]:
    text = recipe if isinstance(recipe, bytes) else yaml.safe_dump(recipe, allow_unicode=True).encode()
    Path("recipe.yaml").write_bytes(text)
    return ["--config", "recipe.yaml"]


@st.composite
def changes(draw):
    name = draw(st.sampled_from(OPTIONS))
    return name, draw(WRONG if name in NEEDS else ANY)


@cases(600)
@given(st.lists(changes(), min_size=1, max_size=2))
def test_values_in_a_recipe(changed):
    check(write({**RECIPE, **dict(changed)}), *dict(changed))
