"""Reward models behind a server, which is a small one here: order, limits, failures, and what is refused."""

import asyncio
import functools
import json
import math
import time
from pathlib import Path

import pytest
import yaml
from helpers import count_abc, logits, make_tokenizer, request_text, score_request
from transformers import AutoModelForSequenceClassification
from trl.trainer.utils import is_async_callable

from trl_sppo import ServedRewardModel
from trl_sppo.oracles.reward_models import load_reward_models
from trl_sppo.train import build_trainer


def ask(reward, prompts, completions, **kwargs):
    return asyncio.run(reward(prompts=prompts, completions=completions, **kwargs))


# ---- What is sent, and what comes back


def test_what_is_sent(server):
    reward = ServedRewardModel(server.url + "/v1/", "org/Reward-8B", chat_template_kwargs={"enable_thinking": False})
    assert reward.__name__ == "Reward-8B" and reward.base_url == server.url
    user, assistant = ({"role": role, "content": role[:3]} for role in ("user", "assistant"))
    nothing = {"tool_calls": None, "name": None}  # as datasets fills in
    assert ask(reward, [[{**user, **nothing}]], [[assistant]], completion_ids=[[1]], log_metric=None) == [1.0]
    assert ask(reward, ["what? "], ["a<eos>"]) == [2.0]
    common = {"model": "org/Reward-8B", "use_activation": False, "add_special_tokens": False}
    assert server.requests == [
        {**common, "messages": [user, assistant], "chat_template_kwargs": {"enable_thinking": False}},
        {**common, "input": "what? a<eos>"},
    ]
    assert server.headers[0]["path"] == "/classify"


def test_each_completion_gets_its_own_score(server):
    """Whatever the order in which the answers come."""

    def answer(number, request):
        time.sleep(0.02 * (3 - number % 4))
        return 200, logits(len(request_text(request)) - 0.5)

    server.answer = answer
    reward = ServedRewardModel(server.url)
    assert ask(reward, ["x"] * 7, ["a" * n for n in (3, 1, 4, 2, 5, 9, 6)]) == [3.5, 1.5, 4.5, 2.5, 5.5, 9.5, 6.5]
    assert ask(reward, [], []) == []
    assert reward.num_lost == 0
    with pytest.raises(ValueError, match="zip"):
        ask(reward, ["x", "y"], ["a"])


@pytest.mark.parametrize("limit", [1, 3])
def test_requests_at_a_time(server, limit):
    server.answer = lambda *args: time.sleep(0.02) or (200, logits(0.5))
    ask(ServedRewardModel(server.url, max_concurrency=limit), ["x"] * 9, ["a"] * 9)
    assert server.most_at_once == limit


# ---- Failures


@pytest.mark.parametrize("status", [500, 503, 429])
def test_errors_of_the_server_are_retried(server, status, caplog):
    server.answer = lambda number, request: (status, {"error": "busy"}) if number < 2 else (200, logits(1.5))
    reward = ServedRewardModel(server.url, max_retries=2)
    assert ask(reward, ["x"], ["a"]) == [1.5]
    assert len(server.requests) == 3 and reward.num_lost == 0 and "no score" not in caplog.text


def test_time_outs_are_retried(server):
    server.answer = lambda number, request: (number == 0 and time.sleep(0.5)) or (200, logits(1.5))
    assert ask(ServedRewardModel(server.url, timeout=0.1, max_retries=1), ["x"], ["a"]) == [1.5]
    assert len(server.requests) == 2


NONSENSE = [
    "{not json", "[]", "null", {"data": []}, {"data": [{}]}, {"data": [{"probs": None}]}, {"data": [{"probs": 1.0}]},
    {"data": logits(1.0)["data"] * 2}, logits(), logits(0.5, 0.5), logits("1.0"), logits("1"), logits(None),
    logits(True), logits([1.0]), logits(math.nan), logits(-math.inf), logits(10**400),
]  # fmt: skip


@pytest.mark.parametrize("body", NONSENSE, ids=range(len(NONSENSE)))
def test_answers_without_a_score(server, body, caplog):
    server.answer = lambda number, request: (200, logits(-0.5) if request_text(request) == "xc" else body)
    reward = ServedRewardModel(server.url, "reward")
    assert ask(reward, ["x"] * 3, ["a", "c", "a"]) == [None, -0.5, None]
    assert ask(reward, ["x"] * 2, ["a", "c"]) == [None, -0.5]
    assert reward.num_lost == 3
    assert caplog.text.count("reward gave no score to 2 of 3 completions (shown once). The first: BadResponse") == 1


def test_a_server_that_dies_stops_the_run(server):
    reward = ServedRewardModel(server.url, max_retries=0)
    assert ask(reward, ["x"] * 2, ["a", "b"]) == [1.0, 1.0]
    server.server.shutdown()
    server.server.server_close()
    message = rf"the reward model at '{server.url}' gave no score to any of 2 completions. The first: APIConnection"
    with pytest.raises(RuntimeError, match=message):
        ask(reward, ["x"] * 2, ["a", "b"])


def test_texts_that_a_living_server_refuses_do_not_stop_the_run(server):
    """A group of one prompt, all too long."""
    server.answer = lambda number, request: (
        (400, {"error": {"message": "too long"}}) if len(request_text(request)) > 5 else (200, logits(1.5))
    )
    reward = ServedRewardModel(server.url)
    with pytest.raises(RuntimeError, match=r"gave no score to any of 1 completions.*too long"):
        ask(reward, ["x"], ["a" * 5])  # nothing says yet that it can score at all
    assert ask(reward, ["x"] * 2, ["a", "a" * 5]) == [1.5, None]
    assert ask(reward, ["x"] * 2, ["a" * 5] * 2) == [None, None]
    assert reward.num_lost == 3 and len(server.requests) == 5  # which are not repeated
    server.answer = lambda *args: (404, {})
    with pytest.raises(RuntimeError, match="NotFoundError"):
        ask(reward, ["x"], ["a"])


@pytest.mark.parametrize("given", ["argument", "environment"])
def test_the_key_is_sent_and_not_shown(server, caplog, monkeypatch, given):
    key = "a-very-secret-key"
    caplog.set_level("DEBUG")
    if given == "environment":
        monkeypatch.setenv("VLLM_API_KEY", key)
    reward = ServedRewardModel(server.url, api_key=key if given == "argument" else None)
    server.answer = lambda number, request: (
        (401, {"error": {"message": f"wrong key {key}"}}) if number else (200, logits(1.0))
    )
    said = []
    assert sorted(ask(reward, ["x"] * 2, ["a"] * 2), key=str) == [1.0, None]
    assert server.headers[0]["key"] == f"Bearer {key}"
    with pytest.raises(RuntimeError, match=r"AuthenticationError: .*wrong key \*\*\*") as error:
        ask(reward, ["x"], ["a"])
    said.append(error)
    with pytest.raises(ValueError, match=r"gives a score.*\(AuthenticationError: .*wrong key \*\*\*") as error:
        reward.check(conversational=False)
    said.append(error)
    ours = "".join(record.getMessage() for record in caplog.records if record.name.startswith("trl_sppo"))
    assert "wrong key ***" in ours
    traceback = "".join(str(error.getrepr(style="native")) for error in said)
    assert "very-secret" not in ours + traceback + repr(reward) and "wrong key ***" in traceback


# ---- Before a run


def load(source, conversational=True, tokenizer=None):
    return load_reward_models([source], [tokenizer], conversational)


@pytest.mark.parametrize("conversational", [True, False])
def test_a_url_becomes_a_served_reward_model(server, conversational):
    (reward,), tokenizers = load(server.url, conversational)
    assert isinstance(reward, ServedRewardModel) and tokenizers == [None]
    assert reward.model == "org/Reward-8B" and reward.__name__ == "Reward-8B"
    assert is_async_callable(reward) and is_async_callable(functools.partial(reward))
    (request,) = server.requests  # one, in the form of the prompts
    assert ("messages" in request) == conversational and ("input" in request) != conversational


def test_one_that_was_made_before_is_checked_too(server):
    reward = ServedRewardModel(server.url, "other")
    assert load(reward)[0] == [reward] and server.requests[0]["model"] == "other"


@pytest.mark.parametrize(
    ("models", "reason"),
    [
        ((404, {}), "NotFoundError: "),
        ((200, "<html>"), "the response lacks the expected fields: '<html>'"),
        ((200, {"data": "no"}), "the response lacks the expected fields"),
        ((200, {"data": []}), "the response lacks the expected fields"),
    ],
)
def test_no_vllm_server(server, models, reason):
    server.models = models
    with pytest.raises(ValueError, match=rf"no vLLM server at '{server.url}' gives .*`vllm serve MODEL.*{reason}"):
        load(server.url)


def test_a_dead_port_is_refused_before_a_model_is_loaded(server, make_trainer, monkeypatch):
    server.server.shutdown()
    server.server.server_close()
    monkeypatch.setattr("trl.trainer.grpo_trainer.create_model_from_path", lambda *a, **k: pytest.fail("loaded"))
    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", lambda *a, **k: pytest.fail("loaded"))
    cure = r"Start one with `vllm serve MODEL --runner pooling`.*\(APIConnectionError: "
    with pytest.raises(ValueError, match=rf"no vLLM server at '{server.url}' gives a score.*{cure}"):
        make_trainer(reward_funcs=[count_abc, server.url])


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ((200, logits(0.2, 0.3, 0.5)), "BadResponseError: the response lacks the expected fields"),
        ((200, logits(math.nan)), "BadResponseError: the response lacks the expected fields: .*NaN"),
        ((404, {"detail": "Not Found"}), "NotFoundError: Error code: 404"),
        ((400, {"error": {"message": "no chat template"}}), "BadRequestError: .*no chat template"),
    ],
)
def test_a_server_without_scores(server, answer, reason):
    server.answer = lambda *args: answer
    message = rf"no vLLM server at '{server.url}' gives a score. .* a classifier with one label, .*\({reason}"
    for conversational in (True, False):
        with pytest.raises(ValueError, match=message):
            load(server.url, conversational)


def test_a_tokenizer_for_a_served_reward_model(server):
    with pytest.raises(ValueError, match=r"has a tokenizer and a chat template of its own.* must be None"):
        load(server.url, tokenizer=make_tokenizer())


@pytest.mark.parametrize(
    "message",
    [
        {"content": "x", "reasoning_content": "y"},
        {"content": None, "tool_calls": [{"type": "function"}]},
        {"content": [{"type": "image", "image": object()}]},
    ],
)
def test_messages_that_the_server_would_render_otherwise(server, message):
    with pytest.raises(ValueError, match=r"reads messages of a role and a text, but got one with \['content|'role'"):
        ask(ServedRewardModel(server.url), [[{"role": "user", "content": "x"}]], [[{"role": "assistant", **message}]])
    assert not server.requests


def test_what_it_refuses(monkeypatch):
    url = "http://localhost:1"
    with pytest.raises(ValueError, match=r"^url must be an http\(s\) URL, got 'localh"):
        ServedRewardModel("localhost:1")
    with pytest.raises(ValueError, match=r"url must hold no user name, password or query.*Pass a key") as error:
        ServedRewardModel("http://me:secret@localhost:1")
    assert "secret" not in str(error.value)
    with pytest.raises(ValueError, match="max_concurrency must be positive, got 0"):
        ServedRewardModel(url, max_concurrency=0)
    with pytest.raises(ValueError, match="timeout must be positive, got -1"):
        ServedRewardModel(url, timeout=-1)
    with pytest.raises(ValueError, match=r"max_retries must not be negative, got -1.*set it to 0"):
        ServedRewardModel(url, max_retries=-1)
    monkeypatch.setattr("trl_sppo.oracles.endpoint.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"ServedRewardModel needs openai.*pip install trl-sppo\[served\]"):
        ServedRewardModel(url)


# ---- In a run


def test_the_trainer_trains_with_it(server, make_trainer):
    """Beside a reward function that gives the same scores, and with one text that it cannot score."""
    server.answer = lambda number, request: (
        (400, {}) if "z" in request_text(request) else (200, logits(score_request(request)))
    )
    prompts = [[{"role": "user", "content": text}] for text in ("ab", "fgh")]
    seen = []

    def record(completions, **kwargs):
        seen.extend(completion[0]["content"] for completion in completions)
        return [None if "z" in completion[0]["content"] else count_abc([completion])[0] for completion in completions]

    trainer = make_trainer(reward_funcs=[server.url, record], prompts=prompts, max_steps=3)
    trainer.train()
    lost = sum("z" in completion for completion in seen)
    assert len(seen) == 24 and 0 < lost < 24 and trainer.reward_funcs[0].num_lost == lost
    logs = trainer.state.log_history[:3]
    for log in logs:
        assert log["rewards/Reward-8B/mean"] == log["rewards/record/mean"]
        assert log["rewards/Reward-8B/std"] == log["rewards/record/std"]
        assert log["win_rate/kept"] > 0
    assert sum(log["win_rate/unscorable"] for log in logs) * 8 == pytest.approx(lost)


def test_a_recipe_names_a_url(server, tiny_policy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("prompts").mkdir()
    Path("prompts/train.jsonl").write_text("\n".join(json.dumps({"prompt": text}) for text in ("ab", "fgh") * 4))
    recipe = {
        "model_name_or_path": tiny_policy, "reward_model_name_or_path": server.url, "dataset_name": "prompts",
        "num_generations": 4, "output_dir": "out", "use_cpu": True, "bf16": False, "report_to": "none",
    }  # fmt: skip
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    (reward,) = build_trainer(["--config", "recipe.yaml"]).reward_funcs
    assert isinstance(reward, ServedRewardModel) and reward.model == "org/Reward-8B"
