"""Runs with tools and environments, end to end, on a tiny policy that calls them (tests/tool_policy.py)."""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset, load_dataset
from helpers import history, weights
from tool_policy import CLOSE, DIGITS, END, OPEN, PROMPTS, double, make_policy, make_tokenizer

from trl_sppo import cli
from trl_sppo.rollouts.given import load_rollouts


OPTIONS = {
    "max_completion_length": 60, "max_tool_calling_iterations": 2, "eta": 2.0, "optim": "sgd", "learning_rate": 1e-3,
    "lr_scheduler_type": "constant", "max_grad_norm": 0.0,
}  # fmt: skip


def text_of(completion: list[dict]) -> str:
    return "".join(message["content"] for message in completion if message["role"] == "assistant")


def letters_and_calls(completions, **kwargs) -> list[float]:
    """A reward function: mostly different for different completions."""
    calls = [sum(bool(message.get("tool_calls")) for message in completion) for completion in completions]
    found = [[message["content"] for message in completion if message["role"] == "tool"] for completion in completions]
    return [
        10.0 * number + sum(map(int, results)) + sum(map(ord, text_of(completion))) / 1000
        for number, results, completion in zip(calls, found, completions, strict=True)
    ]


@pytest.fixture
def start(make_trainer, tmp_path):
    """A function that builds a trainer whose policy calls `double`, and keeps a list of the numbers it was given."""
    tokenizer = make_tokenizer()

    def build(folder="out", tools=True, **options):
        numbers = []

        def counted(x: int) -> str:
            numbers.append(x)
            return double(x)

        counted.__name__, counted.__doc__ = double.__name__, double.__doc__
        kwargs = {"processing_class": tokenizer, "tools": [counted] if tools else None}
        trainer = make_trainer(**{
            "model": make_policy(tokenizer), "reward_funcs": letters_and_calls, "prompts": PROMPTS * 4, **OPTIONS,
            "output_dir": str(tmp_path / folder), **options,
            "trainer_kwargs": {**kwargs, **options.get("trainer_kwargs", {})},
        })  # fmt: skip
        trainer.numbers = numbers
        return trainer

    return build


def expected_tokens(tokenizer, completion: list[dict]) -> tuple[list[int], list[int]]:
    """Tokens of a completion by its messages, and whether the policy sampled them."""
    ids, mask = [], []
    for message in completion:
        if message["role"] == "tool":
            text = f"\n<|im_start|>user\n<tool_response>\n{message['content']}\n</tool_response><|im_end|>\n"
            pieces = tokenizer(text + "<|im_start|>assistant\n")["input_ids"]
        else:
            calls = [call["function"]["arguments"]["x"] for call in message.get("tool_calls") or ()]
            pieces = tokenizer.convert_tokens_to_ids(
                [*message["content"], *(token for x in calls for token in (OPEN, str(x), CLOSE)), END]
            )
        ids += pieces
        mask += [int(message["role"] != "tool")] * len(pieces)
    return ids, mask


def groups_of(path: Path) -> list[dict]:
    """Rows of a file of rollouts or of an evaluation, with completions as messages."""
    groups = load_dataset("parquet", data_files=str(path), split="train").to_list()
    for group in groups:
        assert all(isinstance(completion, str) for completion in group["completions"])
        group["completions"] = [json.loads(completion) for completion in group["completions"]]
    return groups


def hand_loss(model, groups, eta: float, masked: bool = True) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """
    SPPO's loss over the completions of groups with two different win rates, and their log-probabilities.

        mean over i of (log pi(y_i) - log pi_t(y_i) - eta (W_i - 1/2))^2        log pi: of the tokens of the policy
    """
    logps, targets, old = [], [], []
    for group in groups:
        if len(set(group["win_rates"])) == 1:
            continue
        for k, ids in enumerate(group["completion_ids"]):
            start = len(group["prompt_ids"])
            logits = model(torch.tensor([group["prompt_ids"] + ids])).logits[0, start - 1 : -1]
            by_token = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
            mask = torch.tensor(group["tool_mask"][k]) if masked else torch.ones(len(ids))
            logps.append((by_token * mask).sum())
            targets.append(eta * (group["win_rates"][k] - 0.5))
            old.append(group["old"][k] if "old" in group else logps[-1].detach())
    errors = torch.stack(logps) - torch.stack(old) - torch.tensor(targets)
    return (errors**2).mean(), [logp.detach() for logp in logps]


def test_a_tool_is_called_and_only_the_policys_tokens_are_trained_on(start):
    """Two optimizer steps on one rollout, worked out by hand; with the tool's tokens they would be others."""
    trainer = start(num_iterations=2, per_device_train_batch_size=16)
    tokenizer = trainer.processing_class
    before = make_policy(tokenizer)
    trainer.train()
    (path,) = Path(trainer.args.output_dir, "rollouts").glob("*.parquet")
    groups = groups_of(path)
    completions = [completion for group in groups for completion in group["completions"]]

    # The tool got what the policy wrote, and its result is the message after the call
    asked, told = [], []
    for completion in completions:
        for message, following in zip(completion, [*completion[1:], None], strict=True):
            for call in message.get("tool_calls") or ():
                if following is not None:  # at the limit of iterations a call stays without a result
                    asked.append(call["function"]["arguments"]["x"])
                    told.append(following)
    assert len(asked) > 4 and sorted(asked) == sorted(trainer.numbers) and all(type(x) is int for x in asked)
    assert told == [{"role": "tool", "name": "double", "content": DIGITS[2 * x % 10]} for x in asked]
    log = trainer.state.log_history[0]
    assert log["tools/call_frequency"] == pytest.approx(len(asked) / 16) and log["tools/failure_frequency"] == 0

    # The tokens, and whose they are
    for group in groups:
        for k, completion in enumerate(group["completions"]):
            assert expected_tokens(tokenizer, completion) == (group["completion_ids"][k], group["tool_mask"][k])
    lengths = [sum(mask) for group in groups for mask in group["tool_mask"]]
    assert log["completions/mean_length"] == pytest.approx(sum(lengths) / 16)

    # The first step, from log-ratios of 0
    loss, old = hand_loss(before, groups, eta=2.0)
    loss.backward()
    assert log["loss"] == pytest.approx(loss.item(), rel=1e-5)
    gradients = {name: parameter.grad.clone() for name, parameter in before.named_parameters()}
    before.zero_grad()
    hand_loss(before, groups, eta=2.0, masked=False)[0].backward()
    other = before.lm_head.weight.grad
    assert (other - gradients["lm_head.weight"]).norm() > 0.1 * other.norm()

    # The second, from the weights of the first
    with torch.no_grad():
        for name, parameter in before.named_parameters():
            parameter -= 1e-3 * gradients[name]
    before.zero_grad()
    old = iter(old)
    for group in groups:
        if len(set(group["win_rates"])) > 1:
            group["old"] = [next(old) for _ in range(4)]
    loss, logps = hand_loss(before, groups, eta=2.0)
    loss.backward()
    last = trainer.state.log_history[1]
    assert last["loss"] == pytest.approx(loss.item(), rel=1e-4) and abs(last["loss"] - log["loss"]) > 1e-2
    ratios = torch.stack(logps) - torch.stack([each for group in groups for each in group.get("old", ())])
    assert last["log_ratio"] == pytest.approx(ratios.mean().item(), rel=1e-3, abs=1e-5)
    for name, value in weights(trainer).items():
        expected = before.get_parameter(name).detach() - 1e-3 * before.get_parameter(name).grad
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6)


@pytest.fixture
def evaluated(start, tmp_path):
    """A finished run of three steps with an evaluation after each, a judge, and an oracle that gets messages."""

    def more_calls(prompts, first, second, **kwargs) -> list[float]:
        calls = [[len(completion) for completion in completions] for completions in (first, second)]
        return [0.5 + 0.5 * ((a > b) - (a < b)) for a, b in zip(*calls, strict=True)]

    trainer = start(
        max_steps=3, eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=8, learning_rate=3e-2,
        trainer_kwargs={"eval_dataset": Dataset.from_dict({"prompt": PROMPTS}), "eval_preference_func": more_calls},
    )  # fmt: skip
    trainer.train()
    trainer.save_state()
    return trainer


def share_won(ours: list[dict], theirs: list[dict], value) -> float:
    """Mean over prompts and pairs of completions of 1, 1/2 or 0 for the one with the higher value."""
    pairs = [
        (value(group, a), value(other, b))
        for group, other in zip(ours, theirs, strict=True)
        for a in range(len(group["completions"])) for b in range(len(other["completions"]))
    ]  # fmt: skip
    return sum(0.5 + 0.5 * ((a > b) - (a < b)) for a, b in pairs) / len(pairs)


def test_evaluations_with_tools(evaluated, tmp_path):
    tokenizer = evaluated.processing_class
    files = [groups_of(tmp_path / f"out/evaluations/step-00000{step}.parquet") for step in range(4)]
    for group in files[-1]:
        masks = [expected_tokens(tokenizer, completion)[1] for completion in group["completions"]]
        assert group["lengths"] == [sum(mask) for mask in masks]  # the policy's tokens only
        assert group["scores"]["letters_and_calls"] == pytest.approx(letters_and_calls(group["completions"]))
    assert sum(len(completion) > 1 for group in files[0] for completion in group["completions"]) > 3
    logged = {row["step"]: row for row in evaluated.state.log_history if "eval_loss" in row}
    assert logged[0]["eval_tools/call_frequency"] > 0
    for label, opponent in (("initial", 0), ("previous", 2)):
        for judge, value in (
            ("letters_and_calls", lambda group, k: group["scores"]["letters_and_calls"][k]),
            ("more_calls", lambda group, k: len(group["completions"][k])),
        ):
            expected = share_won(files[3], files[opponent], value)
            assert logged[3][f"eval_win_rate_vs_{label}/{judge}"] == pytest.approx(expected), (label, judge)


def tool_results(completions, **kwargs) -> list[float]:
    """A reward function: how many messages of tools there are."""
    return [float(sum(message["role"] == "tool" for message in completion)) for completion in completions]


def test_commands_read_completions_with_tools(evaluated, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, last = (f"out/evaluations/step-00000{step}.parquet" for step in (0, 3))
    sides = ["--model_name_or_path", last, "--opponent_name_or_path", first]
    assert cli.main(["eval", *sides, "--reward_funcs", "test_tools.tool_results", "--output_dir", "found"]) == 0
    files = [groups_of(Path(path)) for path in (last, first)]
    expected = share_won(*files, lambda group, k: tool_results(group["completions"])[k])
    (found,) = json.loads(Path("found/win_rates.json").read_text())["win_rates"].values()
    assert found["win_rate"]["mean"] == pytest.approx(expected)
    # What `eval` has written is such a file again
    assert [group["completions"] for group in groups_of(Path("found/model.parquet"))] == [
        group["completions"] for group in files[0]
    ]
    sides = ["--model_name_or_path", "found/model.parquet", "--opponent_name_or_path", "found/opponent.parquet"]
    assert cli.main(["eval", *sides, "--reward_funcs", "test_tools.tool_results", "--output_dir", "again"]) == 0
    assert json.loads(Path("again/win_rates.json").read_text())["win_rates"]["tool_results"] == found

    assert cli.main(["ladder", "out", "--reward_funcs", "test_tools.tool_results"]) == 0
    (ladder,) = json.loads(Path("out/ladder.json").read_text()).values()
    assert ladder["3"]["0"]["mean"] == pytest.approx(expected)
    assert cli.main(["report", "out"]) == 0
    page = Path("out/report.html").read_text()
    assert "{&#34;type&#34;: &#34;function&#34;" in page and "[{&#34;role&#34;" not in page
    with pytest.raises(ValueError, match="have tokens of tools in their completions"):
        load_rollouts("out/rollouts", 4)


@pytest.mark.parametrize("step", [2, 3])  # between two iterations, and inside one
def test_a_run_with_tools_is_resumed(start, tmp_path, step):
    """Like one that was not interrupted. Only iterations that begin after the checkpoint call their tools again."""

    def build(folder):
        return start(
            folder, per_device_train_batch_size=4, steps_per_generation=4, gradient_accumulation_steps=2, max_steps=6,
            save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=2, seed=3, optim="adamw_torch",
            per_device_eval_batch_size=8, trainer_kwargs={"eval_dataset": Dataset.from_dict({"prompt": PROMPTS})},
        )  # fmt: skip

    whole = build("whole")
    before = []
    save = whole._save_checkpoint
    whole._save_checkpoint = lambda *args: before.append(len(whole.numbers)) or save(*args)
    whole.train()
    resumed = build("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
    for name, value in weights(whole).items():
        assert torch.equal(weights(resumed)[name], value), name
    assert history(resumed) == history(whole)
    assert any("eval_win_rate_vs_initial/letters_and_calls" in row for row in history(resumed))
    assert len(resumed.numbers) > 4 and resumed.numbers == whole.numbers[before[step - 1] :]


class Door:
    """An environment: three of its ten buttons open it."""

    def __init__(self):
        self.is_open = False

    def reset(self, **kwargs) -> str:
        self.is_open = False
        return ""

    def double(self, x: int) -> str:
        """
        Press a button.

        Args:
            x: The button.

        Returns:
            Whether it opens the door.
        """
        self.is_open = self.is_open or x > 6
        return "b" if self.is_open else "a"

    def get_reward(self) -> float:
        return float(self.is_open)


def press(trainer) -> float:
    """The probability that the policy presses button 7, 8 or 9."""
    tokenizer = trainer.processing_class
    trainer.model.eval()
    with torch.no_grad():
        logits = trainer.model(tokenizer("assistant\n" + OPEN, return_tensors="pt")["input_ids"]).logits[0]
    call, digit = logits[-2].softmax(-1), logits[-1].softmax(-1)
    return (
        call[tokenizer.convert_tokens_to_ids(OPEN)] * digit[tokenizer.convert_tokens_to_ids([*"789"])].sum()
    ).item()


def test_an_environment_trains(start, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    trainer = start(
        tools=False, reward_funcs=None, max_steps=30, per_device_train_batch_size=32, num_generations=16, eta=5.0,
        optim="adamw_torch", learning_rate=3e-3, eval_strategy="steps", eval_steps=15, per_device_eval_batch_size=16,
        num_generations_eval=16, max_tool_calling_iterations=1,
        trainer_kwargs={"environment_factory": Door, "eval_dataset": Dataset.from_dict({"prompt": PROMPTS})},
    )  # fmt: skip
    before = press(trainer)
    trainer.train()
    assert before == pytest.approx(0.15, rel=1e-3) and press(trainer) > 0.5
    logged = [row for row in trainer.state.log_history if "eval_loss" in row]
    assert logged[0]["eval_reward"] < 0.2 < 0.5 < logged[-1]["eval_reward"]
    assert logged[-1]["eval_win_rate_vs_initial/Door"] > 0.7


def test_environments_that_bring_prompts(start, tmp_path, monkeypatch):
    """The dataset only names the environment of each row, which also tells rows apart in evaluations."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    seen = []

    class Gate(Door):
        def reset(self, **kwargs) -> str:
            super().reset()
            return "cd"

        def get_reward(self) -> float:
            seen.append(self)
            return float(not self.is_open)

    trainer = start(
        tools=False, reward_funcs=None, per_device_train_batch_size=32, num_generations=16, eval_strategy="steps",
        eval_steps=1, per_device_eval_batch_size=16, trainer_kwargs={
            "environment_factory": {"door": Door, "gate": Gate},
            "train_dataset": Dataset.from_dict({"environment": ["door", "gate"] * 4}),
            "eval_dataset": Dataset.from_dict({"environment": ["gate", "door"]}),
        },
    )  # fmt: skip
    trainer.train()
    assert seen and trainer.state.log_history[1]["win_rate/kept"] > 0
    files = [groups_of(tmp_path / f"out/evaluations/step-00000{step}.parquet") for step in (0, 2)]
    for name, row in (("Gate", 0), ("Door", 1)):
        ours, theirs = ([file[row]] for file in reversed(files))
        expected = share_won(ours, theirs, lambda group, k, name=name: group["scores"][name][k])
        logged = [line for line in trainer.state.log_history if line.get("step") == 2 and "eval_loss" in line]
        assert logged[0][f"eval_win_rate_vs_initial/{name}"] == pytest.approx(expected)
        assert ours[0]["environment"] == theirs[0]["environment"] == name.lower()
