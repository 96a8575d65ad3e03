"""beta > 0: the KL term towards the initial policy, for full fine-tuning and for LoRA."""

import copy
import math

import pytest
import torch
from helpers import COMPLETIONS, alphabet_score, token_logps, weights
from peft import LoraConfig, get_peft_model
from transformers import Qwen2ForCausalLM

from trl_sppo.rollouts.micro_batches import log_probs


LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)


def regularised_loss(model, old_logps, ref_logps, tokenizer, beta, forward_share, eta=10.0) -> torch.Tensor:
    """SPPO's loss plus beta times the KL of each completion, written out one completion and token at a time."""
    terms = []
    for group, new, old, ref in zip(
        COMPLETIONS.values(), token_logps(model, tokenizer), old_logps, ref_logps, strict=True
    ):
        scores = alphabet_score(group)
        for i, score in enumerate(scores):
            wins = [float(score > s) + 0.5 * float(score == s) for j, s in enumerate(scores) if j != i]
            term = ((new[i] - old[i]).sum() - eta * (sum(wins) / len(wins) - 0.5)) ** 2
            for p, p_old, p_ref in zip(new[i].exp(), old[i].exp(), ref[i].exp(), strict=True):
                reverse = p / p_old * (p_ref / p - 1 - torch.log(p_ref / p))
                forward = p_ref / p_old * (p / p_ref - 1 - torch.log(p / p_ref))
                term = term + beta * ((1 - forward_share) * reverse + forward_share * forward)
            terms.append(term)
    return torch.stack(terms).mean()


@pytest.mark.parametrize("forward_share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.shows("beta")
def test_full_fine_tuning_is_pulled_towards_the_model_it_was_loaded_from(
    fixed, tiny_policy, tiny_tokenizer, forward_share, micro_batches
):
    trainer = fixed(
        model=tiny_policy,
        beta=3.0,
        forward_kl_share=forward_share,
        num_iterations=2,
        max_steps=2,
        per_device_train_batch_size=16 // micro_batches,
        gradient_accumulation_steps=micro_batches,
    )
    initial = Qwen2ForCausalLM.from_pretrained(tiny_policy)
    with torch.no_grad():  # as if iterations had gone by: pi_t is not pi_0
        for parameter in trainer.model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model = copy.deepcopy(initial)  # a copy of the trainer's would share TRL's patched forward
    model.load_state_dict(trainer.model.state_dict())
    with torch.no_grad():
        old, ref = token_logps(model, tiny_tokenizer), token_logps(initial, tiny_tokenizer)

    expected = []
    for _ in range(2):  # two passes over the rollout by plain gradient descent; the second has pi_theta != pi_t
        loss = regularised_loss(model, old, ref, tiny_tokenizer, 3.0, forward_share)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        expected.append(loss.item())
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter.sub_(1e-3 * gradient)
    trainer.train()
    assert [row["loss"] for row in trainer.state.log_history[:2]] == pytest.approx(expected, rel=1e-5)
    for (name, actual), parameter in zip(weights(trainer).items(), model.parameters(), strict=True):
        torch.testing.assert_close(actual, parameter, rtol=1e-5, atol=1e-6, msg=name)
    assert trainer.state.log_history[0]["kl_to_initial_policy"] > 1e-3
    assert trainer.state.log_history[0]["kl_to_rollout_policy"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("existing", [False, True])
def test_lora_is_pulled_towards_what_it_started_from(fixed, tiny_model, tiny_tokenizer, existing):
    """A new adapter: towards the base model. An adapter that was there before: towards the model with it."""
    torch.manual_seed(1)
    kwargs = {} if existing else {"peft_config": LORA}
    model = get_peft_model(copy.deepcopy(tiny_model), LORA) if existing else copy.deepcopy(tiny_model)
    initial = copy.deepcopy(model)
    replay = copy.deepcopy(model) if existing else get_peft_model(copy.deepcopy(tiny_model), LORA)
    trainer = fixed(model=model, beta=1.0, max_steps=3, learning_rate=1e-2, trainer_kwargs=kwargs)
    assert trainer.ref_model is None
    policies = []
    loss = trainer._compute_loss

    def keep(model, inputs):
        policies.append(copy.deepcopy(trainer.model.state_dict()))
        return loss(model, inputs)

    trainer._compute_loss = keep
    trainer.train()
    with torch.no_grad():
        ref = [logps for group in token_logps(initial, tiny_tokenizer) for logps in group]
        for policy, row in zip(policies, trainer.state.log_history, strict=False):
            replay.load_state_dict({name: value for name, value in policy.items() if ".ref." not in name})
            new = [logps for group in token_logps(replay, tiny_tokenizer) for logps in group]
            kl = torch.cat([(r - n).exp() - 1 - (r - n) for n, r in zip(new, ref, strict=True)])
            assert row["kl_to_initial_policy"] == pytest.approx(kl.mean().item(), rel=1e-3, abs=1e-6)
    # At the very start the adapter that exists already is the initial policy; this new one is random, so it is not
    start = trainer.state.log_history[0]["kl_to_initial_policy"]
    assert start == pytest.approx(0, abs=1e-6) if existing else start > 1e-3


def test_a_large_beta_keeps_the_policy_where_it_was(fixed, tiny_policy):
    moved = {}
    for beta in (0.0, 300.0):
        trainer = fixed(model=tiny_policy, beta=beta, max_steps=10, optim="adamw_torch", learning_rate=1e-3)
        before = weights(trainer)
        trainer.train()
        log = trainer.state.log_history
        moved[beta] = sum((p - before[n]).square().sum().item() for n, p in weights(trainer).items())
        assert all(math.isfinite(row["loss"]) for row in log[:10])
    assert moved[300.0] < 0.5 * moved[0.0]


def test_without_beta_there_is_no_reference_model(fixed, tiny_model):
    trainer = fixed(model=tiny_model)
    assert trainer.ref_model is None
    trainer.train()
    assert "kl_to_initial_policy" not in trainer.state.log_history[0]


@pytest.mark.shows("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps")
def test_the_reference_can_follow_the_policy(fixed, tiny_policy):
    """TRL's sync_ref_model: the anchor is then no longer the initial policy but a running average."""
    trainer = fixed(
        model=tiny_policy, beta=1.0, sync_ref_model=True, ref_model_mixup_alpha=1.0, ref_model_sync_steps=1,
        max_steps=2, learning_rate=1e-2,
    )  # fmt: skip
    trainer.train()
    for actual, expected in zip(trainer.ref_model.parameters(), trainer.model.parameters(), strict=True):
        torch.testing.assert_close(actual, expected)
    assert trainer.state.log_history[1]["kl_to_initial_policy"] == pytest.approx(0, abs=1e-7)


def test_only_what_is_trained_on_costs_a_pass_of_the_reference(fixed, tiny_policy, monkeypatch):
    rows = []
    monkeypatch.setattr(
        "trl_sppo.trainer.log_probs", lambda model, ids, *args: rows.append(len(ids)) or log_probs(model, ids, *args)
    )
    fixed(model=tiny_policy, beta=1.0, train_on="best_and_worst").train()
    assert rows == [8, 8]  # the initial policy, and the step


def test_beta_is_warned_about(make_trainer, tiny_policy, caplog):
    make_trainer(model=tiny_policy, beta=0.1)
    assert "beta=0.1 weights the KL term" in caplog.text and "remove beta and set eta=10." in caplog.text


def test_a_model_from_nowhere_has_no_initial_policy_to_load(make_trainer, tiny_model, monkeypatch):
    monkeypatch.setattr("trl.GRPOTrainer.__init__", lambda *args, **kwargs: pytest.fail("too late"))
    with pytest.raises(ValueError, match=r"beta=0.5 needs the initial policy, .* this one has none. Save it"):
        make_trainer(model=tiny_model, beta=0.5)
