"""A run that ends at any point goes on as if it had not. benchmarks/kill_and_resume.py has the harness that kills."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from helpers import RUN_PROMPTS, TINY, assert_same, count_abc, history, make_tokenizer, more_abc, weights
from peft import IA3Config, LoraConfig
from safetensors.torch import load_file
from transformers import (
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from trl_sppo.runs.checkpoints import (
    check_fits,
    differences,
    find_checkpoint,
    fingerprint,
    last_whole_checkpoint,
    read_manifest,
)


def lora() -> LoraConfig:
    return LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")


DONE: dict[str, Path] = {}


@pytest.fixture
def once(start, tmp_path_factory):
    """A function that trains with these options, once for all tests, and returns the output directory."""

    def train(**options) -> Path:
        key = repr(sorted(options.items()))
        if key not in DONE:
            folder = tmp_path_factory.mktemp("once")
            start("", output_dir=str(folder), **options).train()
            DONE[key] = folder
        return DONE[key]

    return train


# ---- Exact resume


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_from_each_checkpoint_to_the_same_weights(start, tmp_path, kind, beta):
    """Inside an iteration and between two, in the first epoch and in the second."""

    def build(folder):
        return start(folder, beta=beta, trainer_kwargs={"peft_config": lora()} if kind == "lora" else {})

    whole = build("whole")
    whole.train()
    assert whole.calls == {"generate": 5, "score": 5} and whole.state.epoch > 1
    for step in range(1, 9):
        resumed = build(f"from{step}")
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert_same(resumed, whole)
        # What the checkpoint holds is not sampled or scored again
        left = 5 - (step + 1) // 2
        assert resumed.calls == ({"generate": left, "score": left} if left else {}), step


@pytest.mark.parametrize("step", [3, 4])  # inside an iteration and between two
@pytest.mark.parametrize("lr_scheduler_type", ["linear", "cosine", "constant_with_warmup"])
@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_another_learning_rate_acts_from_the_next_step_on(start, tmp_path, step, lr_scheduler_type, optim):
    options = {"lr_scheduler_type": lr_scheduler_type, "warmup_steps": 5, "optim": optim, "logging_steps": 1}
    whole = start("whole", **options)
    whole.train()
    resumed = start("resumed", **options, learning_rate=2 * whole.args.learning_rate)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
    rates = [[row["learning_rate"] for row in history(each) if "loss" in row] for each in (whole, resumed)]
    assert len(rates[1]) == len(rates[0]) > step + 1
    # What a step's row has is the rate of that step. Multiplying by 2 rounds nothing
    assert rates[1] == [rate * (2 if i >= step else 1) for i, rate in enumerate(rates[0])]
    last = [each.lr_scheduler.get_last_lr() for each in (whole, resumed)]
    assert last[1] == [2 * rate for rate in last[0]]
    assert any(not torch.equal(weights(resumed)[name], value) for name, value in weights(whole).items())


def test_other_options_of_the_optimizer_and_another_schedule_act(start, tmp_path):
    start("whole", logging_steps=1).train()
    changes = {"logging_steps": 1, "weight_decay": 0.3, "adam_beta1": 0.5, "adam_beta2": 0.9, "adam_epsilon": 1e-3}
    resumed = start("resumed", **changes, lr_scheduler_type="constant")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    decayed, rest = resumed.optimizer.param_groups
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.3, 0.0)
    for group in (decayed, rest):
        assert group["betas"] == (0.5, 0.9) and group["eps"] == 1e-3
        assert group["initial_lr"] == resumed.args.learning_rate
    rates = [row["learning_rate"] for row in history(resumed) if "loss" in row]
    assert set(rates[3:]) == {resumed.args.learning_rate} and rates[2] < resumed.args.learning_rate


def test_with_several_passes_a_moving_reference_oracles_and_evaluations(start, tmp_path):
    options = {
        "num_iterations": 2, "beta": 0.5, "sync_ref_model": True, "ref_model_sync_steps": 2, "max_steps": 11,
        "eval_strategy": "steps", "eval_steps": 3, "per_device_eval_batch_size": 4, "save_steps": 5,
        "disable_dropout": False, "lr_scheduler_type": "cosine", "optim": "rmsprop",
    }  # fmt: skip
    kwargs = {"preference_func": more_abc, "eval_dataset": Dataset.from_dict({"prompt": RUN_PROMPTS[:2]})}
    whole = start("whole", **options, trainer_kwargs=kwargs)
    whole.train()
    resumed = start("resumed", **options, trainer_kwargs=kwargs)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert_same(resumed, whole)
    for a, b in zip(resumed.ref_model.parameters(), whole.ref_model.parameters(), strict=True):
        assert torch.equal(a, b)
    checkpoint = str(tmp_path / "whole" / "checkpoint-5")
    check_fits(checkpoint, whole.args, whole._form)
    with pytest.raises(ValueError, match="does not hold the reference model, which sync_ref_model=True has changed"):
        check_fits(checkpoint, whole.args, {**whole._form, "sharding": "fsdp"})


@pytest.mark.parametrize("step", [3, 5, 6, 7])  # at a move of the reference, and between two of them
def test_inpo_with_an_adapter_and_a_reference_that_moves(start, tmp_path, step):
    options = {
        "loss_type": "inpo", "beta": 0.05, "sync_ref_model": True, "ref_model_mixup_alpha": 1.0,
        "ref_model_sync_steps": 3, "per_device_train_batch_size": 4,
    }  # fmt: skip
    whole = start("whole", **options, trainer_kwargs={"peft_config": lora()})
    whole.train()
    resumed = start("resumed", **options, trainer_kwargs={"peft_config": lora()})
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
    assert_same(resumed, whole)  # the reference too
    reference = {name: value for name, value in weights(whole).items() if ".ref." in name}
    first = weights(start("first", **options, trainer_kwargs={"peft_config": lora()}))
    assert any(not torch.equal(value, first[name]) for name, value in reference.items())


def test_qlora(start, tmp_path):
    """A policy in 4 bit: its adapter goes on, on the same frozen weights."""
    kwargs = {
        "peft_config": lora(),
        "quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    }
    whole = start("whole", trainer_kwargs=kwargs)
    whole.train()
    resumed = start("resumed", trainer_kwargs=kwargs)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert_same(resumed, whole)


@pytest.mark.parametrize("step", [3, 4])  # inside an iteration and between two
@pytest.mark.parametrize(("batch_size", "accumulation"), [(8, 1), (2, 4), (1, 8)])
def test_other_micro_batches(start, once, step, batch_size, accumulation):
    """The same completions in each optimizer step, and the same samples."""
    options = {"optim": "sgd", "learning_rate": 1e-3, "beta": 0.1}
    whole = once(**options)
    resumed = start(
        "resumed", **options, per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation,
        steps_per_generation=2 * accumulation,
    )  # fmt: skip
    resumed.train(resume_from_checkpoint=str(whole / f"checkpoint-{step}"))
    left = 5 - (step + 1) // 2
    assert resumed.calls == {"generate": left, "score": left} and resumed._step == 9 * accumulation
    expected = load_file(whole / "checkpoint-9" / "model.safetensors")
    for name, value in weights(resumed).items():
        if name in expected:
            torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-6)
    log = json.loads((whole / "checkpoint-9" / "trainer_state.json").read_text())["log_history"]
    for mine, row in zip([row for row in history(resumed) if "loss" in row], log, strict=True):
        assert mine == {name: pytest.approx(row[name], rel=1e-4, abs=1e-5) for name in mine}


def test_streamed_prompts(start, tmp_path):
    def build(folder):
        prompts = Dataset.from_dict({"prompt": RUN_PROMPTS}).to_iterable_dataset()
        return start(folder, trainer_kwargs={"train_dataset": prompts})

    whole = build("whole")
    whole.train()
    resumed = build("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert_same(resumed, whole)


def test_evaluations_change_nothing_about_the_training(start):
    without = start("without")
    without.train()
    evaluation = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 4}
    kwargs = {"eval_dataset": Dataset.from_dict({"prompt": RUN_PROMPTS[:2]})}
    evaluated = start("with", **evaluation, trainer_kwargs=kwargs)
    evaluated.train()
    for name, value in weights(without).items():
        assert torch.equal(weights(evaluated)[name], value)


def test_a_run_that_has_taken_all_its_steps_takes_no_more(start, tmp_path, caplog):
    """transformers would take one. A run may be killed between its last checkpoint and its end."""
    words = "has taken all of its 9 steps"
    whole = start("whole")
    whole.train()
    assert words not in caplog.text
    again = start("whole")
    again.train(resume_from_checkpoint=True)
    assert caplog.text.count(words) == 1
    assert again.state.global_step == 9 and not again.calls
    assert_same(again, whole)


@pytest.mark.parametrize("accumulation", [2, 4])
def test_a_killed_run_uses_the_rollouts_after_its_last_checkpoint(start, tmp_path, accumulation):
    """It ends in iteration 3, two after its only checkpoint: what it sampled and scored since then is used."""
    whole = start("whole", save_steps=4)
    whole.train()

    class KilledError(Exception):
        pass

    killed = start("killed", save_steps=4)
    step = killed.training_step

    def dies(*args, **kwargs):
        if killed._step == 15:  # the second micro-batch of optimizer step 8, of iteration 3
            raise KilledError
        return step(*args, **kwargs)

    killed.training_step = dies
    with pytest.raises(KilledError):
        killed.train()
    assert killed.calls == {"generate": 4, "score": 4}
    sizes = {} if accumulation == 2 else {
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "steps_per_generation": 8,
        "per_device_eval_batch_size": 4,
    }  # fmt: skip
    resumed = start("killed", save_steps=4, **sizes)
    resumed.train(resume_from_checkpoint=True)
    if not sizes:
        assert_same(resumed, whole)
    assert resumed.calls == {"generate": 1, "score": 1}  # of iteration 4
    assert not (tmp_path / "killed" / "rollouts-1").exists()


def test_completions_are_not_lost_when_scoring_fails(start, tmp_path):
    whole = start("whole")
    whole.train()

    def fails(completions, **kwargs):
        fails.calls += 1
        if fails.calls == 3:
            raise OSError("the reward model is not there")
        return count_abc(completions)

    fails.calls = 0
    fails.__name__ = "score"
    failing = start("failing", save_steps=100, reward_funcs=fails)
    with pytest.raises(RuntimeError):
        failing.train()
    resumed = start("failing", save_steps=100)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.calls == {"generate": 2, "score": 3}
    for name, value in weights(whole).items():
        assert torch.equal(weights(resumed)[name], value)


def test_scores_are_not_lost_when_log_probabilities_fail(start, tmp_path):
    """They lie beside the rollout's file, which is written again only when all is known."""
    whole = start("whole", save_steps=4)
    whole.train()
    failing = start("failing", save_steps=4)
    compute = failing._get_per_token_logps_and_entropies

    def fails(*args, **kwargs):
        if failing._rollout is not None and failing._step == 12:
            raise torch.OutOfMemoryError("no room")
        return compute(*args, **kwargs)

    failing._get_per_token_logps_and_entropies = fails
    with pytest.raises(torch.OutOfMemoryError):
        failing.train()
    files = failing._recorder.files
    assert "win_rates" not in files.read(3)[0] and "win_rates" in files.with_scored(3, files.read(3))[0]
    resumed = start("failing", save_steps=4)
    resumed.train(resume_from_checkpoint=True)
    assert_same(resumed, whole)
    assert resumed.calls == {"generate": 1, "score": 1}  # of iteration 4 alone
    assert "win_rates" in files.read(3)[0]


def test_scores_of_other_completions_are_not_taken(start, tmp_path):
    """Those of a run with other options, which has left them beside the file that it had not completed."""
    trainer = start("run")
    files = trainer._recorder.files
    trainer.train()
    groups = files.read(0)
    files.write_scored(0, [{**group, "scores": {"score": [9.0] * 4}} for group in groups])
    again = start("run", temperature=0.5, save_steps=100)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert files.read(1)[0]["scores"] != {"score": [9.0] * 4}
    files.forget_scored(0)
    bare = [{name: group[name] for name in group if name != "win_rates"} for group in groups]
    assert files.with_scored(0, bare) == bare


def test_rollouts_of_other_options_are_set_aside(start, tmp_path):
    start("run", save_steps=4, max_steps=6).train()
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    resumed = start("run", save_steps=4, max_steps=6, temperature=0.5)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.calls["generate"] == 1
    assert [path.name for path in (tmp_path / "run" / "rollouts-1").iterdir()] == ["iteration-000002.parquet"]


# ---- Killed


@pytest.mark.first
def test_killed_at_any_point():
    """SIGKILL anywhere, also while checkpoints and rollouts are being written; LoRA and full, one process and two."""
    points = int(os.environ.get("TRL_SPPO_KILL_POINTS", 12))
    script = Path(__file__).parents[1] / "benchmarks" / "kill_and_resume.py"
    command = [sys.executable, str(script), "--points", str(points)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=1800 + 60 * points)
    assert result.returncode == 0, result.stdout + result.stderr
    counts = Counter(json.loads(result.stdout.splitlines()[-1]))
    assert counts["killed"] == counts["same weights"] == counts["same log"] == points, result.stdout
    assert counts["torn checkpoints"] > 0
    # At most what was under way is done again: by each of two processes one sampling, one scoring, one judgement
    assert counts["calls repeated"] <= 3 * counts["kills"]


# ---- Torn checkpoints


def test_a_checkpoint_is_whole_if_all_its_files_are_as_they_were_written(start, tmp_path):
    start("run", max_steps=2).train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert read_manifest(checkpoint)["step"] == 2
    for path in sorted(checkpoint.iterdir()):
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        with pytest.raises(ValueError, match=r"cannot be read|bytes instead of"):
            read_manifest(checkpoint)
        path.unlink()
        with pytest.raises(ValueError, match=r"it has no manifest.json, which is written last|is missing"):
            read_manifest(checkpoint)
        path.write_bytes(content)
    assert read_manifest(checkpoint)["can_be_resumed"]


def test_a_torn_checkpoint_is_passed_over_with_a_line_that_says_so(start, tmp_path, caplog):
    whole = start("run")
    whole.train()
    for step in (8, 9):
        (tmp_path / "run" / f"checkpoint-{step}" / "manifest.json").unlink()
    resumed = start("run")
    resumed.train(resume_from_checkpoint=True)
    assert_same(resumed, whole)
    for step in (8, 9):
        assert f"checkpoint-{step} is torn (it has no manifest.json, which is written last)" in caplog.text
    assert f"Continuing from {tmp_path / 'run' / 'checkpoint-7'}." in caplog.text
    assert read_manifest(tmp_path / "run" / "checkpoint-9")  # written anew


def make_checkpoints(folder: Path, whole: dict[int, str], torn: tuple[int, ...] = ()) -> None:
    for step, time in whole.items():
        (folder / f"checkpoint-{step}").mkdir(parents=True)
        manifest = {"written_at": f"2026-01-01T00:{time}", "files": {}}
        (folder / f"checkpoint-{step}" / "manifest.json").write_text(json.dumps(manifest))
    for step in torn:
        (folder / f"checkpoint-{step}").mkdir(parents=True)


def test_which_checkpoint_is_taken(tmp_path, caplog):
    make_checkpoints(tmp_path, whole={10: "01", 20: "02", 90: "00"}, torn=(15, 30))
    (tmp_path / "checkpoint-best").mkdir()
    path = lambda step: str(tmp_path / f"checkpoint-{step}")  # noqa: E731
    assert find_checkpoint("true", str(tmp_path)) == path(20)  # 90 is of an earlier run
    assert "checkpoint-30 is torn" in caplog.text and "checkpoint-15" not in caplog.text
    assert find_checkpoint(path(10), "elsewhere") == path(10)
    assert last_whole_checkpoint(str(tmp_path / "nowhere")) is None
    for wrong in ("nowhere", "checkpoint-30"):
        words = f"resume_from_checkpoint must be a checkpoint's folder, got .*{wrong}': it has no manifest.json"
        with pytest.raises(ValueError, match=words):
            find_checkpoint(str(tmp_path / wrong), "elsewhere")


def test_a_run_without_a_checkpoint_begins_anew(start, caplog):
    trainer = start("run", max_steps=1)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 1 and "There is no checkpoint in" in caplog.text


def test_the_last_checkpoint_is_deleted_only_when_the_next_is_whole(start, tmp_path, monkeypatch):
    from trl_sppo.runs import resumable

    whole_before = []
    write = resumable.write_manifest

    def record(folder, *facts):
        whole_before.append(last_whole_checkpoint(str(tmp_path / "run")))
        write(folder, *facts)

    monkeypatch.setattr(resumable, "write_manifest", record)
    start("run", save_total_limit=1, max_steps=3).train()
    assert [path and path.name for path in whole_before] == [None, "checkpoint-1", "checkpoint-2"]
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-3"]


def test_a_checkpoint_of_an_earlier_run_is_not_taken_for_this_runs(start, tmp_path, caplog):
    start("run", max_steps=4).train()
    again = start("run", max_steps=4, save_steps=100)
    again._save_checkpoint = lambda *args: None  # killed before its first
    again.train()
    resumed = start("run", max_steps=4)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4 and "There is no checkpoint in" in caplog.text
    assert not resumed.calls  # but the rollouts are its own


def test_a_whole_checkpoint_is_kept_until_the_one_that_replaces_it_is_whole(start, tmp_path, monkeypatch):
    from trl_sppo.runs import resumable

    start("run", max_steps=2).train()
    whole = []
    write = resumable.write_manifest
    monkeypatch.setattr(
        resumable, "write_manifest",
        lambda *args, **kwargs: whole.append(find_checkpoint(True, str(tmp_path / "run"))) or write(*args, **kwargs),
    )  # fmt: skip
    start("run", max_steps=2).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert whole == [str(tmp_path / "run" / "checkpoint-2.replaced")]
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]


def test_a_path_may_be_a_path(tmp_path):
    make_checkpoints(tmp_path, whole={10: "01", 20: "02"})
    assert find_checkpoint(tmp_path / "checkpoint-10", str(tmp_path)) == str(tmp_path / "checkpoint-10")


def test_training_twice_with_one_trainer(start):
    """The second training is one of its own: it does not go on with the first one's iteration."""
    trainer = start("run", max_steps=3)
    trainer.train()
    assert trainer._step == 6 and trainer.calls == {"generate": 2, "score": 2}
    trainer.train()
    assert trainer._step == 6 and trainer.calls == {"generate": 4, "score": 4}


# ---- What does not fit


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"gradient_accumulation_steps": 4},
            r"an optimizer step had 8 completions \(num_processes=1, per_device_train_batch_size=4, "
            r"gradient_accumulation_steps=2, steps_per_generation=4\), now 16 \(",
        ),
        (
            {"steps_per_generation": 2, "num_iterations": 2},
            r"an iteration had 16 completions .*, now 8 .*; num_iterations was 1, now 2",
        ),
        ({"num_generations": 2}, r"num_generations was 4, now 2"),
        ({"keep_groups_together": True}, r"keep_groups_together was False, now True"),
    ],
)
def test_other_batches(start, once, changes, expected):
    checkpoint = once(max_steps=1) / "checkpoint-1"
    with pytest.raises(ValueError, match=expected) as error:
        start("other", **changes).train(resume_from_checkpoint=str(checkpoint))
    assert f"begin a new run from its weights with model_name_or_path='{checkpoint}'" in str(error.value)


def test_an_iteration_with_images_cannot_be_divided_in_another_way(start, tmp_path):
    checkpoint = tmp_path / "run" / "checkpoint-1"
    start("run", max_steps=1).train()
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    assert manifest["can_be_divided"] is True
    (checkpoint / "manifest.json").write_text(json.dumps({**manifest, "can_be_divided": False}))
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "steps_per_generation": 8}
    with pytest.raises(ValueError, match="holds an iteration with images, which cannot be divided in another way"):
        start("other", max_steps=2, **sizes).train(resume_from_checkpoint=str(checkpoint))
    start("other", max_steps=2).train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize(
    ("names", "is_own"), [(["rng_state.pth"], True), (["rng_state.pth", "rng_state_0.pth"], False)]
)
def test_random_states_of_other_processes_are_not_taken(start, tmp_path, names, is_own):
    trainer = start("run")
    torch.manual_seed(7)
    expected = torch.get_rng_state()
    trainer._save_rng_state(str(tmp_path / "states"))
    for name in names:
        shutil.copy(tmp_path / "states" / "rng_state.pth", tmp_path / "states" / f".{name}")
    for path in (tmp_path / "states").glob("rng_state*"):
        path.unlink()
    for name in names:
        (tmp_path / "states" / f".{name}").rename(tmp_path / "states" / name)
    states = []
    for _ in range(2):
        torch.manual_seed(8)
        trainer.load_random_state(tmp_path / "states")
        states.append(torch.get_rng_state())
    assert torch.equal(*states) and torch.equal(states[0], expected) == is_own


def adapter(**options) -> dict:
    return {"trainer_kwargs": {"peft_config": LoraConfig(**{"r": 2, "task_type": "CAUSAL_LM", **options})}}


FORMS = [
    ({}, {"optim": "sgd"}, "optim was 'adamw_torch', now 'sgd'"),
    ({"optim": "sgd"}, {"optim": "adafactor"}, "optim was 'sgd', now 'adafactor'"),
    ({"optim_args": "a=1"}, {}, "optim_args was 'a=1', now None"),
    ({}, {"trainer_kwargs": {"optimizers": (torch.optim.Adam([torch.zeros(1)]), None)}}, "optim was .*, now 'Adam'"),
    ({}, adapter(), "adapter was None, now 'LORA'"),
    (adapter(), {}, "adapter was 'LORA', now None"),
    (adapter(), adapter(r=4), "the adapter's r was 2, now 4"),
    (adapter(), adapter(lora_alpha=64), "the adapter's lora_alpha was 8, now 64"),
    (adapter(), adapter(use_dora=True), "the adapter's use_dora was False, now True"),
    (adapter(), adapter(use_rslora=True), "the adapter's use_rslora was False, now True"),
    (adapter(), adapter(target_modules="all-linear"), "the adapter's target_modules was "),
    (adapter(modules_to_save=["lm_head"]), adapter(), r"the adapter's modules_to_save was \['lm_head'\], now None"),
    (
        adapter(),
        {"trainer_kwargs": {"peft_config": IA3Config(task_type="CAUSAL_LM")}},
        "adapter was 'LORA', now 'IA3'",
    ),
    (adapter(), {**adapter(), "model": "other"}, "base was '.*policy', now '.*other'; the base model was another one"),
    ({"beta": 0.1}, {"beta": 0.1, "model": "other"}, "now '.*other'; the base model was another one"),
]


@pytest.mark.parametrize(("then", "now", "expected"), FORMS)
@pytest.mark.parametrize("early", [True, False])
def test_a_checkpoint_of_another_form(start, once, tmp_path, monkeypatch, then, now, expected, early):
    """It is refused before the checkpoint is loaded, and before the policy is, if what differs is known by then."""
    torch.manual_seed(1)
    Qwen2ForCausalLM(Qwen2Config(**TINY)).save_pretrained(tmp_path / "other")
    checkpoint = str(once(max_steps=1, **then) / "checkpoint-1")
    if "model" in now:
        now = {**now, "model": str(tmp_path / "other")}
    known_late = any(words in expected for words in ("target_modules", "modules_to_save"))
    with pytest.raises(ValueError, match=expected) as error:
        if early and not known_late:
            monkeypatch.setattr("trl.GRPOTrainer.__init__", lambda *args, **kwargs: pytest.fail("too late"))
            start("again", resume_from_checkpoint=checkpoint, **now)
        resumed = start("again", **now)
        monkeypatch.setattr(resumed, "_load_from_checkpoint", lambda *args: pytest.fail("too late"))
        resumed.train(resume_from_checkpoint=checkpoint)
    assert f"model_name_or_path='{checkpoint}'" in str(error.value)


@pytest.mark.parametrize(
    ("then", "now"),
    [
        (adapter(), adapter(lora_dropout=0.1)),
        (adapter(), {**adapter(), "model": "moved"}),
        ({}, {"model": "other"}),  # of which nothing is left
        ({"optim": "adamw_torch"}, {"optim": "adamw_torch_fused"}),
    ],
)
def test_what_a_resumed_run_may_change(start, tiny_policy, tmp_path, then, now):
    torch.manual_seed(1)
    Qwen2ForCausalLM(Qwen2Config(**TINY)).save_pretrained(tmp_path / "other")
    start("run", max_steps=1, **then).train()
    if "model" in now:
        shutil.copytree(tiny_policy, tmp_path / "moved")
        shutil.copy(tmp_path / "moved" / "tokenizer.json", tmp_path / "other")
        shutil.copy(tmp_path / "moved" / "tokenizer_config.json", tmp_path / "other")
        now = {**now, "model": str(tmp_path / now["model"])}
    checkpoint = str(tmp_path / "run" / "checkpoint-1")
    resumed = start("again", max_steps=2, resume_from_checkpoint=checkpoint, **now)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert resumed.state.global_step == 2


@pytest.mark.parametrize("kind", ["GPT-2", "mixture of experts"])
def test_what_peft_settles_when_it_adds_an_adapter_is_no_difference(start, tmp_path, tiny_tokenizer, kind):
    """`fan_in_fan_out` of Conv1D, ranks of the experts' fused weights."""
    sizes = {"vocab_size": 31, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
    if kind == "GPT-2":
        model = GPT2LMHeadModel(GPT2Config(**sizes, n_embd=16, n_layer=1, n_head=2, n_positions=64))
    else:
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**{
            **TINY, "moe_intermediate_size": 8, "num_experts": 2, "num_experts_per_tok": 1, "head_dim": 8,
        }))  # fmt: skip
    model.save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    run = {"model": str(tmp_path / "base"), **adapter(target_modules="all-linear")}
    start("run", max_steps=1, **run).train()
    checkpoint = str(tmp_path / "run" / "checkpoint-1")
    resumed = start("again", max_steps=2, resume_from_checkpoint=checkpoint, **run)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert resumed.state.global_step == 2


def test_another_chat_template_is_another_run(start, tmp_path):
    start("run", max_steps=1).train()
    tokenizer = make_tokenizer(chat_template="{{ messages[0]['content'] }}")
    with pytest.raises(ValueError, match="the tokenizer or its chat template was another one"):
        start("again", trainer_kwargs={"processing_class": tokenizer}).train(
            resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1")
        )


@pytest.mark.parametrize("written", [None, 3, 5])
def test_a_checkpoint_of_another_version(start, tmp_path, written):
    """Its rollouts and counters have another form. Refused before anything is loaded."""
    start("run", max_steps=1).train()
    path = tmp_path / "run" / "checkpoint-1" / "manifest.json"
    manifest = json.loads(path.read_text())
    assert manifest.pop("format") == 4
    path.write_text(json.dumps({**manifest, "format": written} if written else manifest))
    with pytest.raises(ValueError, match=r"checkpoint-1 was written by another version of trl_sppo"):
        start("run", max_steps=2, resume_from_checkpoint=True)


def test_a_checkpoint_of_the_model_alone(start, tmp_path):
    start("run", max_steps=1, save_only_model=True).train()
    with pytest.raises(ValueError, match="was saved with save_only_model=True, without the optimizer"):
        start("run").train(resume_from_checkpoint=True)


def test_the_checkpoint_is_looked_for_before_anything_is_loaded(start, monkeypatch):
    monkeypatch.setattr("trl.GRPOTrainer.__init__", lambda *args, **kwargs: pytest.fail("too late"))
    with pytest.raises(ValueError, match="must be a checkpoint's folder"):
        start("run", resume_from_checkpoint="nowhere")


@pytest.mark.parametrize(
    ("then", "now", "expected"),
    [
        ({"sharding": None}, {"sharding": "fsdp"}, ["sharding was None, now 'fsdp'"]),
        ({"bits": 4}, {"bits": None}, ["bits was 4, now None"]),
        ({"base": "a"}, {"base": "b"}, ["base was 'a', now 'b'"]),  # on a hub, whose weights are not at hand
        ({"base": "a", "base_weights": "1"}, {"base": "b", "base_weights": "1"}, []),
        ({"base": "a", "base_weights": "1"}, {"base": "a", "base_weights": None}, []),
        ({"adapter": {"r": 1}}, {}, []),
        ({"initial_adapter": "1"}, {"initial_adapter": "2"}, ["the adapter that the run began with was another one"]),
        ({"initial_adapter": None}, {"initial_adapter": "2"}, []),  # a model that was given in Python
    ],
)
def test_differences_of_forms(then, now, expected):
    assert differences(then, now) == expected


@pytest.mark.parametrize("place", [0, 12_345, -1])
def test_a_fingerprint_is_that_of_the_weights(tmp_path, place):
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        weights = bytearray(100_000)
        if name == "c":
            weights[place] = 1
        (tmp_path / name / "model.safetensors").write_bytes(weights)
    a, b, c = (fingerprint(str(tmp_path / name)) for name in ("a", "b", "c"))
    assert a == b != c
    assert fingerprint("org/on-the-hub") is fingerprint("") is None
