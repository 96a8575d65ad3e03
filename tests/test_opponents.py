"""Evaluations inside a training: win rates against the initial policy and against that of the evaluation before."""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset, load_dataset
from helpers import TINY, count_abc, more_abc
from transformers import EarlyStoppingCallback, Qwen2Config, Qwen2ForCausalLM, TrainerCallback

from trl_sppo.errors import RunError
from trl_sppo.evaluation.files import EvaluationFiles
from trl_sppo.evaluation.statistics import length_controlled_win_rate, outcomes_of_scores, win_rate


EVAL_PROMPTS = Dataset.from_dict({"prompt": ["ab", "fgh", "k", "l m", "no"], "topic": list("vwxyz")})
EVALUATING = {
    "eval_strategy": "steps", "eval_steps": 2, "max_steps": 4, "per_device_eval_batch_size": 4, "num_generations": 4,
    "learning_rate": 0.1,
}  # fmt: skip


def evaluations(trainer) -> list[dict]:
    return [row for row in trainer.state.log_history if "eval_loss" in row]


def tiny() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**TINY))


def length(completions, **kwargs) -> list[float]:
    return [float(len(text)) for text in completions]


@pytest.fixture
def evaluated(make_trainer):
    def make(model=None, trainer_kwargs=None, **options):
        trainer_kwargs = {"eval_dataset": EVAL_PROMPTS, **(trainer_kwargs or {})}
        trainer = make_trainer(model, trainer_kwargs=trainer_kwargs, **{**EVALUATING, **options})
        trainer.train()
        return trainer

    return make


def test_win_rates_are_those_of_the_files(evaluated, tmp_path):
    trainer = evaluated(trainer_kwargs={"eval_reward_funcs": length, "preference_func": more_abc})
    rows = evaluations(trainer)
    assert [row["step"] for row in rows] == [0, 2, 4]
    assert not any("win_rate_vs" in name for name in rows[0])
    files = {step: EvaluationFiles(str(tmp_path / "out")).read("", step) for step in (0, 2, 4)}
    for row, label, opponent in ((rows[1], "initial", 0), (rows[2], "initial", 0), (rows[2], "previous", 2)):
        ours, theirs = files[row["step"]], files[opponent]
        for judge, score in (("count_abc", count_abc), ("length", length), ("more_abc", count_abc)):
            won = []  # one number for each pair of answers to a prompt, by a loop
            for a, b in zip(ours, theirs, strict=True):
                assert (a["prompt"], a["topic"]) == (b["prompt"], b["topic"])
                pairs = [(x, y) for x in score(a["completions"]) for y in score(b["completions"])]
                won.append(sum((x > y) + 0.5 * (x == y) for x, y in pairs) / len(pairs))
            name = f"eval_win_rate_vs_{label}/{judge}"
            assert row[name] == pytest.approx(sum(won) / len(won))
            assert row[f"{name}/low"] <= row[name] <= row[f"{name}/high"]
        outcomes = outcomes_of_scores(*(torch.tensor([length(g["completions"]) for g in e]) for e in (ours, theirs)))
        lengths = [torch.tensor([g["lengths"] for g in each]).float() for each in (ours, theirs)]
        expected = length_controlled_win_rate(outcomes, *lengths).mean
        assert row[f"eval_win_rate_vs_{label}/length/length_controlled"] == pytest.approx(expected)
        assert row[f"eval_win_rate_vs_{label}/opponent_mean_length"] == pytest.approx(lengths[1].mean().item())
        expected = win_rate(outcomes)
        assert row[f"eval_win_rate_vs_{label}/length/low"] == pytest.approx(expected.low)


def test_datasets_reads_the_files(evaluated, tmp_path):
    evaluated()
    stored = load_dataset(str(tmp_path / "out" / "evaluations"), split="train")
    assert sorted(set(stored["step"])) == [0, 2, 4] and len(stored) == 15
    assert sorted(stored[:5]["prompt"]) == sorted(EVAL_PROMPTS["prompt"])
    assert stored[0]["scores"]["count_abc"] == count_abc(stored[0]["completions"])


def test_judges_are_asked_in_evaluations_only_and_change_nothing(evaluated, tmp_path):
    asked = []

    def judge(completions, trainer_state, **kwargs):
        asked.append(trainer_state.global_step)
        return [None if text.startswith("a") else float(len(text)) for text in completions]

    def oracle(prompts, first, second, topic, **kwargs):
        assert len(topic) == len(prompts)
        return [float(len(a) > len(b)) for a, b in zip(first, second, strict=True)]

    plain = evaluated(tiny(), output_dir=str(tmp_path / "plain"))
    judged = {"eval_reward_funcs": judge, "eval_preference_func": oracle}
    trainer = evaluated(tiny(), trainer_kwargs=judged, reward_weights=[2.0])
    assert set(asked) == {0, 2, 4} and trainer.args.reward_weights == [2.0]
    row = evaluations(trainer)[-1]
    assert {"eval_win_rate_vs_initial/judge", "eval_win_rate_vs_initial/oracle", "eval_rewards/judge/mean"} <= set(row)
    assert not any("judge" in name for row in trainer.state.log_history if "loss" in row for name in row)
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, plain.model.state_dict()[name])


def test_a_resumed_run_plays_against_the_same_opponents(make_trainer, tmp_path):
    def make(folder, **options):
        options = {**EVALUATING, "save_strategy": "steps", "save_steps": 2, "output_dir": str(folder), **options}
        return make_trainer(tiny(), trainer_kwargs={"eval_dataset": EVAL_PROMPTS}, **options)

    whole = make(tmp_path / "whole")
    whole.train()
    first = make(tmp_path / "parts")
    first.add_callback(_StopAfter(2))
    first.train()
    sampled = []
    second = make(tmp_path / "parts")
    generate = second._generate
    second._generate = lambda *args: (sampled.append(second._mode), generate(*args))[1]
    second.train(True)
    assert sampled.count("eval") == len(EVAL_PROMPTS)  # at step 4 alone
    keep = {name for name in evaluations(whole)[-1] if "win_rate_vs" in name}
    assert len(keep) == 10
    for name in keep:
        assert evaluations(second)[-1][name] == evaluations(whole)[-1][name]


class _StopAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def test_the_best_model_and_early_stopping(evaluated, tmp_path):
    """A learning rate of 0 never gets better than the first win rate that there is."""
    trainer = evaluated(
        trainer_kwargs={"callbacks": [EarlyStoppingCallback(early_stopping_patience=2)]},
        learning_rate=1e-12, max_steps=20, save_strategy="steps", save_steps=2, load_best_model_at_end=True,
        metric_for_best_model="win_rate_vs_initial/count_abc", greater_is_better=True,
    )  # fmt: skip
    best = [row.get("eval_win_rate_vs_initial/count_abc", 0) for row in evaluations(trainer)]
    assert trainer.state.best_metric == max(best)
    assert trainer.state.global_step < 20


def steadily(completions, trainer_state, **kwargs):
    """A judge: the policy is as good as the initial one after 2 steps, better after 4, worse after 6."""
    return [{0: 0.0, 2: 0.0, 4: 1.0, 6: -1.0}[trainer_state.global_step]] * len(completions)


BEST = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, "load_best_model_at_end": True}


@pytest.mark.parametrize(
    ("options", "kwargs", "metric"),
    [
        (BEST, {}, "eval_win_rate_vs_initial/count_abc"),
        ({**BEST, "metric_for_best_model": "loss"}, {}, "eval_win_rate_vs_initial/count_abc"),
        (BEST, {"eval_reward_funcs": steadily}, "eval_win_rate_vs_initial/steadily"),
        ({**BEST, "save_strategy": "best"}, {"eval_reward_funcs": steadily}, "eval_win_rate_vs_initial/steadily"),
        (BEST, {"eval_dataset": {"one": EVAL_PROMPTS}}, "eval_one_win_rate_vs_initial/count_abc"),
        (
            {"lr_scheduler_type": "reduce_lr_on_plateau", "max_steps": 6, "lr_scheduler_kwargs": {"patience": 0}},
            {"eval_reward_funcs": steadily},
            "eval_win_rate_vs_initial/steadily",
        ),
    ],
)
def test_a_win_rate_says_which_policy_is_the_best(evaluated, options, kwargs, metric):
    """transformers' default, the loss, is the same for all of them."""
    trainer = evaluated(trainer_kwargs=kwargs, save_total_limit=1, **options)
    assert (trainer.args.metric_for_best_model, trainer.args.greater_is_better) == (metric, True)
    rates = {row["step"]: row[metric] for row in trainer.state.log_history if metric in row}
    if "load_best_model_at_end" in options:
        assert trainer.state.best_metric == max(rates.values())
        best = min(step for step, rate in rates.items() if rate == max(rates.values()))
        assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
        assert (Path(trainer.state.best_model_checkpoint) / "config.json").is_file()
    if "steadily" in metric:
        assert rates == {2: 0.5, 4: 1.0, 6: 0.0}
    if "lr_scheduler_type" in options:  # only the last evaluation was worse
        assert [row["learning_rate"] for row in trainer.state.log_history if "loss" in row][:4] == [0.1] * 4
        assert trainer.lr_scheduler.get_last_lr()[0] < 0.1


def test_a_judge_that_scores_nothing_does_not_end_the_run(evaluated, caplog):
    trainer = evaluated(trainer_kwargs={"eval_reward_funcs": lambda completions, **kwargs: [None] * len(completions)},
                        **BEST)  # fmt: skip
    assert trainer.state.global_step == 6 and trainer.state.best_model_checkpoint is None
    assert "is not known: the judge has scored nothing" in caplog.text
    assert not any("win_rate_vs" in name for name in evaluations(trainer)[0])


def test_a_second_trainer_chooses_its_own_metric(evaluated, make_trainer):
    first = evaluated(**BEST)
    second = type(first)(first.model, length, first.args, first.train_dataset, EVAL_PROMPTS, first.processing_class)
    assert second.args.metric_for_best_model == "eval_win_rate_vs_initial/length"


def test_a_greedy_schedule_follows_a_win_rate_upwards(make_trainer):
    kwargs = {"eval_dataset": EVAL_PROMPTS, "eval_reward_funcs": steadily}
    trainer = make_trainer(trainer_kwargs=kwargs, **{**EVALUATING, "lr_scheduler_type": "greedy"})
    assert trainer.args.lr_scheduler_kwargs["mode"] == "max"


def test_a_loss_is_no_metric(evaluated):
    with pytest.raises(ValueError, match="metric_for_best_model='eval_loss' says nothing about the policy"):
        evaluated(**BEST, metric_for_best_model="eval_loss")


def test_a_metric_that_is_not_measured_ends_the_run_before_its_first_step(evaluated, monkeypatch):
    monkeypatch.setattr("trl_sppo.trainer.SPPOTrainer.training_step", lambda *args: pytest.fail("too late"))
    for metric in ("accuracy", "win_rate_vs_initial/nobody"):
        known = r"eval_win_rate_vs_initial/count_abc, .*, eval_reward, "
        with pytest.raises(
            RunError, match=f"metric_for_best_model='{metric}' is not measured. Choose one of: {known}"
        ):
            evaluated(**BEST, metric_for_best_model=metric, greater_is_better=True)


@pytest.mark.parametrize("metric", ["eval_reward", "win_rate_vs_previous/count_abc/low"])
def test_each_metric_of_evaluations_may_say_which_policy_is_the_best(evaluated, metric):
    evaluated(**BEST, metric_for_best_model=metric, greater_is_better=True)


def test_several_evaluation_sets(evaluated, tmp_path):
    sets = {"one": EVAL_PROMPTS, "two": EVAL_PROMPTS.select(range(2))}
    trainer = evaluated(trainer_kwargs={"eval_dataset": sets})
    names = {name for row in trainer.state.log_history for name in row}
    assert {"eval_one_win_rate_vs_initial/count_abc", "eval_two_win_rate_vs_previous/count_abc/low"} <= names
    files = EvaluationFiles(str(tmp_path / "out"))
    assert files.names() == ["one", "two"] and files.steps("two") == [0, 2, 4]
    assert len(files.read("two", 4)) == 2


def test_without_files(evaluated, tmp_path):
    trainer = evaluated(save_rollouts=False)
    assert "eval_win_rate_vs_previous/count_abc" in evaluations(trainer)[-1]
    assert not (tmp_path / "out" / "evaluations").exists()


def test_an_earlier_runs_evaluations_are_set_aside(evaluated, tmp_path, caplog):
    evaluated()
    evaluated(max_steps=2)
    assert EvaluationFiles(str(tmp_path / "out")).steps("") == [0, 2]
    assert len(list((tmp_path / "out" / "evaluations-1").glob("*.parquet"))) == 3


def test_limit_keeps_the_first_and_the_last(evaluated, tmp_path):
    evaluated(max_steps=10, save_strategy="steps", save_steps=2, rollouts_total_limit=2)
    assert EvaluationFiles(str(tmp_path / "out")).steps("") == [0, 8, 10]


def test_an_evaluation_outside_a_training_keeps_nothing(evaluated, tmp_path):
    trainer = evaluated(max_steps=2)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.parquet")}
    metrics = trainer.evaluate()
    assert "eval_win_rate_vs_initial/count_abc" in metrics
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.parquet")} == before
    json.dumps(metrics)  # plain numbers


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eval_reward_funcs": length}, "eval_strategy='no' evaluates nothing"),
        ({"eval_preference_func": more_abc}, "eval_strategy='no' evaluates nothing"),
    ],
)
def test_judges_need_evaluations(make_trainer, options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(trainer_kwargs=options)


def test_judges_are_checked(make_trainer):
    with pytest.raises(ValueError, match="is neither a folder with"):
        make_trainer(
            eval_strategy="steps",
            trainer_kwargs={"eval_dataset": EVAL_PROMPTS, "eval_reward_funcs": "no/such/model"},
        )
    with pytest.raises(ValueError, match="one entry per source in eval_reward_funcs"):
        make_trainer(
            eval_strategy="steps",
            trainer_kwargs={
                "eval_dataset": EVAL_PROMPTS, "eval_reward_funcs": length,
                "eval_reward_processing_classes": [None, None],
            },
        )  # fmt: skip


def test_pairwise_oracles_alone(evaluated, tmp_path):
    trainer = evaluated(reward_funcs=None, trainer_kwargs={"preference_func": more_abc})
    assert "eval_win_rate_vs_previous/more_abc/low" in evaluations(trainer)[-1]
    assert EvaluationFiles(str(tmp_path / "out")).read("", 4)[0]["completions"]


def test_chats_with_further_columns(evaluated, tmp_path):
    """Columns of many kinds, None among them, and names that are taken."""
    rows = [
        {"prompt": [{"role": "user", "content": text}], "solution": None if i else "x", "meta": {"a": [i]}, "step": i,
         "lengths": 1}
        for i, text in enumerate(["ab", "q", "z"])
    ]  # fmt: skip
    dataset = Dataset.from_list(rows)

    def judge(completions, solution, meta, **kwargs):
        return [float(len(c[0]["content"])) + len(m["a"]) + (s is None) for c, s, m in
                zip(completions, solution, meta, strict=True)]  # fmt: skip

    trainer = evaluated(
        prompts=dataset["prompt"][:] * 4, trainer_kwargs={"eval_dataset": dataset, "eval_reward_funcs": judge}
    )
    assert "eval_win_rate_vs_previous/judge" in evaluations(trainer)[-1]
    stored = EvaluationFiles(str(tmp_path / "out")).read("", 4)
    assert sorted(group["meta"]["a"][0] for group in stored) == [0, 1, 2]
    assert {group["step"] for group in stored} == {4}


def test_oracles_get_all_columns_also_between_policies(evaluated, caplog):
    """Also those whose names the files of evaluations, or an oracle's own arguments, have."""
    columns = {"prompt": ["ab", "q"], "answers": ["a", "b"], "policy": ["x", "y"], "first": ["c", "d"]}
    seen = set()

    def oracle(prompts, first, second, answers, policy, **kwargs):
        assert set(zip(prompts, answers, policy, strict=True)) <= {("ab", "a", "x"), ("q", "b", "y")}
        seen.update(answers)
        return [0.5] * len(first)

    trainer = evaluated(
        trainer_kwargs={"eval_dataset": Dataset.from_dict(columns), "eval_preference_func": oracle}, both_orders=False
    )
    assert evaluations(trainer)[-1]["eval_win_rate_vs_previous/oracle"] == 0.5 and seen == {"a", "b"}
    assert "lost" not in caplog.text
    assert all(
        "image" not in group.get("dataset_columns", {})
        for groups in trainer._opponents._memory.values()
        for group in groups
    )


def test_sources_and_oracles_of_one_name_are_told_apart(evaluated):
    def count_abc(prompts, first, second, **kwargs):
        return [1.0] * len(first)

    trainer = evaluated(trainer_kwargs={"preference_func": count_abc, "eval_preference_func": count_abc})
    names = {name for name in evaluations(trainer)[-1] if name.startswith("eval_win_rate_vs_initial/count_abc")}
    names = {name.split("/")[1] for name in names}
    assert names == {"count_abc", "count_abc_1", "count_abc_2"}
    assert trainer.describe()["preference_funcs"] == ["count_abc_1"]
    assert trainer.describe()["judges"] == ["count_abc_2"]


def test_a_judge_does_not_rename_what_is_trained_on(make_trainer):
    options = {"preference_func": more_abc, "eval_preference_func": more_abc, "eval_dataset": EVAL_PROMPTS}
    trainer = make_trainer(trainer_kwargs=options, eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=4)
    assert trainer.describe()["preference_funcs"] == ["more_abc"]
    assert trainer.describe()["judges"] == ["more_abc_2"]


def test_messages_of_tools_are_messages_to_oracles(evaluated, monkeypatch, tmp_path):
    """In files they are JSON, since they have many shapes."""
    seen = []

    def oracle(prompts, first, second, **kwargs):
        seen.extend(first + second)
        return [0.5] * len(first)

    monkeypatch.setattr("trl_sppo.evaluation.opponents.Opponents._as_json", True)
    prompts = [[{"role": "user", "content": text}] for text in ("ab", "q")]
    trainer = evaluated(
        prompts=prompts * 4,
        trainer_kwargs={"eval_dataset": Dataset.from_dict({"prompt": prompts}), "eval_preference_func": oracle},
    )
    stored = load_dataset("parquet", data_files=str(EvaluationFiles(str(tmp_path / "out")).path("", 4)), split="train")
    assert json.loads(stored[0]["completions"][0])[0]["role"] == "assistant"
    trainer._opponents._memory.clear()  # as in a resumed run
    trainer._opponents._play(trainer._opponents._get("", 4), trainer._opponents._get("", 2))
    assert seen and all(completion[0]["role"] == "assistant" for completion in seen)
