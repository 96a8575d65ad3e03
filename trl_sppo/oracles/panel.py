"""Panels of judges: reward sources that score completions, and pairwise oracles that compare them."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from trl.data_utils import is_conversational
from trl.models import prepare_deepspeed
from trl.trainer.utils import get_callable_name, get_config_model_id

from . import scoring
from .asking import NO_COLUMNS, PreferenceFunc, oracle_name, told_apart
from .reward_models import RewardSource, in_micro_batches, load_reward_models, without_slash
from .scoring import RewardSources


@dataclass(eq=False)
class Panel:
    """Judges of completions, during a training and outside of one. Their verdicts are not trained on."""

    sources: RewardSources
    oracles: dict[str, PreferenceFunc]
    accelerator: Accelerator
    both_orders: bool = True
    batch_size: int = 512  # comparisons per call of an oracle
    log_metric: Callable[[str, float], None] = lambda name, value: None
    disable_tqdm: bool = False

    @property
    def names(self) -> list[str]:
        return [*self.sources.names, *self.oracles]

    def check_prompts(self, prompts: Sequence[Any]) -> None:
        """Raise `ValueError` if the chat template of a reward model refuses a conversation."""
        for name, tokenizer in zip(self.sources.names, self.sources.tokenizers, strict=True):
            messages = tokenizer is not None and is_conversational({"prompt": prompts[0]})
            for i, prompt in enumerate(prompts if messages else ()):
                try:
                    self.sources.text(tokenizer, prompt, [{"role": "assistant", "content": "a"}])
                except Exception as error:  # templates raise any error
                    problem = f"prompt {i} is refused by the chat template of judge {name!r}"
                    raise ValueError(f"{problem}: {error} Leave out such prompts, or change them.") from error


def load_panel(
    reward_funcs: Sequence[RewardSource],
    preference_funcs: Sequence[PreferenceFunc],
    conversational: bool,
    trust_remote_code: Sequence[str] = (),
    both_orders: bool = True,
    batch_size: int = 16,  # completions per forward pass of a reward model
    columns: Sequence[str] | None = None,  # of the prompts, if known: functions that need others are refused
    chat_template_kwargs: dict[str, Any] | None = None,
) -> Panel:
    """Check judges, and load the reward models. Raises `ValueError` if a judge could not be called."""
    if columns is not None:
        functions = [source for source in reward_funcs if callable(source) and not isinstance(source, nn.Module)]
        for function in functions:
            _check_call(function, ["prompts", "completions"], set(columns) - scoring.NO_COLUMNS)
        for oracle in preference_funcs:
            _check_call(oracle, ["prompts", "first", "second", "log_metric"], set(columns) - NO_COLUMNS)
    reward_funcs, unknown = without_slash(reward_funcs), [None] * len(reward_funcs)
    trusted = [name.rstrip("/") for name in trust_remote_code]
    accelerator = Accelerator()
    sources, tokenizers = load_reward_models(reward_funcs, unknown, conversational, trusted, chat_template_kwargs)
    return make_panel(
        sources, tokenizers, preference_funcs, accelerator, batch_size, chat_template_kwargs, both_orders=both_orders
    )


def make_panel(
    sources: Sequence[Any],
    tokenizers: Sequence[Any],
    oracles: Sequence[PreferenceFunc],
    accelerator: Accelerator,
    reward_batch_size: int,  # completions per forward pass
    chat_template_kwargs: dict[str, Any] | None,
    voters: Sequence[str] = (),  # names that judges must not have
    **options: Any,
) -> Panel:
    """Put reward models on their device, as TRL does, and name judges."""
    prepare = partial(accelerator.prepare_model, evaluation_mode=True, device_placement=True)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        prepare = partial(prepare_deepspeed, accelerator=accelerator)
    placed = [prepare(source) if isinstance(source, nn.Module) else source for source in sources]
    own = [  # as TRL names reward sources
        get_config_model_id(cast(Any, each.config)).split("/")[-1]
        if isinstance(each, nn.Module)
        else get_callable_name(each)
        for each in sources
    ]
    names = told_apart([*voters, *own, *map(oracle_name, oracles)])[len(voters) :]
    scorers = in_micro_batches(placed, reward_batch_size)
    reward_sources = RewardSources(names[: len(own)], scorers, tokenizers, chat_template_kwargs, kind="judge")
    return Panel(reward_sources, dict(zip(names[len(own) :], oracles, strict=True)), accelerator, **options)


def _check_call(judge: Callable[..., Any], own: list[str], columns: set[str]) -> None:
    """Raise `ValueError` if a judge could not be called with its own arguments and these columns of the prompts."""
    try:
        inspect.signature(judge).bind(**dict.fromkeys([*own, *columns]))
    except ValueError:  # a built-in function without a signature
        return
    except TypeError as error:
        raise ValueError(
            f"judge {oracle_name(judge)!r} cannot be called: {error}. It gets {', '.join(own)}, and the columns "
            f"{sorted(columns)} of the prompts. Add what is missing to them, or let the judge take `**kwargs`."
        ) from error
