"""[`SPPOTrainer`]: SPPO on TRL's GRPO trainer. Wiring only; the formulas are in `preferences` and `objectives`."""

from collections import deque
from contextlib import nullcontext
from itertools import combinations
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import gather_object, send_to_device
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging
from trl.extras.profiling import profiling_context

from .checks.arguments import check_trainer_arguments
from .checks.models import check_trainable, quantized_bits
from .checks.prompts import check_prompt_ids, check_prompts, check_rows, without_empty_images
from .checks.readers import policy_reader, reward_readers
from .checks.sources import named_datasets
from .config import SPPOConfig
from .diagnostics import agreement
from .errors import RunError, is_of_another_process
from .evaluation.opponents import choose_metric
from .models.adapters import continue_adapter, is_adapter, keep_reference, load_weights
from .models.generation import only_requested_generation, shared_prompts
from .objectives import inpo_loss, kl_to_initial_policy, kl_to_rollout_policy, sppo_loss, sppo_targets
from .oracles.asking import PreferenceFunc, oracle_name, told_apart
from .oracles.panel import make_panel
from .oracles.reward_models import RewardSource, in_micro_batches, load_reward_models, without_slash
from .oracles.scoring import RewardSources
from .oracles.voters import Voters
from .rollouts.batch import Rollout, columns_of, loss_mask, model_inputs, pin, preferences_of_rows, to_device
from .rollouts.given import is_judged, load_rollouts, prompts_of
from .rollouts.micro_batches import cut_by_length, is_distributed, log_probs, take_rows
from .rollouts.reasoning import Reasoning, find_marks
from .rollouts.recorder import make_rollouts
from .rollouts.targets import RolloutTargets, StepMetrics
from .rollouts.weight_sync import prepare_weight_sync, unquantized_vllm
from .runs.checkpoints import check_resume, form_of
from .runs.model_card import PAPER, add_to_card
from .runs.resumable import ResumableTrainer


logger = logging.get_logger(__name__)


class SPPOTrainer(ResumableTrainer):
    """
    Trainer for Self-Play Preference Optimization (SPPO), https://huggingface.co/papers/2405.00675.

    The policy samples a group of completions per prompt, each is compared with the others of its group (by the scores
    of a reward source, or by a pairwise oracle), and the log-ratio between the policy and the one that sampled is
    regressed to `eta * (win_rate - 1/2)`. The next generation batch is sampled by the new policy.

    With respect to [`~trl.GRPOTrainer`], scores become win rates, the loss is [`sppo_loss`], completions that are not
    trained on get no forward pass, and reward models score in micro-batches. Everything else is inherited.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Policy to train, as in [`~trl.GRPOTrainer`], or an adapter's folder, to continue it without `peft_config`.
        reward_funcs (`str`, [`~transformers.PreTrainedModel`], callable, or a list of them):
            Reward models (sequence classifiers with one label: a path, a loaded one, or the URL of one behind a vLLM
            server, see [`ServedRewardModel`]) or reward functions, as in [`~trl.GRPOTrainer`]. The preferences of
            several are averaged by `args.reward_weights`. `None`, NaN and infinite scores mark what is unscorable.
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
            P(first beats second) in [0, 1] of each, `None` where it cannot say. It may be `async`. Each votes with its
            weight in `args.preference_weights`. Ready ones are in [`judges`].
        eval_reward_funcs, eval_reward_processing_classes, eval_preference_func (*optional*):
            Judges, given in the same way, under which each evaluation also plays against the initial policy and the
            one before. Their verdicts are not trained on.
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
    _paper = PAPER

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
        adapter: str | None = None
        peft_config = kwargs.pop("peft_config", None)
        if isinstance(model, str) and is_adapter(model):
            adapter = model.rstrip("/")
            model, peft_config, processing_class = continue_adapter(adapter, args, peft_config, processing_class)
        reward_funcs, judges = without_slash(_as_list(reward_funcs)), without_slash(_as_list(eval_reward_funcs))
        processing_classes = _as_list(reward_processing_classes) or [None] * len(reward_funcs)
        judges_classes = _as_list(eval_reward_processing_classes) or [None] * len(judges)
        preference_funcs, eval_preference_funcs = _as_list(preference_func), _as_list(eval_preference_func)
        has_environment = kwargs.get("environment_factory") is not None  # may bring prompts and a reward
        quantization = kwargs.get("quantization_config")
        given_rollouts: Dataset | None = None
        if args.rollouts is not None:
            if train_dataset is not None:
                raise TypeError(f"train_dataset is given, but also rollouts={args.rollouts!r}. Leave one of them out.")
            given_rollouts = load_rollouts(args.rollouts, cast(int, args.num_generations))
            train_dataset = prompts_of(given_rollouts)
        conversational = check_trainer_arguments(
            args,
            model,
            train_dataset,
            eval_dataset,
            reward_funcs=reward_funcs,
            reward_processing_classes=processing_classes,
            preference_funcs=preference_funcs,
            eval_reward_funcs=judges,
            eval_reward_processing_classes=judges_classes,
            eval_preference_funcs=eval_preference_funcs,
            adapter=adapter,
            peft_config=peft_config,
            quantization_config=quantization,
            needs_tokenizer=processing_class is None,
            has_environment=has_environment,
            judged=given_rollouts is not None and is_judged(given_rollouts),
        )
        if args.resume_from_checkpoint:
            bits, optimizer = quantized_bits(model, args, quantization), kwargs.get("optimizers", (None,))[0]
            check_resume(args, form_of(args, model, peft_config, optimizer, bits, adapter))
        if args.use_vllm and args.vllm_enable_sleep_mode and args.device.type == "cpu":
            logger.warning("vllm_enable_sleep_mode=True is ignored: vLLM can free a GPU's memory, but not a CPU's.")
            args.vllm_enable_sleep_mode = False
        train_dataset = without_empty_images("train_dataset", train_dataset)
        eval_dataset = without_empty_images("eval_dataset", eval_dataset)
        if isinstance(model, str):  # TRL would fall back to pickled weights
            args.model_init_kwargs = {**cast(dict, args.model_init_kwargs or {}), "use_safetensors": True}

        def check(sources: list, tokenizers: list) -> None:
            """Check prompts with the templates of the policy and the reward models, before any is loaded."""
            self._readers = reward_readers(args, sources, tokenizers, len(judges))
            if kwargs.get("rollout_func") is None:  # which renders and samples by itself
                self._readers.insert(0, policy_reader(args, model, processing_class, kwargs.get("tools")))
                find_marks(args.hide_reasoning, self._readers[0].processing_class, self._readers[0].name)
            if not has_environment:
                check_prompts(self._readers, named_datasets(train_dataset, eval_dataset))

        sources, tokenizers = load_reward_models(
            [*judges, *reward_funcs],
            [*judges_classes, *processing_classes],
            conversational,
            [name.rstrip("/") for name in args.reward_trust_remote_code or ()],
            cast(Any, args.chat_template_kwargs),
            args.reward_quantization,
            check,
        )
        self._rollout: Rollout | None = None  # while it is being made
        if (rollout_func := kwargs.get("rollout_func")) is not None:
            kwargs["rollout_func"] = lambda prompts, trainer: _checked(rollout_func(prompts, trainer))
        # TRL insists on a reward source, also where all votes are those of oracles or of stored rollouts
        without_source = not reward_funcs and (len(preference_funcs) > 0 or args.rollouts is not None)
        if without_source:
            args.reward_weights = None  # it may be []
        moves_adapter = args.sync_ref_model and (peft_config is not None or hasattr(model, "peft_config"))
        with unquantized_vllm() if args.use_vllm else nullcontext():
            super().__init__(
                model=model,
                reward_funcs=[lambda **kwargs: []] if without_source else sources[len(judges) :],
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                reward_processing_classes=[None] if without_source else tokenizers[len(judges) :],
                peft_config=peft_config,
                adapter=adapter,
                moves_adapter=moves_adapter,
                given_rollouts=given_rollouts,
                **kwargs,
            )
        if without_source:  # nothing is to be logged of it
            self.reward_funcs, self.reward_weights = self.reward_funcs[1:], self.reward_weights[1:]
            del self.reward_func_names[0], cast(list, self.reward_processing_classes)[0]
        self.reward_funcs = in_micro_batches(self.reward_funcs, args.reward_batch_size)
        self.voters = self._make_voters(preference_funcs)
        self.panel = make_panel(
            sources[: len(judges)],
            tokenizers[: len(judges)],
            eval_preference_funcs,
            self.accelerator,
            args.reward_batch_size,
            cast(dict, self.chat_template_kwargs),
            voters=[*self.reward_func_names, *map(oracle_name, preference_funcs)],
            both_orders=args.both_orders,
            batch_size=args.preference_batch_size,
            log_metric=self._log_metric,
            disable_tqdm=bool(args.disable_tqdm),
        )
        choose_metric(args, [*self.panel.names, *self.voters.names], self.eval_dataset)
        marks = find_marks(args.hide_reasoning, self.processing_class)
        self._reasoning = None if marks is None else Reasoning(self._tokenizer, marks)
        self._step_metrics = StepMetrics(self.accelerator)
        self._parts |= {"voters": self.voters, "step_metrics": self._step_metrics}
        policy = cast(Any, self.model)
        if adapter is not None:
            load_weights("model", policy, adapter)
        has_reference = adapter is not None or "ref" in getattr(policy, "peft_config", {})
        if args.beta > 0 and (has_reference or moves_adapter):
            keep_reference(policy, args.disable_dropout)
        check_trainable(policy)
        if args.use_vllm:
            prepare_weight_sync(self.vllm_generation)

    def _make_voters(self, oracles: list[PreferenceFunc]) -> Voters:
        names, template_kwargs = self.reward_func_names, cast(dict, self.chat_template_kwargs)
        sources = RewardSources(told_apart(names), self.reward_funcs, self.reward_processing_classes, template_kwargs)
        oracle_names = told_apart([*names, *map(oracle_name, oracles)])[len(names) :]
        by_name = dict(zip(oracle_names, oracles, strict=True))
        return Voters(self.args, sources, self.reward_weights, by_name, self.accelerator, self.train_dataset)

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), **self.voters.describe(), "judges": self.panel.names}

    @property
    def is_over_budget(self) -> bool:
        """Whether `args.judge_token_budget` is used up."""
        budget = self.args.judge_token_budget
        return budget is not None and self.voters.tokens_used >= budget

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def rollout(self) -> str:
        """
        Sample and score completions of the training prompts, without training, and return their folder.

        It is `args.output_dir/rollouts`, with a file for each generation batch, including log-probabilities.
        [`SPPOConfig`]'s `rollouts` trains on them. Each prompt is sampled once, or as many batches as
        `args.max_steps` optimizer steps would use. An interrupted call continues where it stopped.

        Raises `ValueError` if models are sharded, or nothing would be written, or another run uses the folder.
        """
        with self.alone():
            return make_rollouts(self)

    # ---- Seam 1: the rollout. TRL generates, computes log-probabilities, then scores. Here scores come right after
    # generation, so that the log-probability passes can skip the completions that will not be trained on.

    def _generate_and_score_completions(
        self, inputs: list[dict[str, Any]], iteration: int | None = None, only_sample: bool = False
    ) -> dict[str, torch.Tensor | Any]:
        """`iteration` and `only_sample` are [`SPPOTrainer.rollout`]'s."""
        training = self.model.training
        if not self.environment_factories:  # these may bring the prompts
            check_rows(inputs, self._readers, training)
        if training:
            self._buffered_inputs = None  # before memory is taken for the next
            iteration = self._step // self._micro_steps_per_iteration if iteration is None else iteration
        self._step_metrics.begin_rollout(self._mode)
        group_size = cast(int, self.num_generations if training else self.num_generations_eval)
        self._rollout = Rollout(inputs, group_size, iteration, only_sample)
        try:
            batch = super()._generate_and_score_completions(inputs)
            targets = self._rollout.targets
            assert targets is not None  # _generate has set them
            if training:
                if only_sample and "old_per_token_logps" not in batch:
                    args, kwargs = model_inputs(batch)
                    kwargs["batch_size"] = self.args.per_device_train_batch_size
                    with torch.no_grad():
                        logps, *_ = self._get_per_token_logps_and_entropies(self.model, *args, **kwargs)
                    batch["old_per_token_logps"] = logps
                self._recorder.finish(batch, self._local(targets.kept))
        finally:
            self._rollout = None

        unmeasured = [] if self.reward_funcs else ["reward", "reward_std", "frac_reward_zero_std"]
        if not training:  # no log-probabilities to compare vLLM's with
            unmeasured += [name for name in self._metrics["eval"] if name.startswith("sampling/")]
        for name in unmeasured:
            self._metrics[self._mode].pop(name, None)
        # The table of completions shows the regressed win rates instead of GRPO's advantage
        table = cast(deque, self._logs["advantages"])
        shown = sppo_targets(targets.regressed, self.args.eta, targets.baseline).flatten().tolist()
        for i, value in zip(range(1, len(table) + 1), reversed(shown), strict=False):
            table[-i] = value

        del batch["advantages"]
        batch["win_rates"] = self._local(targets.regressed)
        batch["baseline"] = self._local(targets.baseline)
        batch["kept"] = self._local(targets.kept)
        if training and self.args.keep_groups_together:
            numbers = torch.arange(len(batch["kept"]), device=batch["kept"].device)
            batch["group"], batch["place"] = numbers // group_size, numbers % group_size
            batch["preferences"] = self._local(targets.preferences).view(-1, group_size)
        if "num_images" not in batch:  # pixels have no rows to choose from: dropped completions are only masked
            batch = take_rows(batch, targets.rows)
            batch["kept"] = torch.arange(len(targets.rows), device=targets.rows.device) < targets.num_kept
        return send_to_device(batch, "cpu")  # where rollouts live between their uses

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, torch.Tensor | Any]:
        is_new = self.model.training and self.needs_rollout()
        inputs = super()._prepare_inputs(generation_batch)
        if is_new:
            args, device = self.args, self.accelerator.device
            slices: Any = cut_by_length(
                cast(list, self._buffered_inputs),
                args.gradient_accumulation_steps,
                args.per_device_train_batch_size,
                self.accelerator,
                args.keep_groups_together,
            )
            slices = [pin(each, device) for each in slices]
            self._buffered_inputs = slices
            inputs = slices[self._step % len(slices)]
        return inputs

    def _generate(self, prompts: list):
        rollout, recorder = self._rollout, self._recorder
        assert rollout is not None
        if rollout.iteration is not None:
            is_resumed = self._resumed or rollout.only_sampled
            recorder.begin(rollout.iteration, rollout.inputs, rollout.group_size, is_resumed)
            if self.is_over_budget and not recorder.is_scored:
                raise RunError(
                    f"judge_token_budget={self.args.judge_token_budget} is used up: the judges have read and written "
                    f"{self.voters.tokens_used:,.0f} tokens. Raise it, and the same command continues."
                )
        generated = super()._generate(prompts)
        prompt_ids, completion_ids, tool_mask, completions, sampling_logps, extra_fields, *_ = generated
        rollout.prompts, rollout.completions = prompts, completions
        rollout.completion_ids, rollout.tool_mask = completion_ids, tool_mask
        if rollout.iteration is not None:
            recorder.sampled(prompt_ids, completion_ids, completions, tool_mask, sampling_logps)
        if self._reasoning is not None:
            hidden = self._reasoning.hide(prompt_ids, completion_ids, completions, tool_mask)
            rollout.completions, rollout.reasoning = hidden
        self._ask_all(rollout, rollout.rows(extra_fields))
        return generated

    def _ask_all(self, rollout: Rollout, rows: list[dict[str, Any]]) -> None:
        """From completions to targets."""
        recorder = self._recorder if rollout.iteration is not None else None
        known = recorder if recorder is not None and recorder.is_scored else None
        names, size = self.voters.sources.names, rollout.group_size
        if known is not None:
            scores = known.scores(names)
        else:
            scores = self._calculate_rewards(rows, rollout.prompts, rollout.completions, rollout.completion_ids)
        rollout.scores = scores
        by_judge = self._ask_judges(rollout, rows) if recorder is None else {}

        facts = rollout.facts(self.eos_token_ids, self._tokenizer.pad_token_id).to(scores.device)
        lengths, ended, fingerprints, reasoning, never_ends = self.accelerator.gather(facts).T.view(5, -1, size)
        visible = lengths - reasoning  # the lengths of what voters and judges read
        usable = (lengths > 0) & ((ended == 1) | (not self.mask_truncated_completions))
        by_source = scores.T.reshape(scores.size(1), *lengths.shape)
        verdicts, metrics = self._ask_oracles(rollout, rows, recorder)
        if recorder is not None:
            self.voters.check_silence(scores, verdicts, size)
            judged = any(each.num_sent > each.num_lost for each in verdicts.values())
            if self.args.judge_token_budget is not None and judged and self.voters.tokens_used == 0:
                raise RunError(
                    f"judge_token_budget={self.args.judge_token_budget} cannot be kept: no judge reports tokens. "
                    "Their servers may send no `usage`. Remove the option."
                )
        panel, weights = self.voters.panel(by_source, verdicts, ended == 1)
        if not panel:  # no voter: the rollouts bring their own preferences
            panel, weights = self._recorder.given_votes(ended == 1)
        rollout.targets = targets = RolloutTargets.of(
            panel,
            weights,
            usable=usable,
            args=self.args,
            num_slices=1 if recorder is None else cast(int, self.args.steps_per_generation),
            num_processes=self.accelerator.num_processes,
            process_index=self.accelerator.process_index,
        )
        metrics |= {name: value.item() for name, value in targets.metrics(visible.float(), fingerprints).items()}
        table = agreement(panel).tolist()
        for (i, first), (k, second) in combinations(enumerate(self.voters.panel_names), 2):  # given ones have no name
            metrics[f"preferences/{first}/agreement/{second}"] = table[i][k]
        if self._reasoning is not None:
            metrics["completions/reasoning_mean_length"] = reasoning.float().mean().item()
            metrics["completions/reasoning_unfinished"] = never_ends.float().mean().item()
        self._step_metrics.add_of_rollout(self._mode, metrics)
        self._log_completion_extra("win_rate", self._local(targets.win_rates).tolist())
        by_name = dict(zip(names, by_source, strict=True))
        if recorder is None:
            self._opponents.add(rows, rollout.completions, visible, by_judge | by_name)
            return
        if not targets.kept.any():
            logger.warning(
                "no completion of this batch can be trained on, so nothing is learned from it. All rewards are equal, "
                "the temperature makes completions equal, or mask_truncated_completions drops all."
            )
        recorder.scored(by_name, verdicts, targets)

    def _for_reward_functions(self, completion_ids: list) -> dict[str, Any]:
        """Arguments that TRL passes to reward functions besides prompts, completions and columns."""
        is_kept = self.model.training and self._recorder.recalls
        return {
            "completion_ids": completion_ids,
            "trainer_state": self.state,
            "log_extra": self._log_completion_extra,
            "log_metric": self._log_metric,
            **({} if self.environments is None else {"environments": self.environments}),
            "if_one_fails": " A resumed run scores what was sampled, without sampling again." * is_kept,
            "timed": lambda name: profiling_context(self, name),
            "loop": getattr(self, "async_loop", None),  # TRL's, in which tools and environments run
        }

    def _ask_judges(self, rollout: Rollout, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Scores by the judges, of shape `(groups, K)`."""
        asked = rollout.prompts, rollout.completions, columns_of(rows)
        for_functions = self._for_reward_functions(rollout.completion_ids)
        sources = self.panel.sources
        scores = sources.score_everywhere(self.accelerator, *asked, **for_functions)
        for name, column in zip(sources.names, scores.T, strict=True):
            if not column.isnan().all():
                self._metrics["eval"][f"rewards/{name}/mean"].append(column.nanmean().item())
        return {name: scores[:, i].reshape(-1, rollout.group_size) for i, name in enumerate(sources.names)}

    def _ask_oracles(self, rollout: Rollout, rows: list[dict[str, Any]], recorder: Any):
        if not self.voters.oracles:
            return {}, {}
        prompts, completions = gather_object(rollout.prompts), gather_object(rollout.completions)
        columns = columns_of(gather_object([{k: v for k, v in row.items() if k != "prompt"} for row in rows]))
        stored: dict[str, Any] = {}
        if recorder is not None:
            stored = {"known": recorder.verdicts} if recorder.is_scored else {"log": recorder.verdict_log}
        return self.voters.compare(prompts, completions, columns, rollout.group_size, self._log_metric, **stored)

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        known = self._recorder.completion_ids(prompt_ids) if self.model.training else None
        if known is not None:
            return known
        check_prompt_ids(prompt_ids, self.args, self.model.config)
        try:
            policy = self.accelerator.unwrap_model(self.model)
            with only_requested_generation(policy), shared_prompts(policy):
                completion_ids, logprobs = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        except Exception as error:
            if not self.use_vllm or isinstance(error, torch.OutOfMemoryError) or is_of_another_process(error):
                raise
            problem = f"vLLM failed while sampling: {type(error).__name__}: {error}."
            raise RunError(f"{problem} docs/vllm.md lists what it needs; see also the server's log.") from error
        # vLLM may give no token at all, which TRL does not expect. Padding says so, and is not trained on
        if logprobs is not None:
            logprobs = [row if ids else [None] for ids, row in zip(completion_ids, logprobs, strict=True)]
        return [ids or [self._tokenizer.pad_token_id] for ids in completion_ids], logprobs

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list) -> torch.Tensor:
        if self._rollout is not None and self._rollout.scores is not None:
            return self._rollout.scores  # `_generate` has asked, before TRL's log-probability passes
        asked = prompts, completions, columns_of(inputs)
        for_functions = self._for_reward_functions(completion_ids_list)
        return self.voters.sources.score_everywhere(self.accelerator, *asked, **for_functions)

    def _local(self, values: torch.Tensor) -> torch.Tensor:
        """This process's part of values over the completions of all processes."""
        return values.reshape(self.accelerator.num_processes, -1)[self.accelerator.process_index]

    # ---- Seam 2: log-probabilities

    def _get_per_token_logps_and_entropies(
        self,
        model,
        input_ids,
        attention_mask,
        logits_to_keep,
        batch_size=None,
        compute_entropy=False,
        compute_aux_loss=False,
        **images,
    ):
        if any(value is not None for value in images.values()):
            return super()._get_per_token_logps_and_entropies(
                model,
                input_ids,
                attention_mask,
                logits_to_keep,
                batch_size,
                compute_entropy,
                compute_aux_loss,
                **images,
            )

        def logps_of(rows):
            with self.accelerator.autocast():
                return log_probs(
                    model,
                    input_ids[rows],
                    attention_mask[rows],
                    logits_to_keep,
                    batch_size or len(input_ids),
                    cast(int | None, self.pad_to_multiple_of),  # TRL has resolved "auto"
                    compute_entropy,
                    compute_aux_loss,
                )

        rollout = self._rollout
        if rollout is None or rollout.targets is None:
            return logps_of(slice(None))
        # During a rollout: only for the rows that will be trained on, and in evaluations for none. The others are NaN,
        # which TRL's vLLM importance correction reads as "unknown", and which would not stay unnoticed in a loss.
        logps = torch.full((len(input_ids), logits_to_keep), torch.nan, device=input_ids.device)
        if self.model.training:
            rows = rollout.rows_with_logps()
            logps[rows], *_ = logps_of(rows)
        return logps, None, None

    # ---- Seam 3: the loss

    def _compute_loss(self, model, inputs):
        if self._mode == "eval":
            # The policy that sampled is the policy itself: all log-ratios are 0, and no forward pass is needed. With
            # INPO too this is the loss of win rates: pairs of a group may be on several processes
            kept = self.accelerator.reduce(inputs["kept"].sum().to(self.accelerator.device), reduction="sum").cpu()
            num_items = kept.clamp(min=1) / self.accelerator.num_processes
            loss, _ = self._sppo_loss(torch.zeros_like(inputs["win_rates"]), inputs, num_items)
            self._log_step()
            return loss.to(self.accelerator.device)
        if not inputs["kept"].any() and not is_distributed(self.accelerator):
            self._log_step()
            if not self.accelerator.sync_gradients:  # others of this step have rows: no parameter needs a part in it
                return torch.zeros((), requires_grad=True, device=self.accelerator.device) * 1.0
            return next(p for p in model.parameters() if p.requires_grad).sum() * 0.0
        inputs = to_device(inputs, self.accelerator.device)
        mask = loss_mask(inputs)
        args, kwargs = model_inputs(inputs)
        kwargs |= {"compute_entropy": True, "compute_aux_loss": self.aux_loss_enabled}
        per_token_logps, entropies, aux_loss = self._get_per_token_logps_and_entropies(model, *args, **kwargs)
        # π_t sampled the batch. TRL leaves its log-probs out where the batch is used before the policy changes.
        old_per_token_logps = inputs.get("old_per_token_logps", per_token_logps.detach())
        per_token_log_ratios = torch.where(mask, per_token_logps - old_per_token_logps, 0.0)
        weights = inputs["importance_sampling_ratio"].squeeze(1) if "importance_sampling_ratio" in inputs else None
        # Gradients are averaged over processes and summed over micro-batches
        num_items = inputs["num_kept"] / self.accelerator.num_processes
        log_ratios, is_inpo = per_token_log_ratios.sum(dim=1), self.args.loss_type == "inpo"
        if is_inpo:
            ref_log_ratios = None
            if self.beta > 0:
                ref_log_ratios = torch.where(mask, old_per_token_logps - inputs["ref_per_token_logps"], 0.0).sum(dim=1)
            eta, preferences = self.args.eta, preferences_of_rows(inputs)
            ref = ref_log_ratios, eta * self.beta
            loss, metrics = inpo_loss(log_ratios, preferences, eta, *ref, weights=weights, num_items=num_items)
        else:
            loss, metrics = self._sppo_loss(log_ratios, inputs, num_items, weights)
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * aux_loss * inputs["share"]  # of the step's tokens
            metrics["aux_loss"] = torch.stack([aux_loss.detach() * inputs["share"], inputs["share"]])

        tokens = mask & inputs["kept"].unsqueeze(1)
        if self.beta > 0:
            # + beta KL, of the whole completion: a sum over its tokens
            logps, old_logps = per_token_logps[tokens], old_per_token_logps[tokens]
            ref_logps = inputs["ref_per_token_logps"][tokens]
            kl = kl_to_initial_policy(logps, old_logps, ref_logps, self.args.forward_kl_share)
            loss = loss if is_inpo else loss + self.beta * kl.sum() / num_items
            metrics["kl_to_initial_policy"] = torch.stack([kl.detach().sum(), tokens.sum()])
        kl = kl_to_rollout_policy(per_token_log_ratios.detach()[tokens])
        metrics["kl_to_rollout_policy"] = torch.stack([kl.sum(), tokens.sum()])
        metrics["entropy"] = torch.stack([entropies.detach()[tokens].sum(), tokens.sum()])
        if weights is not None:
            metrics["importance_weight"] = torch.stack([weights[inputs["kept"]].sum(), inputs["kept"].sum()])
        self._step_metrics.add(metrics)
        self._log_step()
        return loss

    def _sppo_loss(self, log_ratios: torch.Tensor, inputs: dict[str, Any], num_items: Any, weights: Any = None):
        regressed = inputs["win_rates"].masked_fill(~inputs["kept"], torch.nan)
        return sppo_loss(
            log_ratios, regressed, eta=self.args.eta, baseline=inputs["baseline"], weights=weights, num_items=num_items
        )

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write TRL's model card to `output_dir`, and how this model was trained, and its win rates with intervals."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            add_to_card(Path(str(self.args.output_dir)) / "README.md", self)

    def _log_step(self) -> None:
        """Log the metrics of an optimizer step at its last micro-batch."""
        if self._mode == "eval" or self.accelerator.sync_gradients:
            for name, value in self._step_metrics.finish(self._mode).items():
                self._metrics[self._mode][name].append(value)

    # ---- Evaluation

    def evaluation_loop(self, dataloader, *args, **kwargs):
        self._opponents.begin(kwargs.get("metric_key_prefix", "eval"), dataloader.dataset)
        output = super().evaluation_loop(dataloader, *args, **kwargs)
        cast(dict, output.metrics).update(self._opponents.finish())
        return output


def _checked(output: dict[str, Any]) -> dict[str, Any]:
    """The output of a `rollout_func`, if TRL can read it."""
    if not all(output.get("completion_ids", ())):
        raise RunError("rollout_func gave a completion without tokens. Give at least the EOS token.")
    return output


def _as_list(value) -> list:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]
