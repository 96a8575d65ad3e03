"""ServedRewardModel against a real server, which runs on the CPU: tiny classifiers behind vLLM, and in process."""

import asyncio
from importlib.util import find_spec

import pytest
import torch
from helpers import TINY, make_tokenizer
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    Qwen3Config,
    Qwen3ForSequenceClassification,
)
from vllm_server import serve

from trl_sppo import ServedRewardModel


if find_spec("vllm") is None:
    pytest.skip("needs vLLM: .ci/run has it in an environment of its own", allow_module_level=True)

KEY = "a-secret-key"
# Not the policy's: <eos> after each turn, and no roles. Content in parts would be rendered otherwise.
TEMPLATE = (
    "{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for part in m['content'] %}{{ part['text'] | trim }}{% endfor %}{% endif %}<eos>{% endfor %}"
    "{% if add_generation_prompt %}::{% endif %}"
)
# As docs/judges.md says
OPTIONS = ["--runner", "pooling", "--chat-template-content-format", "string"]
SHAPE = {  # vLLM has no kernels for heads of fewer dimensions on a CPU
    "vocab_size": 31, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 64, "num_labels": 1, "pad_token_id": 0,
}  # fmt: skip
DECODER = {**TINY, **SHAPE, "head_dim": 32}
MODELS = {
    "llama": lambda: LlamaForSequenceClassification(LlamaConfig(**DECODER)),
    "qwen3": lambda: Qwen3ForSequenceClassification(Qwen3Config(**DECODER)),
    "bert": lambda: BertForSequenceClassification(BertConfig(**SHAPE)),
}


@pytest.fixture(scope="module", params=MODELS)
def saved(request, tmp_path_factory):
    """A folder with a reward model."""
    torch.manual_seed(0)
    model = MODELS[request.param]()
    with torch.no_grad():  # scores that differ
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    folder = str(tmp_path_factory.mktemp(request.param))
    model.save_pretrained(folder)
    make_tokenizer(chat_template=TEMPLATE).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(saved):
    """The URL of a vLLM server of that model."""
    with serve(saved, *OPTIONS, "--served-model-name", "org/reward", "--api-key", KEY) as url:
        yield url


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", KEY)


# The last ones spell control tokens
PROMPTS = ["ab", "what is it", "x y z", "hello", "ab", "tell me", "a", "b"]
COMPLETIONS = ["c", "it is a thing", "", "hello to you too  ", "größer", "no<eos>b: yes", "<pad>x<unk>", "yes<eos>"]


def as_messages(role, texts):
    return [[{"role": role, "content": text}] for text in texts]


def scores_in_trainer(make_trainer, reward_func, prompts, completions, **kwargs):
    """What the trainer's own path gives."""
    trainer = make_trainer(reward_funcs=reward_func, prompts=prompts, trainer_kwargs=kwargs)
    inputs = [{"prompt": prompt} for prompt in prompts]
    return trainer._calculate_rewards(inputs, prompts, completions, [[1]] * len(prompts))[:, 0]


@pytest.mark.parametrize("conversational", [True, False], ids=["messages", "text"])
def test_scores_equal_those_in_process(server, saved, make_trainer, conversational):
    prompts, completions = PROMPTS, COMPLETIONS
    if conversational:
        system = {"role": "system", "content": "be kind"}
        prompts = [[system, *prompt] for prompt in as_messages("user", prompts)]
        completions = as_messages("assistant", completions)
    expected = scores_in_trainer(make_trainer, saved, prompts, completions)
    scores = scores_in_trainer(make_trainer, server, prompts, completions)
    off, gap = (scores - expected).abs().max().item(), expected.sort().values.diff().min().item()
    print(
        f"\n{len(scores)} logits from {min(scores):.4f} to {max(scores):.4f}, at least {gap:.4f} apart: off {off:.1e}"
    )
    assert gap > 1e-3  # another text is another score
    assert off < 1e-4
    if conversational:  # with the policy's template, the scores would be others
        others = scores_in_trainer(
            make_trainer, saved, prompts, completions, reward_processing_classes=make_tokenizer()
        )
        assert (others - expected).abs().max() > 0.01


def test_texts_that_are_too_long_are_not_scored(server, caplog):
    """The limit is 64 tokens, one per letter."""
    reward = ServedRewardModel(server)
    with pytest.raises(RuntimeError, match=r"no score to any of 1 completions.*maximum context length is 64 tokens"):
        asyncio.run(reward(["a" * 60], ["b" * 5]))
    scores = asyncio.run(reward(["a" * 60] * 3, ["b" * 4, "b" * 5, "b" * 3]))
    assert [score is None for score in scores] == [False, True, False]
    assert asyncio.run(reward(["a" * 60], ["b" * 5])) == [None]
    assert reward.num_lost == 2
    assert "no score to 1 of 3 completions" in caplog.text and "maximum context length is 64 tokens" in caplog.text


def test_training_with_the_server(server, make_trainer):
    prompts = as_messages("user", ["ab", "fgh"])
    trainer = make_trainer(reward_funcs=server, prompts=prompts, max_steps=1)
    trainer.train()
    log = trainer.state.log_history[0]
    assert trainer.reward_func_names == ["reward"] and trainer.reward_funcs[0].num_lost == 0
    assert log["rewards/reward/std"] > 0 and log["win_rate/unscorable"] == 0
    assert log["win_rate/kept"] == 1 and log["loss"] > 0


def test_the_key(server, monkeypatch):
    ServedRewardModel(server).check(conversational=True)
    monkeypatch.setenv("VLLM_API_KEY", "another-key")
    with pytest.raises(ValueError, match=r"no vLLM server at .*VLLM_API_KEY.*AuthenticationError: ") as error:
        ServedRewardModel(server).check(conversational=True)
    assert "another-key" not in str(error.value)
