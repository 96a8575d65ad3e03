"""Win rates between two policies, with intervals."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class WinRate:
    """A policy's win rate against an opponent: the estimate, its confidence interval, and the number of prompts."""

    mean: float
    low: float
    high: float
    num_prompts: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def policy_win_rate(scores: torch.Tensor, opponent_scores: torch.Tensor, confidence: float = 0.95) -> WinRate:
    """
    How often a policy's completion scores higher than its opponent's, for the same prompt.

        w_p = mean over pairs (i, j) of [s_pi > o_pj] + 1/2 [s_pi = o_pj]
        interval = mean(w) +- z std(w) / sqrt(P), clipped to [0, 1]

    Samples of one prompt are not independent of each other, prompts are: so the interval is over the P prompts.

    Args:
        scores (`torch.Tensor` of shape `(P, S)`):
            Scores of S completions of each of P prompts.
        opponent_scores (`torch.Tensor` of shape `(P, S')`):
            Scores of the opponent's completions of the same prompts.
        confidence (`float`, *optional*, defaults to `0.95`):
            Coverage of the interval, by the normal approximation (for some 30 prompts or more).

    Returns:
        [`WinRate`].

    Raises:
        `ValueError`: if the numbers of prompts differ, or there are fewer than two, or a score is NaN.

    Example:

    ```python
    >>> import torch
    >>> print(policy_win_rate(torch.tensor([[2.0], [2.0], [1.0]]), torch.tensor([[1.0], [1.0], [1.0]])))
    0.833 [0.507, 1.000]

    ```
    """
    if scores.ndim != 2 or opponent_scores.ndim != 2 or len(scores) != len(opponent_scores) or len(scores) < 2:
        raise ValueError(
            "scores and opponent_scores must have shapes (P, S) and (P, S') for the same two or more prompts, got "
            f"{tuple(scores.shape)} and {tuple(opponent_scores.shape)}."
        )
    if scores.isnan().any() or opponent_scores.isnan().any():
        raise ValueError("scores must not be NaN: leave out the prompts that could not be scored.")
    wins = (scores[:, :, None] > opponent_scores[:, None, :]).float()
    ties = (scores[:, :, None] == opponent_scores[:, None, :]).float()
    per_prompt = (wins + 0.5 * ties).mean(dim=(1, 2))
    mean = per_prompt.mean().item()
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    margin = z * per_prompt.std().item() / len(per_prompt) ** 0.5
    return WinRate(mean, max(mean - margin, 0.0), min(mean + margin, 1.0), len(per_prompt))


@torch.inference_mode()
def sample_completions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[dict[str, str]]],
    num_samples: int,
    max_completion_length: int,
    temperature: float,
    seed: int,
    batch_size: int = 64,
    description: str = "sampling",
) -> list[list[str]]:
    """
    Sample completions of conversational prompts, with a progress bar.

    Args:
        model, tokenizer:
            The policy.
        prompts (sequence of conversations):
            P prompts, each a list of messages.
        num_samples (`int`):
            Completions per prompt, S.
        max_completion_length (`int`):
            Length limit, in tokens.
        temperature (`float`):
            Sampling temperature.
        seed (`int`):
            Seed of the global random generator.
        batch_size (`int`, *optional*, defaults to `64`):
            Completions sampled at the same time.
        description (`str`, *optional*):
            Text of the progress bar.

    Returns:
        P lists of S completions.
    """
    torch.manual_seed(seed)
    texts = [
        tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True)
        for prompt in prompts
        for _ in range(num_samples)
    ]
    completions: list[str] = []
    for start in tqdm(range(0, len(texts), batch_size), desc=description):
        inputs = tokenizer(
            texts[start : start + batch_size],
            padding=True,
            padding_side="left",
            add_special_tokens=False,
            return_tensors="pt",
        ).to(model.device)
        output = model.generate(  # type: ignore[operator]
            **inputs,
            max_new_tokens=max_completion_length,
            do_sample=True,
            temperature=temperature,
            top_k=0,
            pad_token_id=tokenizer.pad_token_id,
        )
        completions += tokenizer.batch_decode(output[:, inputs["input_ids"].size(1) :], skip_special_tokens=True)
    return [completions[i : i + num_samples] for i in range(0, len(completions), num_samples)]
