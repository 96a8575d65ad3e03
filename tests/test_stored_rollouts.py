"""Rollouts as data: written by a run, read by `datasets`, trained on by another run."""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset, load_dataset
from helpers import count_abc, make_tokenizer, more_abc, weights
from peft import LoraConfig

from trl_sppo.rollouts.files import COLUMNS, RolloutFiles
from trl_sppo.rollouts.given import load_rollouts


# Two optimizer steps for each iteration of four prompts
ITERATIONS = {"per_device_train_batch_size": 8, "steps_per_generation": 2, "gradient_accumulation_steps": 1}


def rollouts_of(folder) -> Dataset:
    return load_dataset(str(Path(folder) / "rollouts"), split="train")


def train_on(make_trainer, path, **options):
    return make_trainer(prompts=None, trainer_kwargs={"train_dataset": None}, rollouts=str(path), **options)


def test_what_is_written(make_trainer, tmp_path):
    """Four iterations of four groups: all that is needed to see, and to learn from, what was sampled."""
    prompts = Dataset.from_dict({"prompt": ["ab", "fgh", "cd e", "xyz"], "level": [1, 2, 3, 4]})
    trainer = make_trainer(
        max_steps=8,
        **ITERATIONS,
        trainer_kwargs={"preference_func": more_abc, "train_dataset": prompts},
    )
    trainer.train()
    rows = rollouts_of(tmp_path / "out")
    assert rows["iteration"] == [i for i in range(4) for _ in range(4)]
    assert rows["step"] == [2 * i for i in range(4) for _ in range(4)]
    assert set(rows.column_names) == {"prompt", "level"} | COLUMNS.keys() - {"importance_weights"}
    tokenizer = make_tokenizer()
    for row in rows:
        assert row["level"] == ["ab", "fgh", "cd e", "xyz"].index(row["prompt"]) + 1
        assert row["prompt_ids"] == tokenizer(row["prompt"])["input_ids"]
        assert tokenizer.batch_decode(row["completion_ids"], skip_special_tokens=True) == row["completions"]
        assert row["scores"] == {"count_abc": count_abc(row["completions"])}
        for i, j in ((0, 1), (1, 0), (2, 3)):
            score = count_abc([row["completions"][i], row["completions"][j]])
            expected = 0.5 + 0.5 * ((score[0] > score[1]) - (score[0] < score[1]))
            assert row["preferences"][i][j] == expected
            if row["completions"][i] != row["completions"][j]:
                assert row["answers"]["more_abc"][i][j] == expected
        for i in range(4):
            others = [row["preferences"][i][j] for j in range(4) if j != i]
            assert row["win_rates"][i] == pytest.approx(sum(others) / 3, abs=1e-6)
            if row["logps"][i] is not None:
                assert len(row["logps"][i]) == len(row["completion_ids"][i]) and max(row["logps"][i]) < 0
            else:  # not trained on
                assert row["win_rates"][i] == 0.5
        assert row["versions"]["trl"] == "1.16.0" and row["versions"]["vllm"] is None
    assert any(logps is not None for row in rows for logps in row["logps"])
    assert len(set(rows["run"])) == 1


@pytest.mark.parametrize("lora", [False, True])
def test_one_step_on_stored_rollouts_is_that_of_the_run_that_sampled(make_trainer, tmp_path, tiny_policy, lora):
    """Sampled and judged by another process: the same weights, without asking anybody."""
    adapter = {"peft_config": LoraConfig(r=2, target_modules="all-linear")} if lora else {}
    options = {
        "model": tiny_policy, "shuffle_dataset": False, "max_steps": 1, "per_device_train_batch_size": 16,
        "optim": "sgd", "prompts": ["ab", "fgh", "cd e", "xyz"],
    }  # fmt: skip
    torch.manual_seed(0)
    sampled = make_trainer(**options, trainer_kwargs=adapter)
    sampled.train()
    torch.manual_seed(0)
    trainer = make_trainer(
        **{**options, "prompts": None}, reward_funcs=None, rollouts=str(tmp_path / "out" / "rollouts"),
        output_dir=str(tmp_path / "other"), trainer_kwargs={"train_dataset": None, **adapter},
    )  # fmt: skip
    trainer.model.generate = None  # nobody samples
    trainer.train()
    assert not (tmp_path / "other" / "rollouts").exists()
    for (name, a), b in zip(weights(sampled).items(), weights(trainer).values(), strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=1e-7, msg=name)


def test_log_probabilities_of_the_policy_that_sampled_are_those_of_the_file(make_trainer, tmp_path):
    """pi_t is who sampled, however many batches of the file are trained on before."""
    groups = [
        {"prompt": prompt, "completions": ["abc", "xyz", "ax", "b"], "completion_ids": ids,
         "preferences": [[0.5, 1, 1, 1], [0, 0.5, 0, 0], [0, 1, 0.5, 1], [0, 1, 0, 0.5]],
         "logps": [[-float(k + 1)] * len(one) for k, one in enumerate(ids)]}
        for prompt, ids in [(p, [[3, 4, 5, 1], [26, 27, 28, 1], [3, 26, 1], [4, 1]]) for p in ("ab", "cd", "x", "y")]
    ]  # fmt: skip
    Dataset.from_list(groups).to_parquet(tmp_path / "made" / "r.parquet")
    trainer = train_on(make_trainer, tmp_path / "made", reward_funcs=None, max_steps=2, num_generations=4)
    seen = []
    loss = trainer._compute_loss

    def record(model, inputs):
        seen.append((inputs["completion_ids"], inputs["old_per_token_logps"], inputs["win_rates"]))
        return loss(model, inputs)

    trainer._compute_loss = record
    trainer.train()
    expected = {(3, 4, 5, 1): (-1, 1), (26, 27, 28, 1): (-2, 0), (3, 26, 1): (-3, 2 / 3), (4, 1): (-4, 1 / 3)}
    for ids, logps, win_rates in seen:
        for row, logp, win_rate in zip(ids, logps, win_rates, strict=True):
            tokens = tuple(token for token in row.tolist() if token)
            assert logp[: len(tokens)].unique().item() == expected[tokens][0]
            assert win_rate.item() == pytest.approx(expected[tokens][1])


def test_rollouts_by_others_are_tokenized_here_and_scored_by_whom_is_given(make_trainer, tmp_path):
    """Texts alone, as JSON lines. Log-probabilities are those of the policy at hand."""
    rows = [{"prompt": p, "completions": ["abc", "xyz"]} for p in ("ab", "cd", "x", "y")]
    (tmp_path / "r.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    trainer = train_on(make_trainer, tmp_path / "r.jsonl", num_generations=2, max_steps=1)
    batches = []
    loss = trainer._compute_loss
    trainer._compute_loss = lambda model, inputs: batches.append(inputs) or loss(model, inputs)
    trainer.train()
    assert sorted(map(tuple, batches[0]["completion_ids"].tolist())) == [(3, 4, 5, 1)] * 4 + [(26, 27, 28, 1)] * 4
    assert trainer.state.log_history[0]["rewards/count_abc/mean"] == 1.5
    assert trainer.state.log_history[0]["winner_log_ratio"] == 0  # pi_theta = pi_t


@pytest.mark.parametrize("scores", [[3.0, 1.0], {"one": [3.0, 1.0], "two": [2.0, None]}])
def test_scores_of_others_are_compared_here(make_trainer, tmp_path, scores):
    rows = [{"prompt": [{"role": "user", "content": p}], "completions": [[{"role": "assistant", "content": "ab"}],
             [{"role": "assistant", "content": "c"}]], "scores": scores} for p in ("ab", "cd", "x", "y")]  # fmt: skip
    Dataset.from_list(rows).to_parquet(tmp_path / "made" / "r.parquet")
    trainer = train_on(make_trainer, tmp_path / "made", reward_funcs=None, num_generations=2, max_steps=1)
    batches = []
    loss = trainer._compute_loss
    trainer._compute_loss = lambda model, inputs: batches.append(inputs) or loss(model, inputs)
    trainer.train()
    # The template ends an assistant's turn with a space, and no end of the sequence: that is added
    ids = {tuple(t for t in row if t): w for row, w in zip(batches[0]["completion_ids"].tolist(),
           batches[0]["win_rates"].tolist(), strict=True)}  # fmt: skip
    assert ids == {(3, 4, 29, 1): 1.0, (5, 29, 1): 0.0}


def test_the_rollout_command_makes_what_training_trains_on(make_trainer, tmp_path, tiny_policy):
    """Sampled without training: each prompt once, all log-probabilities; and an interrupted call goes on."""
    options = {
        **ITERATIONS,
        "model": tiny_policy,
        "max_steps": -1,
        "win_rate_threshold": 0.9,
        "save_strategy": "steps",
    }
    before = weights(make_trainer(**options))
    trainer = make_trainer(**options)
    assert trainer.rollout() == str(tmp_path / "out" / "rollouts")
    for name, value in weights(trainer).items():
        assert torch.equal(value, before[name])
    rows = rollouts_of(tmp_path / "out")
    assert sorted(rows["prompt"]) == sorted(["ab", "fgh", "cd e", "xyz"] * 4)
    assert all(len(a) == len(b) for row in rows for a, b in zip(row["logps"], row["completion_ids"], strict=True))
    whole = {path.name: path.read_bytes() for path in (tmp_path / "out" / "rollouts").glob("*.parquet")}
    assert len(whole) == 4

    (tmp_path / "out" / "rollouts" / "iteration-000002.parquet").unlink()
    again = make_trainer(**options)
    sampled = []
    sample = again._generate_single_turn
    again._generate_single_turn = lambda ids, *args, **kwargs: sampled.append(1) or sample(ids, *args, **kwargs)
    again.rollout()
    assert len(sampled) == 1
    again_rows = rollouts_of(tmp_path / "out")
    assert again_rows.to_list() == rows.to_list()

    trained = train_on(make_trainer, tmp_path / "out" / "rollouts", reward_funcs=None, model=tiny_policy)
    trained.train()
    assert trained.state.global_step == 2


def test_as_many_batches_as_max_steps_would_use(make_trainer, tmp_path):
    """Five optimizer steps are three iterations of two; of the second epoch the order differs."""
    prompts = ["ab", "fgh", "cd e", "xyz", "a", "b", "c", "d"]
    trainer = make_trainer(**ITERATIONS, max_steps=5, prompts=prompts, save_strategy="steps")
    trainer.rollout()
    rows = rollouts_of(tmp_path / "out")
    assert rows["iteration"] == [i for i in range(3) for _ in range(4)]
    assert sorted(rows["prompt"][:8]) == sorted(prompts) and rows["prompt"][8:] != rows["prompt"][:4]


def test_sources_of_one_name_are_told_apart(make_trainer, tmp_path):
    make_trainer(max_steps=1, reward_funcs=[count_abc, lambda **k: [0.0] * 8, lambda **k: [1.0] * 8]).train()
    scores = rollouts_of(tmp_path / "out")[0]["scores"]
    assert scores.keys() == {"count_abc", "<lambda>_1", "<lambda>_2"}
    assert scores["<lambda>_1"] == [0.0] * 4 and scores["<lambda>_2"] == [1.0] * 4


@pytest.fixture
def groups():
    """Four groups of two, with all that a file has."""
    return [
        {"prompt": p, "completions": ["ab", "c"], "completion_ids": [[3, 4, 1], [5, 1]],
         "preferences": [[0.5, 1.0], [0.0, 0.5]], "logps": [[-1.0] * 3, [-2.0] * 2]}
        for p in ("ab", "cd", "x", "y")
    ]  # fmt: skip


def test_log_probabilities_are_needed_only_of_what_is_trained_on(make_trainer, tmp_path, groups, caplog):
    """Where one of these is missing, the policy at hand is taken, and that is said."""
    for group in groups:
        group["preferences"], group["completions"] = (
            [[0.5, 0.5, 1.0], [0.5, 0.5, 0.0], [0.0, 1.0, 0.5]],
            ["ab", "c", "d"],
        )
        group["completion_ids"] += [[6, 1]]
        group["logps"] += [None]
    # Win rates 3/4, 1/4, 1/2: the third is not trained on beyond a threshold of 0.6
    seen = []

    def train(**options):
        Dataset.from_list(groups).to_parquet(tmp_path / "made" / "r.parquet")
        trainer = train_on(
            make_trainer, tmp_path / "made", reward_funcs=None, num_generations=3, per_device_train_batch_size=12,
            max_steps=1, **options,
        )  # fmt: skip
        loss = trainer._compute_loss
        trainer._compute_loss = lambda model, inputs: seen.append(inputs) or loss(model, inputs)
        trainer.train()

    train(win_rate_threshold=0.6)
    kept = seen[0]["old_per_token_logps"][seen[0]["kept"]]
    assert set(kept[kept != 0].tolist()) == {-1.0, -2.0} and "lack log-probabilities" not in caplog.text
    groups[0]["logps"][0] = None
    train(win_rate_threshold=0.6)
    assert "old_per_token_logps" not in seen[1] and "lack log-probabilities of some completions" in caplog.text


def test_rows_that_were_never_judged_are_left_out(make_trainer, tmp_path, groups, caplog):
    """A run that ended between sampling and scoring leaves some."""
    groups[3]["preferences"] = None
    Dataset.from_list(groups).to_parquet(tmp_path / "made" / "r.parquet")
    assert len(load_rollouts(str(tmp_path / "made"), num_generations=2)) == 3
    assert "1 rows without preferences are left out" in caplog.text


def test_tokens_of_tools_are_refused(tmp_path, groups):
    for group in groups:
        group["tool_mask"] = [[1, 0, 1], [1, 1]]
    Dataset.from_list(groups).to_parquet(tmp_path / "made" / "r.parquet")
    with pytest.raises(ValueError, match="have tokens of tools in their completions"):
        load_rollouts(str(tmp_path / "made"), num_generations=2)


def test_trl_walks_through_prompts_and_not_through_whole_groups(make_trainer, tmp_path, groups):
    """It copies each row once for each completion of each micro-step."""
    groups = [{**group, "level": 1} for group in groups]
    Dataset.from_list(groups).to_parquet(tmp_path / "made" / "r.parquet")
    trainer = train_on(make_trainer, tmp_path / "made", reward_funcs=None, num_generations=2)
    assert trainer.train_dataset.column_names == ["prompt", "level", "row_of_rollouts"]


def test_rollouts_are_not_uploaded_unasked(make_trainer):
    with pytest.raises(ValueError, match="push_to_hub=True would upload the rollouts"):
        make_trainer(push_to_hub=True)


def test_a_run_does_not_mix_its_rollouts_with_those_of_an_earlier_one(make_trainer, tmp_path, caplog):
    make_trainer(max_steps=3).train()
    make_trainer(max_steps=1).train()
    assert len(list((tmp_path / "out" / "rollouts").glob("*.parquet"))) == 1
    assert len(list((tmp_path / "out" / "rollouts-1").glob("*.parquet"))) == 3


def test_old_files_go_when_asked_for_and_never_before_a_checkpoint(make_trainer, tmp_path):
    trainer = make_trainer(max_steps=7, save_strategy="steps", save_steps=3, rollouts_total_limit=2)
    kept = {}
    save = trainer._save_checkpoint

    def record(*args):
        save(*args)
        files = sorted(path.name for path in (tmp_path / "out" / "rollouts").glob("*.parquet"))
        kept[trainer.state.global_step] = [int(name[10:16]) for name in files]

    trainer._save_checkpoint = record
    trainer.train()
    assert kept == {3: [1, 2], 6: [4, 5], 7: [5, 6]}


def test_nothing_is_written_if_not_wanted(make_trainer, tmp_path):
    make_trainer(save_rollouts=False).train()
    assert not (tmp_path / "out" / "rollouts").exists()


def test_a_file_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    files = RolloutFiles(str(tmp_path))
    files.write(0, [{"prompt": "a", "completions": ["b", "c"]}], None)
    before = files.path(0).read_bytes()

    def full(table, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pyarrow.parquet.write_table", full)
    with pytest.raises(OSError, match="No space left"):
        files.write(0, [{"prompt": "d", "completions": ["e", "f"]}], None)
    assert files.path(0).read_bytes() == before
    assert [path.name for path in files.folder.iterdir()] == ["iteration-000000.parquet"]


def test_columns_of_the_dataset_with_the_same_names_are_left_out(make_trainer, tmp_path, caplog):
    prompts = Dataset.from_dict(
        {"prompt": ["ab", "fgh", "cd e", "xyz"], "scores": [1, 2, 3, 4], "level": [1, 2, 3, 4]}
    )
    make_trainer(max_steps=1, trainer_kwargs={"train_dataset": prompts}).train()
    rows = rollouts_of(tmp_path / "out")
    assert "level" in rows.column_names and isinstance(rows[0]["scores"], dict)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{"prompt": "a"}], "must have columns 'prompt' and 'completions': ['prompt']"),
        ([{"prompt": "a", "completions": ["b", "c"]}, {"prompt": "a", "completions": ["b"]}],
         "row 1 of rollouts='{path}' has 1 completions, but num_generations is 2"),
        ([{"prompt": "a", "completions": ["b", "c"]}, {"prompt": "a", "completions": None}],
         "row 1 of rollouts='{path}' has None completions, but num_generations is 2"),
    ],
)  # fmt: skip
def test_rollouts_that_cannot_be_trained_on(tmp_path, rows, expected):
    path = tmp_path / "r.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    with pytest.raises(ValueError) as error:
        load_rollouts(str(path), num_generations=2)
    assert expected.format(path=path) in str(error.value)


def test_no_rollouts(tmp_path):
    with pytest.raises(ValueError, match=r"rollouts='.*nowhere' is neither a folder nor a file that"):
        load_rollouts(str(tmp_path / "nowhere"), num_generations=2)


def test_nobody_says_what_is_better(make_trainer, tmp_path):
    (tmp_path / "r.jsonl").write_text(json.dumps({"prompt": "a", "completions": ["b", "c"]}))
    with pytest.raises(ValueError, match="no reward source and no preference oracle given"):
        train_on(make_trainer, tmp_path / "r.jsonl", reward_funcs=None, num_generations=2)


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"preferences": [[0.5]]}, r"the preferences in the rollouts must be 2 x 2 per group, got \(1, 1\)"),
        ({"scores": [1.0, 2.0, 3.0]}, "the scores in the rollouts must be 2 per group and source, got 3"),
        ({"preferences": [[0.5, 1], [0, 0.5]], "completion_ids": [[3], [4]], "logps": [[-1.0], [-1.0, -1.0]]},
         "have log-probabilities for other tokens than their completions"),
    ],
)  # fmt: skip
def test_columns_of_the_wrong_shape(make_trainer, tmp_path, columns, expected):
    rows = [{"prompt": p, "completions": ["b", "c"], **columns} for p in "abcd"]
    (tmp_path / "r.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    trainer = train_on(make_trainer, tmp_path / "r.jsonl", reward_funcs=None, num_generations=2)
    with pytest.raises(ValueError, match=expected):
        trainer.train()


def test_options_that_contradict_stored_rollouts(make_trainer, tmp_path):
    (tmp_path / "r.jsonl").write_text(json.dumps({"prompt": "a", "completions": ["b", "c"], "scores": [1, 2]}))
    path = str(tmp_path / "r.jsonl")
    with pytest.raises(TypeError, match="train_dataset is given, but also rollouts="):
        make_trainer(rollouts=path, num_generations=2)
    with pytest.raises(ValueError, match=r"replace sampling. Set use_vllm=False"):
        train_on(make_trainer, path, num_generations=2, use_vllm=True)
    with pytest.raises(ValueError, match="no reward source and no preference oracle given"):
        train_on(
            make_trainer, path, reward_funcs=None, num_generations=2, eval_strategy="steps", eval_steps=1,
            per_device_eval_batch_size=2,
        )  # fmt: skip
    with pytest.raises(ValueError, match="rollouts_total_limit must be at least 1, got 0"):
        make_trainer(rollouts_total_limit=0)
    with pytest.raises(ValueError, match="rollouts cannot be written with save_rollouts=False"):
        make_trainer(save_rollouts=False).rollout()


@pytest.mark.parametrize("with_logps", [False, True])
def test_a_rollout_is_written_twice(make_trainer, monkeypatch, with_logps):
    """Once sampled, and once all is known. Scores are written by themselves in between."""
    from trl_sppo.rollouts import files

    written = []

    def record(path, groups, features):
        written.append((path.parent.name, sorted(COLUMNS.keys() & groups[0].keys())))
        write(path, groups, features)

    write = files.write_parquet
    monkeypatch.setattr(files, "write_parquet", record)
    options = ITERATIONS if with_logps else {}
    make_trainer(max_steps=1, save_strategy="steps", save_steps=1, **options).train()
    (first, sampled), (second, scored), (third, whole) = written
    assert (first, second, third) == ("rollouts", "000000-scored", "rollouts")
    assert scored == ["preferences", "scores", "win_rates"] and not set(scored) & set(sampled)
    assert set(whole) == {*sampled, *scored, *(["logps"] if with_logps else [])}
