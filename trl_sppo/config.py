"""Options of [`SPPOTrainer`]: SPPO's own, their checks, and refused options of GRPO."""

from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field, fields
from difflib import get_close_matches
from typing import Literal, cast

from torch import distributed
from torch.distributed.distributed_c10d import _set_pg_timeout
from transformers.utils import logging
from trl import GRPOConfig

from .option_rules import (
    OPTIONS_OF_ERRORS,
    find_keyword_problems,
    find_launch_problems,
    find_mapping_problems,
    find_number_problems,
    find_number_texts,
    find_pair_problems,
    find_tracker_problems,
    find_trust_problems,
)


logger = logging.get_logger(__name__)

# Inherited options that must keep their default, by the reason, which is part of the message
_REJECTED = {
    "SPPO's KL term is always corrected for the policy having moved since the rollout.": "use_bias_correction_kl",
    "SPPO regresses the log-ratio to a target and clips no ratio.": "epsilon epsilon_high delta",
    "SPPO's log-ratio belongs to the whole completion.": "importance_sampling_level",
    "SPPO learns from win rates, not from normalised advantages.": (
        "off_policy_mask_threshold scale_rewards sapo_temperature_neg sapo_temperature_pos vespo_k_pos "
        "vespo_lambda_pos vespo_k_neg vespo_lambda_neg"
    ),
    "`reward_aggregation` determines how several reward sources become one preference.": "multi_objective_aggregation",
    "SPPO's log-ratio sums over all tokens of a completion.": "top_entropy_quantile",
    "SPPO's objective has no entropy term.": (
        "entropy_coef use_adaptive_entropy entropy_coef_min entropy_coef_max entropy_coef_delta entropy_target"
    ),
    "Completions are sampled, so there are no labels.": "label_smoothing_factor label_names",
    "Evaluations measure win rates. They keep no predictions and call no `compute_metrics`.": (
        "prediction_loss_only include_for_metrics batch_eval_metrics eval_do_concat_batches eval_use_gather_object"
    ),
    "Batches are whole groups of completions, in the order of the prompts. See `shuffle_dataset`.": (
        "train_sampling_strategy length_column_name"
    ),
    "`seed` determines the order of the prompts.": "data_seed",
    "The loss is an average over the completions of all processes.": "average_tokens_across_devices",
    "The log always has `num_tokens`.": "include_num_input_tokens_seen",
    "Completions are not divided between processes. Shard the model with `fsdp` or `deepspeed`.": "parallelism_config",
    "A run always saves a checkpoint on SIGTERM. See also `time_budget`.": "enable_jit_checkpoint",
    "There is no test set. `trl-sppo eval` compares policies.": "do_predict",
}
_CHOICES = {
    "loss_type": ("sppo", "sppo_hard", "sppo_single", "inpo"),
    "baseline": ("half", "log_mean_exp"),
    "comparison": ("hard", "bradley_terry"),
    "reward_aggregation": ("vote", "sum"),
    "train_on": ("all", "best_and_worst"),
    "reward_quantization": (None, "8bit", "4bit"),
}
REJECTED_OPTIONS = {name: reason for reason, names in _REJECTED.items() for name in names.split()}
# Other ways to write the default
_SAME_AS_DEFAULT = {"scale_rewards": True, "include_num_input_tokens_seen": False}


@dataclass
class SPPOConfig(GRPOConfig):
    r"""
    Configuration class for the [`SPPOTrainer`].

    Inherits all parameters of [`~trl.GRPOConfig`]. Parameters that only GRPO's loss uses are refused. One SPPO
    iteration is one generation batch, on which `steps_per_generation / gradient_accumulation_steps` (times
    `num_iterations`) optimizer steps are taken.

    Parameters:
        eta (`float`, *optional*, defaults to `10.0`):
            The paper's η: the target of a completion's log-ratio is `eta * (win_rate - 1/2)` nats. The `beta` of DPO
            and of the official SPPO code is `1 / eta`. The paper uses `eta=1000`.
        loss_type (`str`, *optional*, defaults to `"sppo"`):
            Form of the win rate in the loss: `"sppo"` (the win rate in the group), `"sppo_hard"` (1 above ½, 0 below,
            like TRL's DPO loss of that name) or `"sppo_single"` (best against worst alone, like the official code;
            needs `train_on="best_and_worst"`). `"inpo"` is INPO's squared loss on pairs ([`inpo_loss`]), with the
            preference of each pair instead of win rates. It sets `keep_groups_together`.
        baseline (`str`, *optional*, defaults to `"half"`):
            Estimate of log Z / η: `"half"` (the paper's constant) or `"log_mean_exp"` (computed from the group).
        beta (`float`, *optional*, defaults to `0.0`):
            Weight of the KL term towards the initial policy (RSPO), per completion. GRPO's KL is per token, so the
            same `beta` pulls stronger here, by about the number of tokens. The `beta` of DPO and of the official SPPO
            code is `1 / eta`. With `loss_type="inpo"` no KL term is added: `eta * beta`, at most 1, is the share of
            π_0 in the reference. 0 is online IPO, a third INPO's paper, 1 IPO.
        forward_kl_share (`float`, *optional*, defaults to `0.0`):
            Share of the forward divergence KL(π_0‖π_θ) in the KL term. The rest is KL(π_θ‖π_0). Needs `beta > 0`.
        comparison (`str`, *optional*, defaults to `"hard"`):
            How two scores become a preference: `"hard"` (the higher wins, ties are ½) or `"bradley_terry"`
            (`sigmoid((s_i - s_j) / bt_temperature)`).
        bt_temperature (`float`, *optional*, defaults to `1.0`):
            Temperature of the Bradley–Terry comparison, in units of the score.
        include_self (`bool`, *optional*, defaults to `False`):
            Whether a completion's tie with itself counts in its win rate, as in the official code.
        reward_aggregation (`str`, *optional*, defaults to `"vote"`):
            How several reward sources become one preference: `"vote"` (their preferences are averaged by
            `reward_weights`; scales may differ) or `"sum"` (weighted scores are added, then compared).
        missing_eos_penalty (`float`, *optional*):
            Subtracted from the scores (with `"sum"`, from their sum) of a completion without a final EOS token.
        preference_weights (`list[float]`, *optional*):
            Vote of each pairwise oracle in `preference_func`, on the scale of `reward_weights`. 1 each by default.
        both_orders (`bool`, *optional*, defaults to `True`):
            Whether pairwise oracles compare each pair in both orders, which cancels a preference for a position.
        comparisons_per_group (`int`, *optional*):
            Comparisons of a group that each pairwise oracle makes, in both orders two per pair. Each completion then
            meets random others of its group. All pairs by default: K (K - 1) comparisons in both orders. Judges that
            order whole groups are not limited, nor are comparisons of policies in evaluations.
        judge_token_budget (`int`, *optional*):
            Tokens, read and written, that judges behind an endpoint may use in training. Once they are used up, the
            run trains on what has been judged, and ends with a checkpoint. Evaluations do not count.
        preference_batch_size (`int`, *optional*, defaults to `512`):
            Comparisons per call of a pairwise oracle. A group is never split.
        train_on (`str`, *optional*, defaults to `"all"`):
            Completions of a group to train on: `"all"`, or `"best_and_worst"` (the paper's experiments).
        win_rate_threshold (`float`, *optional*):
            Train only on completions with a win rate of at least this, or of at most one minus this. In [0.5, 1].
        keep_groups_together (`bool`, *optional*, defaults to `False`):
            Whether the completions of a prompt are trained on in one micro-batch. TRL deals an iteration's completions
            out at random. `per_device_train_batch_size` must be a multiple of `num_generations`.
        reward_batch_size (`int`, *optional*, defaults to `16`):
            Completions per forward pass of a reward model. Limits its memory.
        hide_reasoning (`bool`, *optional*):
            Whether voters and judges read completions without their reasoning (`<think>…</think>`, or the other marks
            in docs/judges.md). The policy is trained on all tokens. By default on if the policy's chat template has
            such marks.
        reward_quantization (`str`, *optional*):
            Load reward models given by path in `"8bit"` (LLM.int8) or `"4bit"` (NF4), except for their scoring heads.
        save_rollouts (`bool`, *optional*, defaults to `True`):
            Whether to write the rollouts of each iteration to `output_dir/rollouts`. A resumed run reuses them.
        rollouts_total_limit (`int`, *optional*):
            Rollout files to keep, of iterations before the last checkpoint. All by default.
        rollouts (`str`, *optional*):
            Train on the rollouts in this folder or file, instead of sampling. See [`load_rollouts`].
        time_budget (`float`, *optional*):
            Minutes from the start of the process until it must have ended. Training ends before that with a
            checkpoint, as after SIGTERM. 5 % of the time is reserved for the checkpoint.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether the policy's checkpoint may run its own Python code, for model and tokenizer. Unlike GRPO's, it
            does not apply to reward models.
        reward_trust_remote_code (`list[str]`, *optional*):
            Reward models, as given in `reward_funcs`, that may run their own Python code. None by default.

    > [!NOTE]
    > These parameters have default values different from [`~trl.GRPOConfig`]:
    > - `learning_rate`: Defaults to `5e-7` instead of `1e-6` (the paper, Section 5).
    > - `temperature`: Defaults to `0.8` instead of `1.0`.
    > - `max_completion_length`: Defaults to `1024` instead of `512`.
    > - `loss_type`: Defaults to `"sppo"` instead of `"dapo"`.
    > - `disable_dropout`: Defaults to `True` instead of `False`: dropout adds noise to log-ratios.
    """

    # Defaults that differ from GRPOConfig. The learning rate is the paper's. Temperature, length, the group of 8 and
    # eta are as in recipes/qwen2.5-7b-instruct/lora.yaml; the paper has 1.0, 2048 (its code), 5 and 1000.
    learning_rate: float = field(
        default=5e-7, metadata={"help": "The initial learning rate. The paper's, for full fine-tuning."}
    )
    temperature: float = field(
        default=0.8, metadata={"help": "Temperature for sampling. The policy at this temperature is trained."}
    )
    max_completion_length: int | None = field(
        default=1024, metadata={"help": "Maximum length of the generated completion, in tokens."}
    )
    disable_dropout: bool = field(
        default=True, metadata={"help": "Whether to disable dropout, which adds noise to the log-ratio."}
    )

    # Parameters that control the objective
    eta: float = field(
        default=10.0,
        metadata={"help": "The target of the log-ratio is eta * (win_rate - 1/2). DPO's beta is 1/eta."},
    )
    loss_type: str = field(
        default="sppo",
        metadata={
            "help": "Form of the win rate: 'sppo' (in the group), 'sppo_hard' (1 above 1/2, 0 below) or "
            "'sppo_single' (best against worst; needs train_on='best_and_worst'). 'inpo': squared loss on pairs."
        },
    )
    baseline: Literal["half", "log_mean_exp"] = field(
        default="half",
        metadata={"help": "Estimate of log Z / eta: 'half' (the paper) or 'log_mean_exp' (from the group)."},
    )
    forward_kl_share: float = field(
        default=0.0, metadata={"help": "Share of KL(initial policy || policy) in the KL term. Needs beta > 0."}
    )

    # Parameters that control where preferences come from
    comparison: Literal["hard", "bradley_terry"] = field(
        default="hard", metadata={"help": "How two scores become a preference: 'hard' or 'bradley_terry'."}
    )
    bt_temperature: float = field(
        default=1.0, metadata={"help": "Temperature of the Bradley-Terry comparison, in units of the score."}
    )
    include_self: bool = field(
        default=False, metadata={"help": "Whether a completion's tie with itself counts in its win rate."}
    )
    reward_aggregation: Literal["vote", "sum"] = field(
        default="vote",
        metadata={
            "help": "Whether several reward sources 'vote' by reward_weights, or their scores are added: 'sum'."
        },
    )
    missing_eos_penalty: float | None = field(
        default=None, metadata={"help": "Subtracted from the scores of a completion without a final EOS token."}
    )
    preference_weights: list[float] | None = field(
        default=None, metadata={"help": "Vote of each pairwise oracle, on the scale of reward_weights."}
    )
    both_orders: bool = field(
        default=True, metadata={"help": "Whether pairwise oracles compare each pair in both orders."}
    )
    comparisons_per_group: int | None = field(
        default=None, metadata={"help": "Comparisons of a group that each pairwise oracle makes. All by default."}
    )
    judge_token_budget: int | None = field(
        default=None, metadata={"help": "Tokens that judges behind an endpoint may use, until the run ends."}
    )
    preference_batch_size: int = field(default=512, metadata={"help": "Comparisons per call of a pairwise oracle."})

    # Parameters that control which completions are trained on
    train_on: Literal["all", "best_and_worst"] = field(
        default="all", metadata={"help": "Completions of a group to train on: 'all' or 'best_and_worst'."}
    )
    win_rate_threshold: float | None = field(
        default=None,
        metadata={"help": "Train only on win rates of at least this, or at most one minus this. In [0.5, 1]."},
    )
    keep_groups_together: bool = field(
        default=False, metadata={"help": "Whether the completions of a prompt are trained on in one micro-batch."}
    )

    # Parameters that control scoring
    reward_batch_size: int = field(default=16, metadata={"help": "Completions per forward pass of a reward model."})
    reward_quantization: Literal["8bit", "4bit"] | None = field(
        default=None, metadata={"help": "Load reward models given by path in '8bit' or '4bit' (NF4)."}
    )
    hide_reasoning: bool | None = field(
        default=None,
        metadata={"help": "Whether voters and judges read no reasoning. By default if the chat template has marks."},
    )

    # Parameters that control stored rollouts
    save_rollouts: bool = field(
        default=True, metadata={"help": "Whether to write the rollouts of each iteration to output_dir/rollouts."}
    )
    rollouts_total_limit: int | None = field(
        default=None, metadata={"help": "Rollout files to keep, of iterations before the last checkpoint."}
    )
    rollouts: str | None = field(
        default=None, metadata={"help": "Train on the rollouts in this folder or file, instead of sampling."}
    )

    # Parameters that control how a run ends
    time_budget: float | None = field(
        default=None, metadata={"help": "Minutes until the process must have ended, with a checkpoint."}
    )

    # Parameters that control whose code runs
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Whether the policy's checkpoint may run its own Python code."}
    )
    reward_trust_remote_code: list[str] | None = field(
        default=None, metadata={"help": "Reward models, as given, that may run their own Python code."}
    )

    def __new__(cls, *args, **kwargs):
        names = [option.name for option in fields(cls)]
        for name in kwargs.keys() - names:
            nearest = "".join(f" Did you mean {match}?" for match in get_close_matches(name, names, n=1, cutoff=0.8))
            raise TypeError(f"SPPOConfig has no option {name!r}.{nearest}")
        return super().__new__(cls)

    def __post_init__(self):
        if self.loss_type == "inpo":
            self.keep_groups_together = True  # both completions of a pair are needed at once
        # All problems are reported at once
        problems = [*find_number_problems(self), *find_mapping_problems(self), *find_pair_problems(self)]
        problems += find_launch_problems()
        can_go_on = not problems  # else TRL might stumble over one of them
        problems += [*self._find_rejected_options(), *self._find_problems()]
        if self.save_strategy == "best" and self.metric_for_best_model is None:
            self.metric_for_best_model = "loss"  # as in other strategies. The trainer takes a win rate instead
        if can_go_on:
            try:
                super().__post_init__()
            except ValueError as error:
                said = str(error).replace("GRPO", "SPPO")  # GRPOConfig may have raised it
                options = (text for start, text in OPTIONS_OF_ERRORS.items() if said.startswith(start))
                problems.append(" ".join([said, *options]))
            else:
                problems += [*find_keyword_problems(self), *find_trust_problems(self), *find_tracker_problems(self)]
                problems += self._find_problems_of_iterations()
                if self.use_cpu and distributed.is_initialized():  # transformers 5.24 sets it for devices only
                    _set_pg_timeout(self.ddp_timeout_delta)
        if problems:
            first: dict[str, str] = {}  # of each option: one number may break two rules
            for problem in problems:
                first.setdefault(problem.partition(" must ")[0], problem)
            raise ValueError("\n".join(first.values()))
        self._warn()

    def _find_rejected_options(self) -> Iterator[str]:
        inherited = {option.name: option for option in fields(GRPOConfig)}
        for name, reason in REJECTED_OPTIONS.items():
            value, option = getattr(self, name), inherited[name]
            default = option.default if option.default_factory is MISSING else option.default_factory()
            if value != default and not (name in _SAME_AS_DEFAULT and value is _SAME_AS_DEFAULT[name]):
                yield (
                    f"{name}={value!r} is an option that SPPO does not use: {reason} Remove it (its default is "
                    f"{default!r})."
                )

    def _find_problems(self) -> Iterator[str]:
        if not 0 < self.eta <= 1e9:  # above, the squared error would overflow
            yield f"eta must be positive and at most 1e9, got {self.eta}. The paper's beta = 0.001 is eta=1000."
        for name, values in _CHOICES.items():
            if getattr(self, name) not in values:
                yield f"{name} must be {' or '.join(map(repr, filter(None, values)))}, got {getattr(self, name)!r}."
        for name in ("reward_weights", "preference_weights"):
            weights = getattr(self, name)
            if weights is None:
                continue
            if not isinstance(weights, (list, tuple)) or not all(isinstance(each, (int, float)) for each in weights):
                rule = f"{name} must be a list of numbers, one per source, got {weights}."
                yield next(find_number_texts(name, weights), rule)
            elif min(weights, default=0) < 0:
                yield f"{name} must not be negative, got {weights}. To prefer low scores, negate the reward function."
        if self.loss_type == "sppo_single" and self.train_on != "best_and_worst":
            yield "loss_type='sppo_single' compares the best with the worst: set train_on='best_and_worst'."
        pair_alone = self.loss_type in ("sppo_single", "inpo") and self.train_on == "best_and_worst"
        if pair_alone and self.comparisons_per_group is not None:
            yield (
                f"comparisons_per_group={self.comparisons_per_group} may leave out the best against the worst, which "
                f"loss_type={self.loss_type!r} needs. Remove one of them."
            )
        if self.baseline != "half" and self.comparisons_per_group is not None:
            yield (
                f"baseline={self.baseline!r} is too high for win rates of few comparisons, which are noisy. Remove "
                f"comparisons_per_group={self.comparisons_per_group}, or use baseline='half'."
            )
        if self.loss_type != "sppo" and self.baseline != "half":
            yield f"baseline={self.baseline!r} needs the win rates of the whole group: use loss_type='sppo'."
        if self.loss_type == "inpo" and self.eta * self.beta > 1 + 1e-9:
            yield (
                f"beta must be at most 1/eta = {1 / self.eta:g} with loss_type='inpo', got {self.beta}: eta * beta is "
                f"the share of the initial policy in the reference. INPO's paper has beta={1 / self.eta / 3:.3g}, and "
                f"beta={1 / self.eta:g} is IPO."
            )
        if self.loss_type == "inpo" and self.forward_kl_share > 0:
            yield (
                f"forward_kl_share={self.forward_kl_share} has no effect with loss_type='inpo', which adds no KL "
                "term. Remove it."
            )
        if self.forward_kl_share > 0 and self.beta == 0:
            yield f"forward_kl_share={self.forward_kl_share} divides a KL term whose weight, beta, is 0. Set beta."
        if self.win_rate_threshold is not None and self.train_on == "best_and_worst":
            yield (
                f"win_rate_threshold={self.win_rate_threshold} and train_on='best_and_worst' both choose the "
                "completions to train on. Set only one of them."
            )
        if (self.metric_for_best_model or "").endswith("_loss"):
            yield (
                f"metric_for_best_model={self.metric_for_best_model!r} says nothing about the policy: in evaluations "
                "all log-ratios are 0. Leave it out for the win rate against the initial policy, or name a metric."
            )
        if self.push_to_hub and self.save_rollouts:
            yield "push_to_hub=True would upload the rollouts, which hold the prompts. Set save_rollouts=False."
        if self.rollouts is not None and self.use_vllm:
            yield f"rollouts={self.rollouts!r} replace sampling. Set use_vllm=False."
        mode = self.vllm_importance_sampling_mode
        if self.use_vllm and self.vllm_importance_sampling_correction and not mode.startswith("sequence"):
            yield (
                f"vllm_importance_sampling_mode={mode!r} weights single tokens, but SPPO's squared error is one "
                "number for a whole completion. Use 'sequence_mask' or 'sequence_truncate'."
            )

    def _find_problems_of_iterations(self) -> Iterator[str]:
        assert self.steps_per_generation is not None  # GRPOConfig has set it
        if self.steps_per_generation % self.gradient_accumulation_steps != 0:
            yield (
                f"steps_per_generation ({self.steps_per_generation}) must be a multiple of "
                f"gradient_accumulation_steps ({self.gradient_accumulation_steps}): an optimizer step belongs to one "
                "SPPO iteration, which is one generation batch. Change one of them (or generation_batch_size)."
            )
        sizes = {name: cast(int, getattr(self, name) or 0) for name in ("num_generations", "num_generations_eval")}
        name, size = max(sizes.items(), key=lambda item: item[1])
        least = -(-size // 2) * (1 + self.both_orders)
        if self.comparisons_per_group is not None and self.comparisons_per_group < least:
            yield (
                f"comparisons_per_group must be at least {least}, got {self.comparisons_per_group}: each of the "
                f"{name}={size} completions must be compared once{', in both orders' * self.both_orders}."
            )
        if self.keep_groups_together and self.per_device_train_batch_size % cast(int, self.num_generations) != 0:
            option = "loss_type='inpo'" if self.loss_type == "inpo" else "keep_groups_together=True"
            yield (
                f"{option} needs whole groups in a micro-batch: set per_device_train_batch_size "
                f"({self.per_device_train_batch_size}) to a multiple of num_generations ({self.num_generations})."
            )

    def _warn(self) -> None:
        if self.beta > 0 and self.loss_type != "inpo":
            logger.warning(
                f"beta={self.beta} weights the KL term towards the initial policy, of a whole completion and not per "
                "token as in GRPO. The beta of DPO and of the official SPPO code is 1/eta: if you meant that, remove "
                f"beta and set eta={1 / self.beta:g}."
            )
        filters = {"top_p": (1.0,), "top_k": (0, None), "min_p": (None, 0.0), "repetition_penalty": (1.0,)}
        for name, neutral in filters.items():
            if getattr(self, name) not in neutral:
                logger.warning(
                    f"{name}={getattr(self, name)} samples from another distribution than the policy that is trained, "
                    f"so win rates belong to the filtered policy. SPPO expects {name}={neutral[0]}."
                )
