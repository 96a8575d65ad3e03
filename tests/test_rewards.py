"""Reward models: micro-batches, and what is refused before anything is loaded."""

import asyncio

import pytest
import torch
from datasets import Dataset, IterableDataset
from helpers import count_abc, decoder, encoder, make_tokenizer
from transformers import (
    AutoModelForSequenceClassification,
)

from trl_sppo.oracles.reward_models import MicroBatchedRewardModel, load_reward_models


@pytest.fixture(params=[encoder, decoder], ids=["encoder", "decoder"])
def reward_model(request):
    torch.manual_seed(0)
    model = request.param()
    with torch.no_grad():  # scores that differ
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


TEXTS = ["a", "hello world", "abc def ghi jkl mno", "zz", "b a", "the quick brown fox jumps", "x" * 40, "y"] * 4


def tokenize(texts):
    return make_tokenizer()(texts, padding=True, padding_side="right", return_tensors="pt")


@pytest.mark.parametrize("batch_size", [1, 3, 8, 100])
def test_micro_batches_equal_one_by_one(reward_model, batch_size):
    reward_model.eval()
    with torch.inference_mode():
        one_by_one = torch.cat([reward_model(**tokenize([text])).logits for text in TEXTS])
        scores = MicroBatchedRewardModel(reward_model, batch_size)(**tokenize(TEXTS)).logits
    assert one_by_one.std() > 0.01
    torch.testing.assert_close(scores, one_by_one, rtol=0, atol=1e-4)


def test_a_micro_batch_is_padded_to_its_own_longest_text(reward_model):
    shapes = []
    reward_model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    MicroBatchedRewardModel(reward_model, batch_size=4)(**tokenize(TEXTS))
    lengths = sorted((len(text) for text in TEXTS), reverse=True)
    assert shapes == [(4, lengths[i]) for i in range(0, len(TEXTS), 4)]


def test_texts_beyond_the_context_are_told_of_once(reward_model, caplog):
    reward_model.config._name_or_path = "judge"
    reward_model.config.max_position_embeddings = 40  # the longest text has as many
    wrapped = MicroBatchedRewardModel(reward_model, 4)
    with torch.inference_mode():
        wrapped(**tokenize(TEXTS))
        assert not caplog.records
        for _ in range(2):
            wrapped(**tokenize(["x" * 41, "a"]))
    (record,) = caplog.records
    assert "reward model 'judge' has a context of 40 tokens, and is given texts of up to 41" in record.message


def test_a_decoder_keeps_no_cache():
    """It would be 5 GB for a micro-batch of the 7B recipes, and nobody reads it."""
    model = decoder()
    kept = []
    model.model.register_forward_hook(lambda module, args, output: kept.append(output.past_key_values))
    MicroBatchedRewardModel(model, 4)(**tokenize(TEXTS[:4]))
    assert kept == [None]


def test_deepspeeds_wrapper_keeps_no_cache_either():
    engine = torch.nn.Module()  # DeepSpeedEngine: its config is not the model's, and its eval() returns None
    engine.module, engine.config, engine.eval = decoder(), {"stage": 3}, lambda: None
    wrapped = MicroBatchedRewardModel(engine, 4)
    assert engine.module.config.use_cache is False and wrapped.model is engine


@pytest.mark.parametrize("rank", ["0", "1"])
def test_under_fsdp_each_process_has_the_weights(reward_model, tmp_path, monkeypatch, rank):
    """TRL's fsdp2.yaml lets transformers load weights in the first process only. Nobody would fill the others'."""
    folder = str(tmp_path / "reward")
    reward_model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    for name in ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING"):
        monkeypatch.setenv(name, "true")
    monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    (loaded,), _ = load_reward_models([folder], [None], conversational=False)
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, reward_model.get_parameter(name)), name


def test_dropout_is_off(reward_model):
    reward_model.train()
    wrapped = MicroBatchedRewardModel(reward_model, batch_size=4)
    torch.testing.assert_close(wrapped(**tokenize(TEXTS)).logits, wrapped(**tokenize(TEXTS)).logits)


def test_trainer_scores_with_a_saved_reward_model(make_trainer, tiny_model, tmp_path, monkeypatch):
    """By path, with its own chat template, in micro-batches: the scores of the messages that it was given."""
    torch.manual_seed(0)
    folder = str(tmp_path / "reward")
    encoder().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    seen, sizes = [], []

    forward = MicroBatchedRewardModel.forward

    def record(self, input_ids, attention_mask, **kwargs):
        output = forward(self, input_ids, attention_mask, **kwargs)
        seen.extend(zip(input_ids, attention_mask, output.logits[:, 0].tolist(), strict=True))
        return output

    monkeypatch.setattr(MicroBatchedRewardModel, "forward", record)
    prompts = [[{"role": "user", "content": text}] for text in ("ab", "fgh")]
    trainer = make_trainer(prompts=prompts, reward_funcs=folder, reward_batch_size=3, max_steps=1)
    trainer.reward_funcs[0].model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    trainer.train()
    assert sizes == [3, 3, 2]
    alone = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = make_tokenizer()
    for ids, mask, score in seen:
        text = tokenizer.decode(ids[mask.bool()])
        assert text.startswith(("u:ab a:", "u:fgh a:"))  # conftest's template: the role's first letter, the content
        with torch.inference_mode():
            expected = alone(ids[mask.bool()][None]).logits.item()
        assert score == pytest.approx(expected, abs=1e-4)


def test_trainer_takes_a_loaded_reward_model(make_trainer, reward_model):
    trainer = make_trainer(
        reward_funcs=[reward_model], trainer_kwargs={"reward_processing_classes": [make_tokenizer()]}, max_steps=1
    )
    trainer.train()
    assert trainer.state.log_history[0]["win_rate/kept"] > 0


# ---- What is refused


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """Saves a model and a tokenizer, and makes loading weights an error: what is refused is refused before."""

    def refuse(*args, **kwargs):
        raise AssertionError("a model was loaded")

    def save(model, tokenizer):
        folder = str(tmp_path / "reward")
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", refuse)
        return folder

    return save


def load(source, conversational=True, tokenizer=None):
    return load_reward_models([source], [tokenizer], conversational)


def test_no_chat_template(saved):
    folder = saved(encoder(), make_tokenizer(chat_template=None))
    with pytest.raises(ValueError, match=r"conversational, but the tokenizer of reward model .* has no chat template"):
        load(folder)
    with pytest.raises(AssertionError, match="a model was loaded"):  # plain text needs none
        load(folder, conversational=False)


def test_several_labels(saved):
    with pytest.raises(ValueError, match=r"has 3 labels, but a reward is one number: .*num_labels=1"):
        load(saved(encoder(num_labels=3), make_tokenizer()))
    with pytest.raises(ValueError, match="has 2 labels"):
        load(encoder(num_labels=2), tokenizer=make_tokenizer())


def test_no_padding_token(saved):
    with pytest.raises(ValueError, match=r"has no padding token.*Set `tokenizer.pad_token`"):
        load(saved(encoder(), make_tokenizer(pad_token=None)))


def test_no_scoring_head(saved, tiny_model):
    with pytest.raises(ValueError, match=r"has no scoring head: .*Qwen2ForCausalLM"):
        load(saved(tiny_model, make_tokenizer()))


def test_missing_path():
    with pytest.raises(ValueError, match=r"reward model './nowhere' is neither a folder with a config.json nor"):
        load("./nowhere")


def test_refused_by_the_trainer_before_the_policy_is_loaded(make_trainer, saved, monkeypatch):
    folder = saved(encoder(num_labels=2), make_tokenizer())
    monkeypatch.setattr("trl.trainer.grpo_trainer.create_model_from_path", lambda *a, **k: pytest.fail("loaded"))
    with pytest.raises(ValueError, match="has 2 labels"):
        make_trainer(reward_funcs=folder)


def test_a_model_whose_tokenizer_nobody_knows(reward_model):
    with pytest.raises(ValueError, match=r"no tokenizer is known for reward model .* was not loaded from"):
        load(reward_model)
    with pytest.raises(ValueError, match=r"no tokenizer is known for reward model Sequential"):
        load(torch.nn.Sequential(reward_model))


def test_number_of_processing_classes(make_trainer, reward_model):
    with pytest.raises(ValueError, match=r"one entry per reward source \(1\), got 2"):
        make_trainer(reward_funcs=reward_model, trainer_kwargs={"reward_processing_classes": [make_tokenizer()] * 2})


def test_a_reward_function_that_returns_the_wrong_number(make_trainer):
    trainer = make_trainer(reward_funcs=lambda completions, **kwargs: [1.0])
    with pytest.raises(RuntimeError, match="returned 1 scores for 8 completions"):
        trainer.train()


@pytest.mark.parametrize("fails_later", [False, True])
def test_the_message_names_the_one_that_fails(make_trainer, fails_later):
    def fine(completions, **kwargs):
        return [0.0] * len(completions)

    def broken(completions, **kwargs):
        raise LookupError("no such word")

    async def broken_later(completions, **kwargs):
        return broken(completions)

    sources = [fine, broken_later if fails_later else broken, count_abc]
    trainer = make_trainer(reward_funcs=sources)
    with pytest.raises(RuntimeError) as error:
        trainer.train()
    assert str(error.value).startswith(f"reward source {sources[1].__name__!r} failed: LookupError: no such word.")
    assert "fine" not in str(error.value) and "count_abc" not in str(error.value)


def test_asynchronous_sources_run_together_in_one_loop(make_trainer):
    """Each waits for the other, and a client may keep its connections between rollouts."""
    loops, first_is_there = [], []

    async def waits(completions, **kwargs):
        loops.append(asyncio.get_running_loop())
        for _ in range(1000):
            if first_is_there:
                return count_abc(completions)
            await asyncio.sleep(0.001)
        raise TimeoutError("the other has not begun")

    async def comes_second(completions, **kwargs):
        first_is_there.append(True)
        return [1.0] * len(completions)

    make_trainer(reward_funcs=[waits, comes_second], max_steps=2).train()
    assert len(loops) == 2 and loops[0] is loops[1]


# ---- The other arguments of the trainer


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ({"text": ["a"] * 8}, r"train_dataset has no 'prompt' column, but \['text'\].*rename_column"),
        ({"prompt": []}, "train_dataset is empty"),
        ({"prompt": ["a"]}, r"has 1 prompts, fewer than the 2 of one generation batch .*8 / num_generations 4"),
    ],
)
def test_datasets(make_trainer, dataset, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(model="./not-even-looked-at", trainer_kwargs={"train_dataset": Dataset.from_dict(dataset)})


@pytest.mark.parametrize(("rows", "message"), [([], "is empty"), ([{"text": "a"}], "has no 'prompt' column")])
def test_streamed_datasets(make_trainer, rows, message):
    stream = IterableDataset.from_generator(lambda: iter(rows))
    with pytest.raises(ValueError, match=f"train_dataset {message}"):
        make_trainer(model="./not-even-looked-at", trainer_kwargs={"train_dataset": stream})


def test_a_list_is_no_dataset(make_trainer):
    with pytest.raises(TypeError, match=r"must be a datasets.Dataset or IterableDataset, got list.*from_list"):
        make_trainer(model="./not-even-looked-at", trainer_kwargs={"train_dataset": [{"prompt": "a"}]})


def test_only_the_prompt_says_whether_prompts_are_conversational(make_trainer, tiny_model):
    from trl_sppo.checks.sources import check_datasets

    args = make_trainer().args
    message = [{"role": "user", "content": "a"}]
    for prompt, expected in (("a", False), (message, True)):
        other = "a" if expected else message
        rows = Dataset.from_list([{"prompt": prompt, "chosen": other, "rejected": other, "messages": other}] * 8)
        assert check_datasets(args, rows, None) is expected


def test_eval_dataset_without_prompts(make_trainer):
    with pytest.raises(ValueError, match="eval_dataset has no 'prompt' column"):
        make_trainer(trainer_kwargs={"eval_dataset": Dataset.from_dict({"text": ["a"]})})


@pytest.mark.parametrize("nothing", [None, []])
def test_no_reward_source(make_trainer, nothing):
    with pytest.raises(ValueError, match=r"no reward source and no preference oracle given\. Pass `reward_funcs`"):
        make_trainer(model="./not-even-looked-at", reward_funcs=nothing)


def test_missing_model(make_trainer):
    with pytest.raises(ValueError, match=r"model './nowhere' is neither a folder with a config.json nor"):
        make_trainer(model="./nowhere")


def test_another_configuration_class(tiny_model, tmp_path):
    from trl import GRPOConfig

    from trl_sppo import SPPOTrainer

    with pytest.raises(TypeError, match="args must be an SPPOConfig, got GRPOConfig"):
        SPPOTrainer(tiny_model, lambda **kwargs: [], GRPOConfig(str(tmp_path), use_cpu=True, bf16=False))
