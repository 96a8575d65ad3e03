"""Plans: what a recipe asks for, and what is known of its models and data before they are loaded."""

import importlib.util
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from accelerate.commands.launch import launch_command_parser
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig
from trl import ModelConfig, get_peft_config, get_quantization_config

from ..arguments.launching import accelerate_config, launch_arguments
from ..arguments.loading import check_one_dataset, is_folder_or_id, load_data
from ..arguments.options import SPPOScriptArguments, check_dotted, make_parser, split_config
from ..arguments.recipes import check_output_dir
from ..checks.arguments import check_activation_checkpointing, check_optimizer
from ..checks.models import check_adapter, check_not_replaced, check_policy_weights, check_quantization, check_sharding
from ..checks.prompts import check_prompts, without_empty_images
from ..checks.readers import policy_reader, reward_readers
from ..checks.sources import check_columns, check_datasets, check_judges, check_sources, named_datasets
from ..config import SPPOConfig
from ..models.adapters import adopt_options, base_of, check_policy, is_adapter, not_found, tokenizer_of
from ..oracles.reward_models import check_reward_model, check_reward_quantization
from ..rollouts.given import is_judged, load_rollouts, prompts_of
from ..runs.checkpoints import check_resume
from ..runs.forms import form_of
from ..trust import is_url
from .memory import ModelSize, Placement, budget, size_of


@dataclass
class Plan:
    """A training as a recipe describes it, with what is known of its models and data, and what is not."""

    script: SPPOScriptArguments
    args: SPPOConfig
    model_args: ModelConfig
    dataset_args: Any
    place: Placement
    unknown: list[str] = field(default_factory=list)
    policy: ModelSize | None = None
    rows: dict[str, float] | None = None  # the budget of memory.py
    num_prompts: int | None = None
    conversational: bool | None = None
    hub_is_away: bool = False
    train_dataset: Any = None
    eval_dataset: Any = None


def read(recipe: str, argv: list[str], gpu: float = 80e9, prompt_length: int = 1024) -> Plan:
    """Read a recipe, overridden by `argv`, and what is available of its models and data. `gpu` is in bytes."""
    argv = ["--config", recipe, *split_config(argv)]
    launch = launch_arguments(make_parser("trl-sppo check"), argv)
    processes, sharding, unknown = _launch(launch)
    script, args, model_args, dataset_args = _parse(argv, processes)
    sharding = sharding or _sharding_of(args)
    plan = Plan(script, args, model_args, dataset_args, Placement(gpu, processes, sharding, prompt_length), unknown)
    check_output_dir(args.output_dir)
    check_activation_checkpointing(args)
    adopt_options(model_args)
    policy = str(model_args.model_name_or_path)
    continued = policy if is_adapter(policy) else None
    form = form_of(args, base_of(policy), _adapter_of(model_args), continued=continued)
    check_resume(args, {name: form[name] for name in form if name not in ("bits", "sharding")})
    check_adapter(model_args)
    if torch.cuda.is_available() or args.use_cpu:  # some optimizers work on GPUs only
        check_optimizer(args)
    how = str(sharding)
    check_sharding(args, model_args.use_peft, deepspeed=how.startswith("zero"), fsdp=how.startswith("fsdp"))
    _look_at_data(plan)
    _look_at_models(plan)
    return plan


def _launch(launch: list[str]) -> tuple[int, str | None, list[str]]:
    """The number of processes that training would start, how they divide the policy, and what is unknown."""
    options = launch_command_parser().parse_args([*launch, "--module", "trl_sppo.train"])
    file = accelerate_config(options.config_file)
    unknown = []
    processes = options.num_processes or getattr(file, "num_processes", None)
    if processes is None:
        processes = max(torch.cuda.device_count(), 1)
        if not torch.cuda.is_available():
            unknown.append("The number of GPUs. One process is assumed, but training starts one on each GPU.")
    kind = getattr(file, "distributed_type", None)
    kind = getattr(kind, "value", kind)
    sharding = None
    if kind == "FSDP" or options.use_fsdp:
        settings = getattr(file, "fsdp_config", None) or {}
        version = settings.get("fsdp_version", 1) if settings else getattr(options, "fsdp_version", 1)
        sharding = f"fsdp{version or 1}"
    elif kind == "DEEPSPEED" or options.use_deepspeed:
        settings = getattr(file, "deepspeed_config", None) or {}
        stage = options.zero_stage if options.use_deepspeed else settings.get("zero_stage")
        if settings.get("deepspeed_config_file"):
            unknown.append("The content of deepspeed_config_file. ZeRO-2 is assumed.")
        sharding = f"zero{2 if stage is None else stage}"
    return processes, sharding, unknown


def _sharding_of(args: SPPOConfig) -> str | None:
    """How the options of transformers divide the policy."""
    if getattr(args, "fsdp", None):
        return "fsdp1"
    if isinstance(args.deepspeed, dict):
        return f"zero{args.deepspeed.get('zero_optimization', {}).get('stage', 0)}"
    return "zero2" if args.deepspeed else None


def _parse(argv: list[str], processes: int) -> Any:
    class Options(SPPOConfig):
        """Options for the processes that training would start. This process is not one of them."""

        world_size = property(lambda self: processes)

        def __post_init__(self):
            backend, self.ddp_backend = self.ddp_backend, None  # it need not be available here
            super().__post_init__()
            self.ddp_backend = backend

    parser = make_parser("trl-sppo check", Options)
    # As on a GPU: the options are not for this machine
    able: dict[str, Any] = {"is_torch_bf16_gpu_available": lambda: True, "is_torch_tf32_available": lambda: True}
    with patch.multiple("transformers.training_args", **able):
        return parser.parse_args_and_config(argv, return_remaining_strings=True)[:4]


def _look_at_data(plan: Plan) -> None:
    script, args = plan.script, plan.args
    evaluate = args.eval_strategy != "no"
    if args.rollouts is not None:
        assert args.num_generations is not None
        plan.train_dataset = load_rollouts(args.rollouts, args.num_generations)
        plan.num_prompts = len(plan.train_dataset)
        plan.conversational = check_datasets(args, prompts_of(plan.train_dataset), None)
        return
    check_one_dataset(script, plan.dataset_args)
    if plan.dataset_args.datasets:
        plan.unknown.append("The number of prompts in the mixture of datasets. It was not loaded.")
    elif not os.path.exists(str(script.dataset_name)) and is_folder_or_id(str(script.dataset_name)):
        plan.unknown.append(f"The number and length of prompts in {script.dataset_name}. It was not loaded.")
    else:
        plan.train_dataset, plan.eval_dataset = load_data(script, plan.dataset_args, evaluate)
        plan.conversational = check_datasets(args, plan.train_dataset, plan.eval_dataset)
        with suppress(TypeError):  # a stream has no length
            plan.num_prompts = len(plan.train_dataset)
    if script.dataset_streaming and args.max_steps <= 0:
        raise ValueError("dataset_streaming=True needs max_steps. A stream has no length, so an epoch has no end.")


def _look_at_models(plan: Plan) -> None:
    """Read configurations and tokenizers of the models that are available here or on the hub."""
    script, args, model_args = plan.script, plan.args, plan.model_args
    policy = model_args.model_name_or_path
    if not policy:
        raise ValueError("no model: give model_name_or_path, a folder or an id on the hub.")
    check_not_replaced(policy, str(args.output_dir))
    _check_sources(plan)
    init_kwargs: Any = args.model_init_kwargs or {}
    revision = init_kwargs.get("revision", model_args.model_revision)
    config, tokenizer = _files(plan, "model", policy, args.trust_remote_code, revision)
    policy, peft_config = base_of(policy), _adapter_of(model_args)
    quantization = get_quantization_config(model_args)
    if config is not None or quantization is not None:
        check_quantization(args, policy, quantization, on_cpu=args.use_cpu)
    if config is not None:
        check_policy_weights(policy, config, args)
        attention = init_kwargs.get("attn_implementation", model_args.attn_implementation)
        plan.policy = _size(plan, policy, config, peft_config, attention)
    args.model_init_kwargs = {"revision": revision, **init_kwargs}
    own_tokenizer = tokenizer if policy != model_args.model_name_or_path else None  # of an adapter
    readers = [policy_reader(args, policy, own_tokenizer)] if tokenizer is not None else []
    models = script.reward_model_name_or_path or []
    trusted = args.reward_trust_remote_code or []
    rewards = []
    num_voters = sum(not is_url(model) for model in models)
    loaded = [model for model in [*models, *(script.eval_reward_model_name_or_path or [])] if not is_url(model)]
    for i, model in enumerate(loaded):
        config, tokenizer = _files(plan, "reward model", model, model in trusted)
        if config is not None:
            check_reward_model(model, tokenizer, bool(plan.conversational), model in trusted)
            readers += reward_readers(args, [model], [tokenizer], num_judges=i >= num_voters)
            rewards.append(_size(plan, model, config, is_reward_model=True))
    if plan.conversational is not None:
        check_prompts(readers, _datasets(plan))
    sizes = [size for size in rewards if size is not None]
    if plan.policy is not None and len(sizes) == len(loaded) and not args.use_cpu:
        plan.rows = budget(args, model_args, plan.policy, sizes, plan.place)


def _adapter_of(model_args: ModelConfig) -> Any:
    """The configuration of the adapter that is continued or added, if any."""
    path = str(model_args.model_name_or_path)
    return check_policy(path) if is_adapter(path) else get_peft_config(model_args)


def _check_sources(plan: Plan) -> None:
    """Check reward sources, preference oracles and judges, without importing or loading any."""
    script, args = plan.script, plan.args
    functions = [*(script.reward_funcs or []), *(script.eval_reward_funcs or [])]
    for name in [*functions, *(script.preference_funcs or []), *(script.eval_preference_funcs or [])]:
        _check_importable(name)
    models = script.reward_model_name_or_path or []
    sources: list[Any] = [*models, *map(_stand_in, script.reward_funcs or [])]
    judges: list[Any] = [
        *(script.eval_reward_model_name_or_path or []),
        *map(_stand_in, script.eval_reward_funcs or []),
    ]
    oracles = [list(map(_stand_in, each or [])) for each in (script.preference_funcs, script.eval_preference_funcs)]
    judged = args.rollouts is not None and is_judged(plan.train_dataset)
    check_sources(args, sources, [None] * len(sources), oracles[0], has_environment=False, judged=judged)
    check_judges(args, sources, judges, [None] * len(judges), oracles[1])
    check_columns(args, _datasets(plan), sources, judges, [oracle for each in oracles for oracle in each])
    if args.reward_quantization is not None:
        check_reward_quantization(args.reward_quantization, [*sources, *judges])


def _datasets(plan: Plan) -> dict[str, Any]:
    """The loaded datasets, by the names of the trainer's arguments."""
    train_dataset = plan.train_dataset if plan.args.rollouts is None else prompts_of(plan.train_dataset)
    datasets = named_datasets(train_dataset, plan.eval_dataset)
    return {name: without_empty_images(name, dataset) for name, dataset in datasets.items()}


def _size(
    plan: Plan,
    name: str,
    config: PreTrainedConfig,
    peft_config: Any = None,
    attention: str | None = None,
    is_reward_model: bool = False,
) -> ModelSize | None:
    """The size of a model, or `None` and a line in `plan.unknown` if its architecture cannot be measured."""
    try:
        return size_of(config, peft_config, is_reward_model, attention)
    except Exception as error:
        plan.unknown.append(f"The memory that {name} needs. Its architecture could not be measured ({error}).")
        return None


def _files(
    plan: Plan, what: str, name: str, trusted: bool, revision: str | None = None
) -> tuple[PreTrainedConfig | None, Any]:
    """Configuration and tokenizer, or `None` and a line in `plan.unknown` if the hub cannot be reached."""
    base = base_of(name)
    if plan.hub_is_away and not os.path.isdir(base):
        plan.unknown.append(f"Anything about {what} {base}. The hub cannot be reached.")
        return None, None
    kwargs = {"trust_remote_code": trusted} | ({"revision": revision} if revision else {})
    try:
        config = AutoConfig.from_pretrained(base, **kwargs)
        return config, AutoTokenizer.from_pretrained(tokenizer_of(name), **kwargs)
    except OSError as error:
        if os.path.isdir(base) or "connect" not in str(error):
            raise not_found(what, name, error) from error
        plan.hub_is_away = True
        return _files(plan, what, name, trusted)


def _check_importable(name: str) -> None:
    """Raise `ValueError` if a function's module does not exist. It is not imported: a judge may load a model."""
    check_dotted(name, repr(name), "reward_model_name_or_path")
    module, _, attribute = name.rpartition(".")
    if not module:
        import trl.rewards

        if not hasattr(trl.rewards, attribute):
            raise ValueError(f"{name!r} is no reward function of trl.rewards. Pass a name in it, or a dotted path.")
        return
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    problem: object = f"there is no module {module!r}"
    try:
        found = importlib.util.find_spec(module) is not None  # this imports the packages that contain it
    except Exception as error:
        found, problem = False, error
    if not found:
        raise ValueError(
            f"{name!r} could not be imported: {problem}. Pass a dotted path: my_rewards.brevity is `brevity` in "
            "my_rewards.py, in the folder from which you start the training."
        )


def _stand_in(name: str) -> Callable:
    """A function in place of one that is not imported."""

    def function(*args: Any, **kwargs: Any) -> None:
        raise AssertionError(f"{name} is not called here")

    function.__name__ = name
    return function
