"""[`SPPOTrainer`]: SPPO on TRL's GRPO trainer. Wiring only; the formulas are in `preferences` and `objectives`."""

import math
import textwrap
from collections import deque
from functools import wraps
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .adapters import continue_adapter, is_adapter, keep_reference, load_weights
from .checks_arguments import check_resume, check_vllm
from .checks_models import (
    check_model,
    check_new_adapter,
    check_not_replaced,
    check_quantization,
    check_sharding,
    check_trainable,
    quantized_bits,
)
from .checks_sources import check_columns, check_datasets, check_judges, check_sources, named_datasets
from .comparisons import PreferenceFunc
from .config import SPPOConfig
from .faults import RunError, is_of_another_process
from .forms import form_of
from .generation import only_requested_generation
from .make_rollouts import make_rollouts
from .model_card import add_to_card
from .objectives import kl_to_initial_policy, kl_to_rollout_policy, sppo_loss, sppo_targets
from .prompts import check_prompt_ids, check_rows, without_empty_images
from .rewards import RewardSource, without_slash
from .rollouts import (
    IMAGE_FIELDS,
    Verdict,
    loss_mask,
    pin,
    preferences_of_sources,
    take_rows,
    to_device,
    trim_completions,
)
from .scoring import ScoringTrainer
from .stored_rollouts import ROW, is_judged, load_rollouts, prompts_of
from .weight_sync import prepare_weight_sync


logger = logging.get_logger(__name__)


class SPPOTrainer(ScoringTrainer):
    """
    Trainer for Self-Play Preference Optimization (SPPO), https://huggingface.co/papers/2405.00675.

    The policy samples a group of completions per prompt, each completion is compared with the others of its group (by
    the scores of a reward source, or by a pairwise oracle), and the log-ratio between the policy and the policy that
    sampled the group is regressed to `eta * (win_rate - 1/2)`. The next generation batch is sampled by the new policy:
    each iteration plays against the last one's.

    What changes with respect to [`~trl.GRPOTrainer`]: scores become win rates, completions that are not trained on are
    dropped before any log-probability is computed, the loss is [`sppo_loss`], and reward models score in
    micro-batches. Everything else (generation, vLLM, PEFT, quantization, evaluation, logging) is inherited.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Policy to train, as in [`~trl.GRPOTrainer`]. Also the folder of an adapter, whose training goes on. Its own
            configuration is then used, and `peft_config` must be left out.
        reward_funcs (`str`, [`~transformers.PreTrainedModel`], callable, or a list of them):
            Reward models (sequence classifiers with one label: a path, a loaded one, or the URL of one behind a vLLM
            server, see [`ServedRewardModel`]) or reward functions, as in [`~trl.GRPOTrainer`]. Each is an oracle of
            its own: with several, their preferences are averaged, weighted by `args.reward_weights`. `None`, NaN and
            infinite scores mark a completion as unscorable.
        args ([`SPPOConfig`], *optional*):
            Configuration. If `None`, the defaults.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Dataset with a `"prompt"` column: text, or a list of messages that ends before the assistant's next one.
        eval_dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or `dict` of them, *optional*):
            Dataset to evaluate on.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer of the policy. By default the one saved beside it.
        reward_processing_classes ([`~transformers.PreTrainedTokenizerBase`] or a list of them, *optional*):
            Tokenizers of the reward models. By default those saved beside them.
        preference_func (callable, or a list of them, *optional*):
            Pairwise oracles, besides or instead of reward sources: `preference_func(prompts, first, second, **kwargs)`
            gets lists of prompts and of two completions each, and the dataset's other columns by name, and returns
            P(first beats second) in [0, 1] of each, `None` where it cannot say. It may be intransitive, and `async`.
            Each votes with its weight in `args.preference_weights`. Ready ones are in [`judges`].
        eval_reward_funcs, eval_reward_processing_classes, eval_preference_func (*optional*):
            Judges for evaluations only, given like `reward_funcs`, `reward_processing_classes` and `preference_func`:
            nothing is trained on what they say. Each evaluation plays against the initial policy and against the one
            before under all judges.
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

    _saved = [*ScoringTrainer._saved, "_sums"]

    _tag_names = ["trl", "sppo"]
    _name = "SPPO"
    _paper = {
        "title": "Self-Play Preference Optimization for Language Model Alignment",
        "id": "2405.00675",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @inproceedings{wu2025selfplay,
                title        = {{Self-Play Preference Optimization for Language Model Alignment}},
                author       = {Yue Wu and Zhiqing Sun and Huizhuo Yuan and Kaixuan Ji and Yiming Yang and
                                Quanquan Gu},
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
        preference_func: PreferenceFunc | list[PreferenceFunc] | None = None,
        eval_reward_funcs: RewardSource | list[RewardSource] | None = None,
        eval_reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase | None] | None = None,
        eval_preference_func: PreferenceFunc | list[PreferenceFunc] | None = None,
        **kwargs,
    ):
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = SPPOConfig(f"{name.rstrip('/').split('/')[-1]}-SPPO")
        elif not isinstance(args, SPPOConfig):
            raise TypeError(f"args must be an SPPOConfig, got {type(args).__name__}.")
        check_new_adapter(kwargs.get("peft_config"))
        if isinstance(model, torch.nn.Module) and kwargs.get("peft_config") is None:
            check_trainable(model)
        if isinstance(model, str):
            check_not_replaced(model, str(args.output_dir))
        if isinstance(model, str) and is_adapter(model):
            self._adapter = model.rstrip("/")
            model, kwargs["peft_config"], processing_class = continue_adapter(
                self._adapter, args, kwargs.get("peft_config"), processing_class
            )
        if args.resume_from_checkpoint:
            bits = quantized_bits(model, args, kwargs.get("quantization_config"))
            optimizer = kwargs.get("optimizers", (None,))[0]
            form = form_of(args, model, kwargs.get("peft_config"), optimizer, bits, self._adapter)
            check_resume(args, form)
        reward_funcs = without_slash(_as_list(reward_funcs))
        preference_funcs = _as_list(preference_func)
        has_environment = kwargs.get("environment_factory") is not None  # may bring prompts and a reward
        processing_classes = _as_list(reward_processing_classes) or [None] * len(reward_funcs)
        judges = without_slash(_as_list(eval_reward_funcs))
        judges_classes = _as_list(eval_reward_processing_classes) or [None] * len(judges)
        eval_preference_funcs = _as_list(eval_preference_func)
        self.rollouts_to_train_on: Dataset | None = None
        if args.rollouts is not None:
            if train_dataset is not None:
                raise TypeError(
                    f"train_dataset is given, but also rollouts={args.rollouts!r}, which bring the prompts. Leave one "
                    "of them out."
                )
            self.rollouts_to_train_on = load_rollouts(args.rollouts, cast(int, args.num_generations))
            train_dataset = prompts_of(self.rollouts_to_train_on)
        judged = self.rollouts_to_train_on is not None and is_judged(self.rollouts_to_train_on)
        check_sources(args, reward_funcs, processing_classes, preference_funcs, has_environment, judged)
        check_judges(args, reward_funcs, judges, judges_classes, eval_preference_funcs)
        check_quantization(args, model, kwargs.get("quantization_config"))
        has_adapter = kwargs.get("peft_config") is not None or hasattr(model, "peft_config")
        check_vllm(args)
        check_sharding(args, has_adapter)
        if args.sync_ref_model and has_adapter:
            raise ValueError(
                "sync_ref_model=True needs a reference policy of its own, but an adapter's is the model without it. "
                "Remove it, or train all weights."
            )
        if args.use_vllm and args.vllm_enable_sleep_mode and args.device.type == "cpu":
            logger.warning("vllm_enable_sleep_mode=True is ignored: vLLM can free a GPU's memory, but not a CPU's.")
            args.vllm_enable_sleep_mode = False
        conversational = check_datasets(args, train_dataset, eval_dataset, needs_prompts=not has_environment)
        train_dataset = without_empty_images("train_dataset", train_dataset)
        eval_dataset = without_empty_images("eval_dataset", eval_dataset)
        check_columns(
            args,
            named_datasets(train_dataset, eval_dataset),
            reward_funcs,
            judges,
            [*preference_funcs, *eval_preference_funcs],
            has_environment,
        )
        check_model(model, args, has_adapter, needs_tokenizer=processing_class is None, adapter=self._adapter)
        if isinstance(model, str):  # TRL would fall back to pickled weights
            args.model_init_kwargs = {**cast(dict, args.model_init_kwargs or {}), "use_safetensors": True}
        self._verdict: Verdict | None = None  # set while a rollout is being made
        self._scores = torch.empty(0)  # likewise
        self._only_samples = False  # `rollout` is at work
        self._sums: dict[str, torch.Tensor] = {}  # metrics of the optimizer step: numerators and denominators
        self._pinned = False  # whether TRL's buffer of rollouts is
        if kwargs.get("rollout_func") is not None:
            kwargs["rollout_func"] = _checked(kwargs["rollout_func"])
        super().__init__(
            model=model,
            reward_funcs=reward_funcs,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            reward_processing_classes=processing_classes,
            preference_funcs=preference_funcs,
            judges=judges,
            judges_processing_classes=judges_classes,
            eval_preference_funcs=eval_preference_funcs,
            conversational=conversational,
            **kwargs,
        )
        policy = cast(Any, self.model)
        if self._adapter is not None:
            load_weights("model", policy, self._adapter)
        if args.beta > 0 and (self._adapter is not None or "ref" in getattr(policy, "peft_config", {})):
            keep_reference(policy, args.disable_dropout)
        check_trainable(policy)
        if args.use_vllm:
            prepare_weight_sync(self.vllm_generation)

    def rollout(self) -> str:
        """
        Sample and score completions of the training prompts, without training.

        They are written to `args.output_dir/rollouts`, a file for each generation batch, with their log-probabilities
        under the policy. [`SPPOConfig`]'s `rollouts` trains on them, here or elsewhere. Each prompt has its turn once,
        or as many batches are made as `args.max_steps` optimizer steps would use. What the folder has already, by the
        same options, is kept: an interrupted call goes on where it was.

        Returns:
            `str`: the folder.

        Raises:
            `ValueError`: if models are sharded, or nothing would be written, or another run uses the folder.
        """
        self._only_samples = True
        try:
            with self.alone():
                return make_rollouts(self)
        finally:
            self._only_samples = False

    def _logps(self, batch: dict[str, Any]) -> torch.Tensor:
        """Log-probabilities of the tokens of all completions of a batch under the policy."""
        with torch.no_grad():
            return self._get_per_token_logps_and_entropies(
                self.model,
                torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
                torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
                batch["completion_ids"].size(1),
                batch_size=self.args.per_device_train_batch_size,
                **{name: batch[name] for name in IMAGE_FIELDS if name in batch},
            )[0]

    # ---- Seam 1: the rollout. TRL generates, computes log-probabilities, then scores. Here scores come right after
    # generation, so that the log-probability passes can skip the completions that will not be trained on.

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, torch.Tensor | Any]:
        if not self.environment_factories:  # these may bring the prompts
            check_rows(inputs, self._readers, self.model.training)
        self._rollout_inputs = inputs
        # Of an earlier iteration, if that one was interrupted
        self._verdict, self._sums = None, {}
        self._rollout_metrics[self._mode] = {}
        if self.model.training:
            self._buffered_inputs, self._pinned = None, False
        batch = super()._generate_and_score_completions(inputs)
        verdict, self._verdict = self._verdict, None
        assert verdict is not None  # _generate has set it
        if self.model.training:
            if self._only_samples and "old_per_token_logps" not in batch:
                batch["old_per_token_logps"] = self._logps(batch)
            self._recorder.finish(batch, self._local(verdict.kept))

        unmeasured = [] if self.reward_funcs else ["reward", "reward_std", "frac_reward_zero_std"]
        if not self.model.training:  # no log-probabilities to compare vLLM's with
            unmeasured += [name for name in self._metrics["eval"] if name.startswith("sampling/")]
        for name in unmeasured:
            self._metrics[self._mode].pop(name, None)
        # The table of completions shows what is regressed instead of GRPO's advantage
        table = cast(deque, self._logs["advantages"])
        targets = sppo_targets(verdict.regressed, self.args.eta, verdict.baseline).flatten().tolist()
        for _ in range(min(len(table), len(targets))):
            table.pop()
        table.extend(targets)

        del batch["advantages"]
        batch["win_rates"] = self._local(verdict.regressed)
        batch["baseline"] = self._local(verdict.baseline)
        batch["kept"] = self._local(verdict.kept)
        if "num_images" not in batch:  # pixels have no rows to choose from: dropped completions are only masked
            batch = take_rows(batch, verdict.rows)
            batch["kept"] = torch.arange(len(verdict.rows), device=verdict.rows.device) < verdict.num_kept
        # Between uses rollouts live in CPU memory
        return to_device(batch, torch.device("cpu"))

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, torch.Tensor | Any]:
        inputs = super()._prepare_inputs(generation_batch)
        slices = self._buffered_inputs  # none in an evaluation before training
        if slices and not self._pinned and self.accelerator.device.type == "cuda":
            for i in range(len(slices)):  # one by one, so that memory holds no iteration twice
                slices[i] = pin(slices[i])
            self._pinned = True
        return inputs

    def _generate(self, prompts: list):
        training = self.model.training
        group_size = self.num_generations if training else self.num_generations_eval
        assert group_size is not None and self.args.steps_per_generation is not None  # GRPOConfig has set them
        recorder = self._recorder if training else None
        if recorder is not None:
            iteration = self._step // self._micro_steps_per_iteration
            resumed = self._resumed or self._only_samples
            recorder.begin(iteration, self._rollout_inputs, group_size, resumed)
        generated = super()._generate(prompts)
        prompt_ids, completion_ids, tool_mask, completions, sampling_logps, extra_fields, *_ = generated
        if recorder is not None:
            recorder.sampled(prompt_ids, completion_ids, completions, tool_mask, sampling_logps)

        # Like TRL, hand what a `rollout_func` returned besides the completions to the reward functions
        inputs = [{name: value for name, value in row.items() if name != ROW} for row in self._rollout_inputs]
        for name, value in extra_fields.items():
            for i, row in enumerate(inputs):
                if not isinstance(value, list) or i < len(value):
                    row[name] = value[i] if isinstance(value, list) else value
        if recorder is not None and recorder.is_scored:
            self._scores = scores = recorder.scores(self.reward_source_names)
        else:
            self._scores = scores = self._calculate_rewards(inputs, prompts, completions, completion_ids)
            if training:
                self._check_scores(scores)
        by_judge = {} if training else self._ask_judges(inputs, prompts, completions, completion_ids, group_size)

        # Of each completion: the tokens that the policy sampled, whether it came to its end, what it is
        pad = self._tokenizer.pad_token_id
        lengths = [len(ids) if tool_mask is None else sum(tool_mask[i]) for i, ids in enumerate(completion_ids)]
        if pad not in self.eos_token_ids:
            lengths = [0 if ids == [pad] else n for ids, n in zip(completion_ids, lengths, strict=True)]
        ends = [*self.eos_token_ids, pad]
        ended = [len(ids) > 0 and ids[-1] in ends for ids in completion_ids]
        fingerprints = [hash(tuple(ids)) for ids in completion_ids]
        local = torch.tensor([lengths, ended, fingerprints], device=scores.device).T.contiguous()
        num_slices = self.args.steps_per_generation if training else 1
        lengths, ended, fingerprints = self.accelerator.gather(local).T.view(3, -1, group_size)
        usable = (lengths > 0) & ((ended == 1) | (not self.mask_truncated_completions))

        by_source = scores.T.reshape(scores.size(1), *lengths.shape)
        panel, weights = preferences_of_sources(by_source, self.reward_weights.tolist(), ended == 1, self.args)
        answers = self._ask_oracles(inputs, prompts, completions, group_size)
        panel += [answer.preferences.to(scores.device) for answer in answers.values()]
        weights = [*weights, *self.preference_weights]
        if not panel:  # nobody is asked: the rollouts bring their own
            panel, weights = self._stored_panel(ended == 1)
        self._verdict = Verdict.of(
            panel,
            weights,
            usable=usable,
            args=self.args,
            num_slices=num_slices,
            num_processes=self.accelerator.num_processes,
            process_index=self.accelerator.process_index,
        )
        self._log_verdict(self._verdict, lengths.float(), fingerprints)
        if recorder is not None:
            recorder.scored(
                dict(zip(self.reward_source_names, by_source, strict=True)),
                {name: answer.matrix for name, answer in answers.items()},
                self._verdict.preferences,
                self._verdict.win_rates,
            )
        if not training:
            by_judge |= zip(self.reward_source_names, by_source, strict=True)
            self._opponents.add(inputs, completions, lengths, by_judge)
        return generated

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        known = self._recorder.completion_ids(prompt_ids) if self.model.training else None
        if known is not None:
            return known
        check_prompt_ids(prompt_ids, self.args, self.model.config)
        try:
            with only_requested_generation(self.accelerator.unwrap_model(self.model)):
                completion_ids, logprobs = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        except Exception as error:
            if not self.use_vllm or isinstance(error, torch.OutOfMemoryError) or is_of_another_process(error):
                raise
            raise RunError(
                f"vLLM failed while sampling: {type(error).__name__}: {error}. docs/vllm.md lists what it needs; in "
                "server mode see the server's own log."
            ) from error
        # vLLM may give no token at all, which TRL does not expect. Padding says so, and is not trained on
        if logprobs is not None:
            logprobs = [row if ids else [None] for ids, row in zip(completion_ids, logprobs, strict=True)]
        return [ids or [self._tokenizer.pad_token_id] for ids in completion_ids], logprobs

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list) -> torch.Tensor:
        if self._verdict is not None:  # TRL asks again, after its log-probability passes
            return self._scores
        return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)

    def _log_verdict(self, verdict: Verdict, lengths: torch.Tensor, fingerprints: torch.Tensor) -> None:
        if self.model.training and not verdict.kept.any():
            logger.warning(
                "no completion of this batch can be trained on: nothing is learned from it. If this goes on, the "
                "reward sources do not tell the completions of a prompt apart, or sampling makes them equal "
                "(temperature), or all are truncated (mask_truncated_completions)."
            )
        self._log_completion_extra("win_rate", self._local(verdict.win_rates).tolist())
        metrics = self._rollout_metrics[self._mode]
        metrics.update({name: value.item() for name, value in verdict.metrics(lengths, fingerprints).items()})

    def _local(self, values: torch.Tensor) -> torch.Tensor:
        """This process's part of values over the completions of all processes."""
        return values.reshape(self.accelerator.num_processes, -1)[self.accelerator.process_index]

    # ---- Seam 2: log-probabilities

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, *args, **kwargs):
        if self._verdict is None or kwargs.get("num_images") is not None:
            return super()._get_per_token_logps_and_entropies(model, input_ids, attention_mask, *args, **kwargs)
        # During a rollout: only for the rows that will be trained on, and in evaluations for none. The others are NaN,
        # which TRL's vLLM importance correction reads as "unknown", and which would not stay unnoticed in a loss.
        if not self.model.training:
            return torch.full((len(input_ids), args[0]), torch.nan, device=input_ids.device), None, None
        rows = self._verdict.rows[: self._verdict.num_logps]
        if self._only_samples:
            rows = torch.arange(len(input_ids), device=input_ids.device)
        outputs = super()._get_per_token_logps_and_entropies(
            model, input_ids[rows], attention_mask[rows], *args, **kwargs
        )
        logps = outputs[0].new_full((len(input_ids), outputs[0].size(1)), torch.nan)
        logps[rows] = outputs[0]
        return logps, None, None

    # ---- Seam 3: the loss

    def _compute_loss(self, model, inputs):
        mode = self._mode
        if mode == "eval":
            # The policy that sampled is the policy itself: all log-ratios are 0, and no forward pass is needed
            regressed = inputs["win_rates"].masked_fill(~inputs["kept"], torch.nan)
            num_items = self._count_kept([inputs]) / self.accelerator.num_processes
            loss, _ = sppo_loss(
                torch.zeros_like(regressed),
                regressed,
                eta=self.args.eta,
                baseline=inputs["baseline"],
                num_items=num_items.to(regressed.device),
            )
            self._log_sums({}, mode)
            return loss.to(self.accelerator.device)
        num_items = self._count_kept(self.micro_batches_of_step())
        # Rows that are not trained on cost nothing. Only if there are other processes, and nothing is to be trained on
        # here, one row stays: every process has to take part.
        rows = inputs["kept"].nonzero().squeeze(1)
        if len(rows) == 0 and self.accelerator.num_processes == 1:
            self._log_sums({}, mode)
            return next(p for p in model.parameters() if p.requires_grad).sum() * 0.0
        if len(rows) == 0:
            rows = rows.new_zeros(1)
        longest = max(int(inputs["completion_mask"][rows].sum(dim=1).max()), 1)
        # First to the device: rows that were taken from pinned memory would not be pinned
        inputs = to_device(inputs, self.accelerator.device)
        if "num_images" not in inputs:
            inputs = take_rows(inputs, rows.to(self.accelerator.device))
            if self.pad_to_multiple_of is None:
                inputs = trim_completions(inputs, longest)

        completion_ids = inputs["completion_ids"]
        mask = loss_mask(inputs)
        per_token_logps, entropies, aux_loss = self._get_per_token_logps_and_entropies(
            model,
            torch.cat([inputs["prompt_ids"], completion_ids], dim=1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            completion_ids.size(1),
            compute_entropy=True,
            compute_aux_loss=self.aux_loss_enabled,
            **{name: inputs[name] for name in IMAGE_FIELDS if name in inputs},
        )
        # π_t sampled the batch. TRL leaves its log-probs out where the batch is used before the policy changes.
        old_per_token_logps = inputs.get("old_per_token_logps", per_token_logps.detach())
        per_token_log_ratios = torch.where(mask, per_token_logps - old_per_token_logps, 0.0)
        ratio = inputs.get("importance_sampling_ratio")
        # Gradients are averaged over processes and summed over micro-batches
        num_items = num_items / self.accelerator.num_processes
        loss, metrics = sppo_loss(
            per_token_log_ratios.sum(dim=1),
            inputs["win_rates"].masked_fill(~inputs["kept"], torch.nan),
            eta=self.args.eta,
            baseline=inputs["baseline"],
            weights=None if ratio is None else ratio.squeeze(1),
            num_items=num_items,
        )
        if self.aux_loss_enabled:
            steps = self.current_gradient_accumulation_steps
            loss = loss + self.router_aux_loss_coef * aux_loss / steps
            metrics["aux_loss"] = torch.stack([aux_loss.detach(), torch.ones_like(aux_loss)])

        tokens = mask & inputs["kept"].unsqueeze(1)
        if self.beta > 0:
            # + beta KL, of the whole completion: a sum over its tokens
            kl = kl_to_initial_policy(
                per_token_logps[tokens],
                old_per_token_logps[tokens],
                inputs["ref_per_token_logps"][tokens],
                self.args.forward_kl_share,
            )
            loss = loss + self.beta * kl.sum() / num_items
            metrics["kl_to_initial_policy"] = torch.stack([kl.detach().sum(), tokens.sum()])
        kl = kl_to_rollout_policy(per_token_log_ratios.detach()[tokens])
        metrics["kl_to_rollout_policy"] = torch.stack([kl.sum(), tokens.sum()])
        metrics["entropy"] = torch.stack([entropies.detach()[tokens].sum(), tokens.sum()])
        if ratio is not None:
            weights = ratio.squeeze(1)[inputs["kept"]]
            metrics["importance_weight"] = torch.stack([weights.sum(), inputs["kept"].sum()])
        self._log_sums(metrics, mode)
        return loss

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write TRL's model card to `output_dir`, and how this model was trained, and its win rates with intervals."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            add_to_card(Path(str(self.args.output_dir)) / "README.md", self)

    def _log_sums(self, metrics: dict[str, torch.Tensor], mode: str) -> None:
        """Add up numerators and denominators over the micro-batches of an optimizer step, then over the processes."""
        for name, sums in metrics.items():
            self._sums[name] = self._sums.get(name, 0) + sums.float()
        if mode == "train" and not self.accelerator.sync_gradients:
            return
        values = dict(self._rollout_metrics[mode])
        if self._sums:
            sums = self.accelerator.reduce(torch.stack(list(self._sums.values())), reduction="sum")
            for name, (numerator, denominator) in zip(self._sums, sums.tolist(), strict=True):
                values[name] = numerator / denominator if denominator else math.nan
            self._sums = {}
        for name, value in values.items():
            if not math.isnan(value):  # there was nothing to measure
                self._metrics[mode][name].append(value)

    def _count_kept(self, micro_batches: list[dict[str, Any]]) -> torch.Tensor:
        """Number of completions in these micro-batches that are trained on, over all processes."""
        count = torch.stack([micro_batch["kept"].sum() for micro_batch in micro_batches]).sum()
        return self.accelerator.reduce(count.to(self.accelerator.device), reduction="sum").clamp(min=1)


def _checked(rollout_func: Any) -> Any:
    """A `rollout_func` whose answer TRL can read."""

    @wraps(rollout_func)
    def checked(prompts: list, trainer: SPPOTrainer) -> dict[str, Any]:
        output = rollout_func(prompts, trainer)
        if not all(output.get("completion_ids", ())):
            raise RunError(
                "rollout_func gave a completion without tokens. Give at least the EOS token, which ends an empty "
                "answer."
            )
        return output

    return checked


def _as_list(value) -> list:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]
