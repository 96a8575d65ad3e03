"""Datasets as files and as `save_to_disk` leaves them, in each command that takes one."""

import json
from pathlib import Path

import datasets
import pytest
from datasets import Dataset, DatasetDict
from helpers import message
from trl import DatasetMixtureConfig

from trl_sppo import cli, train
from trl_sppo.arguments.loading import load_data
from trl_sppo.commands.judging import JudgeArguments


TEXTS = ["ab", "fgh", "cd e", "xyz"]
PROMPTS = [[{"role": "user", "content": text}] for text in TEXTS]


def save(kind: str, prompts: list = PROMPTS, name: str = "data") -> str:
    """Prompts in one of the forms; returns the dataset_name."""
    dataset = Dataset.from_dict({"prompt": prompts})
    if kind == "saved":
        dataset.with_format("torch").save_to_disk(name, num_shards=2)
    elif kind == "saved dict":
        DatasetDict({"train": dataset, "test": dataset.select([1, 0])}).save_to_disk(name)
    elif kind == "json array":
        name = f"{name}.json"
        Path(name).write_text(json.dumps([{"prompt": prompt} for prompt in prompts]))
    else:
        name = f"{name}.{kind}"
        {"parquet": dataset.to_parquet, "csv": dataset.to_csv}.get(kind, dataset.to_json)(name)
    return name


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def loaded(streaming: bool = False, evaluate: bool = False, datasets=None, split: str = "train", **options):
    script = train.SPPOScriptArguments(dataset_streaming=streaming, dataset_train_split=split, **options)
    return load_data(script, DatasetMixtureConfig(datasets=datasets or []), evaluate)


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streaming"])
@pytest.mark.parametrize("kind", ["jsonl", "json array", "json", "parquet", "saved", "saved dict"])
def test_prompts_are_the_same_in_each_form(here, kind, streaming):
    found, _ = loaded(dataset_name=save(kind), streaming=streaming)
    assert [row["prompt"] for row in found] == PROMPTS and isinstance(found, Dataset) is not streaming


def test_csv(here):
    found, _ = loaded(dataset_name=save("csv", TEXTS))
    assert found["prompt"] == TEXTS


def test_shuffled_and_selected_rows_are_saved_as_they_are_seen(here):
    dataset = Dataset.from_dict({"prompt": TEXTS})
    dataset.shuffle(seed=3).select([2, 0]).save_to_disk("data")
    assert loaded(dataset_name="data")[0]["prompt"] == dataset.shuffle(seed=3).select([2, 0])["prompt"]


def test_what_is_saved_anew_is_loaded_anew(here):
    for texts in (["old", "older"], ["new", "newest", "newer"]):
        assert loaded(dataset_name=save("saved", texts))[0]["prompt"] == texts
        assert loaded(dataset_name=save("jsonl", texts))[0]["prompt"] == texts


@pytest.mark.parametrize("kind", ["jsonl", "saved"])
def test_one_split_is_called_train(here, kind):
    with pytest.raises(ValueError, match=r"the dataset has no split 'test', but \['train'\]. Set dataset_train_split"):
        loaded(dataset_name=save(kind), evaluate=True)
    name = save(kind)
    with pytest.raises(ValueError, match=r'cannot be loaded: Unknown split "test".*--dataset_test_split train'):
        JudgeArguments(dataset_name=name).load_prompts()
    assert JudgeArguments(dataset_name=name, dataset_test_split="train[1:3]").load_prompts()["prompt"] == PROMPTS[1:3]


def test_splits_of_a_saved_dict(here):
    found, held_out = loaded(dataset_name=save("saved dict"), evaluate=True)
    assert [len(found), held_out["prompt"]] == [4, [PROMPTS[1], PROMPTS[0]]]
    assert JudgeArguments(dataset_name="data").load_prompts()["prompt"] == [PROMPTS[1], PROMPTS[0]]


def test_mixtures(here):
    parts = [{"path": save("jsonl")}, {"path": save("saved dict"), "split": "test"}, {"path": save("saved", name="b")}]
    found, _ = loaded(datasets=parts)
    assert [row["prompt"] for row in found] == [*PROMPTS, PROMPTS[1], PROMPTS[0], *PROMPTS]


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ({"path": "data.jsonl", "name": "main"}, r"'main' is given, but datasets\[0\].path='data.jsonl' is one file"),
        (
            {"path": "data.jsonl", "data_files": "x"},
            r"datasets\[0\].path='data.jsonl' is one dataset: remove its data_files",
        ),
        ({"path": "data.jsonl", "split": "test"}, 'datasets cannot be loaded: Unknown split "test"'),
        ({"path": "words.txt"}, r"datasets\[0\].path='words.txt' is a file, but must end in .jsonl, .json"),
        ({"path": "broken.jsonl"}, "datasets cannot be loaded: "),
    ],
)
def test_mixtures_that_cannot_be_loaded(here, part, expected):
    save("jsonl")
    Path("words.txt").write_text("ab")
    Path("broken.jsonl").write_text('{"prompt": "ab"}\n{"prompt": ')
    with pytest.raises(ValueError, match=expected):
        loaded(datasets=[part])


def test_what_cannot_be_loaded(here):
    with pytest.raises(
        ValueError, match=r"dataset configuration 'main' is given, but dataset_name='data.jsonl' is one"
    ):
        loaded(dataset_name=save("jsonl"), dataset_config="main")
    with pytest.raises(
        ValueError, match=r"dataset configuration 'main' is given, but dataset_name='data' is one file, or"
    ):
        loaded(dataset_name=save("saved"), dataset_config="main")
    Path("prompts.txt").touch()
    for load in (
        lambda name: loaded(dataset_name=name),
        lambda name: JudgeArguments(dataset_name=name).load_prompts(),
    ):
        with pytest.raises(ValueError, match=r"'prompts.txt' is a file, but must end in .jsonl, .json, .parquet"):
            load("prompts.txt")
    Path("broken.jsonl").write_text('{"prompt": "ab"}\n{"prompt": ')
    with pytest.raises(ValueError, match=r"dataset_name='broken\.jsonl' cannot be loaded"):
        loaded(dataset_name="broken.jsonl")


@pytest.mark.parametrize("text", ["", "{}"])
def test_a_saved_dataset_that_is_incomplete(here, text):
    save("saved")
    Path("data/state.json").write_text(text)
    with pytest.raises(ValueError, match="dataset_name='data' cannot be loaded"):
        loaded(dataset_name="data")


def test_a_saved_dataset_without_its_tables(here):
    save("saved")
    next(Path("data").glob("*.arrow")).unlink()
    with pytest.raises(ValueError, match="dataset_name='data' cannot be loaded"):
        loaded(dataset_name="data")


@pytest.mark.parametrize("kind", ["jsonl", "saved"])
def test_commands(workdir, kind, capsys):
    """Training, its plan, and rollouts; `eval` and `ladder` read prompts by `JudgeArguments.load_prompts`."""
    argv = workdir(dataset_name=save(kind))
    assert cli.main(["check", *argv]) in (0, 1)
    assert "was not loaded" not in capsys.readouterr().out
    assert train.main(argv).state.global_step == 1
    argv = workdir(dataset_name=save(kind), eval_strategy="steps", eval_steps=1)
    for run in (train.main, lambda argv: cli.main(["check", *argv])):
        assert "the dataset has no split 'test', but ['train']" in message(capsys, argv, run)
