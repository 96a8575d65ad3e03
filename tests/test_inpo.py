"""loss_type="inpo": the squared loss on pairs, its reference between pi_t and pi_0, and references that move."""

import copy
import math

import pytest
import torch
from datasets import Dataset
from helpers import COMPLETIONS, alphabet_score, token_logps, weights
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import Qwen2ForCausalLM

from trl_sppo import SPPOConfig, SPPOTrainer
from trl_sppo.checks.models import check_sharding
from trl_sppo.objectives import inpo_loss, sppo_loss
from trl_sppo.preferences import preferences_from_scores, win_rates
from trl_sppo.rollouts.micro_batches import trim


NAN = math.nan
LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def without_diagonal(preferences: torch.Tensor) -> torch.Tensor:
    return preferences.masked_fill(torch.eye(len(preferences), dtype=torch.bool), NAN)


# ---- The loss


def test_golden():
    # eta = 4. Pairs (0, 1) with P = 1 and (0, 2) with P = 0.75; 1 and 2 are no pair. Targets 2 and 1, errors of
    # differences 1 - 0 - 2 = -1 and 1 - -1 - 1 = 1. Means over partners: 0: (1 + 1) / 2, 1: 1, 2: 1. Mean 1
    preferences = torch.tensor([[NAN, 1.0, 0.75], [0.0, NAN, NAN], [0.25, NAN, NAN]])
    loss, metrics = inpo_loss(torch.tensor([1.0, 0.0, -1.0]), preferences, eta=4.0)
    assert loss.item() == pytest.approx(1.0)
    # Both orders of (1 * 2 + 2 * 1) / (2^2 + 1^2)
    assert metrics["log_ratio_to_target"].tolist() == pytest.approx([8.0, 10.0])
    assert metrics["winner_log_ratio"].tolist() == [1.0, 1.0] and metrics["loser_log_ratio"].tolist() == [-1.0, 2.0]
    assert metrics["log_ratio"].tolist() == [0.0, 3.0]
    # The pair (0, 1) weighs 2 * 0.5, (0, 2) 2 * 3: 0: (1 + 6) / 2, 1: 1, 2: 6
    weighted, _ = inpo_loss(torch.tensor([1.0, 0.0, -1.0]), preferences, 4.0, weights=torch.tensor([2.0, 0.5, 3.0]))
    assert weighted.item() == pytest.approx((3.5 + 1 + 6) / 3)


def test_golden_with_a_reference():
    # eta = 4, one certain pair: target 2. pi_t is 3 and 1 nats from pi_0, of which the share is 0.25: the difference
    # of rho has 0.25 * (3 - 1) = 0.5 already, and 1.5 is left. Error 1 - 0 - 1.5
    preferences = torch.tensor([[NAN, 1.0], [0.0, NAN]])
    ratios, of_ref = torch.tensor([[1.0, 0.0], [3.0, 1.0]])
    loss, metrics = inpo_loss(ratios, preferences, 4.0, ref_log_ratios=of_ref, ref_share=0.25)
    assert loss.item() == pytest.approx(0.25)
    assert metrics["log_ratio_to_target"].tolist() == pytest.approx([2 * 1.5, 2 * 1.5**2])
    # At the start of an iteration nothing is done yet, wherever pi_0 is
    loss, metrics = inpo_loss(torch.zeros(2), preferences, 4.0, ref_log_ratios=of_ref, ref_share=0.25)
    assert loss.item() == pytest.approx(1.5**2) and metrics["log_ratio_to_target"][0] == 0
    assert metrics["winner_log_ratio"].tolist() == [0.0, 1.0] == metrics["loser_log_ratio"].tolist()


@pytest.mark.parametrize(("tau", "eta"), [(0.002, 0.006), (0.006, 0.006), (0.0, 0.006)])
def test_one_pair_is_the_papers_equation(tau, eta):
    """(h - 1 / (2 eta))^2, of which the paper's eta is 1 / eta here, and IPO is tau = eta."""
    policy, old, ref = torch.randn(3, 2, generator=torch.Generator().manual_seed(0)).double()
    margin, old_margin, ref_margin = (each[0] - each[1] for each in (policy, old, ref))
    h = margin - tau / eta * ref_margin - (eta - tau) / eta * old_margin
    preferences = torch.tensor([[NAN, 1.0], [0.0, NAN]], dtype=torch.float64)
    loss, _ = inpo_loss(policy - old, preferences, 1 / eta, ref_log_ratios=old - ref, ref_share=tau / eta)
    torch.testing.assert_close(loss, (h - 1 / (2 * eta)) ** 2)
    if tau == eta:
        torch.testing.assert_close(loss, (margin - ref_margin - 1 / (2 * tau)) ** 2)


@given(st.integers(0, 10_000), st.integers(2, 6))
def test_on_all_pairs_it_is_sppo_with_centred_log_ratios(seed, size):
    """sum_j (rho_i - rho_j - eta (P_ij - 1/2)) = K (rho_i - mean rho) - eta (K - 1) (W_i - 1/2)"""
    generator = torch.Generator().manual_seed(seed)
    scores, rho = torch.randn(2, size, generator=generator, dtype=torch.float64)
    preferences = preferences_from_scores(scores.unsqueeze(0), "bradley_terry")
    rho.requires_grad_()
    (ours,) = torch.autograd.grad(inpo_loss(rho, without_diagonal(preferences[0]), eta=3.0)[0], rho)
    rates = win_rates(preferences)[0]
    eta = 3.0 * (size - 1) / size
    (sppo,) = torch.autograd.grad(sppo_loss(rho - rho.mean(), rates, eta)[0], rho)
    torch.testing.assert_close(ours, sppo * 2 * size / (size - 1))


def test_gradient_against_finite_differences():
    generator = torch.Generator().manual_seed(0)
    log_ratios = torch.randn(6, generator=generator, dtype=torch.float64, requires_grad=True)
    preferences = torch.rand(6, 6, generator=generator, dtype=torch.float64)
    preferences = torch.where(torch.rand(6, 6, generator=generator) < 0.3, NAN, preferences)
    preferences[2] = preferences[:, 2] = NAN
    weights = torch.rand(6, generator=generator, dtype=torch.float64)
    options = {"ref_log_ratios": torch.rand(6, generator=generator), "ref_share": 0.5, "weights": weights}
    assert torch.autograd.gradcheck(lambda x: inpo_loss(x, preferences, 5.0, **options)[0], (log_ratios,))


def test_a_completion_without_a_pair_is_as_if_dropped():
    preferences = torch.tensor([[NAN, 1.0, NAN], [0.0, NAN, NAN], [NAN, NAN, NAN]])
    log_ratios = torch.tensor([0.3, 0.1, NAN], requires_grad=True)
    loss, metrics = inpo_loss(log_ratios, preferences, eta=2.0)
    expected, _ = inpo_loss(log_ratios.detach()[:2], preferences[:2, :2], eta=2.0)
    assert loss.item() == expected.item()
    loss.backward()
    assert log_ratios.grad[2] == 0 and log_ratios.grad.isfinite().all()
    assert all(metric.isfinite().all() for metric in metrics.values())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: inpo_loss(torch.zeros(2), torch.zeros(2, 2), eta=0.0), "eta must be positive, got 0.0"),
        (
            lambda: inpo_loss(torch.zeros(2), torch.zeros(2, 3), eta=1.0),
            r"\(N,\) and \(N, N\), got \(2,\) and \(2, 3\)",
        ),
    ],
)
def test_messages(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("size", [2, 8])
def test_hard_preferences_do_not_add_up(size):
    """At the minimum log_ratio_to_target is 2 (K + 1) / (3 K): docs/method.md."""
    preferences = without_diagonal(preferences_from_scores(torch.arange(size, dtype=torch.float64).unsqueeze(0))[0])
    log_ratios = torch.zeros(size, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_ratios], max_iter=100)
    optimizer.step(
        lambda: (optimizer.zero_grad(), loss := inpo_loss(log_ratios, preferences, 10.0)[0], loss.backward())[1]
    )
    done, target = inpo_loss(log_ratios, preferences, 10.0)[1]["log_ratio_to_target"].tolist()
    assert done / target == pytest.approx(2 * (size + 1) / (3 * size))


# ---- In the trainer


def loss_by_loops(model, old_logps, ref_logps, tokenizer, share, chosen, eta=10.0) -> torch.Tensor:
    """The mean over completions of the mean over their partners, one pair at a time."""
    terms = []
    for g, (group, new) in enumerate(zip(COMPLETIONS.values(), token_logps(model, tokenizer), strict=True)):
        scores = alphabet_score(group)
        rho = [(new[i] - (1 - share) * old_logps[g][i] - share * ref_logps[g][i]).sum() for i in range(len(scores))]
        rows = chosen(scores)
        for i in rows:
            wins = {j: float(scores[i] > scores[j]) + 0.5 * float(scores[i] == scores[j]) for j in rows if j != i}
            terms.append(sum((rho[i] - rho[j] - eta * (wins[j] - 0.5)) ** 2 for j in wins) / len(wins))
    return torch.stack(terms).mean()


def best_and_worst(scores):
    return [scores.index(max(scores)), scores.index(min(scores))]


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("train_on", ["all", "best_and_worst"])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_trainer_descends_this_loss(fixed, tiny_policy, tiny_tokenizer, share, train_on, micro_batches):
    trainer = fixed(
        model=tiny_policy, loss_type="inpo", beta=share / 10.0, train_on=train_on, num_iterations=2, max_steps=2,
        per_device_train_batch_size=16 // micro_batches, gradient_accumulation_steps=micro_batches,
    )  # fmt: skip
    assert trainer.args.keep_groups_together
    initial = Qwen2ForCausalLM.from_pretrained(tiny_policy)
    with torch.no_grad():  # as if iterations had gone by: pi_t is not pi_0
        for parameter in trainer.model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model = copy.deepcopy(initial)
    model.load_state_dict(trainer.model.state_dict())
    with torch.no_grad():
        old, ref = token_logps(model, tiny_tokenizer), token_logps(initial, tiny_tokenizer)
    expected = []
    chosen = best_and_worst if train_on == "best_and_worst" else lambda scores: range(len(scores))
    for _ in range(2):
        loss = loss_by_loops(model, old, ref, tiny_tokenizer, share, chosen)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        expected.append(loss.item())
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter.sub_(1e-3 * gradient)
    trainer.train()
    log = trainer.state.log_history
    assert [row["loss"] for row in log[:2]] == pytest.approx(expected, rel=1e-5)
    for (name, actual), parameter in zip(weights(trainer).items(), model.parameters(), strict=True):
        torch.testing.assert_close(actual, parameter, rtol=1e-5, atol=1e-6, msg=name)
    assert ("kl_to_initial_policy" in log[0]) == (share > 0)
    assert log[0]["log_ratio"] == log[0]["winner_log_ratio"] == log[0]["log_ratio_to_target"] == 0


def test_preferences_are_not_cut_like_columns_of_tokens():
    """Groups of 4, padded to 4 columns: by their shape, preferences could be tokens."""
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]])
    batch = {"prompt_mask": torch.ones(2, 1), "completion_mask": mask, "completion_ids": mask, "preferences": mask}
    trimmed = trim(batch)
    assert trimmed["completion_ids"].shape == (2, 2) and trimmed["preferences"].shape == (2, 4)


def test_a_completion_whose_only_partner_is_not_trained_on_is_left_out(fixed, tiny_policy):
    """The worst is cut off, and cut-off completions are masked: the best has nothing to be compared with."""

    def cut_off(completion_ids, **kwargs):
        return [0.0 if i % 4 == 3 else float(sum(ids)) + 1 for i, ids in enumerate(completion_ids)]

    trainer = fixed(model=tiny_policy, loss_type="inpo", train_on="best_and_worst", reward_funcs=cut_off)
    facts = trainer._calculate_rewards

    def mask(*args):
        scores = facts(*args)
        trainer._rollout.completion_ids = [
            [] if i % 4 == 3 else ids for i, ids in enumerate(trainer._rollout.completion_ids)
        ]  # without tokens it may not be trained on
        return scores

    trainer._calculate_rewards = mask
    trainer.train()
    assert trainer.state.log_history[0]["win_rate/kept"] == 0


def test_the_loss_of_an_evaluation_is_about_win_rates(fixed, tiny_policy):
    """A group may be on several processes, so pairs are not known. It says nothing about the policy anyway."""
    trainer = fixed(
        model=tiny_policy, loss_type="inpo", beta=0.05, eval_strategy="steps", eval_steps=1,
        per_device_eval_batch_size=16,
        trainer_kwargs={"eval_dataset": Dataset.from_dict({"prompt": list(COMPLETIONS)})},
    )  # fmt: skip
    trainer.train()
    (loss,) = [row["eval_loss"] for row in trainer.state.log_history if row.get("step") == 1 and "eval_loss" in row]
    scores = preferences_from_scores(torch.tensor([alphabet_score(group) for group in COMPLETIONS.values()]))
    assert loss == pytest.approx((10 * (win_rates(scores) - 0.5)).square().mean().item())


def scored_by_some(prompts, first, second, **kwargs):
    return [None if len(a) == len(b) else float(len(a) > len(b)) for a, b in zip(first, second, strict=True)]


def test_pairs_without_a_preference_are_not_trained_on(fixed, tiny_policy, tiny_tokenizer):
    trainer = fixed(
        model=tiny_policy, loss_type="inpo", reward_funcs=None, both_orders=False,
        trainer_kwargs={"preference_func": scored_by_some},
    )  # fmt: skip
    seen = []
    loss = trainer._compute_loss
    trainer._compute_loss = lambda model, inputs: seen.append(inputs) or loss(model, inputs)
    trainer.train()
    expected, partners = 0.0, 0
    for group in COMPLETIONS.values():
        lengths = [len(ids) for ids in group]
        for i in lengths:
            wins = [float(i > j) for j in lengths if j != i]
            if wins and len(set(lengths)) > 1:
                expected += sum((10.0 * (w - 0.5)) ** 2 for w in wins) / len(wins)
                partners += 1
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected / partners)


# ---- References that move


def test_the_reference_of_an_adapter_becomes_the_adapter(fixed, tiny_model, tiny_tokenizer):
    """Every two steps, and what it is pulled towards is then the policy of that time."""
    trainer = fixed(
        model=copy.deepcopy(tiny_model), loss_type="inpo", beta=0.05, sync_ref_model=True, ref_model_mixup_alpha=1.0,
        ref_model_sync_steps=2, max_steps=4, learning_rate=1e-2, trainer_kwargs={"peft_config": LORA},
    )  # fmt: skip
    assert trainer.ref_model is None
    of_ref, of_policy = [], []

    def record(trainer=trainer):
        of_ref.append({n.replace(".ref.", "."): p.clone() for n, p in weights(trainer).items() if ".ref." in n})
        of_policy.append({n.replace(".default.", "."): p for n, p in weights(trainer).items() if ".default." in n})

    step = trainer.training_step
    trainer.training_step = lambda *args, **kwargs: record() or step(*args, **kwargs)
    trainer.train()
    record()
    assert of_ref[0].keys() == of_policy[0].keys() and len(of_ref[0]) > 0

    def same(a, b):
        return all(torch.equal(a[name], b[name]) for name in a)

    assert [same(of_ref[i], of_policy[i // 2 * 2]) for i in range(5)] == [True] * 5
    assert not same(of_policy[1], of_policy[0]) and not same(of_policy[2], of_policy[0])
    kl = [row["kl_to_initial_policy"] for row in trainer.state.log_history[:4]]
    assert kl[0] == pytest.approx(0, abs=1e-6) and kl[1] > 1e-6 and kl[2] == pytest.approx(0, abs=1e-6)


def test_the_options_of_the_caller_stay_as_they_were(tiny_policy, tiny_tokenizer, tmp_path):
    args = SPPOConfig(
        str(tmp_path), beta=0.05, loss_type="inpo", sync_ref_model=True, ref_model_mixup_alpha=1.0, use_cpu=True,
        bf16=False, num_generations=4, per_device_train_batch_size=8, report_to="none",
    )  # fmt: skip
    prompts = Dataset.from_dict({"prompt": ["ab", "xyz"] * 4})
    options = {"train_dataset": prompts, "processing_class": tiny_tokenizer, "peft_config": LORA}
    trainer = SPPOTrainer(tiny_policy, alphabet_score, args, **options)
    assert args.sync_ref_model and trainer.args.sync_ref_model


@pytest.mark.parametrize("existing", [False, True])
def test_a_new_adapter_and_one_that_was_there(fixed, tiny_model, existing):
    model = get_peft_model(copy.deepcopy(tiny_model), LORA) if existing else copy.deepcopy(tiny_model)
    trainer = fixed(
        model=model, beta=0.05, sync_ref_model=True, ref_model_mixup_alpha=1.0, ref_model_sync_steps=1,
        trainer_kwargs={} if existing else {"peft_config": LORA},
    )  # fmt: skip
    trainer.train()
    state = weights(trainer)
    moved = [name for name in state if ".default." in name]
    assert moved and all(torch.equal(state[n], state[n.replace(".default.", ".ref.")]) for n in moved)
    assert not any(p.requires_grad for n, p in trainer.model.named_parameters() if ".ref." in n)


@pytest.mark.parametrize(
    ("options", "sharding", "message"),
    [
        (
            {"ref_model_mixup_alpha": 0.6},
            {},
            "ref_model_mixup_alpha=0.6 .* does not work with an adapter: .*Set it to 1",
        ),
        ({}, {"deepspeed": True}, "sync_ref_model=True with an adapter needs the whole adapter.*multi_gpu"),
        ({}, {"fsdp": 2}, "sync_ref_model=True with an adapter needs the whole adapter.*multi_gpu"),
    ],
)
def test_what_cannot_move(tmp_path, options, sharding, message):
    moving = {"beta": 0.1, "sync_ref_model": True, "ref_model_mixup_alpha": 1.0, **options}
    args = SPPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", **moving)
    sharding = {"deepspeed": False, "fsdp": 0, **sharding}
    with pytest.raises(ValueError, match=message):
        check_sharding(args, has_adapter=True, bits=None, **sharding)
    check_sharding(args, has_adapter=False, bits=None, **sharding)


@pytest.mark.parametrize("lora", [False, True])
def test_a_checkpoint_belongs_to_a_reference_that_moves_or_to_one_that_stays(
    make_trainer, tiny_policy, tmp_path, lora
):
    """Else a moved reference would be gone after a resume, or could not be found."""

    def build(moves):
        moving = {"sync_ref_model": True, "ref_model_mixup_alpha": 1.0, "ref_model_sync_steps": 1} if moves else {}
        return make_trainer(
            model=tiny_policy, beta=0.05, save_strategy="steps", save_steps=1, max_steps=1, **moving,
            trainer_kwargs={"peft_config": LORA} if lora else {},
        )  # fmt: skip

    for moves in (True, False):
        build(moves).train()
        message = f"sync_ref_model was {moves}, now {not moves}"
        with pytest.raises(ValueError, match=message):
            build(not moves).train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
