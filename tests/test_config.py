"""Options: defaults, checks and messages. Whether each inherited option acts is in test_options.py."""

import re

import pytest
from transformers.integrations import integration_utils

from trl_sppo import SPPOConfig


def config(tmp_path, **options):
    return SPPOConfig(str(tmp_path), **{"use_cpu": True, "bf16": False, "report_to": "none", **options})


def test_defaults(tmp_path):
    args = config(tmp_path)
    assert (args.num_generations, args.eta, args.temperature, args.learning_rate) == (8, 10.0, 0.8, 5e-7)
    assert (args.max_completion_length, args.comparison, args.train_on, args.win_rate_threshold) == (
        1024, "hard", "all", None,
    )  # fmt: skip
    assert args.disable_dropout and not args.include_self and args.beta == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_generations": 1}, "num_generations must be at least 2, got 1"),
        ({"num_generations": None}, "num_generations must be at least 2, got None"),
        ({"eta": 0.0}, "eta must be positive and at most 1e9, got 0.0.*eta=1000"),
        ({"eta": -1.0}, "eta must be positive and at most 1e9, got -1.0"),
        ({"eta": float("nan")}, "eta must be .*, got nan"),
        ({"eta": float("inf")}, "eta must be .*, got inf"),
        ({"beta": -0.1}, "beta must be not negative, got -0.1"),
        ({"beta": float("nan")}, "beta must be between -2.31 and 2.31, got nan"),
        ({"forward_kl_share": 0.5}, "forward_kl_share=0.5 divides a KL term whose weight, beta, is 0"),
        ({"forward_kl_share": 1.5, "beta": 0.1}, r"forward_kl_share must be in \[0, 1\], got 1.5"),
        ({"loss_type": "sigmoid"}, "loss_type must be 'sppo' or 'sppo_hard' or 'sppo_single' or 'inpo', got 'sig"),
        ({"loss_type": "sppo_single"}, "loss_type='sppo_single' compares the best with the worst.*best_and_worst"),
        (
            {"loss_type": "sppo_hard", "baseline": "log_mean_exp"},
            "baseline='log_mean_exp' needs the win rates of the",
        ),
        (
            {"loss_type": "inpo", "beta": 0.11},
            "beta must be at most 1/eta = 0.1 with loss_type='inpo', got 0.11.*paper has beta=0.0333.*beta=0.1 is",
        ),
        ({"loss_type": "inpo", "beta": 0.05, "forward_kl_share": 0.5}, "forward_kl_share=0.5 has no effect with loss"),
        ({"loss_type": "inpo", "baseline": "log_mean_exp"}, "baseline='log_mean_exp' needs the win rates of the"),
        (
            {"loss_type": "inpo", "per_device_train_batch_size": 12, "steps_per_generation": 2},
            r"loss_type='inpo' needs whole groups in a micro-batch: set per_device_train_batch_size \(12\) to a mul",
        ),
        (
            {"loss_type": "inpo", "train_on": "best_and_worst", "comparisons_per_group": 16},
            "comparisons_per_group=16 may leave out the best against the worst, which loss_type='inpo' needs",
        ),
        ({"baseline": "mean"}, "baseline must be 'half' or 'log_mean_exp', got 'mean'"),
        ({"reward_aggregation": "mean"}, "reward_aggregation must be 'vote' or 'sum', got 'mean'"),
        ({"missing_eos_penalty": -1.0}, "missing_eos_penalty must be positive, got -1.0"),
        ({"preference_weights": [-1.0]}, r"preference_weights must not be negative, got \[-1.0\]"),
        ({"preference_batch_size": 0}, "preference_batch_size must be at least 1, got 0"),
        ({"comparison": "soft"}, "comparison must be 'hard' or 'bradley_terry', got 'soft'"),
        ({"max_steps": 0}, "max_steps must be at least 1, or -1 for num_train_epochs, got 0"),
        ({"bt_temperature": 0.0}, "bt_temperature must be positive, got 0.0"),
        ({"train_on": "some"}, "train_on must be 'all' or 'best_and_worst', got 'some'"),
        ({"win_rate_threshold": 0.4}, r"win_rate_threshold must be in \[0.5, 1\], got 0.4"),
        ({"win_rate_threshold": 1.1}, r"win_rate_threshold must be in \[0.5, 1\], got 1.1"),
        (
            {"keep_groups_together": True, "per_device_train_batch_size": 12, "steps_per_generation": 2},
            r"needs whole groups in a micro-batch: set per_device_train_batch_size \(12\) to a multiple of num_gen",
        ),
        (
            {"win_rate_threshold": 0.6, "train_on": "best_and_worst"},
            "win_rate_threshold=0.6 and train_on='best_and_worst' both choose.*Set only one",
        ),
        ({"reward_weights": [1.0, -1.0]}, r"reward_weights must not be negative, got \[1.0, -1.0\]"),
        ({"reward_weights": 2.0}, "reward_weights must be a list of numbers, one per source, got 2.0"),
        ({"reward_batch_size": 0}, "reward_batch_size must be at least 1, got 0"),
        (
            {"per_device_train_batch_size": 6},
            r"generation_batch_size \(6\) must be divisible by num_generations \(8\)",
        ),
        (
            {"gradient_accumulation_steps": 4, "steps_per_generation": 2},
            r"steps_per_generation \(2\) must be a multiple of gradient_accumulation_steps \(4\): .*generation batch",
        ),
        (
            {"use_vllm": True, "vllm_importance_sampling_mode": "token_truncate"},
            "vllm_importance_sampling_mode='token_truncate' weights single tokens.*'sequence_mask'",
        ),
    ],
)
def test_messages(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("num_generation", "SPPOConfig has no option 'num_generation'. Did you mean num_generations?"),
        ("lora_r", "SPPOConfig has no option 'lora_r'."),
    ],
)
def test_unknown_options(tmp_path, name, message):
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        config(tmp_path, **{name: 8})


def test_all_problems_are_said_at_once(tmp_path):
    """As someone meets them who comes with a configuration of GRPO."""
    options = {
        "epsilon": 0.3, "scale_rewards": "batch", "loss_type": "dapo", "adam_beta1": 2.0, "top_p": 0.0,
        "lr_scheduler_kwargs": "x", "win_rate_threshold": 0.1,
    }  # fmt: skip
    with pytest.raises(ValueError) as error:
        config(tmp_path, **options)
    lines = str(error.value).splitlines()
    assert sorted(re.split(r"[= ]", line)[0] for line in lines) == sorted(options)


def test_trls_own_problem_is_said_with_the_others(tmp_path):
    with pytest.raises(ValueError) as error:
        config(tmp_path, delta=3.0, per_device_train_batch_size=6)
    lines = str(error.value).splitlines()
    assert len(lines) == 2 and lines[0].startswith("delta=3.0 is an option that SPPO does not use")
    assert lines[1].startswith("generation_batch_size (6) must be divisible by num_generations (8).")


def test_several_keys_of_a_mapping_are_all_named(tmp_path):
    with pytest.raises(ValueError) as error:
        config(tmp_path, generation_kwargs={"top_p": 0.9, "num_beams": 2}, gradient_accumulation_steps=3,
               steps_per_generation=4)  # fmt: skip
    lines = str(error.value).splitlines()
    assert [name in line for name, line in zip(("set top_p", "num_beams must", "steps_per_gen"), lines, strict=True)]


def test_one_number_is_one_problem(tmp_path):
    for options in ({"beta": float("nan")}, {"bt_temperature": float("nan")}, {"max_completion_length": 2**40}):
        with pytest.raises(ValueError) as error:
            config(tmp_path, **options)
        assert "\n" not in str(error.value) and str(error.value).startswith(next(iter(options)))


def test_errors_of_trl_are_about_sppo(tmp_path):
    with pytest.raises(ValueError, match="auto_find_batch_size is not supported by SPPO") as error:
        config(tmp_path, auto_find_batch_size=True)
    assert "GRPO" not in str(error.value)


def test_a_reference_that_moves_needs_a_kl_term(tmp_path):
    with pytest.raises(ValueError, match=r"sync_ref_model=True moves the initial policy .* beta is 0"):
        config(tmp_path, sync_ref_model=True)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {"lr_scheduler_kwargs": {"min_lr": "1e-6"}},
            "lr_scheduler_kwargs: min_lr must .* '1e-6'.*: 1.0e-5",
        ),
        ({"lr_scheduler_kwargs": '{"min_lr": "1e-6"}'}, "lr_scheduler_kwargs: min_lr must .*: 1.0e-5"),
        ({"generation_kwargs": {"prefill_chunk_size": "1e2"}}, "prefill_chunk_size must .* '1e2'"),
        ({"generation_kwargs": {"eos": ["1E3", 2]}}, r"generation_kwargs: eos\[0\] must be a number"),
        ({"deepspeed": {"optimizer": {"params": {"lr": "5e-1"}}}}, "deepspeed: optimizer.params.lr must be a number"),
        ({"gradient_checkpointing_kwargs": {"a": ".5e-2"}}, "gradient_checkpointing_kwargs: a must be a number"),
        ({"reward_weights": ["1e-1", 1]}, r"reward_weights\[0\] must be a number"),
        (
            {"preference_weights": ["one", 1]},
            r"preference_weights must be a list .*, got \['one', 1\]",
        ),
        ({"generation_kwargs": {"prefill_chunk_size": 1e2}}, "prefill_chunk_size must be a whole number .* got 100.0"),
        ({"generation_kwargs": {"prefill_chunk_size": 0}}, "prefill_chunk_size must be a whole number .* got 0"),
        ({"generation_kwargs": {"prefill_chunk_size": "many"}}, "prefill_chunk_size must be a whole number .*'many'"),
    ],
)
def test_numbers_in_mappings_and_lists(tmp_path, options, expected):
    with pytest.raises(ValueError, match=expected) as error:
        config(tmp_path, **options)
    assert "\n" not in str(error.value) or "optim" in expected


def test_texts_that_only_look_like_numbers(tmp_path):
    """A commit, and what a chat template shows."""
    config(tmp_path, model_init_kwargs={"revision": "12345e7"}, chat_template_kwargs={"version": "1e5"})
    config(tmp_path, generation_kwargs={"prefill_chunk_size": 256, "stop_strings": ["e5", "1.0"]})


def test_trackers(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"^report_to=\['wandbb'\]: wandbb is not supported, only .*wandb"):
        config(tmp_path, report_to="wandbb")
    monkeypatch.setattr(integration_utils, "is_wandb_available", lambda: False)
    with pytest.raises(ValueError, match=r"^report_to=\['wandb'\]: WandbCallback requires wandb .*pip install wandb"):
        config(tmp_path, report_to=["wandb"])
    for value in ("none", ["none"], [], "all"):
        config(tmp_path, report_to=value)
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", object)
    assert config(tmp_path, report_to="tensorboard").report_to == ["tensorboard"]


@pytest.mark.parametrize(
    ("name", "value"), [("top_p", 0.9), ("top_k", 50), ("min_p", 0.1), ("repetition_penalty", 1.2)]
)
def test_filtered_sampling_is_warned_about(tmp_path, caplog, name, value):
    config(tmp_path, **{name: value})
    assert f"{name}={value} samples from another distribution" in caplog.text


def test_plain_sampling_is_not_warned_about(tmp_path, caplog):
    config(tmp_path, temperature=0.7)
    assert "another distribution" not in caplog.text


@pytest.mark.parametrize("name", ["eta", "beta", "learning_rate", "num_generations", "max_steps"])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_number_that_python_refuses_to_print(name, sign):
    with pytest.raises(ValueError, match=rf"{name} must be .*(20001 bits|got -?inf)"):
        SPPOConfig("out", use_cpu=True, bf16=False, **{name: sign * 2**20_000})


def test_inpo_keeps_groups_together_and_its_beta_is_no_mistake(tmp_path, caplog):
    args = config(tmp_path, loss_type="inpo", beta=0.1)  # IPO
    assert args.keep_groups_together and "weights the KL term" not in caplog.text
    assert not config(tmp_path).keep_groups_together
