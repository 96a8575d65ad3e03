"""Play games whose answer is known with the real trainer: print how close it comes, and draw docs/game.png.

    python benchmarks/game.py

A policy of one token out of a few is a table, so that what an SPPO iteration should do is exact arithmetic. The
trainer does it with samples, an oracle and gradient steps. `tests/test_game.py` holds it to these answers.
"""

import argparse
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast, PrinterCallback, Qwen2Config, Qwen2ForCausalLM

from trl_sppo import SPPOConfig, SPPOTrainer


# P[i, j] is the probability that action i beats action j
ROCK_PAPER_SCISSORS = torch.tensor([[0.5, 0.0, 1.0], [1.0, 0.5, 0.0], [0.0, 1.0, 0.5]], dtype=torch.float64)


# ---- Games and their answers, in double precision and without the package


def random_game(num_actions: int, seed: int) -> torch.Tensor:
    """A constant-sum game: each pair of actions has a probability uniform in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    upper = torch.rand(num_actions, num_actions, generator=generator, dtype=torch.float64).triu(1)
    return upper + (1 - upper).T.tril(-1) + 0.5 * torch.eye(num_actions)


def random_policy(num_actions: int, seed: int) -> torch.Tensor:
    """The softmax of standard normal logits."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_actions, generator=generator, dtype=torch.float64).softmax(0)


def multiplicative_weights(policy: torch.Tensor, preferences: torch.Tensor, eta: float) -> torch.Tensor:
    """The update that SPPO approximates: pi_{t+1}(y) ∝ pi_t(y) exp(eta P(y > pi_t))."""
    return (policy.log() + eta * preferences @ policy).softmax(0)


def least_squares(policy: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """
    The policy q that minimises sum_y pi_t(y) (log q(y)/pi_t(y) - target(y))^2.

    With x = log q/pi_t and a multiplier l for sum_y pi_t(y) e^x(y) = 1, each action has x + l e^x = target. The left
    side grows with x, and so the sum falls with l: Newton's method inside, bisection outside. l is not negative, for
    sum_y pi_t(y) e^target(y) >= 1: by Jensen's inequality for targets eta (P - 1/2), equal for eta P - log Z.
    """

    def log_ratios(multiplier: float) -> torch.Tensor:
        x = targets
        for _ in range(100):
            weighted = multiplier * x.exp()
            step = (x + weighted - targets) / (1 + weighted)
            x = x - step
            if step.abs().max() < 1e-14:
                break
        return x

    low, high = 0.0, 1.0
    while (policy * log_ratios(high).exp()).sum() > 1:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        if (policy * log_ratios(middle).exp()).sum() > 1:
            low = middle
        else:
            high = middle
    return policy * log_ratios(high).exp()


def minimise(loss: Callable[[torch.Tensor], torch.Tensor], start: torch.Tensor) -> torch.Tensor:
    """The policy q that minimises `loss(log q)`, by a quasi-Newton method on its logits."""
    logits = start.log().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=2000, tolerance_grad=1e-12, tolerance_change=1e-15, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        value = loss(logits.log_softmax(0))
        value.backward()
        return value

    optimizer.step(closure)
    return logits.detach().softmax(0)


def minimum_for_group(
    policy: torch.Tensor, group: torch.Tensor, preferences: torch.Tensor, eta: float, baseline: str
) -> torch.Tensor:
    """The policy that minimises SPPO's loss on a group with these counts of the actions."""
    size, share = group.sum(), group.double() / group.sum()
    win_rates = (preferences @ group.double() - 0.5) / (size - 1)  # without the tie with itself
    log_z = eta / 2 if baseline == "half" else (share * (eta * win_rates).exp()).sum().log()
    return minimise(lambda logps: (share * (logps - policy.log() - eta * win_rates + log_z) ** 2).sum(), policy)


def total_variation(p: torch.Tensor, q: torch.Tensor) -> float:
    return 0.5 * (p - q).abs().sum().item()


def duality_gap(policy: torch.Tensor, preferences: torch.Tensor) -> float:
    """
    max_p P(p > policy) - min_p P(policy > p), where one policy plays both sides: 0 for the von Neumann winner, at
    most 1. By P + P^T = 1 that is 2 (max_y P(y > policy) - 1/2).
    """
    return 2 * (preferences @ policy).max().item() - 1


def averages(policies: Sequence[torch.Tensor]) -> torch.Tensor:
    """Row t is the uniform mixture of the first t + 1 policies: the one that Theorem 4.1 is about."""
    stacked = torch.stack(list(policies))
    return stacked.cumsum(0) / torch.arange(1, len(stacked) + 1).unsqueeze(1)


def bradley_terry_scores(preferences: torch.Tensor) -> torch.Tensor:
    """
    The maximum-likelihood scores s of P(i beats j) = sigmoid(s_i - s_j), each pair as often as the others. The log-
    likelihood is concave, its gradient sum_j P[i, j] - sigmoid(s_i - s_j).
    """
    scores = preferences.new_zeros(len(preferences))
    for _ in range(2000):
        gradient = (preferences - torch.sigmoid(scores.unsqueeze(1) - scores)).sum(dim=1)
        scores = scores + gradient / len(preferences)
    return scores


# ---- The trainer


def make_tokenizer(num_actions: int) -> PreTrainedTokenizerFast:
    """Action i is the i-th letter. Padding and EOS come behind the actions, where the policy cannot say them."""
    vocabulary = [*(chr(ord("a") + i) for i in range(num_actions)), "<pad>", "<eos>"]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="a"))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def make_model(num_actions: int) -> Qwen2ForCausalLM:
    """A model whose only tokens are the actions."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=num_actions, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, tie_word_embeddings=False, pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


def set_policy(model: Any, policy: torch.Tensor) -> None:
    """Make the model a table: its LM head gives this policy on the one prompt, and nothing else is trained."""
    model.model.requires_grad_(False)
    with torch.no_grad():
        hidden = model.model(torch.tensor([[0]])).last_hidden_state[0, -1]
        # (log pi h^T / |h|^2) h = log pi
        model.lm_head.weight.copy_(torch.outer(policy.log().float(), hidden / hidden.square().sum()))


@torch.no_grad()
def get_policy(model: Any) -> torch.Tensor:
    return model(torch.tensor([[0]])).logits[0, -1].double().softmax(0)


def sample(policy: torch.Tensor, size: int, generator: torch.Generator) -> torch.Tensor:
    """
    Systematic sampling: `size` equally spaced points with one random offset. A point picked at random is a sample of
    the policy, but an action comes up within 1 of `size` times its probability: a group with little noise.
    """
    points = (torch.arange(size) + torch.rand(1, generator=generator)) / size
    return torch.searchsorted(policy.cumsum(0), points.double()).clamp(max=len(policy) - 1)


def play(
    preferences: torch.Tensor,
    start: torch.Tensor,
    num_iterations: int = 1,
    scores: torch.Tensor | None = None,
    model: Qwen2ForCausalLM | str | None = None,
    group_size: int = 256,
    steps: int = 100,
    seed: int = 0,
    sampler: Callable[[torch.Tensor, int, torch.Generator], torch.Tensor] = sample,
    **options: Any,
) -> tuple[list[torch.Tensor], SPPOTrainer, list[torch.Tensor]]:
    """
    Train on a game.

    Args:
        preferences (`torch.Tensor` of shape `(actions, actions)`):
            The game, which is the trainer's pairwise oracle.
        start (`torch.Tensor` of shape `(actions,)`):
            Policy of the first rollout.
        num_iterations (`int`, *optional*, defaults to `1`):
            SPPO iterations: rollouts of one group, each fitted in `steps` optimizer steps.
        scores (`torch.Tensor` of shape `(actions,)`, *optional*):
            Scores that are the trainer's reward function, instead of the oracle.
        model ([`~transformers.Qwen2ForCausalLM`] or `str`, *optional*):
            What becomes the table; by default a new one. With a path, the initial policy is what that holds.
        group_size, steps, seed (`int`):
            Completions per iteration, of one group without the option `num_generations`; optimizer steps per
            iteration; of the samples.
        sampler (callable, *optional*, defaults to [`sample`]):
            Gets a policy, the number of actions to sample, and a generator.
        options:
            Options of [`SPPOConfig`].

    Returns:
        The policies (before each iteration and after the last), the trainer, and each group's counts of the actions.
    """
    policies: list[torch.Tensor] = []
    groups: list[torch.Tensor] = []
    generator = torch.Generator().manual_seed(seed)

    def rollout(prompts: list[str], trainer: SPPOTrainer) -> dict[str, Any]:
        policies.append(get_policy(trainer.model))
        actions = sampler(policies[-1], len(prompts), generator)
        groups.append(actions.bincount(minlength=len(start)))
        return {"prompt_ids": [[0]] * len(prompts), "completion_ids": actions.unsqueeze(1).tolist(), "logprobs": None}

    def indices(completions: list[str]) -> list[int]:
        return [ord(completion) - ord("a") for completion in completions]

    def oracle(prompts, first, second, **kwargs):
        return preferences[indices(first), indices(second)]

    def reward(completions, **kwargs):
        assert scores is not None
        return scores[indices(completions)].tolist()

    with tempfile.TemporaryDirectory() as folder:
        args = SPPOConfig(**{
            "output_dir": folder, "per_device_train_batch_size": group_size, "num_generations": group_size,
            "num_iterations": steps, "max_steps": num_iterations * steps, "max_completion_length": 1,
            "temperature": 1.0, "both_orders": False, "preference_batch_size": group_size**2,
            # Adam, whose learning rate falls to 0 in each iteration, so that each is fitted to its end. Less momentum
            # than usual, for it pushes on into the next iteration.
            "learning_rate": 0.05, "adam_beta1": 0.8, "max_grad_norm": 0.0,
            "lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": num_iterations},
            "gradient_checkpointing": False, "bf16": False, "use_cpu": True, "report_to": "none",
            "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, **options,
        })  # fmt: skip
        trainer = SPPOTrainer(
            make_model(len(start)) if model is None else model,
            None if scores is None else reward,
            args,
            Dataset.from_dict({"prompt": ["a"] * (group_size // cast(int, args.num_generations))}),
            processing_class=make_tokenizer(len(start)),
            preference_func=oracle if scores is None else None,
            rollout_func=rollout,
        )
        trainer.remove_callback(PrinterCallback)
        set_policy(trainer.model, start)
        trainer.train()
    return [*policies, get_policy(trainer.model)], trainer, groups


# ---- The long version


GAME_SEED = 56
TABLE = "{:>4}  {:<14}{:>14}{:>14}{:>14}{:>14}"


def one_iteration(preferences: torch.Tensor, start: torch.Tensor) -> dict[str, dict[float, float]]:
    """Total-variation distance to the multiplicative-weights update by baseline and eta, of the trainer."""
    print("One iteration of the trainer: total-variation distances, and what the exact answers are apart")
    print(TABLE.format("eta", "baseline", "to MW", "to LS", "to its group", "LS to MW"))
    distances: dict[str, dict[float, float]] = {"half": {}, "log_mean_exp": {}}
    for eta in [1.0, 2.0, 5.0, 10.0]:
        for baseline in distances:
            policies, _, groups = play(preferences, start, group_size=512, steps=200, eta=eta, baseline=baseline)
            before, after = policies
            update = multiplicative_weights(before, preferences, eta)
            fit = least_squares(before, eta * (preferences @ before - 0.5))
            for_group = minimum_for_group(before, groups[0], preferences, eta, baseline)
            distances[baseline][eta] = total_variation(after, update)
            row = [
                total_variation(*pair) for pair in [(after, update), (after, fit), (after, for_group), (fit, update)]
            ]
            print(TABLE.format(f"{eta:g}", baseline, *(f"{value:.2g}" for value in row)), flush=True)
    return distances


def distance_of_half(preferences: torch.Tensor, start: torch.Tensor, eta: float) -> float:
    """Exact distance between the minimiser with the constant 1/2 and the multiplicative-weights update."""
    fit = least_squares(start, eta * (preferences @ start - 0.5))
    return total_variation(fit, multiplicative_weights(start, preferences, eta))


def independent_groups(preferences: torch.Tensor, start: torch.Tensor) -> None:
    """What the noise of independent samples costs, as an exact minimiser would have it."""
    print("Independent samples: distance to MW of the group's exact minimum, median of 50 groups")
    sizes = [8, 32, 128, 512, 2048]
    print("{:>4}  {:<14}".format("eta", "baseline") + "".join(f"{f'K = {size}':>10}" for size in sizes))
    torch.manual_seed(0)
    for eta in [1.0, 10.0]:
        update = multiplicative_weights(start, preferences, eta)
        for baseline in ["half", "log_mean_exp"]:
            medians = []
            for size in sizes:
                groups = [start.multinomial(size, replacement=True).bincount(minlength=len(start)) for _ in range(50)]
                fits = [minimum_for_group(start, group, preferences, eta, baseline) for group in groups]
                medians.append(torch.tensor([total_variation(fit, update) for fit in fits]).median().item())
            print(f"{eta:>4g}  {baseline:<14}" + "".join(f"{median:>10.2g}" for median in medians), flush=True)


def self_play(
    name: str, preferences: torch.Tensor, start: torch.Tensor, eta: float, iterations: int
) -> dict[str, list]:
    """Duality gaps after 0, 1, 2, ... iterations."""
    scores = bradley_terry_scores(preferences)
    options: dict[str, Any] = {"eta": eta, "baseline": "log_mean_exp", "steps": 30, "logging_steps": 30}
    sppo, *_ = play(preferences, start, iterations, **options)
    fitted, *_ = play(preferences, start, iterations, scores=scores, comparison="bradley_terry", **options)
    exact = [start]
    for _ in range(iterations):
        exact.append(multiplicative_weights(exact[-1], preferences, eta))
    runs: dict[str, Any] = {
        "SPPO, average": averages(sppo),
        "SPPO, last": sppo,
        "exact, average": averages(exact),
        "Bradley–Terry, average": averages(fitted),
        "Bradley–Terry, last": fitted,
    }
    gaps = {run: [duality_gap(policy, preferences) for policy in policies] for run, policies in runs.items()}
    shown = [t for t in [0, 1, 2, 4, 8, 16, 32, 64, 128] if t <= iterations]
    print(f"{name}: duality gap after iterations, eta = {eta:g}")
    print(f"{'':<24}" + "".join(f"{t:>8}" for t in shown))
    for run, values in gaps.items():
        print(f"{run:<24}" + "".join(f"{values[t]:>8.3f}" for t in shown))
    favourite = torch.eye(len(preferences), dtype=torch.float64)[scores.argmax()]
    if scores.abs().max() > 1e-9:
        print(f"{'Bradley–Terry favourite':<24}{duality_gap(favourite, preferences):>8.3f}")
    return gaps


def draw(distances: dict, half: dict, games: dict[str, dict[str, list]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, *others) = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    left.plot(half["eta"], half["exact"], color="tab:red", label="b = ½, exact")
    style = {"color": "tab:red", "alpha": 0.15, "linewidth": 0}
    left.fill_between(half["eta"], half["low"], half["high"], label="likewise, 80 % of random games", **style)
    for baseline, color, label in [("half", "tab:red", "½"), ("log_mean_exp", "tab:blue", "log-mean-exp")]:
        points = distances[baseline]
        left.plot(points.keys(), points.values(), "o", color=color, label=f"b = {label}, trainer")
    left.set(title="One iteration, from multiplicative weights", xlabel="η", ylabel="total-variation distance")
    left.set_ylim(-0.01, 0.35)
    left.legend(loc="upper left")
    curves: list[tuple[str, str, dict[str, Any]]] = [
        (
            "Bradley–Terry, last",
            "Bradley–Terry fit, last policy",
            {"color": "tab:orange", "alpha": 0.4, "linewidth": 1},
        ),
        ("SPPO, last", "SPPO, last policy", {"color": "tab:blue", "alpha": 0.4, "linewidth": 1}),
        ("Bradley–Terry, average", "Bradley–Terry fit, average", {"color": "tab:orange"}),
        ("SPPO, average", "SPPO, average", {"color": "tab:blue"}),
        ("exact, average", "exact update, average", {"color": "black", "linewidth": 1, "linestyle": "--"}),
    ]
    for axis, (name, gaps) in zip(others, games.items(), strict=True):
        for run, label, style in curves:
            axis.plot(range(len(gaps[run])), gaps[run], label=label, **style)
        axis.set(title=f"Self-play, {name}", xlabel="iteration", ylabel="duality gap", yscale="log", ylim=(0.01, 1.1))
    others[-1].legend(loc="lower left")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=128)
    parser.add_argument("--eta", type=float, default=0.5, help="Of self-play.")
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "docs" / "game.png")
    args = parser.parse_args()
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # `rollout_func`
    logging.disable(logging.WARNING)  # the trainer says of each group without signal that it is one

    preferences, start = random_game(8, GAME_SEED), random_policy(8, GAME_SEED)
    distances = one_iteration(preferences, start)

    etas = [0.25 * i for i in range(1, 43)]
    others = torch.tensor(
        [[distance_of_half(random_game(8, seed), random_policy(8, seed), eta) for eta in etas] for seed in range(100)]
    )
    low, median, high = others.quantile(torch.tensor([0.1, 0.5, 0.9]), dim=0)
    half = {
        "eta": etas,
        "exact": [distance_of_half(preferences, start, eta) for eta in etas],
        "low": low,
        "high": high,
    }
    print("LS to MW, exact, of 100 random games and policies: eta, 10 %, median, 90 %")
    for eta in [1.0, 2.0, 5.0, 10.0]:
        i = etas.index(eta)
        print(f"{eta:>4g}  {low[i]:.2g}  {median[i]:.2g}  {high[i]:.2g}")
    independent_groups(preferences, start)

    uneven = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    games = {
        "rock–paper–scissors": self_play(
            "rock–paper–scissors", ROCK_PAPER_SCISSORS, uneven, args.eta, args.iterations
        ),
        "random 8-action game": self_play("random 8-action game", preferences, start, args.eta, args.iterations),
    }
    draw(distances, half, games, args.output)
    print(f"Drawn: {args.output}")


if __name__ == "__main__":
    main()
