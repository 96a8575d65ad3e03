"""Bad configuration: whatever a recipe or a command line says, it is trained as asked for, or refused by one message.

Each case is a recipe that trains, with something changed. It must train two steps; or end with status 2, one message
that names an option that was changed (or the recipe), and no new file, in seconds. Some cases are always the same,
TRL_SPPO_FUZZ are fresh.
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
from accelerate.commands.launch import launch_command_parser
from helpers import TINY, make_tokenizer
from hypothesis import HealthCheck, Phase, assume, currently_in_test_context, given, note, seed, settings
from hypothesis import strategies as st
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.trainer_callback import DefaultFlowCallback

from trl_sppo import train
from trl_sppo.arguments.options import make_parser


RECIPE = {
    "model_name_or_path": "policy", "reward_funcs": "helpers.count_abc", "dataset_name": "prompts",
    "output_dir": "out", "num_generations": 4, "per_device_train_batch_size": 8, "max_completion_length": 4,
    "max_steps": 2, "use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no",
    "gradient_checkpointing": False, "disable_tqdm": True,
}  # fmt: skip
ROW = '{"prompt": [{"role": "user", "content": "%s"}]}'
# What is not in the recipe, so that its options are met as well
MORE = {
    "use_peft": True, "lora_r": 2, "eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4,
    "save_strategy": "steps", "save_steps": 1, "beta": 0.1, "gradient_checkpointing": True, "log_completions": True,
    "logging_steps": 1, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4,
}  # fmt: skip
PROMPTS = "ab", "fgh", "cd e", "xyz"
SECONDS = 20  # for a case; the machine may be busy

# Right values of these have effects outside, or need what is not here. Wrong ones are tried.
NEEDS = {
    **dict.fromkeys(["push_to_hub", "report_to", "log_completions_hub_repo"], "the network"),
    **dict.fromkeys(["deepspeed", "fsdp", "use_vllm"], "a GPU, or an extra"),
    **dict.fromkeys(["use_transformers_continuous_batching", "use_transformers_paged"], "minutes, on a CPU"),
    **dict.fromkeys(["torch_compile", "torch_compile_backend", "torch_compile_mode"], "a compiler, and minutes"),
    "use_liger_kernel": "a GPU, and a package",
    "dataloader_num_workers": "that many processes",
}

# As messages have them
ALIASES = {
    "reward_model_name_or_path": "reward model '",
    "load_in_4bit": "8 bit and 4 bit precision",
    "load_in_8bit": "8 bit and 4 bit precision",
    "lora_target_modules": "arget modules",
    "lora_target_parameters": "target_parameters",
    "lora_modules_to_save": "modules_to_save",
    "lora_task_type": "task type",
}

PARSER = make_parser()
HINTS = {name: hint for each in PARSER.dataclass_types for name, hint in get_type_hints(each).items()}
OPTIONS = sorted({action.dest for action in PARSER._actions} - {"help"})
FLAGS = [option for action in PARSER._actions for option in action.option_strings if option not in ("-h", "--help")]
LAUNCHING = (
    "num_processes",
    "accelerate_config",
    "main_process_port",
    "mixed_precision",
    "num_machines",
    "gpu_ids",
    "env",
)
KNOWN = {*OPTIONS, "env", "config", *(action.dest for action in launch_command_parser()._actions)}

INTEGERS = st.sampled_from([0, 1, 2, 3, 4, 7, 8, 1000, -1, -5, 2**31, 2**63, -(2**63), 10**30, 10**400])
FLOATS = st.sampled_from(
    [0.0, -0.0, 0.3, 1.0, 1.5, 2.0, -1.0, -1e-3, 1e-300, 1e38, 1e308, float("nan"), float("inf"), -float("inf")]
)
TEXTS = st.sampled_from(
    [
        "",
        " ",
        "none",
        "null",
        "true",
        "no",
        "auto",
        "eight",
        "1e-6",
        "nan",
        "-inf",
        "0",
        "-1",
        "3.5",
        "./nowhere",
        "policy/config.json",
        "policy/nowhere",
        "helpers",
        "helpers.TINY",
        "a.b",
        ".",
        "é☃",
        "\U0001f600",
        "x" * 5000,
        "{",
        "{}",
        '{"a": 1}',
        '{"a": [',
        "{1: 2}",
        "[1, 2]",
        "--eta",
        "-x",
        "--",
        "a b",
        "a\nb",
        "a\tb",
        "%s {0} %(x)d",
        "$HOME",
        "=",
        "a=1,b=2",
        "lr",
        "all-linear",
        "1" * 5000,
    ]
) | st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="/~"), max_size=8)
LISTS = st.sampled_from(
    [
        [],
        [1, 2],
        [0.5],
        [float("nan")],
        [-1.0],
        ["a"],
        ["a", "b"],
        ["0.5"],
        [None],
        [[1]],
        [{}],
        [True],
        [{"path": 1}],
        [{"path": "prompts"}],
        [{"path": "./nowhere"}],
        [{"pth": "prompts"}],
        [{"path": "prompts", "fraction": -1.0}],
        [{"path": "prompts", "split": "nowhere"}],
        list(range(1000)),
    ]
)
DICTS = st.sampled_from(
    [
        {},
        {"a": 1},
        {1: 2},
        {None: None},
        {"a": {"b": [1, {"c": None}]}},
        {"path": "prompts"},
        {"temperature": "hot"},
        {"max_new_tokens": 2},
        {"num_beams": 0},
        {"torch_dtype": "float32"},
        {"dtype": 7},
        {"revision": 1},
        {"split_batches": "perhaps"},
        {"use_reentrant": 1},
        {"num_cycles": "x"},
        {True: False},
        {"self": 1},
    ]
)
ODD = st.sampled_from([datetime.date(2026, 2, 28), datetime.datetime(2026, 2, 28, 1, 2), b"\x00\xff", {1, 2}])
ANY = st.none() | st.booleans() | INTEGERS | FLOATS | TEXTS | LISTS | DICTS | ODD
WRONG = st.sampled_from([[1, 2], {1: 2}, [{}], 2.5, datetime.date(2026, 2, 28), b"\x00\xff", float("nan"), {"a"}])

RIGHT = {"bool": st.booleans(), "int": INTEGERS, "float": FLOATS, "str": TEXTS, "list": LISTS, "dict": DICTS}
RIGHT |= {"SchedulerType": TEXTS, "Literal": TEXTS}

HOSTILE = [
    b'eta: !!python/object/apply:os.system ["touch pwned"]', b"eta: !!python/name:os.system",
    b"eta: !!python/tuple [1]", b"!!python/object/new:os.system {}", b"eta: !nowhere 1", b'eta: !!binary "%%%"',
    b"eta: !!int x", b'eta: !!int ""', b"eta: !!bool perhaps", b"eta: !!timestamp x", b'eta: !!float ""',
    b"eta: 2024-99-99", b"eta: 0x", b"eta: 1:99:99", b"eta: 0x" + b"f" * 5000, b"eta: " + b"9" * 5000,
    b"eta: &a 1\nbeta: *a", b"eta: *nowhere", b"<<: {eta: 1}", b"<<: [1]",
    b"generation_kwargs: &a {x: 1}\nmodel_init_kwargs: *a", b"eta: " + b"[" * 10**4,
    b"eta: " + b"{a: " * 50 + b"}" * 50, b"model_init_kwargs: " + b"{a: " * 19 + b"1" + b"}" * 19, b"\teta: 1",
    b"eta:\t1", b"eta: \xff\xfe", b"run_name: \0", b'run_name: "\\0"', b'run_name: "\\ud800"',
    b'output_dir: "\\ud800"', b"run_name: \xc3\x28", b"---", b"...", b"--- {}", b"%YAML 9.9", b"- a", b"a",
    b"eta: 1\neta: 2", b"? [a]\n: b", b"? {a: b}\n: c", b"generation_kwargs: {a: 1, a: 2}", b"{", b"}",
    b"eta: |\n  1", b"eta: >\n", b"# " + b"x" * 2 * 10**5, b"run_name: " + b"x" * 90000, b"@", b"`", b"eta", b":",
    b"self: 1", b"config: recipe.yaml", b"help: true", b"env: {HF_HOME: [1]}", b"env: 1", b"env: {'': 1}",
    b"env: {a=b: 1}", b"env: {1: 2}", b'env: {A: "\\0"}', b"env: {A: null}", b"save_strategy: no", b"eta: yes",
    b"training_script: x.py", b"module: true",
]  # fmt: skip

# Each a recipe that says two things at once
CONTRADICTIONS: list[dict] = [
    {"load_in_4bit": True, "load_in_8bit": True}, {"generation_batch_size": 8, "steps_per_generation": 1},
    {"fp16": True, "bf16": True}, {"datasets": [{"path": "prompts"}], "dataset_name": "prompts"},
    {"win_rate_threshold": 0.7, "train_on": "best_and_worst"}, {"beta": 0.0, "forward_kl_share": 0.5},
    {"loss_type": "sppo_hard", "baseline": "log_mean_exp"},
    {"load_best_model_at_end": True, "eval_strategy": "no", "save_strategy": "steps"},
    {"eval_strategy": "steps", "per_device_eval_batch_size": 3}, {"num_generations": 3},
    {"gradient_accumulation_steps": 2, "steps_per_generation": 1, "per_device_train_batch_size": 4},
    {"lr_scheduler_type": "reduce_lr_on_plateau"}, {"reward_weights": [1.0, 2.0]}, {"preference_weights": [1.0]},
    {"push_to_hub": True, "output_dir": "policy/config.json"}, {"missing_eos_penalty": 1.0, "reward_funcs": None},
]  # fmt: skip

FRESH = int(os.environ.get("TRL_SPPO_FUZZ", 120))  # so many fresh cases in all tests together, beside the fixed ones
SEED = int(os.environ.get("TRL_SPPO_FUZZ_SEED", random.randrange(10**6)))
SHARES = 0  # of all tests together
outcomes: Counter[str] = Counter()
pytestmark = pytest.mark.filterwarnings("ignore")  # a warning is not a refusal


def cases(share: int, *strategies, fixed: int | None = None, mixed: bool = True):
    """Check a property twice: on the same cases in each run, and on its share of fresh ones."""
    global SHARES
    SHARES += share

    def decorate(holds):
        @pytest.mark.parametrize("kind", ["fixed", "fresh"])
        def test(kind):
            number = (share // 7 if fixed is None else fixed) if kind == "fixed" else round(FRESH * share / SHARES)
            if not number:
                return
            explore = settings(
                max_examples=number,
                derandomize=kind == "fixed",
                deadline=None,
                database=None,
                phases=[Phase.explicit, Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            outcomes.clear()
            run = given(*strategies)(holds)
            explore(run if kind == "fixed" else seed(SEED)(run))()
            if number >= 100:  # cases are met, and where both can be, not all of them in one way
                expected = min(outcomes["trained"], outcomes["refused"]) if mixed else outcomes["refused"]
                assert expected > number // 20, outcomes

        test.__name__ = test.__qualname__ = holds.__name__
        test.__doc__ = holds.__doc__
        return test

    return decorate


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
            Path(f"prompts/{split}.jsonl").write_text("\n".join(ROW % text for text in PROMPTS))

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
    if currently_in_test_context():
        note(f"TRL_SPPO_FUZZ_SEED={SEED} TRL_SPPO_FUZZ={FRESH}, unless the case is a fixed one")
    before, stderr, start = files(), io.StringIO(), time.monotonic()
    try:
        with mock.patch.dict(os.environ), redirect_stderr(stderr), redirect_stdout(io.StringIO()):
            trainer = train.main(argv)
    except SystemExit as exit:
        if exit.code == 124:  # the time budget counts from the start of this process
            assert "time_budget" in names
            outcomes["trained"] += 1
            return
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
        names = (*names, *(ALIASES[name] for name in names if name in ALIASES))
        assert any(name in message for name in names), f"{names} are not in: {message}"
        assert "Traceback" not in stderr.getvalue()
        assert not left
    else:
        outcomes["trained"] += 1
        assert trainer.state.global_step == min(2, trainer.state.max_steps) > 0
        assert left


def write(recipe: dict | bytes) -> list[str]:
    # As a file is written by hand: a value that two options have is written twice
    dumper = type("Dumper", (yaml.SafeDumper,), {"ignore_aliases": lambda self, data: True})
    text = recipe if isinstance(recipe, bytes) else yaml.dump(recipe, Dumper=dumper, allow_unicode=True).encode()
    Path("recipe.yaml").write_bytes(text)
    return ["--config", "recipe.yaml"]


@st.composite
def changes(draw):
    name = draw(st.sampled_from(OPTIONS))
    if name in NEEDS:
        return name, draw(WRONG)
    choices = next(action.choices for action in PARSER._actions if action.dest == name)
    right = (
        [st.sampled_from(list(choices))] if choices else [RIGHT[kind] for kind in RIGHT if kind in str(HINTS[name])]
    )
    return name, draw(st.one_of(ANY, *right))


@cases(850, st.lists(changes(), min_size=1, max_size=2))
def test_values_in_a_recipe(changed):
    check(write({**RECIPE, **dict(changed)}), *dict(changed))


@cases(150, changes())
def test_values_in_a_recipe_that_evaluates_saves_and_has_an_adapter(changed):
    assume(changed[0] != "metric_for_best_model")  # which metrics there are is known after an evaluation
    check(write({**RECIPE, **MORE, **dict([changed])}), changed[0])


@st.composite
def tokens(draw):
    """An option on the command line with nothing, a value, or two; and what a message may name."""
    flag = draw(st.sampled_from(FLAGS))
    (name,) = {action.dest for action in PARSER._actions if flag in action.option_strings}
    if name in NEEDS:
        return [flag, "eight", "nine"], [name, "nine"]
    values = draw(st.lists((INTEGERS | FLOATS | st.booleans()).map(str) | TEXTS, max_size=2))
    named = [name, *(part.strip("-") or "''" for value in values for part in (value, repr(value)[1:-1]))]
    if len(values) == 1 and draw(st.booleans()):
        return [f"{flag}={values[0]}"], named
    return [flag, *values], named


@cases(300, tokens())
def test_values_on_the_command_line(drawn):
    argv, named = drawn
    check([*write(RECIPE), *argv], *named)


@st.composite
def typos(draw):
    name = draw(st.sampled_from(OPTIONS))
    i, letter = draw(st.integers(0, len(name) - 1)), draw(st.sampled_from("aexyz_"))
    typo = draw(
        st.sampled_from(
            [name[:i] + name[i + 1 :], name[:i] + letter + name[i:], name[:i] + letter + name[i + 1 :], name.upper(),
             name[:i] + name[i : i + 2][::-1] + name[i + 2 :], name + "s", f"no_{name}_"]
        )
    )  # fmt: skip
    return typo


@cases(120, typos(), ANY, st.booleans(), mixed=False)
def test_typos(typo, value, in_recipe):
    if typo in KNOWN:
        return
    argv = write({**RECIPE, typo: value}) if in_recipe else [*write(RECIPE), f"--{typo}", "1"]
    check(argv, f"there is no option {typo!r}")


@cases(40, ODD.filter(lambda key: not isinstance(key, set)) | st.none() | st.booleans() | INTEGERS | FLOATS, ANY)
def test_keys_that_are_no_names(key, value):
    check(write({**RECIPE, key: value}), str(key), "recipe.yaml")


@cases(200, st.sampled_from(HOSTILE) | st.binary(max_size=40), st.integers(0, len(RECIPE)))
def test_hostile_yaml(text, position):
    lines = yaml.safe_dump(RECIPE).encode().splitlines()
    check(write(b"\n".join([*lines[:position], text, *lines[position:]])), "recipe.yaml", *OPTIONS)
    assert not Path("pwned").exists()


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_each_hostile_yaml(text):
    check(write(yaml.safe_dump(RECIPE).encode() + text), "recipe.yaml", *OPTIONS)
    assert not Path("pwned").exists()


@pytest.mark.parametrize("text", [b"", b"[a]", b"a", b"1", b"--- {}\n--- {}", b"\xff\xfea\0", b"\0", b"a: [", b"!x"])
def test_what_is_no_recipe(text):
    check(write(text), "recipe.yaml")


@pytest.mark.parametrize(
    "path", ["", ".", "policy", "nowhere.yaml", "x" * 5000, "a\0b", "policy/model.safetensors", "/dev/zero"]
)
def test_what_is_no_file(path):
    check(["--config", path], "recipe")


@cases(60, st.sampled_from(LAUNCHING), ANY)
def test_options_of_accelerate(name, value):
    check(write({**RECIPE, name: value}), name)


@cases(100, st.sampled_from(CONTRADICTIONS), changes(), mixed=False)
def test_contradictions(contradiction, changed):
    check(write({**RECIPE, **dict([changed]), **contradiction}), *contradiction, changed[0])


@pytest.mark.parametrize("contradiction", CONTRADICTIONS, ids=str)
def test_each_contradiction(contradiction):
    check(write({**RECIPE, **contradiction}), *contradiction)
