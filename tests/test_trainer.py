"""SPPOTrainer end to end on tiny models: what is trained on what, and that it is the published objective."""

import copy
import functools
import math
from collections import Counter
from itertools import count

import pandas as pd
import pytest
import torch
from datasets import Dataset, load_dataset
from helpers import COMPLETIONS, alphabet_score, count_abc, decoder, fixed_rollout, make_tokenizer, more_abc, weights
from peft import LoraConfig, PeftModel, get_peft_model

import trl_sppo.trainer
from trl_sppo import SPPOConfig
from trl_sppo.errors import RunError
from trl_sppo.rollouts.micro_batches import cut_by_length, log_probs


NAN = math.nan


def independent_loss(model, tokenizer, prompts, eta, temperature, keep=lambda w: True, first=0) -> torch.Tensor:
    """
    The paper's loss at pi_theta = pi_t, written out: plain softmax, quadratic loop, one completion at a time, of which
    tokens count from `first` on.
    """
    errors = []
    for prompt in prompts:
        group = COMPLETIONS[prompt]
        scores = alphabet_score(group)
        for i, completion in enumerate(group):
            wins = [float(scores[i] > s) + 0.5 * float(scores[i] == s) for j, s in enumerate(scores) if j != i]
            win_rate = sum(wins) / len(wins)
            if not keep(win_rate):
                continue
            prompt_ids = tokenizer(prompt)["input_ids"]
            logits = model(torch.tensor([prompt_ids + completion])).logits[0] / temperature
            logps = logits.log_softmax(-1)
            positions = range(len(prompt_ids) - 1, len(prompt_ids) + len(completion) - 1)
            logp = sum(logps[t, token] for t, token in list(zip(positions, completion, strict=True))[first:])
            errors.append((logp - logp.detach() - eta * (win_rate - 0.5)) ** 2)
    return torch.stack(errors).mean()


# ---- The objective


@pytest.mark.parametrize("temperature", [1.0, 0.8])
def test_one_step_equals_the_papers_loss_written_out(fixed, tiny_model, tiny_tokenizer, temperature):
    expected_model = copy.deepcopy(tiny_model)
    expected = independent_loss(expected_model, tiny_tokenizer, COMPLETIONS, eta=10.0, temperature=temperature)
    expected.backward()
    trainer = fixed(model=tiny_model, temperature=temperature)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)
    for (name, actual), parameter in zip(weights(trainer).items(), expected_model.parameters(), strict=True):
        torch.testing.assert_close(actual, parameter - 1e-3 * parameter.grad, rtol=1e-5, atol=1e-6, msg=name)


def test_the_threshold_trains_on_the_clear_winners_and_losers_only(fixed, tiny_model, tiny_tokenizer):
    expected = independent_loss(
        tiny_model, tiny_tokenizer, COMPLETIONS, eta=10.0, temperature=1.0, keep=lambda w: w >= 0.8 or w <= 0.2
    )
    trainer = fixed(model=tiny_model, win_rate_threshold=0.8)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert 0 < log["win_rate/kept"] < 1


def test_later_steps_of_an_iteration_are_relative_to_the_rollout_policy(fixed, tiny_model):
    """pi_t is the policy that sampled the batch, not the one before the step and not the initial one."""
    trainer = fixed(model=tiny_model, num_iterations=3, max_steps=6, learning_rate=1e-2)
    log_ratios = []
    loss = trainer._compute_loss

    def record(model, inputs):
        result = loss(model, inputs)
        log_ratios.append(trainer._metrics["train"]["log_ratio_to_target"][-1])
        return result

    trainer._compute_loss = record
    trainer.train()
    # Each iteration starts at its own policy and moves towards its targets; the second starts anew
    assert log_ratios[0] == pytest.approx(0, abs=1e-6)
    assert 0 < log_ratios[1] < log_ratios[2]
    assert log_ratios[3] == pytest.approx(0, abs=1e-6)
    assert 0 < log_ratios[4] < log_ratios[5]


def test_several_optimizer_steps_per_iteration_use_every_kept_row_once(fixed, tiny_model, monkeypatch):

    trained = []
    original = trl_sppo.trainer.sppo_loss

    def record(log_ratios, win_rates, **kwargs):
        trained.extend(win_rates[~win_rates.isnan()].tolist())
        return original(log_ratios, win_rates, **kwargs)

    monkeypatch.setattr(trl_sppo.trainer, "sppo_loss", record)
    trainer = fixed(
        model=tiny_model, per_device_train_batch_size=4, steps_per_generation=4, max_steps=4, win_rate_threshold=0.7
    )
    trainer.train()
    scores = torch.tensor([alphabet_score(group) for group in COMPLETIONS.values()])
    rates = torch.stack([(s[:, None] > s).float() + 0.5 * (s[:, None] == s).float() for s in scores])
    rates = (rates.sum(2) - 0.5) / 3
    expected = rates[(rates > 0.7 - 1e-6) | (rates < 0.3 + 1e-6)]
    assert sorted(trained) == pytest.approx(sorted(expected.tolist()))


def test_win_rates_of_several_sources_are_a_weighted_vote(fixed, tiny_model):
    def length(completion_ids, **kwargs):
        return [float(len(ids)) for ids in completion_ids]

    def opposite(completion_ids, **kwargs):
        return [-1000 * score for score in length(completion_ids)]

    # The scale of a source does not matter, its weight does: 3 votes for long, 1 for short
    trainer = fixed(model=tiny_model, reward_funcs=[length, opposite], reward_weights=[3.0, 1.0], log_completions=True)
    trainer.train()
    # lengths 2, 3, 4, 2: the longer wins by 3/4, so 4 -> 3/4, 3 -> (3/4 + 3/4 + 1/4) / 3, 2 -> (1/2 + 1/4 + 1/4) / 3
    table = pd.read_parquet(f"{trainer.args.output_dir}/completions/completions_00001.parquet")
    by_length = {2: (0.5 + 0.25 + 0.25) / 3, 3: (0.75 + 0.75 + 0.25) / 3, 4: 0.75}
    expected = [by_length[len(completion) + 1] for completion in table["completion"]]
    assert table["win_rate"].tolist() == pytest.approx(expected)


def test_bradley_terry_and_include_self_reach_the_win_rates(fixed, tiny_model):
    trainer = fixed(
        model=tiny_model, comparison="bradley_terry", bt_temperature=2.0, include_self=True, log_completions=True
    )
    trainer.train()
    table = pd.read_parquet(f"{trainer.args.output_dir}/completions/completions_00001.parquet")
    scores = torch.tensor(table["alphabet_score"].tolist()).view(-1, 4)
    expected = torch.sigmoid((scores[:, :, None] - scores[:, None, :]) / 2).mean(2)  # the diagonal is sigmoid(0)
    torch.testing.assert_close(torch.tensor(table["win_rate"].tolist()).view(-1, 4).float(), expected)
    # and the column that GRPO calls advantage is SPPO's target
    torch.testing.assert_close(
        torch.tensor(table["advantage"].tolist()).view(-1, 4).float(), 10 * (expected - 0.5), rtol=1e-5, atol=1e-5
    )


# ---- What is not trained on


@pytest.mark.parametrize("micro_batches", [1, 2, 16])
@pytest.mark.parametrize("num_iterations", [1, 2])
def test_dropped_completions_cost_no_forward(fixed, tiny_model, monkeypatch, num_iterations, micro_batches):
    rows = []

    def count(model, ids, *args, **kwargs):
        rows.append(len(ids))
        return log_probs(model, ids, *args, **kwargs)

    monkeypatch.setattr("trl_sppo.trainer.log_probs", count)
    trainer = fixed(
        model=tiny_model,
        train_on="best_and_worst",
        num_iterations=num_iterations,
        max_steps=num_iterations,
        per_device_train_batch_size=16 // micro_batches,
        gradient_accumulation_steps=micro_batches,
    )
    trainer.train()
    # Four groups of four: 8 of 16 rows. More than one pass needs the log-probabilities of pi_t: those rows, once.
    # Of 16 micro-batches 8 have nothing to train on, and make no forward pass.
    one_pass = {1: [8], 2: [3, 5], 16: [1] * 8}[micro_batches]
    assert rows == (one_pass if num_iterations == 1 else [8, *one_pass, *one_pass])


def test_a_batch_in_which_all_tie_teaches_nothing_and_says_so(fixed, tiny_model, caplog):
    trainer = fixed(model=tiny_model, reward_funcs=lambda completions, **kwargs: [1.0] * len(completions))
    before = weights(trainer)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["loss"] == 0 and log["win_rate/kept"] == 0 and log["preferences/tied"] == 1
    assert log["win_rate/groups_without_signal"] == 1
    assert all(torch.equal(before[name], after) for name, after in weights(trainer).items())
    assert "nothing is learned from it" in caplog.text


@pytest.mark.parametrize("bad", [None, NAN, math.inf, -math.inf])
def test_unscorable_completions_take_no_part(fixed, tiny_model, caplog, bad):
    def score(completion_ids, **kwargs):  # the second of each group of four cannot be scored
        return [bad if i % 4 == 1 else s for i, s in enumerate(alphabet_score(completion_ids))]

    trainer = fixed(model=tiny_model, reward_funcs=score, log_completions=True)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["win_rate/unscorable"] == 0.25 and math.isfinite(log["loss"]) and math.isfinite(log["reward"])
    assert "gave no finite score (None, NaN or infinite) for 4 of 16 completions" in caplog.text
    table = pd.read_parquet(f"{trainer.args.output_dir}/completions/completions_00001.parquet")
    assert table["win_rate"].isna().tolist() == [False, True, False, False] * 4
    assert table["win_rate"].mean() == pytest.approx(0.5)


@pytest.mark.parametrize("bad", [None, NAN, math.inf])
def test_nothing_scorable_at_all(fixed, tiny_model, bad):
    trainer = fixed(model=tiny_model, reward_funcs=lambda completions, **kwargs: [bad] * len(completions))
    with pytest.raises(RunError, match="for any completion of the last 4 prompts"):
        trainer.train()


@pytest.mark.parametrize(("silent", "stops"), [([2, 3], False), ([2, 3, 4], True), ([2, 3, 5, 6], False)])
def test_nothing_scorable_in_some_rollouts(fixed, tiny_model, caplog, silent, stops):
    calls = count(1)

    def score(completions, **kwargs):
        return [None if n in silent else float(i) for n in [next(calls)] for i in range(len(completions))]

    trainer = fixed(model=tiny_model, reward_funcs=score, max_steps=6)
    if stops:
        with pytest.raises(RunError, match="of the last 12 prompts"):
            trainer.train()
    else:
        trainer.train()
        assert "for 16 of 16 completions" in caplog.text and "nothing is learned from it" in caplog.text
        unscorable = [log["win_rate/unscorable"] for log in trainer.state.log_history if "loss" in log]
        assert unscorable == [float(n in silent) for n in range(1, 7)]


@pytest.mark.shows("mask_truncated_completions")
def test_truncated_completions_can_be_masked(fixed, tiny_model, monkeypatch):
    cut = {
        prompt: [ids[:-1] if k == 2 else ids for k, ids in enumerate(group)] for prompt, group in COMPLETIONS.items()
    }
    monkeypatch.setattr("helpers.COMPLETIONS", cut)

    trained = []
    original = trl_sppo.trainer.sppo_loss

    def record(log_ratios, win_rates, **kwargs):
        trained.append((~win_rates.isnan()).sum().item())
        return original(log_ratios, win_rates, **kwargs)

    monkeypatch.setattr(trl_sppo.trainer, "sppo_loss", record)
    trainer = fixed(model=tiny_model, mask_truncated_completions=True)
    trainer.train()
    assert trained == [12] and trainer.state.log_history[0]["win_rate/kept"] == 12 / 16


def test_tool_tokens_do_not_count(fixed, tiny_model, tiny_tokenizer):
    """A step is that of the loss in which tokens that the environment wrote (`env_mask` 0) have no log-ratio."""

    def rollout(prompts, trainer):
        output = fixed_rollout(prompts, trainer)
        output["env_mask"] = [[0] + [1] * (len(ids) - 1) for ids in output["completion_ids"]]
        return output

    expected_model = copy.deepcopy(tiny_model)
    independent_loss(expected_model, tiny_tokenizer, COMPLETIONS, eta=10.0, temperature=1.0, first=1).backward()
    trainer = fixed(model=tiny_model, trainer_kwargs={"rollout_func": rollout})
    trainer.train()
    for (name, actual), parameter in zip(weights(trainer).items(), expected_model.parameters(), strict=True):
        torch.testing.assert_close(actual, parameter - 1e-3 * parameter.grad, rtol=1e-5, atol=1e-6, msg=name)


# ---- Training


def test_training_on_samples_raises_the_reward(make_trainer):
    trainer = make_trainer(max_steps=40, per_device_train_batch_size=32, num_generations=8, max_completion_length=8)
    trainer.train()
    rewards = [row["reward"] for row in trainer.state.log_history if "reward" in row]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 1


def test_lora_trains_the_adapter_only(make_trainer, tiny_model):
    base = {name: parameter.clone() for name, parameter in tiny_model.named_parameters()}
    trainer = make_trainer(
        model=tiny_model,
        num_iterations=2,
        max_steps=4,
        trainer_kwargs={"peft_config": LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")},
    )
    adapter = {name: p.clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    assert adapter and all("lora_" in name for name in adapter)
    moved = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert any(not torch.equal(adapter[name], moved[name]) for name in adapter)
    for name, parameter in base.items():
        wrapped = dict(trainer.model.base_model.model.named_parameters())
        actual = wrapped.get(name, wrapped.get(name.replace(".weight", ".base_layer.weight")))
        actual = wrapped.get(name.replace(".bias", ".base_layer.bias")) if actual is None else actual
        assert torch.equal(actual, parameter), name
    assert trainer.ref_model is None
    # pi_t is the adapter at rollout, not the base model: the second iteration starts at a log-ratio of zero again
    log = [row for row in trainer.state.log_history if "log_ratio" in row]
    assert log[2]["log_ratio"] == pytest.approx(0, abs=1e-5) and log[3]["log_ratio"] != 0


def test_metrics_and_evaluation(make_trainer):
    trainer = make_trainer(
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=4,
        num_generations_eval=2,
        trainer_kwargs={"eval_dataset": Dataset.from_dict({"prompt": ["ab", "q"]})},
    )
    trainer.train()
    train = next(row for row in trainer.state.log_history if "loss" in row)
    evaluation = next(row for row in trainer.state.log_history if "eval_loss" in row)
    expected = {
        "reward", "reward_std", "rewards/count_abc/mean", "win_rate/spread", "win_rate/kept", "win_rate/unscorable",
        "win_rate/groups_without_signal", "preferences/tied", "preferences/saturated", "completions/duplicates",
        "completions/winners_mean_length", "completions/losers_mean_length",
    }  # fmt: skip
    of_the_loss = {
        "log_ratio", "log_ratio_to_target", "winner_log_ratio", "loser_log_ratio", "kl_to_rollout_policy", "entropy",
    }  # fmt: skip
    assert expected | of_the_loss <= train.keys()
    assert {f"eval_{name}" for name in expected} <= evaluation.keys()


def test_evaluations_compute_no_log_probabilities(make_trainer, monkeypatch):
    """The policy is the one that sampled: the loss is the mean squared target, (eta (W - 1/2))^2."""
    passes = []
    monkeypatch.setattr(
        "trl_sppo.trainer.log_probs",
        lambda model, *args: (passes.append(model.training), log_probs(model, *args))[1],
    )
    scores = {"ab": [1.0, 2.0, 3.0, 3.0], "q": [0.0, 0.0, 0.0, 4.0]}

    def score(prompts, **kwargs):
        return [scores[prompt][i % 4] for i, prompt in enumerate(prompts)]

    trainer = make_trainer(
        reward_funcs=score, eta=2.0, eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=8,
        prompts=["ab", "q"] * 4, trainer_kwargs={"eval_dataset": Dataset.from_dict({"prompt": ["ab", "q"]})},
        max_steps=1, steps_per_generation=2,
    )  # fmt: skip
    trainer.train()
    assert passes and all(passes)
    # ab: win rates 0, 1/3, 5/6, 5/6; q: 1/3 three times, 1
    targets = [2 * (w - 0.5) for w in (0, 1 / 3, 5 / 6, 5 / 6, 1 / 3, 1 / 3, 1 / 3, 1)]
    expected = sum(target**2 for target in targets) / 8
    evaluation = [row for row in trainer.state.log_history if "eval_loss" in row]
    assert [row["eval_loss"] for row in evaluation] == pytest.approx([expected] * 2, rel=1e-5)


def test_metrics_of_the_rollout_are_logged_at_each_of_its_steps(fixed, tiny_model):
    """Also when an evaluation, which has another rollout, comes between."""
    trainer = fixed(
        model=tiny_model, num_iterations=3, max_steps=3, eval_strategy="steps", eval_steps=1,
        per_device_eval_batch_size=4, num_generations_eval=2, comparison="bradley_terry",
        trainer_kwargs={"eval_dataset": Dataset.from_dict({"prompt": ["ab", "xyz"]})},
    )  # fmt: skip
    trainer.train()
    train = [row for row in trainer.state.log_history if "loss" in row]
    evaluation = next(row for row in trainer.state.log_history if "eval_loss" in row)
    for name in ("win_rate/spread", "win_rate/length_correlation", "preferences/saturated", "completions/duplicates"):
        assert train[0][name] == train[1][name] == train[2][name]
    assert evaluation["eval_win_rate/spread"] != train[0]["win_rate/spread"]


def test_evaluation_with_one_completion_per_prompt_has_rewards_and_no_win_rates(make_trainer):
    trainer = make_trainer(
        per_device_eval_batch_size=2,
        num_generations_eval=1,
        trainer_kwargs={"eval_dataset": Dataset.from_dict({"prompt": ["ab", "q"]})},
    )
    metrics = trainer.evaluate()
    assert math.isfinite(metrics["eval_reward"]) and metrics["eval_win_rate/kept"] == 0


def test_conversational_prompts_and_empty_completions(make_trainer, tiny_model):
    """The policy always answers with EOS at once: an empty text is an answer like any other."""
    with torch.no_grad():
        tiny_model.lm_head.weight.zero_()
    bias = torch.zeros(tiny_model.config.vocab_size)
    bias[1] = 1e4
    tiny_model.lm_head.register_forward_hook(lambda module, args, output: output + bias)
    seen = []

    def score(completions, **kwargs):
        seen.extend(completion[0]["content"] for completion in completions)
        return [0.0] * len(completions)

    prompts = [[{"role": "user", "content": text}] for text in ("ab", "fgh")]
    make_trainer(model=tiny_model, prompts=prompts, reward_funcs=score, max_steps=1).train()
    assert seen == [""] * 8


@pytest.mark.shows("router_aux_loss_coef")
def test_moe_load_balancing_loss_is_added(make_trainer, fixed):
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=31, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8,
        shared_expert_intermediate_size=8, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = Qwen2MoeForCausalLM(config)
    losses = {}
    for coefficient in (0.0, 0.5):
        trainer = fixed(model=copy.deepcopy(model), router_aux_loss_coef=coefficient)
        trainer.train()
        losses[coefficient] = trainer.state.log_history[0]
    extra = 0.5 * losses[0.5]["aux_loss"]
    assert extra > 0
    assert losses[0.5]["loss"] == pytest.approx(losses[0.0]["loss"] + extra, rel=1e-4)


# ---- Metrics: their values, on completions that are known


def entropies_and_log_ratios(before, after, tokenizer, keep):
    """Per token of the kept completions: entropy of pi_theta, and log pi_theta / pi_t."""
    entropies, log_ratios = [], []
    for prompt, group in COMPLETIONS.items():
        for k, completion in enumerate(group):
            if not keep(alphabet_score(group), k):
                continue
            ids = tokenizer(prompt)["input_ids"]
            positions = slice(len(ids) - 1, len(ids) + len(completion) - 1)
            with torch.no_grad():
                old, new = (
                    model(torch.tensor([ids + completion])).logits[0, positions].log_softmax(-1)
                    for model in (before, after)
                )
            entropies += (-(new.exp() * new).sum(-1)).tolist()
            log_ratios.append([(new - old)[i, token].item() for i, token in enumerate(completion)])
    return entropies, log_ratios


@pytest.mark.parametrize("micro_batches", [1, 4, 16])
def test_metrics_of_the_loss_are_means_over_the_whole_step(fixed, tiny_model, tiny_tokenizer, micro_batches):
    """Whatever the split: entropy and KL per token, log-ratios per completion. The second pass has log-ratios."""
    before = copy.deepcopy(tiny_model)
    trainer = fixed(
        model=tiny_model,
        num_iterations=2,
        max_steps=2,
        per_device_train_batch_size=16 // micro_batches,
        gradient_accumulation_steps=micro_batches,
        win_rate_threshold=0.8,
    )
    after_one_step = []
    loss = trainer._compute_loss

    def keep_weights(model, inputs):
        if trainer.state.global_step == 1 and not after_one_step:
            after_one_step.append(copy.deepcopy(tiny_model.state_dict()))
        return loss(model, inputs)

    trainer._compute_loss = keep_weights
    trainer.train()

    def win_rate(scores, k):
        others = [score for j, score in enumerate(scores) if j != k]
        return sum((scores[k] > s) + 0.5 * (scores[k] == s) for s in others) / len(others)

    def keep(scores, k):
        return win_rate(scores, k) >= 0.8 or win_rate(scores, k) <= 0.2

    after = copy.deepcopy(before)
    after.load_state_dict(after_one_step[0])
    entropies, log_ratios = entropies_and_log_ratios(before, after, tiny_tokenizer, keep)
    rates = [
        win_rate(alphabet_score(group), k)
        for group in COMPLETIONS.values()
        for k in range(4)
        if keep(alphabet_score(group), k)
    ]
    sums = [sum(per_token) for per_token in log_ratios]
    targets = [10 * (rate - 0.5) for rate in rates]
    tokens = [value for per_token in log_ratios for value in per_token]
    winners = [s for s, rate in zip(sums, rates, strict=True) if rate > 0.5]
    losers = [s for s, rate in zip(sums, rates, strict=True) if rate < 0.5]
    expected = {
        "entropy": sum(entropies) / len(entropies),
        "kl_to_rollout_policy": sum(math.exp(x) - 1 - x for x in tokens) / len(tokens),
        "log_ratio": sum(sums) / len(sums),
        "winner_log_ratio": sum(winners) / len(winners),
        "loser_log_ratio": sum(losers) / len(losers),
        "log_ratio_to_target": sum(s * t for s, t in zip(sums, targets, strict=True)) / sum(t * t for t in targets),
    }
    log = trainer.state.log_history[1]
    for name, value in expected.items():
        assert log[name] == pytest.approx(value, rel=1e-3, abs=1e-7), name


def test_metrics_of_the_win_rates(fixed, tiny_model):
    # Letters by group, scored by length: lengths with EOS are 2, 3, 4, 2 in each group, so two of four tie.
    # Win rates: 4 -> 1, 3 -> 2/3, 2 -> (1/2) / 3 = 1/6. One pair of six ties.
    trainer = fixed(
        model=tiny_model, reward_funcs=lambda completion_ids, **kwargs: [float(len(ids)) for ids in completion_ids]
    )
    trainer.train()
    log = trainer.state.log_history[0]
    rates = [1, 2 / 3, 1 / 6, 1 / 6]
    assert log["win_rate/spread"] == pytest.approx(math.sqrt(sum((rate - 0.5) ** 2 for rate in rates) / 4))
    assert log["preferences/tied"] == pytest.approx(1 / 6)
    assert log["win_rate/kept"] == 1 and log["win_rate/unscorable"] == 0 and log["win_rate/groups_without_signal"] == 0
    assert log["completions/winners_mean_length"] == pytest.approx((4 + 3) / 2)
    assert log["completions/losers_mean_length"] == pytest.approx(2)
    assert log["reward"] == pytest.approx((2 + 3 + 4 + 2) / 4)


# ---- The rest of TRL's doors


def test_an_interrupted_rollout_leaves_nothing_behind(fixed, tiny_model, monkeypatch):
    calls = []

    def score(completion_ids, **kwargs):
        calls.append(len(completion_ids))
        return alphabet_score(completion_ids)

    trainer = fixed(model=tiny_model, reward_funcs=score, num_iterations=2, max_steps=2)
    monkeypatch.setattr("trl_sppo.trainer.log_probs", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    monkeypatch.setattr("trl_sppo.trainer.log_probs", log_probs)
    trainer.train()
    assert calls == [16, 16]


def test_an_evaluation_batch_may_exceed_the_generation_batch(make_trainer):
    trainer = make_trainer(
        per_device_eval_batch_size=32,
        trainer_kwargs={"eval_dataset": Dataset.from_dict({"prompt": ["ab", "q"] * 8})},
    )
    assert math.isfinite(trainer.evaluate()["eval_reward"])


def test_async_reward_functions_and_their_logs(make_trainer):
    async def score(completions, log_metric, log_extra, **kwargs):
        log_metric("mine", 3.0)
        log_extra("column", ["x"] * len(completions))
        return count_abc(completions)

    trainer = make_trainer(reward_funcs=score, log_completions=True, max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["mine"] == 3.0
    table = pd.read_parquet(f"{trainer.args.output_dir}/completions/completions_00001.parquet")
    assert table["column"].tolist() == ["x"] * 8 and table["win_rate"].notna().all()


def test_an_environment_without_a_reward_beside_an_oracle(make_trainer, monkeypatch):
    """The pairwise oracle alone says what is better; TRL by itself would refuse it."""

    class Room:
        def reset(self, **kwargs):
            return None

    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    monkeypatch.setattr("trl.trainer.grpo_trainer.supports_tool_calling", lambda processing_class: True)
    trainer = make_trainer(
        reward_funcs=None,
        prompts=[[{"role": "user", "content": text}] for text in ("ab", "fgh")] * 4,
        trainer_kwargs={"preference_func": more_abc, "environment_factory": Room},
    )
    assert trainer.reward_funcs == [] and len(trainer.reward_weights) == 0


def test_streamed_prompts(make_trainer):
    stream = Dataset.from_dict({"prompt": ["ab", "fgh", "cd e", "xyz"] * 4}).to_iterable_dataset()
    trainer = make_trainer(trainer_kwargs={"train_dataset": stream})
    trainer.train()
    assert trainer.state.global_step == 2


def test_what_a_rollout_function_adds_reaches_the_reward_functions(fixed, tiny_model):
    seen = []

    def rollout(prompts, trainer):
        return {**fixed_rollout(prompts, trainer), "turns": list(range(len(prompts))), "short": [7], "shared": "s"}

    def score(completion_ids, turns, shared, short, **kwargs):
        seen.append((turns, shared, short))
        return alphabet_score(completion_ids)

    prompts = Dataset.from_list([{"prompt": prompt, "short": None} for prompt in COMPLETIONS])
    kwargs = {"rollout_func": rollout, "train_dataset": prompts}
    fixed(model=tiny_model, reward_funcs=score, trainer_kwargs=kwargs).train()
    assert seen == [(list(range(16)), ["s"] * 16, [7] + [None] * 15)]


def test_padding_that_only_dropped_completions_needed_is_cut(fixed, tiny_model, monkeypatch):
    """The long completions are in the middle of each group: best and worst have two tokens."""
    table = {p: [[3 + k, 1] if k in (0, 3) else [3 + k, 4, 5, 6, 7, 8, 1] for k in range(4)] for p in COMPLETIONS}
    monkeypatch.setattr("helpers.COMPLETIONS", table)
    shapes = []
    tiny_model.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    fixed(
        model=tiny_model,
        reward_funcs=lambda completion_ids, **kwargs: [float(ids[0]) for ids in completion_ids],
        train_on="best_and_worst",
    ).train()
    assert shapes == [(8, len("cd e") + 2)]


# ---- vLLM, up to its door: what TRL does with its completions and log-probabilities


@pytest.fixture
def fake_vllm(monkeypatch):
    """A stand-in for TRL's vLLM backend: the table's completions, with the policy's log-probs shifted per position."""
    shifts = [0.0, 0.0, 0.0, 0.0]

    class Backend:
        mode = "server"  # has nothing to be prepared for a weight sync

        def __init__(self, model, processing_class, **kwargs):
            self.model, self.tokenizer, self.syncs = model, processing_class, 0

        def sync_weights(self):
            self.syncs += 1

        def generate(self, prompts, images, num_generations, profiler):
            seen: dict[str, int] = {}
            completion_ids, logprobs = [], []
            for ids in prompts:
                prompt = self.tokenizer.decode(ids)
                k = seen.get(prompt, 0) % 4
                seen[prompt] = k + 1
                completion = COMPLETIONS[prompt][k]
                with torch.no_grad():
                    logps = self.model(torch.tensor([ids + completion])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
                own = logps.gather(1, torch.tensor(completion)[:, None])[:, 0]
                completion_ids.append(completion)
                logprobs.append([[value + shifts[k] / len(completion)] for value in own.tolist()])
            return None, completion_ids, logprobs, None

    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", Backend)
    monkeypatch.setattr("trl_sppo.checks.arguments.check_vllm", lambda args: None)
    return shifts


@pytest.mark.parametrize("options", [{}, {"train_on": "best_and_worst"}])
def test_exact_vllm_log_probabilities_change_nothing(fixed, fake_vllm, tiny_model, options):
    start = copy.deepcopy(tiny_model)
    plain = fixed(model=tiny_model, num_iterations=2, max_steps=2, **options)
    plain.train()
    by_vllm = fixed(
        model=start, use_vllm=True, num_iterations=2, max_steps=2, trainer_kwargs={"rollout_func": None}, **options
    )
    by_vllm.train()
    assert by_vllm.vllm_generation.syncs == 1
    log = by_vllm.state.log_history[0]
    assert log["sampling/sampling_logp_difference/max"] == pytest.approx(0, abs=1e-4)  # NaN rows are left out
    assert log["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-4)
    for name, parameter in weights(by_vllm).items():
        torch.testing.assert_close(parameter, weights(plain)[name], rtol=1e-4, atol=1e-5, msg=name)


def test_vllm_importance_correction_weights_the_completion(fixed, fake_vllm, tiny_model, tiny_tokenizer):
    # vLLM believes its second completion of each group twice as likely as the trainer does: pi_t / pi_vllm is 1/2
    fake_vllm[1] = math.log(2)
    scores = [alphabet_score(group) for group in COMPLETIONS.values()]
    errors = []
    for group in scores:
        for k, score in enumerate(group):
            wins = [float(score > other) + 0.5 * float(score == other) for j, other in enumerate(group) if j != k]
            errors.append((0.5 if k == 1 else 1.0) * (10 * (sum(wins) / 3 - 0.5)) ** 2)
    trainer = fixed(
        model=tiny_model,
        use_vllm=True,
        vllm_importance_sampling_mode="sequence_truncate",
        trainer_kwargs={"rollout_func": None},
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(sum(errors) / len(errors), rel=1e-4)


@pytest.mark.parametrize("how", ["frozen", "adapter for inference"])
def test_a_policy_of_which_nothing_would_be_trained(make_trainer, tiny_model, tmp_path, how):
    model = tiny_model.requires_grad_(False)
    if how == "adapter for inference":
        get_peft_model(tiny_model, LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "adapter")
        model = PeftModel.from_pretrained(tiny_model, tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"^no parameter of the policy .* requires a gradient.*is_trainable=True"):
        make_trainer(model=model)


def test_a_new_adapter_on_a_frozen_policy(make_trainer, tiny_model):
    trainer = make_trainer(
        model=tiny_model.requires_grad_(False), trainer_kwargs={"peft_config": LoraConfig(task_type="CAUSAL_LM")}
    )
    assert {name.split(".")[-2] for name, p in trainer.model.named_parameters() if p.requires_grad} == {"default"}


def test_a_reward_model_with_a_trailing_slash_is_named_by_its_folder(make_trainer, tmp_path):
    for name in ("one", "two"):
        decoder().save_pretrained(tmp_path / name / "reward")
        make_tokenizer().save_pretrained(tmp_path / name / "reward")
    trainer = make_trainer(reward_funcs=[f"{tmp_path}/one/reward/", f"{tmp_path}/two/reward//"])
    first, second = trainer.voters.sources.names
    assert first.startswith("reward") and second.startswith("reward") and first != second


# ---- What a checkpoint recommends


@pytest.mark.parametrize(
    "recommended",
    [
        {"min_p": 0.9},
        {"typical_p": 0.01},
        {"no_repeat_ngram_size": 1},
        {"suppress_tokens": list(range(3, 25))},
        {"bad_words_ids": [[i] for i in range(3, 25)]},
        {"forced_eos_token_id": 1, "exponential_decay_length_penalty": (1, 9.0)},
        {"min_new_tokens": 6},
        {"max_time": 1e-9},
        {"epsilon_cutoff": 0.9},
    ],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.parametrize("adapter", [False, True])
def test_what_a_checkpoint_recommends_does_not_act_on_rollouts(make_trainer, tiny_model, recommended, adapter):
    def sampled(**recommended):
        model = copy.deepcopy(tiny_model)
        model.generation_config.update(**recommended)
        kwargs = {"peft_config": LoraConfig(task_type="CAUSAL_LM", r=2)} if adapter else {}
        trainer = make_trainer(model=model, trainer_kwargs=kwargs, max_steps=1, max_completion_length=8)
        trainer.train()
        kept = trainer.model.generation_config
        assert all(getattr(kept, name) == value for name, value in recommended.items())  # for those who load it
        return list(trainer._logs["completion"])

    assert sampled(**recommended) == sampled()


def test_every_eos_token_of_a_checkpoint_ends_a_completion(make_trainer, tiny_model):
    tiny_model.generation_config.eos_token_id = [1, *range(3, 16)]
    lengths = []

    def record(completion_ids, **kwargs):
        lengths.extend(map(len, completion_ids))
        assert all(3 <= ids[-1] < 16 or ids[-1] == 1 or len(ids) == 30 for ids in completion_ids)
        return [0.0] * len(completion_ids)

    make_trainer(reward_funcs=record, max_steps=1, max_completion_length=30).train()
    assert max(lengths) < 30


# ---- What reward functions change


def _vandal(completions, prompts, completion_ids, note, **kwargs):
    for completion, ids, row in zip(completions, completion_ids, note, strict=True):
        completion[0]["content"] = "abc"
        ids.clear()
        row.append("changed")
    prompts.clear()
    return [float(i) for i in range(len(completions))]


async def _async_vandal(**kwargs):
    return _vandal(**kwargs)


class _CallableVandal:
    __name__ = "vandal"

    def __call__(self, **kwargs):
        return _vandal(**kwargs)


@pytest.mark.parametrize("vandal", [_vandal, _async_vandal, _CallableVandal(), functools.partial(_vandal)])
def test_a_reward_function_changes_only_its_own_copies(make_trainer, vandal):
    seen = []

    def witness(completions, completion_ids, note, **kwargs):
        seen.append((completions, completion_ids, note))
        return count_abc(completions)

    prompts = Dataset.from_dict({"prompt": [[{"role": "user", "content": t}] for t in ("ab", "cd")], "note": [[], []]})
    trainer = make_trainer(
        reward_funcs=[vandal, witness],
        trainer_kwargs={"train_dataset": prompts},
        max_steps=1,
        max_completion_length=12,
    )
    trainer.train()
    completions, completion_ids, notes = seen[0]
    texts = trainer.processing_class.batch_decode(completion_ids, skip_special_tokens=True)
    assert [row[0]["content"] for row in completions] == texts and set(texts) != {"abc"}
    assert notes == [[]] * 8 and all(completion_ids)
    stored = load_dataset("parquet", data_dir=f"{trainer.args.output_dir}/rollouts", split="train")
    assert [row[0]["content"] for group in stored["completions"] for row in group] == texts


# ---- What is asked of other processes, and of the arguments


def test_kept_completions_are_counted_once_per_iteration(make_trainer, monkeypatch):
    """Four optimizer steps of two micro-batches: each micro-batch knows the count of its own step."""
    cut, used = [], []
    monkeypatch.setattr("trl_sppo.trainer.cut_by_length", lambda *args: cut.append(cut_by_length(*args)) or cut[-1])
    trainer = make_trainer(
        per_device_train_batch_size=4, gradient_accumulation_steps=2, steps_per_generation=8, max_steps=4,
        win_rate_threshold=0.8, prompts=["ab", "fgh", "cd e", "xyz"] * 8,
    )  # fmt: skip
    compute = trainer._compute_loss

    def use(model, inputs):
        used.append((int(inputs["num_kept"]), int(inputs["kept"].sum())))
        return compute(model, inputs)

    monkeypatch.setattr(trainer, "_compute_loss", use)
    trainer.train()
    ((*slices,),) = cut
    kept = [each["num_kept"] for each in slices[::2]]
    assert len(kept) == 4 and len(used) == 8
    for step in range(4):
        (one, a), (two, b) = used[2 * step : 2 * step + 2]
        assert one == two == int(kept[step]) == max(a + b, 1)


@pytest.mark.parametrize("chosen", [{"train_on": "best_and_worst"}, {}])
@pytest.mark.parametrize("together", [True, False])
def test_completions_of_a_prompt_in_one_micro_batch(make_trainer, monkeypatch, together, chosen):
    """Two optimizer steps of two micro-batches on 8 groups of 4, of which TRL's order divides some."""
    trainer = make_trainer(
        per_device_train_batch_size=8, gradient_accumulation_steps=2, steps_per_generation=4, max_steps=2,
        prompts=["ab", "fgh", "cd e", "xyz", "a", "bcd f", "gg", "hijk"], keep_groups_together=together, **chosen,
        reward_funcs=lambda completion_ids, **kwargs: [sum(ids) + i % 4 for i, ids in enumerate(completion_ids)],
    )  # fmt: skip
    compute, used = trainer._compute_loss, []

    def use(model, inputs):
        rows = zip(inputs["prompt_ids"], inputs["prompt_mask"], inputs["kept"], strict=True)
        used.append(Counter(tuple(row[mask.bool()].tolist()) for row, mask, kept in rows if kept))
        return compute(model, inputs)

    monkeypatch.setattr(trainer, "_compute_loss", use)
    trainer.train()
    assert len(used) == 4 and sum(used, Counter()).total() >= (14 if chosen else 28)  # some groups may be tied
    homes = Counter(prompt for each in used for prompt in each)
    assert (set(homes.values()) == {1}) is together
    if together:
        assert abs(len(used[0] | used[1]) - len(used[2] | used[3])) <= 1


def test_a_training_writes_nothing_to_its_arguments(make_trainer, tmp_path, monkeypatch):
    """Through evaluations, checkpoints with a limit, the best model, and a resumed run."""
    options = {
        "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1,
        "load_best_model_at_end": True, "per_device_eval_batch_size": 4, "max_steps": 2,
        "trainer_kwargs": {"eval_dataset": Dataset.from_dict({"prompt": ["ab"]})},
    }  # fmt: skip
    trainers = [make_trainer(**options), make_trainer(**{**options, "max_steps": 3})]
    owned = {id(trainer.args) for trainer in trainers}
    written = []

    def set_it(self, name, value):
        if id(self) in owned:
            written.append(name)
        object.__setattr__(self, name, value)

    monkeypatch.setattr(SPPOConfig, "__setattr__", set_it)
    trainers[0].train()
    trainers[1].train(resume_from_checkpoint=True)
    assert set(written) <= {"eval_steps", "save_steps", "logging_steps"}, "shares of steps become numbers"
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] != []
