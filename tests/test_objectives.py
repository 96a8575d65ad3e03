import math

import pytest
import torch
from trl import DPOConfig, DPOTrainer

from trl_sppo.objectives import (
    head_to_head,
    kl_to_initial_policy,
    kl_to_rollout_policy,
    log_mean_exp_baseline,
    select_completions,
    sppo_loss,
    sppo_targets,
)
from trl_sppo.preferences import preferences_from_scores, win_rates


NAN = math.nan


def ratio(metric: torch.Tensor) -> float:
    numerator, denominator = metric.tolist()
    return numerator / denominator


def test_loss_golden():
    # eta = 10: targets 5, 0, -2; errors 1 - 5, 2 - 0, -1 + 2; squares 16, 4, 1; mean 7
    loss, metrics = sppo_loss(torch.tensor([1.0, 2.0, -1.0]), torch.tensor([1.0, 0.5, 0.3]), eta=10.0)
    assert loss.item() == pytest.approx(7.0)
    assert ratio(metrics["log_ratio"]) == pytest.approx(2 / 3)
    # (1 * 5 + 2 * 0 + -1 * -2) / (25 + 0 + 4)
    assert ratio(metrics["log_ratio_to_target"]) == pytest.approx(7 / 29)
    assert ratio(metrics["winner_log_ratio"]) == pytest.approx(1.0)
    assert ratio(metrics["loser_log_ratio"]) == pytest.approx(-1.0)


def test_loss_is_zero_at_the_targets_and_the_metric_says_one():
    rates = torch.tensor([0.9, 0.1, 0.6])
    loss, metrics = sppo_loss(sppo_targets(rates, 3.0), rates, eta=3.0)
    assert loss.item() == 0
    assert ratio(metrics["log_ratio_to_target"]) == pytest.approx(1.0)


@pytest.mark.parametrize("baseline", ["half", "log_mean_exp"])
@pytest.mark.parametrize("eta", [0.1, 4.0, 1000.0])
def test_gradient_against_finite_differences(baseline, eta):
    generator = torch.Generator().manual_seed(0)
    log_ratios = torch.randn(6, generator=generator, dtype=torch.float64, requires_grad=True)
    rates = torch.tensor([0.1, 0.5, NAN, 1.0, 0.0, 0.7], dtype=torch.float64)
    weights = torch.rand(6, generator=generator, dtype=torch.float64)
    b = 0.5 if baseline == "half" else log_mean_exp_baseline(rates[None], eta).expand(1, 6)[0]
    assert torch.autograd.gradcheck(lambda x: sppo_loss(x, rates, eta, b, weights)[0], (log_ratios,))


@pytest.mark.parametrize("forward_share", [0.0, 0.3, 1.0])
def test_kl_gradient_against_finite_differences(forward_share):
    generator = torch.Generator().manual_seed(0)
    logps, old, ref = (-3 * torch.rand(7, generator=generator, dtype=torch.float64) for _ in range(3))
    assert torch.autograd.gradcheck(
        lambda x: kl_to_initial_policy(x, old, ref, forward_share).sum(), (logps.requires_grad_(),)
    )


@pytest.mark.parametrize("log_ratio", [-1e4, -100.0, 0.0, 100.0, 1e4])
@pytest.mark.parametrize("rate", [0.0, 0.5, 1.0])
def test_extreme_log_ratios_and_win_rates_stay_finite(log_ratio, rate):
    rates = torch.tensor([[rate, 0.0, 1.0, 0.5]])
    for eta in (1e-3, 1000.0):
        log_ratios = torch.tensor([log_ratio, 1.0, -1.0, 0.0], requires_grad=True)
        baseline = log_mean_exp_baseline(rates, eta).expand_as(rates)[0]
        loss, metrics = sppo_loss(log_ratios, rates[0], eta, baseline)
        loss.backward()
        assert loss.isfinite() and log_ratios.grad.isfinite().all()
        assert all(value.isfinite().all() for value in metrics.values())
    logps = torch.tensor([log_ratio], requires_grad=True)
    for forward_share in (0.0, 0.5, 1.0):
        for old, ref in ((0.0, 0.0), (1e3, -1e3), (-1e3, 1e3)):
            kl = kl_to_initial_policy(logps, torch.tensor([old]), torch.tensor([ref]), forward_share)
            (gradient,) = torch.autograd.grad(kl.sum(), logps)
            assert kl.isfinite().all() and gradient.isfinite().all() and (kl >= 0).all()
    assert kl_to_rollout_policy(torch.tensor([log_ratio])).isfinite().all()


def test_gradient_at_the_start_is_a_win_rate_policy_gradient():
    # d/dx (x - eta (W - 1/2))^2 at x = 0 is -2 eta (W - 1/2), over the N = 2 of the mean
    log_ratios = torch.zeros(2, requires_grad=True)
    sppo_loss(log_ratios, torch.tensor([0.8, 0.25]), eta=10.0)[0].backward()
    torch.testing.assert_close(log_ratios.grad, torch.tensor([-2 * 10 * 0.3 / 2, 2 * 10 * 0.25 / 2]))


@pytest.mark.parametrize("log_ratio", [0.3, NAN, math.inf])
def test_a_nan_win_rate_is_as_if_dropped(log_ratio):
    rates = torch.tensor([0.9, NAN, 0.2])
    log_ratios = torch.tensor([0.5, log_ratio, -0.1], requires_grad=True)
    loss, metrics = sppo_loss(log_ratios, rates, eta=2.0)
    loss.backward()
    kept = torch.tensor([0.5, -0.1], requires_grad=True)
    expected, expected_metrics = sppo_loss(kept, rates[[0, 2]], eta=2.0)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(log_ratios.grad[[0, 2]], kept.grad)
    assert log_ratios.grad[1].item() == 0
    torch.testing.assert_close(metrics, expected_metrics)


def test_no_win_rate_at_all_gives_zero_loss_and_zero_gradient():
    log_ratios = torch.tensor([1.0, 2.0], requires_grad=True)
    loss, metrics = sppo_loss(log_ratios, torch.tensor([NAN, NAN]), eta=2.0)
    loss.backward()
    assert loss.item() == 0 and log_ratios.grad.tolist() == [0.0, 0.0]
    assert all(value.tolist() == [0.0, 0.0] for value in metrics.values())


def test_micro_batches_add_up_to_the_whole_batch():
    generator = torch.Generator().manual_seed(1)
    log_ratios, rates = torch.randn(7, generator=generator), torch.rand(7, generator=generator)
    whole, metrics = sppo_loss(log_ratios, rates, eta=5.0)
    for split in ([3, 4], [1, 1, 5], [7]):
        pieces = zip(log_ratios.split(split), rates.split(split), strict=True)
        parts = [sppo_loss(x, w, eta=5.0, num_items=7) for x, w in pieces]
        torch.testing.assert_close(sum(loss for loss, _ in parts), whole)
        for name, value in metrics.items():
            torch.testing.assert_close(sum(part[name] for _, part in parts), value)


def test_weights_scale_each_completion_and_not_the_count():
    # ((1 - 1)^2 * 3 + (0 + 1)^2 * 0.5) / 2
    loss, _ = sppo_loss(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0]), 2.0, weights=torch.tensor([3.0, 0.5]))
    assert loss.item() == pytest.approx(0.25)


def test_larger_eta_means_larger_targets():
    rates = torch.tensor([1.0, 0.5, 0.0])
    torch.testing.assert_close(sppo_targets(rates, 1000.0), torch.tensor([500.0, 0.0, -500.0]))


# ---- log Z


def test_log_mean_exp_baseline_golden():
    # eta = 2: exponents 2, 0 and 1; (e^2 + 1 + e) / 3 = (7.389 + 1 + 2.718) / 3 = 3.7024, log 1.3090, over eta 0.6545
    rates = torch.tensor([[1.0, 0.0, 0.5, NAN]])
    torch.testing.assert_close(log_mean_exp_baseline(rates, 2.0), torch.tensor([[0.65450]]), rtol=0, atol=1e-5)
    assert log_mean_exp_baseline(torch.full((1, 3), NAN), 2.0).isnan().all()


def test_targets_of_eight_distinct_scores():
    """The example of docs/method.md: with the group's log Z the targets are mostly negative."""
    rates = torch.arange(8)[None] / 7
    half, group = sppo_targets(rates, 10.0), sppo_targets(rates, 10.0, log_mean_exp_baseline(rates, 10.0))
    assert half[0, [0, -1]].tolist() == pytest.approx([-5, 5])
    assert group[0, [0, -1]].tolist() == pytest.approx([-8.2, 1.8], abs=0.01)
    assert (group < 0).sum() == 6


def test_log_mean_exp_baseline_is_the_mean_for_small_eta_and_the_best_for_large():
    rates = torch.tensor([[0.9, 0.1, 0.5, 0.5], [1.0, 2 / 3, 1 / 3, 0.0]], dtype=torch.float64)
    assert log_mean_exp_baseline(rates, 1e-6).flatten().tolist() == pytest.approx([0.5, 0.5], abs=1e-5)
    assert log_mean_exp_baseline(rates, 1e5).flatten().tolist() == pytest.approx([0.9, 1.0], abs=1e-4)


@pytest.mark.parametrize("eta", [0.5, 10.0, 1000.0])
def test_targets_with_the_groups_log_z_are_a_distribution_over_the_group(eta):
    """The mean over the samples of pi_t of pi_{t+1} / pi_t is 1, which the constant 1/2 does not give."""
    rates = torch.rand(3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    targets = sppo_targets(rates, eta, log_mean_exp_baseline(rates, eta))
    torch.testing.assert_close(targets.exp().mean(1), torch.ones(3, dtype=torch.float64))
    assert not torch.isclose(sppo_targets(rates, eta).exp().mean(1), torch.ones(3, dtype=torch.float64)).any()


def test_self_comparison_is_a_rescale_of_eta():
    scores = torch.randn(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    preferences = preferences_from_scores(scores, "bradley_terry")
    with_self = sppo_targets(win_rates(preferences, include_self=True), 10.0)
    torch.testing.assert_close(with_self, sppo_targets(win_rates(preferences), 10.0 * 4 / 5))


# ---- Parity with the official code (uclaml/SPPO: compute_prob.py and trainer.py, read; written anew here)


def official_probabilities(scores: list[float]) -> tuple[list[list[float]], list[float]]:
    """P_ij = sigmoid(score_i - score_j), and the sum of each row over K: a completion also meets itself."""
    table = [[1 / (1 + math.exp(b - a)) for b in scores] for a in scores]
    return table, [sum(row) / len(scores) for row in table]


@pytest.mark.parametrize("loss_type", ["sppo", "sppo_single"])
def test_loss_and_gradient_are_those_of_the_official_pair_loss(loss_type):
    generator = torch.Generator().manual_seed(3)
    beta = 0.05
    groups = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    log_ratios = torch.randn(6, 5, generator=generator, dtype=torch.float64, requires_grad=True)

    pairs = []
    for scores, ratios in zip(groups.tolist(), log_ratios, strict=True):
        table, rates = official_probabilities(scores)
        best, worst = scores.index(max(scores)), scores.index(min(scores))
        win, lose = rates[best], rates[worst]
        if loss_type == "sppo_single":
            win, lose = table[best][worst], table[worst][best]
        pairs.append(((ratios[best] - (win - 0.5) / beta) ** 2 + (ratios[worst] - (lose - 0.5) / beta) ** 2) / 2)
    expected = torch.stack(pairs).mean()
    (expected_gradient,) = torch.autograd.grad(expected, log_ratios)

    preferences = preferences_from_scores(groups, "bradley_terry")
    rates = win_rates(preferences, include_self=True)
    torch.testing.assert_close(rates.tolist(), [official_probabilities(scores)[1] for scores in groups.tolist()])
    chosen = select_completions(rates, "best_and_worst")
    if loss_type == "sppo_single":
        rates = head_to_head(preferences, chosen)
    loss, _ = sppo_loss(log_ratios.flatten(), rates.masked_fill(~chosen, NAN).flatten(), eta=1 / beta)
    (gradient,) = torch.autograd.grad(loss, log_ratios)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-12)


def test_head_to_head_needs_an_opponent():
    preferences = preferences_from_scores(torch.tensor([[1.0, 2.0, NAN]]), "bradley_terry")
    assert head_to_head(preferences, torch.tensor([[True, False, False]])).isnan().all()
    assert head_to_head(preferences, torch.tensor([[True, False, True]])).isnan().all()


# ---- KL towards the initial policy


@pytest.mark.parametrize("forward_share", [0.0, 0.25, 1.0])
def test_kl_estimate_has_the_value_and_the_gradient_of_the_divergence(forward_share):
    """Expectation over pi_t by enumeration, with pi_theta, pi_t and pi_0 all different."""
    logits, old, ref = torch.randn(3, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits.requires_grad_()
    logps, old, ref = logits.log_softmax(0), old.log_softmax(0), ref.log_softmax(0)
    reverse = (logps.exp() * (logps - ref)).sum()
    forward = (ref.exp() * (ref - logps)).sum()
    exact = (1 - forward_share) * reverse + forward_share * forward
    estimate = (old.exp() * kl_to_initial_policy(logps, old, ref, forward_share)).sum()
    torch.testing.assert_close(estimate, exact)
    torch.testing.assert_close(
        *(torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (estimate, exact))
    )


def test_kl_is_zero_with_zero_gradient_at_the_initial_policy():
    logps = torch.tensor([-1.0, -2.0], requires_grad=True)
    for forward_share in (0.0, 1.0):
        kl = kl_to_initial_policy(logps, logps.detach(), logps.detach(), forward_share)
        (gradient,) = torch.autograd.grad(kl.sum(), logps)
        assert kl.tolist() == [0, 0] and gradient.tolist() == [0, 0]


def test_two_completions_and_hard_labels_are_trl_sppo_hard(tiny_model, tiny_tokenizer, tmp_path):
    """Loss and gradient equal those of TRL's own DPO trainer with `loss_type="sppo_hard"`, beta = 1 / eta."""
    from datasets import Dataset

    beta = 0.25
    pairs = Dataset.from_dict({"prompt": ["ab", "fgh"], "chosen": ["cde", "aa"], "rejected": ["h", "bcb"]})
    args = DPOConfig(
        str(tmp_path), loss_type="sppo_hard", beta=beta, per_device_train_batch_size=2, gradient_checkpointing=False,
        bf16=False, use_cpu=True, report_to="none", disable_dropout=True, precompute_ref_log_probs=False,
    )  # fmt: skip
    trainer = DPOTrainer(
        tiny_model,
        ref_model=tiny_model_like(tiny_model),
        args=args,
        train_dataset=pairs,
        processing_class=tiny_tokenizer,
    )
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer.model.train()
    expected = trainer.compute_loss(trainer.model, batch)
    expected.backward()
    expected_gradient = {n: p.grad.clone() for n, p in trainer.model.named_parameters()}
    trainer.model.zero_grad()

    # Independently: sum the log-probabilities of the completion tokens of the same batch
    def completion_logps(model):
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        logps = logits.log_softmax(-1).gather(2, batch["input_ids"][:, 1:, None]).squeeze(2)
        return (logps * batch["completion_mask"][:, 1:]).sum(1)

    with torch.no_grad():
        reference = completion_logps(trainer.ref_model)
    log_ratios = completion_logps(trainer.model) - reference
    # TRL concatenates the chosen and then the rejected; it sums the two errors of a pair, where SPPO takes the mean
    win_rates = torch.tensor([1.0, 1.0, 0.0, 0.0])
    loss = 2 * sppo_loss(log_ratios, win_rates, eta=1 / beta)[0]
    loss.backward()
    assert abs(log_ratios).max() > 0.01  # a reference equal to the policy would prove little
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected_gradient[name], rtol=1e-5, atol=1e-5)


def tiny_model_like(model):
    """Another model of the same architecture, with slightly other weights."""
    other = type(model)(model.config)
    with torch.no_grad():
        for target, source in zip(other.parameters(), model.parameters(), strict=True):
            target.copy_(source + 0.02 * torch.randn_like(source))
    return other


def test_select_all_leaves_out_nan_and_groups_without_spread():
    rates = torch.tensor([[1.0, NAN, 0.0], [0.5, 0.5, 0.5], [NAN, 1.0, NAN]])
    expected = torch.tensor([[True, False, True], [False, False, False], [False, False, False]])
    assert torch.equal(select_completions(rates), expected)


def test_select_best_and_worst():
    rates = torch.tensor([[0.4, 1.0, NAN, 0.0, 0.6], [0.75, 0.75, 0.25, 0.25, 0.5], [0.5, 0.5, 0.5, 0.5, 0.5]])
    chosen = select_completions(rates, train_on="best_and_worst")
    assert chosen.nonzero().tolist() == [[0, 1], [0, 3], [1, 0], [1, 2]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_threshold_includes_both_of_its_ends(dtype):
    rates = torch.tensor([[0.0, 0.2, 0.4, 0.5, 0.6, 0.8, 1.0]], dtype=dtype)
    assert select_completions(rates, threshold=0.6).tolist() == [[True, True, True, False, True, True, True]]
    assert select_completions(rates, threshold=0.7).tolist() == [[True, True, False, False, False, True, True]]
    assert select_completions(rates, threshold=0.5).all()
    assert select_completions(rates, threshold=1.0).sum() == 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sppo_loss(torch.zeros(2), torch.zeros(2), eta=0.0), "eta must be positive, got 0.0.* eta=1000"),
        (lambda: sppo_loss(torch.zeros(2), torch.zeros(2), eta=-1.0), "eta must be positive, got -1.0"),
        (lambda: sppo_loss(torch.zeros(2), torch.zeros(3), eta=1.0), r"same shape \(N,\), got \(2,\) and \(3,\)"),
    ],
)
def test_messages(call, message):
    with pytest.raises(ValueError, match=message):
        call()
