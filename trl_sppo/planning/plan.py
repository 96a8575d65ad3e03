"""Plans: a recipe's options, and facts about its models and data before they are loaded."""

import importlib.util
import os
import sys
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
from accelerate.commands.launch import launch_command_parser
from huggingface_hub import constants, get_session
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig
from trl import ModelConfig, get_peft_config, get_quantization_config

from ..arguments.launching import accelerate_config, launch_arguments
from ..arguments.loading import check_one_dataset, is_id, load_data
from ..arguments.options import (
    SPPOScriptArguments,
    check_call,
    check_dotted,
    import_callable,
    make_parser,
    path_and_arguments,
    split_config,
)
from ..arguments.recipes import check_output_dir
from ..checks.arguments import check_activation_checkpointing, check_optimizer
from ..checks.models import (
    check_adapter,
    check_not_replaced,
    check_policy_weights,
    check_quantization,
    check_sharding,
    fsdp_version,
)
from ..checks.prompts import check_prompts, without_empty_images
from ..checks.readers import policy_reader, reward_readers
from ..checks.sources import check_columns, check_datasets, check_judges, check_sources, named_datasets
from ..config import SPPOConfig
from ..models.adapters import adopt_options, base_of, check_policy, is_adapter, not_found, tokenizer_of
from ..oracles.reward_models import check_reward_model, check_reward_quantization
from ..rollouts.given import is_judged, load_rollouts, prompts_of
from ..runs.checkpoints import check_resume, form_of
from ..trust import is_url
from .memory import ModelSize, Placement, budget, size_of


FUNCTIONS = "reward_funcs", "eval_reward_funcs", "preference_funcs", "eval_preference_funcs"


@dataclass
class Plan:
    """A training as a recipe describes it, with known and unknown facts about its models and data."""

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
    train_dataset: Any = None
    eval_dataset: Any = None


def read(recipe: str, argv: list[str], gpu: float = 80e9, prompt_length: int = 1024) -> Plan:
    """Read a recipe, overridden by `argv`, and the available models and data. `gpu` is in bytes."""
    argv = ["--config", recipe, *split_config(argv)]
    launch = launch_arguments(make_parser("trl-sppo check"), argv)
    processes, sharding, unknown = _launch(launch)
    script, args, model_args, dataset_args = _parse(argv, processes)
    if sharding is None and args.deepspeed:
        config = args.deepspeed if isinstance(args.deepspeed, dict) else {"zero_optimization": {"stage": 2}}
        sharding = f"zero{config.get('zero_optimization', {}).get('stage', 0)}"
    elif sharding is None and (version := fsdp_version(args)):
        sharding = f"fsdp{version}"
    plan = Plan(script, args, model_args, dataset_args, Placement(gpu, processes, sharding, prompt_length), unknown)
    check_output_dir(args.output_dir)
    check_activation_checkpointing(args)
    adopt_options(model_args)
    name = str(model_args.model_name_or_path)
    form = form_of(args, base_of(name), _adapter_of(model_args), continued=name if is_adapter(name) else None)
    check_resume(args, {name: form[name] for name in form if name not in ("bits", "sharding")})
    check_adapter(model_args)
    if torch.cuda.is_available() or args.use_cpu:  # some optimizers work on GPUs only
        check_optimizer(args)
    how, bits = str(sharding), 4 * model_args.load_in_4bit or 8 * model_args.load_in_8bit
    check_sharding(args, model_args.use_peft, bits, how.startswith("zero"), {"fsdp1": 1, "fsdp2": 2}.get(how, 0))
    _look_at_data(plan)
    _look_at_models(plan)
    return plan


def _launch(launch: list[str]) -> tuple[int, str | None, list[str]]:
    """The number of processes that training would start here, how they shard the policy, and unknown facts."""
    options = launch_command_parser().parse_args([*launch, "--module", "trl_sppo.train"])
    file = accelerate_config(options.config_file)
    given = options.num_processes or getattr(file, "num_processes", None)
    processes, unknown = given or max(torch.cuda.device_count(), 1), []
    if given is None and not torch.cuda.is_available():
        unknown.append("The number of GPUs. One process is assumed, but training starts one on each GPU.")
    kind = str(getattr(file, "distributed_type", None))
    if kind.endswith("FSDP") or options.use_fsdp:
        version = (getattr(file, "fsdp_config", None) or {}).get("fsdp_version") or options.fsdp_version
        return processes, f"fsdp{version or 1}", unknown
    if kind.endswith("DEEPSPEED") or options.use_deepspeed:
        settings = getattr(file, "deepspeed_config", None) or {}
        stage = options.zero_stage if options.use_deepspeed else settings.get("zero_stage")
        if stage is None:
            unknown.append("The stage of DeepSpeed, which another file sets. ZeRO-2 is assumed.")
        return processes, f"zero{2 if stage is None else stage}", unknown
    return processes, None, unknown


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
    if args.rollouts is not None:
        assert args.num_generations is not None
        plan.train_dataset = load_rollouts(args.rollouts, args.num_generations)
        plan.num_prompts = len(plan.train_dataset)
        plan.conversational = check_datasets(args, prompts_of(plan.train_dataset), None)
        return
    check_one_dataset(script, plan.dataset_args)
    name = str(script.dataset_name)
    if plan.dataset_args.datasets or (is_id(name) and not os.path.exists(name)):
        what = "the mixture of datasets" if plan.dataset_args.datasets else name
        plan.unknown.append(f"The number and length of prompts in {what}. It was not loaded.")
    else:
        plan.train_dataset, plan.eval_dataset = load_data(script, plan.dataset_args, args.eval_strategy != "no")
        plan.conversational = check_datasets(args, plan.train_dataset, plan.eval_dataset)
        if not script.dataset_streaming:
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
    own_tokenizer = tokenizer if is_adapter(policy) else None
    policy, peft_config = base_of(policy), _adapter_of(model_args)
    quantization = get_quantization_config(model_args)
    if config is not None or quantization is not None:
        check_quantization(args, policy, quantization, on_cpu=args.use_cpu)
    if config is not None:
        check_policy_weights(policy, config, args)
        attention = init_kwargs.get("attn_implementation", model_args.attn_implementation)
        plan.policy = _size(plan, policy, config, peft_config, False, attention)
    args.model_init_kwargs = {"revision": revision, **init_kwargs}
    readers = [policy_reader(args, policy, own_tokenizer)] if tokenizer is not None else []
    rewards = []
    for models, are_judges in (
        (script.reward_model_name_or_path, False),
        (script.eval_reward_model_name_or_path, True),
    ):
        for model in [model for model in models or [] if not is_url(model)]:
            trusted = model in (args.reward_trust_remote_code or [])
            config, tokenizer = _files(plan, "reward model", model, trusted)
            size = None
            if config is not None:
                check_reward_model(model, tokenizer, bool(plan.conversational), trusted)
                readers += reward_readers(args, [model], [tokenizer], num_judges=are_judges)
                size = _size(plan, model, config, None, True)
            rewards.append(size)
    if plan.conversational is not None:
        check_prompts(readers, _datasets(plan))
    sizes = [size for size in rewards if size is not None]
    if plan.policy is not None and len(sizes) == len(rewards) and not args.use_cpu:
        plan.rows = budget(args, model_args, plan.policy, sizes, plan.place)


def _adapter_of(model_args: ModelConfig) -> Any:
    """The configuration of the adapter that is continued or added, if any."""
    path = str(model_args.model_name_or_path)
    return check_policy(path) if is_adapter(path) else get_peft_config(model_args)


def _check_sources(plan: Plan) -> None:
    """Check reward sources, preference oracles and judges, without importing or loading any."""
    script, args = plan.script, plan.args
    names = [getattr(script, option) or [] for option in FUNCTIONS]
    for option, given in zip(FUNCTIONS, names, strict=True):
        for name in given:
            path, arguments = path_and_arguments(name, option)
            _check_importable(path, option)
            if arguments is not None and path.startswith("trl_sppo.judges."):
                check_call(import_callable(path, option), arguments, path, option)
    functions, eval_functions, oracles, eval_oracles = ([_stand_in] * len(given) for given in names)
    sources: list[Any] = [*(script.reward_model_name_or_path or []), *functions]
    judges: list[Any] = [*(script.eval_reward_model_name_or_path or []), *eval_functions]
    judged = args.rollouts is not None and is_judged(plan.train_dataset)
    check_sources(args, sources, [None] * len(sources), oracles, has_environment=False, judged=judged)
    check_judges(args, sources, judges, [None] * len(judges), eval_oracles)
    check_columns(args, _datasets(plan), sources, judges)
    if args.reward_quantization is not None:
        check_reward_quantization(args.reward_quantization, [*sources, *judges])


def _stand_in(*args: Any, **kwargs: Any) -> None:
    """In place of a function that is not imported."""


def _datasets(plan: Plan) -> dict[str, Any]:
    """The loaded datasets, by the names of the trainer's arguments."""
    train_dataset = plan.train_dataset if plan.args.rollouts is None else prompts_of(plan.train_dataset)
    datasets = named_datasets(train_dataset, plan.eval_dataset)
    return {name: without_empty_images(name, dataset) for name, dataset in datasets.items()}


def _size(plan: Plan, name: str, config: PreTrainedConfig, *args: Any) -> ModelSize | None:
    """The size of a model, or `None` and a line in `plan.unknown` if its architecture cannot be measured."""
    try:
        return size_of(config, *args)
    except Exception as error:
        plan.unknown.append(f"The memory that {name} needs. Its architecture could not be measured ({error}).")
        return None


def _files(
    plan: Plan, what: str, name: str, trusted: bool, revision: str | None = None
) -> tuple[PreTrainedConfig | None, Any]:
    """Configuration and tokenizer, or `None` and a line in `plan.unknown` if the hub cannot be reached."""
    base = base_of(name)
    kwargs = {"trust_remote_code": trusted} | ({"revision": revision} if revision else {})
    offline = constants.HF_HUB_OFFLINE or not (os.path.isdir(base) or _hub_responds())
    try:
        with patch.object(constants, "HF_HUB_OFFLINE", offline):
            config = AutoConfig.from_pretrained(base, **kwargs)
            return config, AutoTokenizer.from_pretrained(tokenizer_of(name), **kwargs)
    except OSError as error:
        if os.path.isdir(base) or "connect" not in str(error):
            raise not_found(what, name, error) from error
        plan.unknown.append(f"Anything about {what} {base}. The hub cannot be reached.")
        return None, None


@cache
def _hub_responds() -> bool:
    """False if the hub cannot be reached: otherwise each file would be tried six times."""
    try:
        get_session().head(constants.ENDPOINT, timeout=2.0)
    except Exception:
        return False
    return True


def _check_importable(name: str, option: str) -> None:
    """Raise `ValueError` if a function's module does not exist. It is not imported: a judge may load a model."""
    if not {".", "/", ":"} & set(name):
        import_callable(f"trl.rewards.{name}" if "reward" in option else name, option)
        return
    check_dotted(name, f"{name!r} (--{option})")
    module = name.rpartition(".")[0]
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    problem: object = f"there is no module {module!r}"
    try:
        if importlib.util.find_spec(module) is not None:  # this imports the packages that contain it
            return
    except Exception as error:
        problem = error
    raise ValueError(
        f"{name!r} (--{option}) could not be imported: {problem}. Pass a dotted path: my_rewards.brevity is `brevity` "
        "in my_rewards.py, in the folder from which you start the training."
    )
