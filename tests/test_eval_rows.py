"""Rows of the dataset in `trl-sppo eval` and `ladder`: equal prompts, columns with names that are taken, templates."""

import json
import signal
from importlib import import_module
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from helpers import EVAL, EVAL_PROMPTS, JUDGES, TINY, count_abc, make_tokenizer, more_abc, run_here
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForSequenceClassification

from trl_sppo.commands import evaluate as command_evaluate
from trl_sppo.commands import ladder as command_ladder
from trl_sppo.commands.ladder import LadderArguments
from trl_sppo.evaluation import policies
from trl_sppo.evaluation.files import EvaluationFiles, group_of, row_of
from trl_sppo.evaluation.play import aligned, matched, score_groups
from trl_sppo.evaluation.policies import load_completions
from trl_sppo.rollouts.files import write_parquet


assert count_abc and more_abc  # imported by their paths


def write(name: str, *rows: dict) -> str:
    Path(name).write_text("\n".join(map(json.dumps, rows)))
    return name


def exact(completions, gold, **kwargs):
    """A judge: is the completion the gold one of its row?"""
    return [float(completion == each) for completion, each in zip(completions, gold, strict=True)]


def win_rate(output_dir="eval", judge="exact") -> float:
    return json.loads(Path(output_dir, "win_rates.json").read_text())["win_rates"][judge]["win_rate"]["mean"]


def play(model, opponent, *options, judges=("--reward_funcs", "test_eval_rows.exact")):
    return run_here(
        "eval", "--model_name_or_path", model, "--opponent_name_or_path", opponent, *judges, *options,
    )  # fmt: skip


# ---- Equal prompts


def rows(*labels: str) -> list[dict]:
    """ "x1" is prompt "x" with gold "1"; "x" has no gold."""
    return [
        {"prompt": label[0], "completions": [label], **({"gold": label[1:]} if label[1:] else {})} for label in labels
    ]


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        (["x1", "x2", "y1"], ["x1", "x2", "y1"], [("x1", "x1"), ("x2", "x2"), ("y1", "y1")]),
        (["x1", "x2", "y1"], ["x2", "y1", "x1"], [("x1", "x1"), ("x2", "x2"), ("y1", "y1")]),  # by gold
        (["x1", "x2", "y1"], ["y", "x", "x"], [("x1", "x"), ("x2", "x"), ("y1", "y")]),  # by order
        (["x1", "x1", "y1"], ["x1", "y1", "x1"], [("x1", "x1"), ("x1", "x1"), ("y1", "y1")]),
        (["x1", "x2"], ["x2"], [("x2", "x2")]),
        (["x2"], ["x1", "x2"], [("x2", "x2")]),
        (["x1", "x2"], ["x2", "x9"], [("x1", "x9"), ("x2", "x2")]),
        (["x1"], ["x2"], [("x1", "x2")]),  # a column that is of no dataset, perhaps
        (["x1", "y1"], ["z1", "y1"], [("y1", "y1")]),
        (["x1"], ["y1"], []),
    ],
)  # fmt: skip
def test_which_rows_play_against_each_other(ours, theirs, expected):
    found = matched(rows(*ours), rows(*theirs))
    assert [(a["completions"][0], b["completions"][0]) for a, b in zip(*found, strict=True)] == expected
    assert matched(*found) == found  # what is matched stays so
    if expected:
        assert aligned(rows(*ours), rows(*theirs)) == found


TWO_GOLDS = [{"prompt": "x", "gold": "a"}, {"prompt": "x", "gold": "b"}, {"prompt": "y", "gold": "c"}]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_a_perfect_policy_wins_everything(folder, order):
    """Also where a prompt comes twice with two gold completions."""
    perfect = write("perfect.jsonl", *[{**row, "completions": [row["gold"]] * 2} for row in TWO_GOLDS])
    wrong = write("wrong.jsonl", *[{**TWO_GOLDS[i], "completions": ["z"] * 2} for i in order])
    assert play(perfect, wrong) == 0 and win_rate() == 1.0
    facts = json.loads(Path("eval/win_rates.json").read_text())
    assert facts["num_prompts"] == 3
    # What was written is read again, by the scores in it and anew
    assert play("eval/model.parquet", "eval/opponent.parquet", "--output_dir", "again", judges=()) == 0
    assert win_rate("again") == 1.0
    assert play("eval/opponent.parquet", "eval/model.parquet", "--output_dir", "anew") == 0
    assert win_rate("anew") == 0.0


def test_prompts_that_come_unequally_often_are_sampled_and_read_again(folder, caplog):
    Path("prompts/test.jsonl").write_text("\n".join(map(json.dumps, [*TWO_GOLDS, TWO_GOLDS[0]])))
    sides = ("--model_name_or_path", "policy-1", "--opponent_name_or_path", "policy-0")
    assert run_here(*EVAL, "--reward_funcs", "helpers.count_abc", *sides) == 0
    assert "both have completions" not in caplog.text
    for side in ("model", "opponent"):
        groups = load_completions(f"eval/{side}.parquet")
        assert [(group["prompt"], group["gold"]) for group in groups] == [
            ("x", "a"),
            ("x", "b"),
            ("y", "c"),
            ("x", "a"),
        ]
        assert {len(group["completions"]) for group in groups} == {4}
    assert play("eval/model.parquet", "eval/opponent.parquet", "--output_dir", "again", judges=()) == 0
    assert win_rate("again", "count_abc") == win_rate("eval", "count_abc")
    # A file against a policy, which is sampled for the rows of the file
    assert play("eval/model.parquet", "policy-0", "--output_dir", "file", "--max_completion_length", 6) == 0
    assert [group["gold"] for group in load_completions("file/opponent.parquet")] == ["a", "b", "c", "a"]


def test_rows_with_one_completion_each(folder):
    """Those that are equal in all other columns are one group, and only those."""
    name = write(
        "single.jsonl",
        *[{"prompt": prompt, "completion": completion, "gold": gold, "policy": "p"} for prompt, completion, gold in [
            ("x", "1", "a"), ("y", "2", "a"), ("x", "3", "b"), ("x", "4", "a"), ("y", "5", "a"), ("x", "6", "b"),
        ]],
    )  # fmt: skip
    groups = load_completions(name)
    assert [(group["prompt"], group["gold"], group["completions"]) for group in groups] == [
        ("x", "a", ["1", "4"]), ("y", "a", ["2", "5"]), ("x", "b", ["3", "6"])
    ]  # fmt: skip
    uneven = write("uneven.jsonl", *[{"prompt": "x", "completion": c, "likes": n} for c, n in ("a1", "b1", "c2")])
    with pytest.raises(ValueError, match=r"has \[1, 2\] completions per prompt.*leave out columns that describe"):
        load_completions(uneven)


def test_the_ladder_keeps_rows_apart(tmp_path):
    """Step 5 knows both gold completions of one prompt, step 0 none."""
    for step, scores in ((0, [0.0, 0.0]), (5, [1.0, 1.0])):
        groups = [
            {
                "step": step,
                "prompt": "x",
                "gold": gold,
                "completions": [gold],
                "lengths": [1],
                "scores": {"j": [score]},
            }
            for gold, score in zip("ab", scores, strict=True)
        ]
        policies_file = EvaluationFiles(str(tmp_path)).path("", step)
        write_parquet(policies_file, groups[:: 1 if step else -1], None)
    assert run_here("ladder", tmp_path) == 0
    result = json.loads((tmp_path / "ladder.json").read_text())["j"]["5"]["0"]
    assert result["mean"] == 1.0 and result["num_prompts"] == 2


# ---- Columns with names that are taken


TAKEN = {
    "answers": "gold", "step": 3, "policy": "me", "scores": [1, 2], "iteration": 1.5, "versions": {"v": 1}, "run": "r",
    "lengths": "long", "preferences": True, "dataset_columns": "mine", "topic": "free",
}  # fmt: skip


def strict(completions, prompts, answers, step, policy, scores, iteration, versions, run, lengths, preferences,
           dataset_columns, topic, **kwargs):  # fmt: skip
    """A judge that requires columns with all these names."""
    columns = (step, policy, scores, iteration, versions, run, lengths, preferences, dataset_columns, topic)
    assert answers == [f"gold of {prompt}" for prompt in prompts]
    for values, name in zip(columns, list(TAKEN)[1:], strict=True):
        assert values == [TAKEN[name]] * len(prompts), name
    assert not kwargs
    return [float(len(completion)) for completion in completions]


def strict_oracle(prompts, first, second, log_metric, **columns):
    scores = [strict(each, prompts, **columns) for each in (first, second)]
    return [0.5 + 0.5 * ((a > b) - (a < b)) for a, b in zip(*scores, strict=True)]


def taken_rows() -> list[dict]:
    return [{"prompt": prompt, **TAKEN, "answers": f"gold of {prompt}"} for prompt in EVAL_PROMPTS]


STRICT = ("--reward_funcs", "test_eval_rows.strict", "--preference_funcs", "test_eval_rows.strict_oracle")


def test_judges_get_columns_of_every_name(folder):
    Path("prompts/test.jsonl").write_text("\n".join(map(json.dumps, taken_rows())))
    sides = ("--model_name_or_path", "policy-1", "--opponent_name_or_path", "policy-0")
    assert run_here(*EVAL, *STRICT, *sides) == 0
    # They come back from the files
    assert row_of(load_completions("eval/model.parquet")[0]) == taken_rows()[0]
    assert play("eval/model.parquet", "eval/opponent.parquet", "--output_dir", "again", judges=STRICT) == 0
    assert win_rate("again", "strict") == win_rate("eval", "strict") == win_rate("again", "strict_oracle")
    # A file of somebody else: all but its completions are columns of the dataset
    theirs = [{**row, "completion": "abc"} for row in taken_rows()]
    assert play(write("theirs.jsonl", *theirs), "eval/model.parquet", "--output_dir", "their", judges=STRICT) == 0


def test_judges_of_the_ladder_get_columns_of_every_name(folder, make_trainer):
    trainer = make_trainer(
        model="policy-0", eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=1, max_steps=2,
        per_device_eval_batch_size=4, output_dir="run",
        trainer_kwargs={
            "eval_dataset": Dataset.from_list(taken_rows()), "processing_class": make_tokenizer(),
            "eval_preference_func": strict_oracle,
        },
    )  # fmt: skip
    trainer.train()
    assert row_of(EvaluationFiles("run").read("", 2)[0]) == taken_rows()[0]
    assert run_here("ladder", "run", *STRICT) == 0  # which samples step 1
    assert set(json.loads(Path("run/ladder.json").read_text())["strict"]) == set("012")
    # The files of a run are known by their versions: `step` and `policy` are theirs
    path = EvaluationFiles("run").path("", 2)
    assert row_of(load_completions(str(path))[0]) == taken_rows()[0]


def needs_rubric(completions, rubric, **kwargs):
    raise AssertionError


def needs_rubric_too(prompts, first, second, rubric, **kwargs):
    raise AssertionError


def takes_no_more(prompts, completions):
    raise AssertionError


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        (("--reward_funcs", "test_eval_rows.needs_rubric"), "'needs_rubric' cannot be called: missing a required "
         "argument: 'rubric'. It gets prompts, completions, and the columns ['"),
        (("--preference_funcs", "test_eval_rows.needs_rubric_too"), "'needs_rubric_too' cannot be called: missing a"),
        (("--reward_funcs", "test_eval_rows.takes_no_more"), "got an unexpected keyword argument"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("command", ["eval", "ladder"])
def test_a_judge_that_needs_another_column_is_refused_before_sampling(
    folder, command, judge, message, capsys, monkeypatch
):  # fmt: skip
    for module in (command_evaluate, command_ladder):
        monkeypatch.setattr(module, "sample", None)
    if command == "eval":
        sides = ("--model_name_or_path", "policy-1", "--opponent_name_or_path", "policy-0")
        assert run_here(*EVAL, *judge, *sides) == 2
    else:
        Path("run/checkpoint-1").mkdir(parents=True)
        assert run_here("ladder", "run", *judge, "--dataset_name", "prompts") == 2
    assert message in capsys.readouterr().err


def test_a_column_that_only_one_file_has_is_none_to_judges_that_need_it(folder, capsys):
    with_gold = write("with.jsonl", {"prompt": "x", "completions": ["a"], "gold": "a"})
    without = write("without.jsonl", {"prompt": "x", "completions": ["a"]})
    assert play(with_gold, without) == 2
    assert "missing a required argument: 'gold'" in capsys.readouterr().err


def test_prompts_with_images_are_refused(folder, capsys):
    Path("prompts/test.jsonl").write_text(json.dumps({"prompt": "x", "image": "x.png"}))
    assert run_here(*EVAL, *JUDGES, "--model_name_or_path", "policy-1", "--opponent_name_or_path", "policy-0") == 2
    assert "has images, and this command samples from text only" in capsys.readouterr().err


def test_groups_and_rows():
    row = {"prompt": "p", "a": 1, **TAKEN}
    group = group_of(row, completions=["x"], scores={"j": [1.0]})
    assert row_of(group) == row and group["scores"] == {"j": [1.0]}
    assert "dataset_columns" not in group_of({"prompt": "p", "a": 1})


# ---- Prompts as in the training


THINKING = (
    "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'q' if enable_thinking is defined and not enable_thinking else 't' }}{% endif %}"
    "{{ suffix if suffix is defined }}"
)


@pytest.fixture
def prompted(folder, monkeypatch):
    """What each policy was prompted with, by the policy's path, and the texts that a reward model has read."""
    for policy in ("policy-0", "policy-1"):
        make_tokenizer(chat_template=THINKING).save_pretrained(policy)
    chats = [{"prompt": [{"role": "user", "content": prompt}]} for prompt in EVAL_PROMPTS[:2]]
    Path("prompts/test.jsonl").write_text("\n".join(map(json.dumps, chats)))
    seen = {}
    sample_ids = policies.sample_ids

    def spy(model, tokenizer, prompt_ids, sampling, description):
        seen[description] = tokenizer.decode(prompt_ids[0])
        return sample_ids(model, tokenizer, prompt_ids, sampling, description)

    monkeypatch.setattr(policies, "sample_ids", spy)
    return seen


def as_run(policy: str, **config) -> str:
    """A policy as if a training had made it."""
    Path(policy, "run_began.json").write_text(json.dumps({"began_at": "", "config": config}))
    return policy


OFF, ON = {"chat_template_kwargs": {"enable_thinking": False}}, {"chat_template_kwargs": {"enable_thinking": True}}


@pytest.mark.parametrize(
    ("model", "opponent", "option", "expected", "said"),
    [
        (None, None, None, "tt", ""),
        (OFF, OFF, None, "qq", ""),
        (
            OFF,
            ON,
            None,
            "qt",
            'chat_template_kwargs are {"enable_thinking": false} for model and {"enable_thinking": tr',
        ),
        (OFF, {}, None, "qt", "null for opponent, taken from the training of model and opponent"),
        (OFF, None, None, "qq", "taken from the training of model."),
        (None, OFF, None, "qq", "taken from the training of opponent."),
        (OFF, ON, '{"enable_thinking": true}', "tt", ""),
        (OFF, OFF, "{}", "tt", ""),
        (None, None, '{"enable_thinking": false}', "qq", ""),
    ],
)
def test_policies_are_prompted_as_they_were_trained(prompted, model, opponent, option, expected, said, caplog):
    for policy, config in (("policy-1", model), ("policy-0", opponent)):
        if config is not None:
            as_run(policy, **config)
    options = ("--chat_template_kwargs", option) if option else ()
    assert (
        run_here(*EVAL, *JUDGES, "--model_name_or_path", "policy-1", "--opponent_name_or_path", "policy-0", *options)
        == 0
    )
    assert prompted == {"policy-1": "ab" + expected[0], "policy-0": "ab" + expected[1]}
    assert said in caplog.text and ("chat_template_kwargs" in caplog.text) == bool(said)


def test_a_checkpoint_is_prompted_as_its_run(prompted):
    Path("policy-1").rename("checkpoint-3")
    Path("run").mkdir()
    Path("checkpoint-3").rename("run/checkpoint-3")
    as_run("run", **OFF)
    assert (
        run_here(*EVAL, *JUDGES, "--model_name_or_path", "run/checkpoint-3", "--opponent_name_or_path", "policy-0")
        == 0
    )
    assert prompted == {"run/checkpoint-3": "abq", "policy-0": "abq"}


def test_options_of_chat_templates_in_a_file(prompted):
    Path("eval.yaml").write_text("chat_template_kwargs:\n  enable_thinking: false\nnum_generations: 2\n")
    sides = ("--model_name_or_path", "policy-1", "--opponent_name_or_path", "policy-0")
    assert run_here(*EVAL, *JUDGES, *sides, "--config", "eval.yaml") == 0
    assert set(prompted.values()) == {"abq"}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("thinking", "chat_template_kwargs must be a mapping, got 'thinking'"),
        ("[1]", "chat_template_kwargs must be a mapping, got [1]"),
        ('{"tokenize": false}', "chat_template_kwargs: tokenize is set by TRL itself"),
    ],
)
def test_options_of_chat_templates_are_checked(folder, value, message, capsys):
    assert run_here(*EVAL, "--chat_template_kwargs", value) == 2
    assert message in capsys.readouterr().err


def test_the_ladder_prompts_as_the_run_did_and_reward_models_too(prompted, make_trainer, monkeypatch):
    """Against what TRL renders in the training."""
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertForSequenceClassification(BertConfig(vocab_size=31, num_labels=1, **sizes)).save_pretrained("reward")
    make_tokenizer(chat_template=THINKING).save_pretrained("reward")
    kwargs = {"enable_thinking": False, "suffix": "z"}
    dataset = Dataset.from_json("prompts/test.jsonl")
    trainer = make_trainer(
        model="policy-0", reward_funcs=["reward"], eval_strategy="steps", eval_steps=2, save_strategy="steps",
        save_steps=1, max_steps=2, per_device_eval_batch_size=4, output_dir="run", chat_template_kwargs=kwargs,
        trainer_kwargs={
            "train_dataset": dataset, "eval_dataset": dataset,
            "processing_class": AutoTokenizer.from_pretrained("policy-0"),
        }, per_device_train_batch_size=4,
    )  # fmt: skip
    trained_on = []
    tokenize = trainer._tokenize_prompts

    def spy(prompts):
        output = tokenize(prompts)
        trained_on.extend(trainer.processing_class.batch_decode(output[0]))
        return output

    monkeypatch.setattr(trainer, "_tokenize_prompts", spy)
    trainer.train()
    stored = EvaluationFiles("run").read("", 2)
    assert run_here("ladder", "run", "--reward_model_name_or_path", "reward") == 0
    assert prompted == {"run/checkpoint-1": "abqz"} and set(trained_on) == {"abqz", "fghqz"}
    panel = LadderArguments(reward_model_name_or_path=["reward"], chat_template_kwargs=kwargs)
    again = [{name: group[name] for name in ("prompt", "completions")} for group in stored]
    score_groups(panel.load_panel(again[0]["prompt"], ["prompt"], kwargs), again)
    for before, after in zip(stored, again, strict=True):
        assert after["scores"]["reward"] == pytest.approx(before["scores"]["reward"], abs=1e-5)


def test_tools_of_the_training_are_missed(folder, caplog):
    Path("policy-1/run_began.json").write_text(json.dumps({"config": {}, "tools": ["search", "add"]}))
    assert run_here(*EVAL, *JUDGES, "--model_name_or_path", "policy-1", "--opponent_name_or_path", "policy-0") == 0
    assert "'policy-1' was trained with tools (search, add), which are not available here" in caplog.text


# ---- Ctrl-C, and vLLM that is not there


@pytest.mark.parametrize("moment", ["sampling the first", "sampling the second", "judging"])
def test_ctrl_c_keeps_what_was_sampled(folder, moment, monkeypatch, capsys):
    calls = []
    sample = command_evaluate.sample

    def interrupt(*args):
        calls.append(args)
        if len(calls) == 1 + (moment != "sampling the first"):
            signal.raise_signal(signal.SIGINT)
        return sample(*args)

    target = (command_evaluate, "play") if moment == "judging" else (command_evaluate, "sample")
    monkeypatch.setattr(*target, interrupt if target[1] == "sample" else lambda *args: signal.raise_signal(2))
    Path("eval").mkdir()
    Path("eval/win_rates.json").write_text("of an earlier evaluation")
    sides = ("--model_name_or_path", "policy-1", "--opponent_name_or_path", "policy-0")
    assert run_here(*EVAL, *JUDGES, *sides) == 130
    said = capsys.readouterr().err.splitlines()[-1]
    kept = sorted(path.name for path in Path("eval").glob("[!_]*"))
    assert said == "trl-sppo: interrupted."
    if moment == "sampling the first":
        assert kept == ["win_rates.json"]
        return
    names = ["model.parquet", "opponent.parquet"][: len(kept)]
    assert kept == names and len(kept) == 1 + (moment == "judging")
    options = " and ".join(f"--{name.split('.')[0]}_name_or_path eval/{name}" for name in names)
    # They are given in the place of the policies
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    sides = (*options.replace(" and ", " ").split(), "--output_dir", "again", *sides[2:][: 2 * (len(kept) == 1)])
    assert run_here(*EVAL, *JUDGES, *sides) == 0


def test_a_judge_that_fails_loses_no_completions(folder, capsys):
    sides = ("--model_name_or_path", "policy-1", "--opponent_name_or_path", "policy-0")
    assert run_here(*EVAL, "--reward_funcs", "test_evaluate.broken", *sides) == 2
    assert "ZeroDivisionError" in (error := capsys.readouterr().err)
    assert "--model_name_or_path eval/model.parquet and --opponent_name_or_path eval/opponent.parquet" in error
    assert len(load_completions("eval/model.parquet")) == len(EVAL_PROMPTS)


@pytest.mark.parametrize("command", ["ladder", "report", "check"])
def test_ctrl_c_of_other_commands(folder, command, monkeypatch, capsys):
    name = {"ladder": "climb_run", "report": "main", "check": "main"}[command]
    module = import_module(f"trl_sppo.commands.{command}")
    monkeypatch.setattr(module, name, lambda *args: signal.raise_signal(signal.SIGINT))
    assert run_here(command, "prompts") == 130
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert lines == ["trl-sppo: interrupted."]


@pytest.mark.parametrize("command", ["eval", "ladder"])
def test_vllm_that_is_not_installed(folder, command, monkeypatch, capsys):
    find_spec = policies.check_vllm_is_installed.__globals__["importlib"].util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *args: None if name == "vllm" else find_spec(name))
    for module in (command_evaluate, command_ladder):
        monkeypatch.setattr(module, "sample", None)
    Path("run/checkpoint-1").mkdir(parents=True)
    sides = ("--model_name_or_path", "policy-1", "--opponent_name_or_path", "policy-0") if command == "eval" else ()
    start = EVAL if command == "eval" else ("ladder", "run", "--dataset_name", "prompts")
    assert run_here(*start, *JUDGES, *sides, "--use_vllm", "true") == 2
    assert (
        "needs vLLM, which is not installed. Install it with `pip install trl-sppo[vllm]`" in capsys.readouterr().err
    )


# ---- Found before anything is sampled


def conversations(*rows) -> None:
    lines = [json.dumps({"prompt": [{"role": role, "content": "ab"} for role in roles]}) for roles in rows]
    Path("prompts/test.jsonl").write_text("\n".join(lines))


NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}ab"
SIDES = ("--model_name_or_path", "policy-1", "--opponent_name_or_path", "policy-0")


@pytest.mark.parametrize(
    ("rows", "who", "message"),
    [
        ((["user"], ["system", "user"]), "policy-0", "prompt 1 cannot be read by policy 'policy-0': no system"),
        ((["user"], ["system", "user"]), "judge", "prompt 1 is refused by the chat template of judge 'judge': no sys"),
        ((["user"], ["user", "assistant"]), None, "prompt 1 cannot be read by policy 'policy-1': it ends with an "),
    ],
)  # fmt: skip
def test_prompts_that_cannot_be_read(folder, capsys, monkeypatch, rows, who, message):
    conversations(*rows)
    Qwen2ForSequenceClassification(Qwen2Config(**TINY, num_labels=1)).save_pretrained("judge")
    make_tokenizer().save_pretrained("judge")
    if who:
        make_tokenizer(chat_template=NO_SYSTEM).save_pretrained(who)
    monkeypatch.setattr(command_evaluate, "sample", lambda *args: pytest.fail("too late"))
    assert run_here(*EVAL, "--reward_model_name_or_path", "judge", *SIDES) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "{"])
def test_files_that_are_empty_or_torn(folder, capsys, content):
    Path("prompts/test.jsonl").write_text(content)
    Path("file.jsonl").write_text(content)
    assert run_here(*EVAL, *JUDGES, *SIDES) == 2
    assert "dataset_name='prompts' with dataset_test_split='test' cannot be loaded" in capsys.readouterr().err
    assert (
        run_here("eval", *JUDGES, "--model_name_or_path", "file.jsonl", "--opponent_name_or_path", "file.jsonl") == 2
    )
    assert "completions 'file.jsonl' cannot be read" in capsys.readouterr().err


def test_a_judge_that_runs_out_of_memory_loses_no_completions(folder, capsys, monkeypatch):
    def score(panel, groups):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(command_evaluate, "score_groups", score)
    assert run_here(*EVAL, *JUDGES, *SIDES) == 2
    assert "trl-sppo: error: CUDA out of memory" in capsys.readouterr().err
    assert len(load_completions("eval/model.parquet")) > 0


def test_columns_with_empty_lists(folder, make_trainer):
    """TRL's test for conversations fails on them."""
    rows = Dataset.from_list(
        [{"prompt": "ab", "tags": []}, {"prompt": "ab", "tags": ["x"]}, {"prompt": "c", "tags": []}]
    )
    trainer = make_trainer(
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=4,
        trainer_kwargs={"eval_dataset": Dataset.from_list(rows)},
    )
    trainer.train()
    assert "eval_win_rate_vs_previous/count_abc" in trainer.state.log_history[-2]


def test_a_policy_that_was_trained_on_images_is_not_sampled_without_them(folder, capsys):
    Path("run_began.json").write_text(json.dumps({"began_at": "2026", "images": True, "config": {}}))
    assert run_here(*EVAL, *JUDGES, *SIDES) == 2
    assert "policy 'policy-1' was trained on images" in capsys.readouterr().err
