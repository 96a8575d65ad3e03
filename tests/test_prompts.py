"""Prompts and columns that training cannot use are refused before any weights are loaded, with the cure."""

import json
import re

import pytest
import torch
import trl
from datasets import Dataset, Features, Image, IterableDataset, List, Value, load_dataset
from helpers import CHAT_TEMPLATE, TINY, count_abc, image_dataset, image_score, make_tokenizer, more_abc
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2ForSequenceClassification

from trl_sppo.checks.prompts import check_prompts
from trl_sppo.checks.readers import policy_reader
from trl_sppo.checks.sources import how_to_make_prompts
from trl_sppo.errors import RunError


USER = {"role": "user", "content": "ab"}
OTHER = {"role": "user", "content": "cd"}
ASSISTANT = {"role": "assistant", "content": "ef"}
SYSTEM = {"role": "system", "content": "gh"}
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHAT_TEMPLATE
ALTERNATE = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}" + CHAT_TEMPLATE
)
PRINTS = "{% for m in messages %}{{ m.role ~ ':' ~ m.content ~ ' ' }}{% endfor %}"
LOADERS = "trl.trainer.grpo_trainer.create_model_from_path", "trl_sppo.oracles.reward_models.patch_environment"


def save(folder, tokenizer, reward=False, **config) -> str:
    kind = Qwen2ForSequenceClassification if reward else Qwen2ForCausalLM
    torch.manual_seed(0)
    kind(Qwen2Config(**{**TINY, **({"num_labels": 1} if reward else {}), **config})).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def make(make_trainer, tmp_path, monkeypatch):
    """A function that builds a trainer of models by path, and fails if weights are loaded; or of what it is given."""

    def make(rows, policy=None, reward=None, load=False, stream=False, **kwargs):
        policy = policy or save(tmp_path / "policy", make_tokenizer())
        if isinstance(rows, list):
            rows = [row if isinstance(row, dict) and "prompt" in row else {"prompt": row} for row in rows]
            if stream:
                rows = IterableDataset.from_generator(lambda rows=rows: iter(rows))
            else:
                rows = as_json(rows, tmp_path)
        options = {"max_steps": 1, "shuffle_dataset": False, **kwargs.pop("options", {})}
        rewards = count_abc if reward is None else reward
        trainer_kwargs = {"processing_class": None, "train_dataset": rows, **kwargs}
        with monkeypatch.context() as patch:
            for loader in () if load else LOADERS:
                patch.setattr(loader, lambda *args, **kwargs: pytest.fail("loads"))
            return make_trainer(model=policy, reward_funcs=rewards, trainer_kwargs=trainer_kwargs, **options)

    return make


def as_json(rows, folder) -> Dataset:
    """As `datasets` reads a file: rows may be of several types."""
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return load_dataset("json", data_files=str(path), split="train", cache_dir=str(folder))


ODD = {
    "texts": (["ab", "cd"], "has no prompt, but ['ab', 'cd']. A prompt is a text, or a list of messages"),
    "number": (3, "has no prompt, but 3. A prompt is a text, or"),
    "one message": (USER, "has no prompt, but {"),
    "conversations": ([[USER]], "has no prompt, but [[{"),
    "ShareGPT": ([{"from": "human", "value": "ab"}], "has no prompt, but [{"),
    "content a number": ([{"role": "user", "content": 3}], "has no prompt, but [{"),
    "content a message": ([{"role": "user", "content": USER}], "has no prompt, but [{"),
    "role a number": ([{"role": 1, "content": "ab"}], "has no prompt, but [{"),
    "parts as texts": ([{"role": "user", "content": ["ab"]}], "has no prompt, but [{"),
    "nothing": (None, "has no prompt, but None"),
    "no message": ([], "has no prompt, but []"),
    "only a call": ([USER, {"role": "user", "tool_calls": [{}]}], "has no prompt, but [{"),
    "parts": ([{"role": "user", "content": [{"type": "text", "text": "ab"}]}],
              "is refused by the chat template of model '{policy}' (TypeError: can only concatenate"),
    "image": ([{"role": "user", "content": [{"type": "image", "image": "ab"}]}],
              "is refused by the chat template of model '{policy}' (TypeError: can only concatenate"),
    "a completion": ([USER, ASSISTANT], "ends with an assistant message, after which TRL would open another one"),
}  # fmt: skip


@pytest.mark.parametrize("where", ["all rows", "one row"])
@pytest.mark.parametrize(("prompt", "words"), ODD.values(), ids=ODD)
def test_prompts_of_odd_types(make, tmp_path, prompt, words, where):
    rows = [[USER], [OTHER], prompt, [USER]] if where == "one row" else [prompt] * 4
    words = words.replace("{policy}", str(tmp_path / "policy"))
    with pytest.raises(ValueError, match=f"^row {2 if where == 'one row' else 0} of train_dataset {re.escape(words)}"):
        make(rows)


def test_images_that_a_template_for_texts_leaves_out(make, tmp_path):
    template = "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% endif %}{% endfor %}a"
    policy = save(tmp_path / "policy", make_tokenizer(chat_template=template))
    image = [{"role": "user", "content": [{"type": "image", "image": "ab"}]}]
    words = r"^row 1 of train_dataset has an image, but model .* tokenizer for texts only"
    with pytest.raises(ValueError, match=words):
        make([[USER], image, [USER], [USER]], policy)


@pytest.mark.parametrize(("prompt", "words"), ODD.values(), ids=ODD)
def test_prompts_of_odd_types_in_a_stream(make, tmp_path, prompt, words):
    """The first row at the start, the others as they come, before anything is sampled from them."""
    words = re.escape(words.split(". ")[0].replace("{policy}", str(tmp_path / "policy")))
    with pytest.raises(ValueError, match=f"row 0 of train_dataset {words}"):
        make([prompt] * 4, stream=True)


@pytest.mark.parametrize("name", ["texts", "number", "ShareGPT", "parts", "a completion"])
def test_a_later_row_of_a_stream(make, tmp_path, name):
    prompt, words = ODD[name]
    trainer = make([[USER], prompt, [OTHER], [USER]], stream=True, load=True)
    trainer._generate = lambda prompts: pytest.fail("samples")
    words = re.escape(words.split(". ")[0].replace("{policy}", str(tmp_path / "policy")))
    with pytest.raises(RunError, match=f"a row of the dataset {words}.*: {re.escape(repr({'prompt': prompt})[:20])}"):
        trainer.train()


@pytest.mark.parametrize(("rows", "words"), [
    (["ab", "cd", [USER], "e"], "row 2 of train_dataset has a prompt of another kind than the first"),
    ([[USER], [OTHER], [USER], "ab"], "row 3 of train_dataset has a prompt of another kind than the first"),
])  # fmt: skip
def test_texts_mixed_with_messages(make, rows, words):
    with pytest.raises(ValueError, match=words):
        make(rows)


def test_an_empty_text(make, tmp_path):
    """It is no prompt, except for a tokenizer that begins each with a token of its own."""
    with pytest.raises(ValueError, match=r"^row 1 of train_dataset has a prompt without tokens"):
        make(["ab", "", "c", "d"])
    trainer = make(["ab", "", "c", "d"], stream=True, load=True)
    with pytest.raises(RunError, match="a row of the dataset has a prompt without tokens"):
        trainer.train()
    trainer = make(["ab", "", "c", "d"], policy=save(tmp_path / "bos", with_bos()), load=True)
    assert trainer._readers[0].look([""]) == [[31]]


def with_bos(**kwargs):
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer(bos_token="<bos>", **kwargs)
    tokenizer._tokenizer.post_processor = TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 31)])
    return tokenizer


@pytest.fixture(autouse=True)
def room_for_bos(monkeypatch):
    monkeypatch.setitem(TINY, "vocab_size", 32)


# ---- Templates


@pytest.mark.parametrize(("template", "prompt", "words"), [
    (NO_SYSTEM, [SYSTEM, USER], "TemplateError: no system role"),
    (ALTERNATE, [USER, OTHER], "TemplateError: roles must alternate"),
    ("{{ messages[0].content.name.x }}", [USER], "UndefinedError: "),
])  # fmt: skip
@pytest.mark.parametrize("kind", ["policy", "reward", "judge", "reward in an evaluation", "judge in training"])
def test_a_template_that_refuses_a_row(make, tmp_path, template, prompt, words, kind):
    plain, strict = make_tokenizer(), make_tokenizer(chat_template=template)
    folder = save(tmp_path / "strict", strict, reward=kind != "policy")
    rows, kwargs = [[USER], [OTHER], prompt, [USER]], {}
    good = [[{"role": "user", "content": letter}] for letter in "abcd"]
    if template == "{{ messages[0].content.name.x }}":
        rows, good = [prompt] * 4, [prompt] * 4
    where, i = "train_dataset", 0 if rows == good else 2
    if kind == "policy":
        kwargs = {"policy": folder}
    elif kind == "reward":
        kwargs = {"reward": folder}
    else:
        where, kwargs = "eval_dataset", {"eval_dataset": Dataset.from_dict({"prompt": rows})}
        kwargs |= {"options": {"eval_strategy": "steps", "per_device_eval_batch_size": 4}}
        kwargs |= {"reward": folder} if "reward" in kind else {"eval_reward_funcs": folder}
        rows = good
    if kind == "judge in training":  # which does not read the prompts of the training
        if template == "{{ messages[0].content.name.x }}":
            return
        kwargs["eval_dataset"] = Dataset.from_dict({"prompt": good})
        make([[USER], [OTHER], prompt, [USER]], policy=save(tmp_path / "plain", plain), load=True, **kwargs)
        return
    if template == "{{ messages[0].content.name.x }}" and kind == "reward in an evaluation":
        where = "train_dataset"
    role = "model" if kind == "policy" else "reward model"
    words = (
        f"row {i} of {where} is refused by the chat template of {role} '{folder}' \\({words}.*\\). Change such rows"
    )
    with pytest.raises(ValueError, match=words):
        make(rows, **kwargs)


def test_templates_of_loaded_models(make_trainer, tiny_model, tmp_path):
    """And tokenizers that are given."""
    rows = Dataset.from_dict({"prompt": [[USER], [SYSTEM, USER]] * 4})
    strict = make_tokenizer(chat_template=NO_SYSTEM)
    with pytest.raises(ValueError, match=r"row 1 of train_dataset is refused by the chat template of the policy \("):
        make_trainer(trainer_kwargs={"train_dataset": rows, "processing_class": strict})
    reward = Qwen2ForSequenceClassification(Qwen2Config(**TINY, num_labels=1))
    kwargs = {"train_dataset": rows, "reward_processing_classes": strict}
    with pytest.raises(
        ValueError, match="row 1 of train_dataset is refused by the chat template of reward model 'Qwen"
    ):
        make_trainer(reward_funcs=reward, trainer_kwargs=kwargs)


def test_a_stream_is_read_by_the_templates_of_reward_models_before_it_is_sampled(make, tmp_path):
    reward = save(tmp_path / "strict", make_tokenizer(chat_template=NO_SYSTEM), reward=True)
    trainer = make([[USER], [SYSTEM, USER], [OTHER], [USER]], stream=True, load=True, reward=reward)
    trainer._generate = lambda prompts: pytest.fail("samples")
    with pytest.raises(
        RunError, match=f"a row of the dataset is refused by the chat template of reward model '{reward}'"
    ):
        trainer.train()


def test_chat_template_kwargs_reach_the_template(make, tmp_path):
    template = "{% if not quiet %}{{ raise_exception('loud') }}{% endif %}" + CHAT_TEMPLATE
    policy = save(tmp_path / "quiet", make_tokenizer(chat_template=template))
    reward = save(tmp_path / "quiet-reward", make_tokenizer(chat_template=template), reward=True)
    rows = [[USER], [OTHER]]
    with pytest.raises(ValueError, match=f"template of model '{policy}' .*loud"):
        make(rows, policy)
    with pytest.raises(ValueError, match=f"template of reward model '{reward}' .*loud"):
        make(rows, reward=reward)
    make(rows, policy, reward, load=True, options={"chat_template_kwargs": {"quiet": True}})


def test_content_in_parts_that_a_template_prints(make, tmp_path):
    """Without an error, so that the model would read Python."""
    parts = [{"role": "user", "content": [{"type": "text", "text": "ab"}]}]
    reads = "{% for m in messages %}{{ m.content if m.content is string else m.content[0].text }}{% endfor %}"
    policy = save(tmp_path / "prints", make_tokenizer(chat_template=PRINTS))
    words = (
        f"row 1 of train_dataset has content in parts, which the chat template of model '{policy}' prints as a Python"
    )
    with pytest.raises(ValueError, match=words):
        make([[USER], parts], policy)
    make([[USER], [OTHER]], policy, load=True)
    trainer = make([parts, parts], save(tmp_path / "reads", make_tokenizer(chat_template=reads)), load=True)
    assert trainer._readers[0].look([parts]) == [[3, 4]]  # a and b


def test_messages_for_a_policy_without_a_chat_template(make, tmp_path):
    policy = save(tmp_path / "base", make_tokenizer(chat_template=None))
    words = f"row 0 of train_dataset is a list of messages, but the tokenizer of model '{policy}' has no chat template"
    with pytest.raises(ValueError, match=words):
        make([[USER], [OTHER]], policy)
    make(["ab", "cd"], policy, load=True)


def test_a_prompt_is_rendered_as_training_does(make, tmp_path):
    """The same tokens as TRL's, with the templates' arguments."""
    template = CHAT_TEMPLATE + "{{ suffix }}"
    policy = save(tmp_path / "suffix", make_tokenizer(chat_template=template))
    for rows in ([[USER], [SYSTEM, OTHER]], ["ab", "c d"]):
        trainer = make(rows, policy, load=True, options={"chat_template_kwargs": {"suffix": "xyz"}})
        assert trainer._readers[0].look(rows) == trainer._tokenize_prompts(rows)[0]


def test_equal_prompts_are_rendered_once(make, monkeypatch):
    from trl_sppo.checks.readers import Reader

    seen = []
    read = Reader.read
    monkeypatch.setattr(Reader, "read", lambda self, prompts: seen.extend(prompts) or read(self, prompts))
    trainer = make(
        [[USER], [OTHER], [USER], [OTHER]] * 3, load=True, eval_dataset=Dataset.from_dict({"prompt": [[USER]]})
    )
    assert seen == [[USER], [OTHER]]
    trainer.train()
    assert seen == [[USER], [OTHER]]  # nor are they again


def test_the_first_row_of_several_is_named_and_batches_are_counted(make, monkeypatch):
    monkeypatch.setattr("trl_sppo.checks.prompts.BATCH", 3)
    rows = [[{"role": "user", "content": letter}] for letter in "abcdefgh"]
    with pytest.raises(ValueError, match=r"^row 7 of train_dataset has no prompt, but None"):
        make([*rows[:7], None, rows[7], None])
    with pytest.raises(ValueError, match=r"^row 4 of train_dataset ends with an assistant"):
        make([*rows[:4], [USER, ASSISTANT], *rows[:3], [USER, ASSISTANT]])


def test_prompts_of_a_custom_rollout_are_not_rendered(make, tmp_path, monkeypatch):
    """A `rollout_func` does that itself, in its own way."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    policy = save(tmp_path / "base", make_tokenizer(chat_template=None))
    make([[USER, ASSISTANT]] * 2, policy, load=True, rollout_func=lambda prompts, trainer: {})
    with pytest.raises(ValueError, match="row 1 of train_dataset has no prompt"):
        make([[USER], None], policy, rollout_func=lambda prompts, trainer: {})


# ---- Tokenizers


def test_tokens_outside_the_vocabulary(make, tmp_path):
    policy = save(tmp_path / "small", make_tokenizer(), vocab_size=28)  # y has the id 27, z the id 28
    words = (
        f"row 1 of train_dataset has the token 'z' with the id 28, but the embedding of model '{policy}' has 28 rows"
    )
    with pytest.raises(ValueError, match=words):
        make(["ab", "zy"], policy)
    make(["ab", "xy"], policy, load=True)
    reward = save(tmp_path / "small-reward", make_tokenizer(), reward=True, vocab_size=27)
    with pytest.raises(ValueError, match=f"row 0 .* the token 'y' .* the embedding of reward model '{reward}' has 27"):
        make(["xy", "ab"], reward=reward)
    trainer = make(["ab", "z"], policy, stream=True, load=True)
    with pytest.raises(RunError, match="a row of the dataset has the token 'z' with the id 28"):
        trainer.train()


def test_special_tokens_outside_the_vocabulary(make, tmp_path):
    """No prompt has them, but batches and completions do."""
    tokenizer = make_tokenizer(pad_token="<more>")
    policy = save(tmp_path / "added", tokenizer, vocab_size=31, pad_token_id=0)
    with pytest.raises(
        ValueError, match=f"tokenizer of model '{policy}' has the pad token '<more>' with the id 31, but"
    ):
        make(["ab", "cd"], policy)
    reward = save(tmp_path / "added-reward", tokenizer, reward=True, vocab_size=31, pad_token_id=0)
    with pytest.raises(ValueError, match=r"tokenizer of reward model .* has the pad token '<more>' with the id 31"):
        make(["ab", "cd"], reward=reward)


def test_the_embedding_of_a_loaded_model_counts(make_trainer, tiny_model):
    """And not what its configuration says."""
    tokenizer = make_tokenizer(extra_special_tokens={"image_token": "<image>"})
    kwargs = {"processing_class": tokenizer, "train_dataset": Dataset.from_dict({"prompt": ["ab", "<image>c"]})}
    tiny_model.resize_token_embeddings(31)
    tiny_model.config.vocab_size = 99
    with pytest.raises(
        ValueError, match=r"row 1 .* '<image>' with the id 31, but the embedding of the policy has 31 rows"
    ):
        make_trainer(model=tiny_model, trainer_kwargs=kwargs)
    tiny_model.resize_token_embeddings(32)
    make_trainer(model=tiny_model, trainer_kwargs=kwargs)


def test_a_tokenizer_without_eos(make, make_trainer, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    policy = save(tmp_path / "endless", tokenizer)
    with pytest.raises(
        ValueError, match=f"the tokenizer of model '{policy}' has no EOS token.* `tokenizer.eos_token`"
    ):
        make(["ab", "cd"], policy)
    with pytest.raises(ValueError, match="the tokenizer of the policy has no EOS token"):
        make_trainer(trainer_kwargs={"processing_class": tokenizer})


def test_a_policy_whose_tokenizer_nobody_knows(make_trainer):
    with pytest.raises(ValueError, match="the policy was not loaded from a checkpoint"):
        make_trainer(trainer_kwargs={"processing_class": None})
    with pytest.raises(TypeError, match="processing_class must be a tokenizer or a processor, got str"):
        make_trainer(trainer_kwargs={"processing_class": "tokenizer"})


# ---- Columns


@pytest.mark.parametrize("column", ["prompts", "completions", "trainer_state", "log_extra", "log_metric"])
@pytest.mark.parametrize("kind", ["train", "eval", "judge", "stream"])
def test_columns_with_the_names_of_arguments(make, column, kind):
    rows = [{"prompt": "ab", column: "c"}, {"prompt": "de", column: "f"}]
    where, kwargs = "train_dataset", {}
    if kind in ("eval", "judge"):
        where, kwargs = "eval_dataset", {"eval_dataset": Dataset.from_list(rows)}
        kwargs["options"] = {"eval_strategy": "steps", "per_device_eval_batch_size": 4}
        rows = ["ab", "cd"]
    if kind == "judge":
        kwargs |= {"reward": [], "preference_func": more_abc, "eval_reward_funcs": count_abc}
    words = (
        rf"^{where} has columns \['{column}'\], but reward functions get something else .*rename_column\('{column}', "
    )
    with pytest.raises(ValueError, match=words):
        make(rows, stream=kind == "stream", **kwargs)


def test_columns_that_nobody_is_given(make_trainer):
    """Reward models read none, and oracles are not given all."""
    reward = Qwen2ForSequenceClassification(Qwen2Config(**TINY, num_labels=1))
    columns = {"prompt": ["ab", "cd"] * 4, "prompts": ["x"] * 8, "completions": ["x"] * 8, "first": ["x"] * 8}
    kwargs = {"train_dataset": Dataset.from_dict(columns), "reward_processing_classes": make_tokenizer()}
    make_trainer(reward_funcs=reward, trainer_kwargs=kwargs, max_steps=1).train()
    got = []

    def oracle(prompts, first, second, **kwargs):
        got.append(sorted(kwargs))
        return more_abc(prompts, first, second)

    kwargs = {"train_dataset": Dataset.from_dict(columns), "preference_func": oracle}
    make_trainer(reward_funcs=None, trainer_kwargs=kwargs, max_steps=1).train()
    assert got[0] == ["completions", "log_metric"]


@pytest.mark.parametrize("column", ["image", "images"])
@pytest.mark.parametrize("prompt", ["ab", [USER]], ids=["text", "messages"])
def test_a_column_of_images_without_any(make_trainer, caplog, column, prompt):
    rows = [{"prompt": prompt, column: None}] * 8
    trainer = make_trainer(
        reward_funcs=lambda completions, **kwargs: [float(column in kwargs)] * len(completions), max_steps=1,
        trainer_kwargs={"train_dataset": Dataset.from_list(rows), "eval_dataset": {"a": Dataset.from_list(rows)}},
    )  # fmt: skip
    assert f"the column '{column}' of train_dataset is left out: it has no images" in caplog.text
    assert f"the column '{column}' of eval_dataset['a'] is left out" in caplog.text
    assert trainer.train_dataset.column_names == ["prompt"] == trainer.eval_dataset["a"].column_names
    trainer.train()


def test_a_column_of_images_for_a_policy_that_reads_texts(make_trainer, tiny_model):
    rows = image_dataset()
    words = (
        "train_dataset has a column 'image', but the policy has a tokenizer for texts only. Use a model .*remove_col"
    )
    with pytest.raises(ValueError, match=words):
        make_trainer(trainer_kwargs={"train_dataset": rows})
    with pytest.raises(ValueError, match=words):
        make_trainer(trainer_kwargs={"train_dataset": rows.to_iterable_dataset()})
    with pytest.raises(ValueError, match=words.replace("train", "eval")):
        make_trainer(trainer_kwargs={"eval_dataset": rows})


def test_a_model_that_sees_without_images(make_trainer, seeing):
    """Prompts are read through the processor; an empty column is left out, also where only some rows are taken."""
    model, processor = seeing
    rows = image_dataset()
    features = rows.features
    both = [{**row, "image": row["image"] if i < 2 else None} for i, row in enumerate(rows)]
    both = Dataset.from_list(both, features=features)
    kwargs = {"processing_class": processor, "train_dataset": both.select([2, 3])}
    trainer = make_trainer(model=model, reward_funcs=image_score, trainer_kwargs=kwargs, max_steps=1)
    assert trainer.train_dataset.column_names == ["prompt"]
    prompts = [row["prompt"] for row in trainer.train_dataset]
    assert trainer._readers[0].look(prompts) == trainer._tokenize_prompts(prompts)[0]
    trainer.train()
    kwargs["train_dataset"] = both.select([1, 2])
    assert "image" in make_trainer(model=model, trainer_kwargs=kwargs).train_dataset.column_names


# ---- Datasets of other layouts


LAYOUTS = {
    "messages": ({"messages": [SYSTEM, USER, ASSISTANT]}, [[SYSTEM, USER]]),
    "messages of several turns": ({"messages": [USER, ASSISTANT, OTHER, ASSISTANT]}, [[USER, ASSISTANT, OTHER]]),
    "chosen and rejected": (
        {"chosen": [USER, ASSISTANT], "rejected": [USER, {**ASSISTANT, "content": "xy"}]}, [[USER]],
    ),
    "a question with chosen and rejected": (
        {"question": "ab", "chosen": "The answer is 4.", "rejected": "The result is 5."}, [[USER], "ab"],
    ),
    "conversations": ({"conversations": [USER, ASSISTANT]}, [[USER]]),
    "question": ({"question": "ab", "answer": "ef"}, [[USER], "ab"]),
    "problem": ({"problem": "ab", "solution": "ef"}, [[USER], "ab"]),
    "query": ({"query": "ab", "response": "ef"}, [[USER], "ab"]),
    "text": ({"text": "ab"}, [[USER], "ab"]),
    "instruction": ({"instruction": "ab", "output": "ef"}, [[USER], "ab"]),
}  # fmt: skip


@pytest.mark.parametrize(("row", "expected"), LAYOUTS.values(), ids=LAYOUTS)
def test_how_to_make_prompts_of_other_layouts(make, row, expected):
    """The message has lines of Python, and these do it."""
    dataset = Dataset.from_list([row] * 8)
    with pytest.raises(ValueError, match=r"^train_dataset has no 'prompt' column, but ") as error:
        make(dataset)
    lines = re.findall("`(dataset.*?)`", str(error.value))
    assert [eval(line, {"dataset": dataset, "trl": trl})[3]["prompt"] for line in lines] == expected
    make(eval(lines[0], {"dataset": dataset, "trl": trl}), load=True, policy=None)


def test_how_to_make_prompts_of_what_nobody_knows():
    assert "`dataset.rename_column('...', 'prompt')`" in how_to_make_prompts({"body": "ab", "label": 1})
    assert "rename_column('...'" in how_to_make_prompts({"messages": None, "question": None})


# ---- What is trained on as it is, with a warning


@pytest.mark.parametrize(
    ("prompts", "tokenizer", "kind"),
    [
        (["ab", "cd"], {}, "row 0 of train_dataset is a text, so the chat template of model"),
        (["<bos>ab", "cd"], {}, "row 1 of train_dataset is a text, so"),
        (["ab", "cd"], {"chat_template": None}, None),
        (
            ["ab", "<bos>cd", "<bos>e"],
            {"chat_template": None},
            "row 1 of train_dataset begins with the BOS token twice",
        ),
        (["ab", "cd", "e<eos>", "f<eos>"], {"chat_template": None}, "row 2 of train_dataset ends with the EOS token"),
        ([[USER], [OTHER]], {}, None),
    ],
)
def test_texts_that_are_read_as_they_are(make, tmp_path, caplog, prompts, tokenizer, kind):
    policy = save(tmp_path / "bos", with_bos(**tokenizer))
    make(prompts, policy, load=True, eval_dataset=Dataset.from_dict({"prompt": prompts}))
    said = [record.getMessage() for record in caplog.records if "train_dataset" in record.getMessage()]
    said = [words for words in said if kind is None or kind.split("dataset ")[1][:12] in words]
    assert len(said) == (kind is not None), said
    assert kind is None or kind in said[0]
    assert "eval_dataset" not in caplog.text


# ---- `trl-sppo check`


@pytest.fixture
def check(tmp_path, capsys):
    """A function that checks a recipe with these prompts: exit status and what it says."""
    from trl_sppo.commands import check as command_check

    def run(rows, policy=None, reward=None, *options) -> tuple[int, str]:
        (tmp_path / "data").mkdir(exist_ok=True)
        for split in ("train", "test"):
            (tmp_path / f"data/{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        policy = policy or save(tmp_path / "policy", make_tokenizer())
        reward = ["--reward_model_name_or_path", reward] if reward else ["--reward_funcs", "helpers.count_abc"]
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(json.dumps({
            "model_name_or_path": policy, "dataset_name": str(tmp_path / "data"), "output_dir": str(tmp_path / "out"),
            "use_cpu": True, "per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 6,
            "gradient_accumulation_steps": 1, "bf16": False,
        }))  # fmt: skip
        try:
            status = command_check.main([str(recipe), *reward, *options])
        except SystemExit as error:
            status = error.code
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    return run


def test_check_refuses_what_training_refuses(check, tmp_path):
    rows = [{"prompt": [USER]}, {"prompt": [SYSTEM, USER]}]
    assert check(rows)[0] == 0
    strict = make_tokenizer(chat_template=NO_SYSTEM)
    policy, reward = save(tmp_path / "strict", strict), save(tmp_path / "strict-reward", strict, reward=True)
    for models, words in (((policy,), f"of model '{policy}'"), ((None, reward), f"of reward model '{reward}'")):
        status, said = check(rows, *models)
        assert status == 2 and f"row 1 of train_dataset is refused by the chat template {words}" in said
    judge = ("--eval_strategy", "steps", "--eval_reward_model_name_or_path", reward)
    status, said = check(rows, None, None, *judge)
    assert status == 2 and f"row 1 of eval_dataset is refused by the chat template of reward model '{reward}'" in said
    base = save(tmp_path / "base", make_tokenizer(chat_template=None))
    status, said = check(rows, base)
    assert status == 2 and "is a list of messages, but the tokenizer of model" in said
    status, said = check([{**row, "completions": "a"} for row in rows])
    assert status == 2 and "train_dataset has columns ['completions'], but reward functions" in said
    status, said = check([{"messages": [USER, ASSISTANT]}] * 2)
    assert status == 2 and "A prompt is the conversation before the assistant's last message" in said
    status, said = check([{"prompt": [USER, ASSISTANT]}] * 2)
    assert status == 2 and "row 0 of train_dataset ends with an assistant message" in said
    status, said = check([{"prompt": 3}] * 2)
    assert status == 2 and "row 0 of train_dataset has no prompt, but 3" in said


def test_check_reads_the_prompts_of_rollouts(check, tmp_path):
    rows = [{"prompt": [USER, ASSISTANT], "completions": ["a"] * 4, "scores": [1.0, 2.0, 3.0, 4.0]}] * 2
    (tmp_path / "rollouts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    status, said = check([], None, None, "--rollouts", str(tmp_path / "rollouts.jsonl"))
    assert status == 2 and "row 0 of train_dataset ends with an assistant message" in said


def test_a_progress_bar_for_many_prompts(make_trainer, capsys, monkeypatch):
    monkeypatch.setattr("trl_sppo.checks.prompts.MANY", 4)
    make_trainer(disable_tqdm=False)
    assert "prompts of train_dataset" in capsys.readouterr().err
    make_trainer(disable_tqdm=True)
    assert "prompts of train_dataset" not in capsys.readouterr().err


def test_a_dataset_without_prompts(make_trainer, tiny_model, tiny_tokenizer):
    """`check_prompts` leaves it alone."""
    reader = policy_reader(make_trainer().args, tiny_model, tiny_tokenizer)
    check_prompts([reader], {"train_dataset": Dataset.from_dict({"environment": ["a"]})})
    assert reader.seen == set()


def test_images_inside_messages_are_not_decoded(monkeypatch):
    """They may be large, and the check leaves them to TRL."""
    part = lambda row: [{"type": "image", "image": row["image"]}, {"type": "text", "text": "ab"}]  # noqa: E731
    rows = [{"prompt": [{"role": "user", "content": part(row)}]} for row in image_dataset()]
    kinds = {"type": Value("string"), "image": Image(), "text": Value("string")}
    features = Features({"prompt": List({"role": Value("string"), "content": List(kinds)})})
    dataset = Dataset.from_list(rows, features=features)
    monkeypatch.setattr(Image, "decode_example", lambda *args, **kwargs: pytest.fail("decoded"))
    check_prompts([], {"train_dataset": dataset})
