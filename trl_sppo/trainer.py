"""[`SPPOTrainer`]: SPPO on TRL's GRPO trainer. Wiring only; the formulas are in `preferences` and `objectives`."""

import importlib.util
import textwrap
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging
from trl import GRPOTrainer
from trl.data_utils import is_conversational

from .config import SPPOConfig
from .objectives import select_completions, sppo_loss, sppo_targets
from .preferences import (
    mean_preferences,
    preferences_from_scores,
    share_of_ties,
    win_rates,
    win_rates_from_scores,
)
from .rewards import MicroBatchedRewardModel, RewardSource, load_reward_models


logger = logging.get_logger(__name__)


class SPPOTrainer(GRPOTrainer):
    """
    Trainer for Self-Play Preference Optimization (SPPO), https://huggingface.co/papers/2405.00675.

    The policy samples a group of completions per prompt, a reward source scores them, each completion is compared with
    the others of its group, and the log-ratio between the policy and the policy that sampled the group is regressed to
    `eta * (win_rate - 1/2)`. The next generation batch is sampled by the new policy: each iteration plays against the
    last one's.

    What changes with respect to [`~trl.GRPOTrainer`]: scores become win rates, completions that are not trained on are
    dropped before any log-probability is computed, the loss is [`sppo_loss`], and reward models score in micro-batches.
    Everything else (generation, vLLM, PEFT, quantization, evaluation, logging) is inherited.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Policy to train, as in [`~trl.GRPOTrainer`].
        reward_funcs (`str`, [`~transformers.PreTrainedModel`], callable, or a list of them):
            Reward models (sequence classifiers with one label, by path or loaded) or reward functions, as in
            [`~trl.GRPOTrainer`]. Each is an oracle of its own: with several, their preferences are averaged, weighted
            by `args.reward_weights`. `None`, NaN and infinite scores mark a completion as unscorable.
        args ([`SPPOConfig`], *optional*):
            Configuration. If `None`, the defaults.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Dataset with a `"prompt"` column: text, or a list of messages.
        eval_dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or `dict` of them, *optional*):
            Dataset to evaluate on.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer of the policy. By default the one saved beside it.
        reward_processing_classes ([`~transformers.PreTrainedTokenizerBase`] or a list of them, *optional*):
            Tokenizers of the reward models. By default those saved beside them.
        kwargs:
            Further arguments of [`~trl.GRPOTrainer`], such as `peft_config`, `quantization_config` and `callbacks`.

    Raises:
        `ValueError`, `TypeError` or `ImportError`: for input that could not be trained on, before a model is loaded.

    Example:

    ```python
    from datasets import load_dataset
    from trl_sppo import SPPOConfig, SPPOTrainer

    trainer = SPPOTrainer(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        reward_funcs="Skywork/Skywork-Reward-V2-Qwen3-0.6B",
        args=SPPOConfig("Qwen2.5-0.5B-SPPO", win_rate_threshold=0.6),
        train_dataset=load_dataset("trl-lib/ultrafeedback-prompt", split="train"),
    )
    trainer.train()
    ```
    """

    _tag_names = ["trl", "sppo"]
    _name = "SPPO"
    _paper = {
        "title": "Self-Play Preference Optimization for Language Model Alignment",
        "id": "2405.00675",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @inproceedings{wu2025selfplay,
                title        = {{Self-Play Preference Optimization for Language Model Alignment}},
                author       = {Yue Wu and Zhiqing Sun and Huizhuo Yuan and Kaixuan Ji and Yiming Yang and Quanquan Gu},
                year         = 2025,
                booktitle    = {International Conference on Learning Representations},
                eprint       = {arXiv:2405.00675},
            }"""),
    }

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward_funcs: RewardSource | list[RewardSource] | None = None,
        args: SPPOConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase | None] | None = None,
        **kwargs,
    ):
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = SPPOConfig(f"{name.rstrip('/').split('/')[-1]}-SPPO")
        elif not isinstance(args, SPPOConfig):
            raise TypeError(f"args must be an SPPOConfig, got {type(args).__name__}.")
        reward_funcs = _as_list(reward_funcs)
        if not reward_funcs and kwargs.get("environment_factory") is None:
            raise ValueError(
                "no reward source: pass `reward_funcs`, a reward model (path or model) or a reward function. On the "
                "command line that is --reward_model_name_or_path or --reward_funcs."
            )
        if args.use_vllm and importlib.util.find_spec("vllm") is None:
            raise ImportError(
                "use_vllm=True needs vLLM, which is not installed. Install it with `pip install trl-sppo[vllm]`, or "
                "set use_vllm=False to generate with transformers."
            )
        conversational = _check_datasets(args, train_dataset, eval_dataset)
        if isinstance(model, str):
            _check_model_path(model, args)
        processing_classes = _as_list(reward_processing_classes) or [None] * len(reward_funcs)
        if len(processing_classes) != len(reward_funcs):
            raise ValueError(
                f"reward_processing_classes must have one entry per reward source ({len(reward_funcs)}), got "
                f"{len(processing_classes)}. Use None for a reward function."
            )
        reward_funcs, processing_classes = load_reward_models(
            reward_funcs, processing_classes, conversational, args.trust_remote_code
        )

        # The rows of the local rollout that log-probabilities are computed for, while a rollout is being made
        self._rows: torch.Tensor | None = None

        super().__init__(
            model=model,
            reward_funcs=reward_funcs,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            reward_processing_classes=processing_classes,
            **kwargs,
        )
        if self.reward_weights.numel() != len(self.reward_funcs):  # an environment brought its own reward
            self.reward_weights = torch.ones(len(self.reward_funcs))
        self.reward_funcs = [
            MicroBatchedRewardModel(source, args.reward_batch_size) if isinstance(source, nn.Module) else source
            for source in self.reward_funcs
        ]

    # ---- Seam 1: the rollout. TRL generates, computes log-probabilities, then scores. Here scores come right after
    # generation, so that the log-probability passes can skip the completions that will not be trained on.

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, torch.Tensor | Any]:
        self._rollout_inputs = inputs
        self._scores = None
        batch = super()._generate_and_score_completions(inputs)
        rows, self._rows = self._rows, None

        # The table of completions shows what is regressed instead of GRPO's advantage
        table = self._logs["advantages"]
        for _ in range(self._win_rates.numel()):
            table.pop()
        table.extend(sppo_targets(self._win_rates.flatten(), self.args.eta).tolist())

        del batch["advantages"]
        batch = _take_rows(batch, rows)
        local = self._local(self._win_rates.flatten())
        has_tokens = _loss_mask(batch).any(dim=1)  # false where truncated completions are masked
        batch["win_rates"] = local[rows]
        batch["kept"] = has_tokens & (torch.arange(len(rows), device=rows.device) < self._num_kept)
        return batch

    def _generate(self, prompts: list):
        generated = super()._generate(prompts)
        prompt_ids, completion_ids, tool_mask, completions, logprobs, extra_fields, *_ = generated
        # Like TRL, hand what a `rollout_func` returned besides the completions to the reward functions
        inputs = [
            {**row, **{name: value[i] if isinstance(value, list) else value for name, value in extra_fields.items()}}
            for i, row in enumerate(self._rollout_inputs)
        ]
        self._scores = self._calculate_rewards(inputs, prompts, completions, completion_ids)
        self._judge(completion_ids)
        return generated

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list) -> torch.Tensor:
        if self._scores is not None:  # TRL asks again, after its log-probability passes
            return self._scores
        scores = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        for name, column in zip(self.reward_func_names, scores.T, strict=True):
            unscorable = (~column.isfinite()).sum().item()
            if unscorable:
                logger.warning(
                    f"reward source {name!r} gave no finite score (None, NaN or infinite) for {unscorable} of "
                    f"{len(column)} completions: they take no part in its comparisons."
                )
        # (completions of all processes, reward sources)
        return scores.masked_fill(~scores.isfinite(), torch.nan)

    def _judge(self, completion_ids: list[list[int]]) -> None:
        """From the scores of all processes: win rates, which rows to keep, and their metrics."""
        mode = "train" if self.model.training else "eval"
        args = self.args
        group_size = self.num_generations if mode == "train" else self.num_generations_eval
        scores = self._scores.T.reshape(self._scores.size(1), -1, group_size)  # (sources, groups, K)
        if len(scores) == 1:
            self._win_rates = win_rates_from_scores(scores[0], args.comparison, args.bt_temperature, args.include_self)
        else:
            matrices = [preferences_from_scores(source, args.comparison, args.bt_temperature) for source in scores]
            self._win_rates = win_rates(mean_preferences(matrices, self.reward_weights.tolist()), args.include_self)
        kept = select_completions(self._win_rates, args.train_on, args.win_rate_threshold)
        if not kept.any():
            logger.warning(
                f"no group of this {mode} batch has two completions with different win rates: nothing is learned from "
                "it. If this goes on, the reward source does not tell the completions apart, or sampling (temperature) "
                "makes them equal."
            )

        # Every process carries the same number of rows, so that all take the same number of forward passes (sharded
        # models need that) and each slice of the generation batch gets as many: the kept rows, then copies of row 0
        # that are not trained on.
        num_kept = kept.view(self.accelerator.num_processes, -1).sum(dim=1)
        slices = args.steps_per_generation if mode == "train" else 1
        num_rows = -(-max(int(num_kept.max()), 1) // slices) * slices
        self._num_kept = int(num_kept[self.accelerator.process_index])
        rows = self._local(kept.flatten()).nonzero().squeeze(1)
        self._rows = nn.functional.pad(rows, (0, num_rows - self._num_kept))

        self._log_completion_extra("win_rate", self._local(self._win_rates.flatten()).tolist())
        lengths = torch.tensor([len(ids) for ids in completion_ids], device=kept.device, dtype=torch.float32)
        lengths = self.accelerator.gather(lengths).view_as(self._win_rates)
        metrics = {
            "win_rate/std": _nanmean(self._win_rates.var(dim=1, correction=0).sqrt()),
            "win_rate/tied_pairs": _nanmean(torch.stack([share_of_ties(source) for source in scores])),
            "win_rate/kept": kept.float().mean(),
            "win_rate/unscorable": self._win_rates.isnan().float().mean(),
            "win_rate/groups_without_signal": (~kept.any(dim=1)).float().mean(),
            "completions/winners_mean_length": lengths[self._win_rates > 0.5].mean(),
            "completions/losers_mean_length": lengths[self._win_rates < 0.5].mean(),
        }
        for name, value in metrics.items():
            self._metrics[mode][name].append(value.item())

    def _local(self, values: torch.Tensor) -> torch.Tensor:
        """This process's part of a flat tensor over the completions of all processes."""
        return values.view(self.accelerator.num_processes, -1)[self.accelerator.process_index]

    # ---- Seam 2: log-probabilities

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, *args, **kwargs):
        if self._rows is None:
            return super()._get_per_token_logps_and_entropies(model, input_ids, attention_mask, *args, **kwargs)
        # During a rollout: only for the rows that will be trained on. The others are NaN, which TRL's vLLM importance
        # correction reads as "unknown", and which would not stay unnoticed in a loss.
        rows = self._rows
        outputs = super()._get_per_token_logps_and_entropies(
            model, input_ids[rows], attention_mask[rows], *args, **kwargs
        )
        logps = outputs[0].new_full((len(input_ids), outputs[0].size(1)), torch.nan)
        logps[rows] = outputs[0]
        return logps, None, None

    # ---- Seam 3: the loss

    def _compute_loss(self, model, inputs):
        mode = "train" if self.model.training else "eval"
        num_items = self._count_kept(inputs, mode)
        # Rows that are not trained on cost nothing. One stays if there is no other: every process has to take part.
        rows = inputs["kept"].nonzero().squeeze(1)
        inputs = _take_rows(inputs, rows if len(rows) else rows.new_zeros(1))

        completion_ids = inputs["completion_ids"]
        mask = _loss_mask(inputs)
        per_token_logps, entropies, aux_loss = self._get_per_token_logps_and_entropies(
            model,
            torch.cat([inputs["prompt_ids"], completion_ids], dim=1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            completion_ids.size(1),
            compute_entropy=True,
            compute_aux_loss=self.aux_loss_enabled,
        )
        # π_t sampled the batch. TRL leaves its log-probs out where the batch is used before the policy changes.
        old_per_token_logps = inputs.get("old_per_token_logps", per_token_logps.detach())
        per_token_log_ratios = torch.where(mask, per_token_logps - old_per_token_logps, 0.0)
        ratio = inputs.get("importance_sampling_ratio")
        loss, metrics = sppo_loss(
            per_token_log_ratios.sum(dim=1),
            inputs["win_rates"].masked_fill(~inputs["kept"], torch.nan),
            eta=self.args.eta,
            weights=None if ratio is None else ratio.squeeze(1),
            # Gradients are averaged over processes and summed over micro-batches
            num_items=num_items / self.accelerator.num_processes,
        )
        if self.aux_loss_enabled:
            steps = self.current_gradient_accumulation_steps if mode == "train" else 1
            loss = loss + self.router_aux_loss_coef * aux_loss / steps
            metrics["aux_loss"] = aux_loss.detach()

        # KL(π_t || π_θ) per token, from samples of π_t: E[r - 1 - log r], r = π_θ / π_t
        log_ratios = per_token_log_ratios.detach()
        metrics["kl_to_rollout_policy"] = _masked_mean(
            log_ratios.exp() - 1 - log_ratios, mask & inputs["kept"][:, None]
        )
        metrics["entropy"] = _masked_mean(entropies.detach(), mask & inputs["kept"][:, None])
        gathered = self.accelerator.gather(torch.stack([value.float() for value in metrics.values()]))
        for name, value in zip(metrics, gathered.view(-1, len(metrics)).nanmean(dim=0).tolist(), strict=True):
            self._metrics[mode][name].append(value)
        return loss

    def _count_kept(self, inputs: dict[str, Any], mode: str) -> torch.Tensor:
        """Number of completions trained on in this optimizer step, over its micro-batches and all processes."""
        micro_batches = [inputs]
        if mode == "train":
            # TRL's buffer holds the slices of the generation batch; steps_per_generation is a multiple of `steps`
            steps = self.args.gradient_accumulation_steps
            first = self._step % self.args.steps_per_generation // steps * steps
            micro_batches = self._buffered_inputs[first : first + steps]
        count = torch.stack([micro_batch["kept"].sum() for micro_batch in micro_batches]).sum()
        return self.accelerator.reduce(count, reduction="sum").clamp(min=1)


def _as_list(value) -> list:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def _take_rows(batch: dict[str, Any], rows: torch.Tensor) -> dict[str, Any]:
    return {
        name: value[rows] if isinstance(value, torch.Tensor) and value.ndim > 0 else value
        for name, value in batch.items()
    }


def _loss_mask(batch: dict[str, Any]) -> torch.Tensor:
    """Completion tokens that the policy sampled: neither padding nor a tool's words."""
    mask = batch["completion_mask"]
    return (mask * batch["tool_mask"] if "tool_mask" in batch else mask).bool()


def _masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return values[mask].mean()


def _nanmean(values: torch.Tensor) -> torch.Tensor:
    return values.nanmean()


def _check_model_path(model: str, args: SPPOConfig) -> None:
    kwargs = args.model_init_kwargs or {}
    try:
        AutoConfig.from_pretrained(model, revision=kwargs.get("revision"), trust_remote_code=args.trust_remote_code)
    except OSError as error:
        raise ValueError(
            f"model {model!r} is neither a folder with a config.json nor a model that can be had from the Hugging Face "
            f"hub. Check the path (--model_name_or_path). ({error})"
        ) from error


def _check_datasets(args: SPPOConfig, train_dataset, eval_dataset) -> bool:
    """Check what can be checked without a model. Returns whether the prompts are conversational."""
    if train_dataset is None:
        return True  # an environment may bring the prompts; TRL checks that
    datasets = {"train_dataset": train_dataset}
    if isinstance(eval_dataset, dict):
        datasets |= {f"eval_dataset[{name!r}]": dataset for name, dataset in eval_dataset.items()}
    elif eval_dataset is not None:
        datasets["eval_dataset"] = eval_dataset
    for name, dataset in datasets.items():
        if isinstance(dataset, Dataset) and len(dataset) == 0:
            raise ValueError(f"{name} is empty. It needs rows with a 'prompt' column.")
        columns = dataset.column_names
        if columns is not None and "prompt" not in columns:
            raise ValueError(
                f"{name} has no 'prompt' column, but {columns}. Rename the column that holds the prompts: "
                "`dataset.rename_column('...', 'prompt')`."
            )
        if columns is not None and {"image", "images"} & set(columns):
            raise ValueError(f"{name} has an image column: this release of SPPOTrainer trains on text only.")
    num_prompts = args.generation_batch_size // args.num_generations
    if isinstance(train_dataset, Dataset) and len(train_dataset) < num_prompts:
        raise ValueError(
            f"train_dataset has {len(train_dataset)} prompts, fewer than the {num_prompts} of one generation batch "
            f"(generation_batch_size {args.generation_batch_size} / num_generations {args.num_generations}), so there "
            "would be no training step. Lower per_device_train_batch_size or steps_per_generation, or add prompts."
        )
    return is_conversational(next(iter(train_dataset)))
