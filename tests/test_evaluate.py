"""`trl-sppo eval` and `trl-sppo ladder`, and what they stand on."""

import json
import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from helpers import EVAL, EVAL_PROMPTS, JUDGES, TINY, count_abc, make_tokenizer, more_abc, run_here
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
)

from trl_sppo.commands import ladder as command_ladder
from trl_sppo.evaluation import ladder
from trl_sppo.evaluation.files import EvaluationFiles
from trl_sppo.evaluation.play import score_groups
from trl_sppo.evaluation.policies import Sampling, load_completions, sample, sample_ids
from trl_sppo.evaluation.statistics import WinRate
from trl_sppo.oracles.panel import load_panel
from trl_sppo.rollouts.files import write_parquet
from trl_sppo.runs.report import read_history


@pytest.mark.parametrize("policy", ["policy-1", "adapter"])
def test_eval(folder, policy, capsys):
    assert run_here(*EVAL, *JUDGES, "--model_name_or_path", policy, "--opponent_name_or_path", "policy-0") == 0
    facts = json.loads((folder / "eval" / "win_rates.json").read_text())
    sides = {side: load_completions(f"eval/{side}.parquet") for side in ("model", "opponent")}
    assert [group["prompt"] for group in sides["model"]] == EVAL_PROMPTS and sides["model"][0]["topic"] == 2
    won = []
    for ours, theirs in zip(*sides.values(), strict=True):
        assert len(ours["completions"]) == len(ours["lengths"]) == 4 and max(ours["lengths"]) <= 6
        pairs = [(a, b) for a in count_abc(ours["completions"]) for b in count_abc(theirs["completions"])]
        won.append(sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs))
    assert set(facts["win_rates"]) == {"count_abc", "more_abc"}
    for rates in facts["win_rates"].values():
        assert rates["win_rate"]["mean"] == pytest.approx(sum(won) / len(won))
    said = capsys.readouterr().out
    plain, controlled = (
        WinRate(**facts["win_rates"]["count_abc"][name]) for name in ("win_rate", "length_controlled")
    )
    assert re.search(r"^judge +win rate, 95 % interval +length-controlled +prompts$", said, re.MULTILINE), said
    assert re.search(rf"^count_abc +{re.escape(f'{plain}')} +{re.escape(f'{controlled}')} +6$", said, re.MULTILINE), (
        said
    )
    length = facts["mean_length"]["model"]
    assert re.search(rf"^model +{policy} +{length:.1f} tokens$", said, re.MULTILINE), said


def test_eval_of_a_policy_against_itself_uses_other_random_numbers(folder):
    assert run_here(*EVAL, *JUDGES, "--model_name_or_path", "policy-0", "--opponent_name_or_path", "policy-0") == 0
    sides = [load_completions(f"eval/{side}.parquet") for side in ("model", "opponent")]
    assert sides[0][0]["completions"] != sides[1][0]["completions"]


def test_eval_of_files(folder, caplog):
    (folder / "a.jsonl").write_text(
        "\n".join(
            json.dumps({"prompt": prompt, "completion": completion})
            for prompt, completion in [
                ("x", "aaa"),
                ("y", "ab"),
                ("x", "zzz"),
                ("y", "b"),
                ("only here", "a"),
                ("only here", "b"),
            ]
        )
    )
    (folder / "b.csv").write_text("prompt,completion\ny,a\nx,aa\n")
    files = (
        "--model_name_or_path",
        "a.jsonl",
        "--opponent_name_or_path",
        "b.csv",
        "--reward_funcs",
        "helpers.count_abc",
    )
    # x: 3 and 0 against 2 -> 1/2; y: 2 and 1 against 1 -> 3/4
    assert run_here("eval", *files) == 0
    facts = json.loads((folder / "eval" / "win_rates.json").read_text())
    assert facts["win_rates"]["count_abc"]["win_rate"]["mean"] == 0.625 and facts["num_prompts"] == 2
    assert "the two policies are compared on the 2 prompts for which both have completions" in caplog.text
    assert run_here("eval", *files, "--at_least", 0.01) == 0
    assert run_here("eval", *files, "--at_least", 0.6) == 1  # the lower bound counts
    # A column that only some rows have is one to oracles too
    for name, text in (("c", "aa"), ("d", "b")):
        rows = [{"prompt": "x", "completion": text, "ref": "r"}, {"prompt": "y", "completion": text}]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sides = ("--model_name_or_path", "c.jsonl", "--opponent_name_or_path", "d.jsonl")
    assert run_here("eval", *sides, "--output_dir", "refs", "--preference_funcs", "helpers.more_abc") == 0
    # What was written can be compared again, by the scores in it
    files = ("--model_name_or_path", "eval/opponent.parquet", "--opponent_name_or_path", "eval/model.parquet")
    assert run_here("eval", *files, "--output_dir", "again") == 0
    facts = json.loads((folder / "again" / "win_rates.json").read_text())
    assert facts["win_rates"]["count_abc"]["win_rate"]["mean"] == 0.375


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--opponent_name_or_path", "policy-0"), "model_name_or_path is missing"),
        (("--model_name_or_path", "nowhere", "--opponent_name_or_path", "policy-0"), "policy 'nowhere' is neither"),
        (("--model_name_or_path", "policy-0", "--opponent_name_or_path", "policy-0"), "no judge given. Pass --"),
        (("--model_name_or_path", "policy-0", "--oponent", "policy-0"), "HfArgumentParser: ['--oponent'"),
        (("--temperature", "0"), "temperature must be positive"),
        (("--num_generations", "0"), "num_generations must be at least 1, got 0"),
        (("--model_name_or_path", "policy-0", "--opponent_name_or_path", "policy-0", "--dataset_test_split", "no",
          *JUDGES), "dataset_test_split='no' cannot be"),
        (("--model_name_or_path", "bad.jsonl", "--opponent_name_or_path", "policy-0", *JUDGES),
         "needs columns 'prompt'"),
        (("--model_name_or_path", "ragged.jsonl", "--opponent_name_or_path", "policy-0", *JUDGES),
         "has [1, 2] completions per prompt"),
        (("--model_name_or_path", "policy-0", "--opponent_name_or_path", "policy-0", "--reward_funcs", "no.such"),
         "(--reward_funcs) could not be imported"),
        (("--model_name_or_path", "pickled", "--opponent_name_or_path", "policy-0", *JUDGES), "only safetensors"),
    ],
)  # fmt: skip
def test_eval_messages(folder, argv, message, capsys):
    (folder / "bad.jsonl").write_text('{"question": "x"}')
    (folder / "ragged.jsonl").write_text(
        '{"prompt": "x", "completions": ["a"]}\n{"prompt": "y", "completions": ["a", "b"]}'
    )
    (folder / "pickled").mkdir()
    (folder / "pickled" / "pytorch_model.bin").write_text("")
    assert run_here(*EVAL, *argv) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (folder / "eval").exists()


def test_sampling_is_of_the_policy(folder):
    """Frequencies of first tokens against the model's probabilities at this temperature."""
    model, tokenizer = Qwen2ForCausalLM.from_pretrained("policy-0").eval(), make_tokenizer()
    sampling = Sampling(num_generations=4000, max_completion_length=1, temperature=0.5, batch_size=4000)
    prompts = [[3, 4], [5]]  # of different lengths
    ids = sample_ids(model, tokenizer, prompts, sampling)
    for prompt, group in zip(prompts, ids, strict=True):
        with torch.no_grad():
            expected = (model(torch.tensor([prompt])).logits[0, -1] / 0.5).softmax(dim=0)
        counts = torch.bincount(torch.tensor([each[0] for each in group]), minlength=31) / 4000
        assert (counts - expected).abs().max() < 4 * (expected.max() / 4000) ** 0.5
    assert ids == sample_ids(model, tokenizer, prompts, sampling)


def test_completions_end_with_their_eos(folder):
    prompts = Dataset.from_dict({"prompt": EVAL_PROMPTS})
    groups = sample("policy-0", prompts, Sampling(num_generations=50, max_completion_length=8, temperature=2.0))
    lengths = [length for group in groups for length in group["lengths"]]
    texts = [text for group in groups for text in group["completions"]]
    assert 1 <= min(lengths) < 8 == max(lengths)
    # an EOS token is counted and not shown; others of the tiny vocabulary may decode to nothing too
    assert all(len(text) <= length for text, length in zip(texts, lengths, strict=True))


@pytest.mark.parametrize("eos", [5, [5, 9], None])
def test_all_tokens_that_end_a_training_completion_end_it_here(folder, eos):
    """The tokenizer's, and those that the checkpoint names."""
    model, tokenizer = Qwen2ForCausalLM.from_pretrained("policy-0").eval(), make_tokenizer()
    model.generation_config.eos_token_id = eos
    (group,) = sample_ids(model, tokenizer, [[3, 4]], Sampling(400, 12, temperature=2.0))
    ends = {1, *([] if eos is None else [eos] if isinstance(eos, int) else eos)}
    assert {ids[-1] for ids in group if len(ids) < 12} == ends
    assert not any(ends & set(ids[:-1]) for ids in group)


def test_a_panel_scores_like_the_trainer(folder, make_trainer):
    """The same reward model, on the same completions, in both."""
    torch.manual_seed(0)
    BertForSequenceClassification(
        BertConfig(vocab_size=31, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                   num_labels=1)
    ).save_pretrained("reward")  # fmt: skip
    make_tokenizer().save_pretrained("reward")
    chats = [[{"role": "user", "content": prompt}] for prompt in EVAL_PROMPTS]
    for prompts in (EVAL_PROMPTS, chats):
        trainer = make_trainer(
            reward_funcs=["reward", count_abc], prompts=prompts, eval_strategy="steps", eval_steps=1,
            per_device_eval_batch_size=4, output_dir=str(folder / f"run-{len(prompts[0])}"),
            trainer_kwargs={"eval_dataset": Dataset.from_dict({"prompt": prompts})}, max_steps=1,
            per_device_train_batch_size=4,
        )  # fmt: skip
        trainer.train()
        stored = EvaluationFiles(trainer.args.output_dir).read("", 1)
        groups = [{name: group[name] for name in ("prompt", "completions", "lengths")} for group in stored]
        score_groups(load_panel(["reward", count_abc], [], conversational=prompts is chats), groups)
        for group, again in zip(stored, groups, strict=True):
            for name in ("reward", "count_abc"):
                assert again["scores"][name] == pytest.approx(group["scores"][name], abs=1e-5)


def test_judges_of_the_same_name_are_told_apart(folder):
    for name in ("a", "b"):
        Qwen2ForSequenceClassification(Qwen2Config(**TINY, num_labels=1)).save_pretrained(f"{name}/rm")
        make_tokenizer().save_pretrained(f"{name}/rm")
    panel = load_panel(["a/rm/", count_abc, "b/rm"], [more_abc, count_abc], conversational=False)
    assert panel.sources.names == ["rm_0", "count_abc_1", "rm_2"] and list(panel.oracles) == [
        "more_abc",
        "count_abc_4",
    ]


# ---- The ladder


def make_run(folder, scores: dict[int, list[list[float]]]):
    for step, table in scores.items():
        groups = [
            {"step": step, "prompt": f"p{i}", "completions": ["a"] * len(row), "lengths": [1] * len(row),
             "scores": {"judge": row}, "policy": "x", "versions": {"trl_sppo": "0", "trl": "1", "transformers": "2",
             "torch": "3", "vllm": None}}
            for i, row in enumerate(table)
        ]  # fmt: skip
        write_parquet(EvaluationFiles(str(folder)).path("", step), groups, None)


def test_ladder_golden(tmp_path, capsys):
    make_run(tmp_path, {0: [[1.0], [1.0]], 5: [[2.0], [1.0]], 10: [[0.0], [3.0]]})
    assert run_here("ladder", tmp_path) == 0
    matrix = json.loads((tmp_path / "ladder.json").read_text())["judge"]
    assert matrix["5"]["0"]["mean"] == 0.75 and matrix["0"]["5"]["mean"] == 0.25  # a win and a tie
    assert matrix["10"]["5"]["mean"] == 0.5 and matrix["10"]["0"]["mean"] == 0.5
    assert matrix["0"]["5"]["low"] == pytest.approx(1 - matrix["5"]["0"]["high"])
    assert (tmp_path / "ladder.png").stat().st_size > 5000
    out = capsys.readouterr().out
    assert (
        "step      0      5     10\n0         -  0.250  0.500\n5     0.750      -  0.500\n10    0.500  0.500      -"
        in out
    )
    assert "step 5 cannot be distinguished from step 0: 0.750" in out and "no circles" in out


def test_circles():
    def rate(mean):
        return WinRate(mean, mean - 0.05, mean + 0.05, 100)

    def matrix(ab, bc, ca):
        return {
            "0": {"5": rate(ab), "10": rate(1 - ca)},
            "5": {"0": rate(1 - ab), "10": rate(bc)},
            "10": {"0": rate(ca), "5": rate(1 - bc)},
        }

    assert ladder.verdict(matrix(0.6, 0.7, 0.8))[3:] == ["circle: step 0 beats 5, 5 beats 10, 10 beats 0"]
    assert ladder.verdict(matrix(0.4, 0.3, 0.2))[3:] == ["circle: step 0 beats 10, 10 beats 5, 5 beats 0"]
    for rates in ((0.6, 0.7, 0.4), (0.52, 0.7, 0.8)):  # none, and one that may be noise
        assert ladder.verdict(matrix(*rates))[3:] == ["no circles beyond the noise"]


def test_the_ladder_samples_checkpoints_that_were_not_evaluated(make_trainer, folder, capsys, monkeypatch):
    trainer = make_trainer(
        model="policy-0", eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=1, max_steps=2,
        per_device_eval_batch_size=4, output_dir="run", learning_rate=0.1,
        trainer_kwargs={
            "eval_dataset": Dataset.from_dict({"prompt": EVAL_PROMPTS}), "processing_class": make_tokenizer(),
        },
    )  # fmt: skip
    trainer.train()
    assert run_here("ladder", "run") == 0
    assert "the checkpoints of steps [1], which no evaluation sampled" in capsys.readouterr().err
    assert set(json.loads((folder / "run" / "ladder.json").read_text())["count_abc"]) == {"0", "2"}

    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("trl_sppo.evaluation.ladder.score_groups", interrupt)
        assert run_here("ladder", "run", *JUDGES) == 130
    assert "Completions of the checkpoints of steps [1] go to run/ladder." in capsys.readouterr().err
    assert len(load_completions("run/ladder/step-000001.parquet")) == len(EVAL_PROMPTS)
    assert run_here("ladder", "run", *JUDGES) == 0
    result = json.loads((folder / "run" / "ladder.json").read_text())
    assert set(result) == {"count_abc", "more_abc"} and set(result["more_abc"]) == {"0", "1", "2"}
    for a, b in (("1", "0"), ("2", "1")):  # the oracle's opinion is that of the scores
        assert result["count_abc"][a][b]["mean"] == pytest.approx(result["more_abc"][a][b]["mean"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("ladder",), "Pass the output directory of a run first"),
        (("ladder", "nowhere"), "'nowhere' is not a folder"),
        (("ladder", "prompts"), "a ladder needs two policies, but 'prompts' has only steps []"),
        (("report", "prompts"), "has no trainer_state.json"),
        (("report", "prompts", "--x"), "not used by the HfArgumentParser: ['--x']"),
    ],
)
def test_messages(folder, argv, message, capsys):
    assert run_here(*argv) == 2
    assert message in capsys.readouterr().err


def test_help(capsys):
    for command in ("eval", "ladder", "report"):
        assert run_here(command, "--help") == 0
        assert command in capsys.readouterr().out


assert more_abc  # imported by its path


def test_eval_and_report_with_pairwise_oracles_alone(folder, make_trainer):
    sides = ("--model_name_or_path", "policy-1", "--opponent_name_or_path", "policy-0")
    assert run_here(*EVAL, *JUDGES[2:], *sides) == 0
    assert set(json.loads((folder / "eval" / "win_rates.json").read_text())["win_rates"]) == {"more_abc"}
    trainer = make_trainer(
        model="policy-0", reward_funcs=None, eval_strategy="steps", eval_steps=1, max_steps=2, output_dir="run",
        per_device_eval_batch_size=4,
        trainer_kwargs={
            "eval_dataset": Dataset.from_dict({"prompt": EVAL_PROMPTS}), "processing_class": make_tokenizer(),
            "preference_func": more_abc,
        },
    )  # fmt: skip
    trainer.train()
    trainer.save_state()
    assert run_here("report", "run") == 0
    page = (folder / "run" / "report.html").read_text()
    assert "<td>more_abc</td><td>yes</td>" in page  # of the log: the files have no scores
    assert run_here("ladder", "run") == 2
    assert run_here("ladder", "run", *JUDGES[2:]) == 0


def test_report_of_a_run_with_several_evaluation_sets(folder, make_trainer):
    sets = {name: Dataset.from_dict({"prompt": EVAL_PROMPTS[:size]}) for name, size in (("one", 2), ("two", 3))}
    trainer = make_trainer(
        model="policy-0", eval_strategy="steps", eval_steps=1, max_steps=2, output_dir="run",
        per_device_eval_batch_size=4, trainer_kwargs={"eval_dataset": sets, "processing_class": make_tokenizer()},
    )  # fmt: skip
    trainer.train()
    trainer.save_state()
    assert run_here("report", "run") == 0
    assert run_here("ladder", "run", "--evaluation_set", "two") == 0
    assert run_here("ladder", "run", "--evaluation_set", "three") == 2
    page = folder / "run" / "report.html"
    assert "the evaluation prompts of one" in page.read_text() and page.read_text().count("<tr data-outcome") == 2
    assert run_here("report", "run", "--evaluation_set", "two") == 0
    text = page.read_text()
    assert "the evaluation prompts of two" in text and text.count("<tr data-outcome") == 3
    assert text.count("<svg") == 4  # with win rates and ladder


def test_what_an_earlier_run_has_left_is_none_of_this_runs(folder, make_trainer, capsys, caplog):
    def train(steps):
        trainer = make_trainer(
            model="policy-0", eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=1,
            max_steps=steps, per_device_eval_batch_size=4, output_dir="run",
            trainer_kwargs={
                "eval_dataset": Dataset.from_dict({"prompt": EVAL_PROMPTS}), "processing_class": make_tokenizer()
            },
        )  # fmt: skip
        trainer.train()
        return trainer

    train(4).save_state()
    train(2)
    capsys.readouterr()
    assert run_here("ladder", "run") == 0
    assert "the checkpoints of steps [1], which" in capsys.readouterr().err  # and not 3, and there is no rung 4
    assert "checkpoint-3 is an earlier run's and is left out" in caplog.text
    assert max(row["step"] for row in read_history(folder / "run")) == 2
    (folder / "run" / "run_began.json").unlink()  # as if of another trainer, which marks nothing
    assert run_here("ladder", "run", *JUDGES) == 0
    assert set(json.loads((folder / "run" / "ladder.json").read_text())["count_abc"]) == set("01234")


def test_the_ladder_samples_as_the_run_did_unless_told_otherwise(tmp_path, monkeypatch):
    config = {"temperature": 0.3, "max_completion_length": 9, "num_generations": 8, "num_generations_eval": None}
    (tmp_path / "run_began.json").write_text(json.dumps({"config": config}))
    seen = []

    def climb_run(run, args):
        seen.append(args)
        raise ValueError("enough")

    monkeypatch.setattr(command_ladder, "climb_run", climb_run)
    for argv in ([], ["--temperature", "0.8", "--num_generations", "4"]):
        assert run_here("ladder", tmp_path, *argv) == 2
    first, second = seen
    assert (first.temperature, first.max_completion_length, first.num_generations) == (0.3, 9, 8)
    assert (second.temperature, second.max_completion_length, second.num_generations) == (0.8, 9, 4)


def test_the_ladder_pairs_by_prompt_and_leaves_out_who_did_not_play(tmp_path):
    make_run(tmp_path, {0: [[1.0], [5.0]], 2: [[2.0], [6.0]], 4: [[0.0], [0.0]]})
    files = EvaluationFiles(str(tmp_path))
    groups = files.read("", 2)[::-1]  # another order: each still beats the answer to its own prompt
    write_parquet(files.path("", 2), groups, None)
    late = files.read("", 4)
    for group in late:
        group["scores"] = {"judge": group["scores"]["judge"], "late": [1.0]}
    write_parquet(files.path("", 4), late, None)
    assert run_here("ladder", tmp_path) == 0
    result = json.loads((tmp_path / "ladder.json").read_text())
    assert result["judge"]["2"]["0"]["mean"] == 1.0 and set(result) == {"judge"}


def test_the_checkpoints_own_sampling_is_not_taken(folder):
    model = Qwen2ForCausalLM.from_pretrained("policy-0").eval()
    sampling = Sampling(num_generations=8, max_completion_length=6, temperature=1.0)
    expected = sample_ids(model, make_tokenizer(), [[3, 4]], sampling)
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.min_p = 0.9
    assert sample_ids(model, make_tokenizer(), [[3, 4]], sampling) == expected


def test_lengths_in_one_unit(folder):
    """Tokens of one side are not compared with words of the other."""
    (folder / "a.jsonl").write_text(
        json.dumps({"prompt": "x", "completions": ["a b"], "lengths": [7], "scores": None})
    )
    (folder / "b.jsonl").write_text(json.dumps({"prompt": "x", "completions": ["c"], "answers": ["kept out"]}))
    files = ("--model_name_or_path", "a.jsonl", "--opponent_name_or_path", "b.jsonl", *JUDGES[:2])
    assert run_here("eval", *files) == 0
    facts = json.loads((folder / "eval" / "win_rates.json").read_text())
    assert facts["mean_length"] == {"model": 2, "opponent": 1} and facts["unit_of_length"] == "words"


def test_more_eval_messages(folder, capsys):
    (folder / "a.jsonl").write_text(json.dumps({"prompt": "x", "completions": ["a"]}))
    sides = ("eval", "--model_name_or_path", "a.jsonl", "--opponent_name_or_path", "a.jsonl")
    assert run_here(*sides, *JUDGES[:2], "--output_dir", ".") == 2
    assert "lies in output_dir" in capsys.readouterr().err
    assert run_here(*sides, "--reward_funcs", "test_evaluate.broken") == 2
    assert "judge 'broken' failed: ZeroDivisionError" in capsys.readouterr().err
    assert run_here(*sides, "--reward_funcs", "helpers.count_abc", "--preference_funcs", "test_evaluate.namesake") == 0
    assert set(json.loads(Path("eval/win_rates.json").read_text())["win_rates"]) == {"count_abc_0", "count_abc_1"}


def broken(prompts, **kwargs):
    return 1 / 0


def namesake(prompts, first, second, **kwargs):
    return [0.5] * len(prompts)


namesake.__name__ = "count_abc"
