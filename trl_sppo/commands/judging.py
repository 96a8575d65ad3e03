"""Options that `trl-sppo eval`, `ladder` and `report` share: judges, sampling, and the folder of a run."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError
from trl.data_utils import is_conversational

from ..arguments.loading import dataset_source
from ..arguments.options import _Parser, load_preference_funcs, load_reward_funcs, split_config
from ..checks.sources import how_to_make_prompts
from ..evaluation.policies import Sampling
from ..option_rules import find_chat_template_problems
from ..oracles.panel import Panel, load_panel
from ..rows import IMAGES


@dataclass
class JudgeArguments:
    """
    Arguments that select judges and prompts, and say how policies are sampled.

    Args:
        reward_model_name_or_path, reward_funcs, preference_funcs (`list[str]`, *optional*):
            Judges, given as in training recipes.
        reward_trust_remote_code (`list[str]`, *optional*):
            Reward models whose own Python code may run.
        both_orders (`bool`, *optional*, defaults to `True`):
            Whether pairwise oracles compare each pair in both orders.
        reward_batch_size (`int`, *optional*, defaults to `16`):
            Completions per forward pass of a reward model.
        dataset_name, dataset_config (`str`, *optional*):
            Dataset with a `"prompt"` column, and its configuration.
        dataset_test_split (`str`, *optional*, defaults to `"test"`):
            Its split.
        max_prompts (`int`, *optional*):
            Number of prompts to use, from the start of the dataset. All by default.
        num_generations (`int`, *optional*, defaults to `4`):
            Completions per prompt of each policy.
        max_completion_length (`int`, *optional*, defaults to `1024`):
            Longest completion, in tokens.
        temperature (`float`, *optional*, defaults to `0.8`):
            Sampling temperature.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the sampling.
        batch_size (`int`, *optional*, defaults to `64`):
            Completions that transformers samples at the same time.
        use_vllm (`bool`, *optional*, defaults to `False`):
            Whether vLLM samples.
        vllm_gpu_memory_utilization (`float`, *optional*, defaults to `0.5`):
            Share of the GPU's memory that vLLM takes.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether the policies' own Python code may run.
        chat_template_kwargs (`dict`, *optional*):
            Further arguments of the chat templates of policies and reward models. The default is what the policy was
            trained with.
    """

    reward_model_name_or_path: list[str] | None = field(default=None, metadata={"help": "Reward models that judge."})
    reward_funcs: list[str] | None = field(default=None, metadata={"help": "Reward functions that judge."})
    preference_funcs: list[str] | None = field(default=None, metadata={"help": "Pairwise oracles that judge."})
    reward_trust_remote_code: list[str] | None = field(
        default=None, metadata={"help": "Reward models whose own Python code may run."}
    )
    both_orders: bool = field(
        default=True, metadata={"help": "Compare each pair in both orders with pairwise oracles."}
    )
    reward_batch_size: int = field(default=16, metadata={"help": "Completions per forward pass of a reward model."})
    dataset_name: str | None = field(default=None, metadata={"help": "Dataset with a 'prompt' column."})
    dataset_config: str | None = field(default=None, metadata={"help": "Its configuration."})
    dataset_test_split: str = field(default="test", metadata={"help": "Its split."})
    max_prompts: int | None = field(
        default=None, metadata={"help": "Number of prompts to use, from the start of the dataset."}
    )
    num_generations: int = field(default=4, metadata={"help": "Completions per prompt of each policy."})
    max_completion_length: int = field(default=1024, metadata={"help": "Longest completion, in tokens."})
    temperature: float = field(default=0.8, metadata={"help": "Sampling temperature."})
    seed: int = field(default=0, metadata={"help": "Seed of the sampling."})
    batch_size: int = field(default=64, metadata={"help": "Completions that transformers samples at the same time."})
    use_vllm: bool = field(default=False, metadata={"help": "Let vLLM sample."})
    vllm_gpu_memory_utilization: float = field(
        default=0.5, metadata={"help": "Share of the GPU's memory that vLLM takes."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Whether the policies' own Python code may run."})
    chat_template_kwargs: dict | str | None = field(
        default=None,
        metadata={
            "help": "Further arguments of chat templates, as JSON on the command line. The default is what the policy "
            "was trained with."
        },
    )

    def __post_init__(self):
        if isinstance(self.chat_template_kwargs, str):
            try:
                self.chat_template_kwargs = json.loads(self.chat_template_kwargs)
            except ValueError:
                pass  # said below
        if not isinstance(self.chat_template_kwargs, dict | None):
            raise ValueError(
                f"chat_template_kwargs must be a mapping, got {self.chat_template_kwargs!r}: on the command line "
                "write JSON, such as '{\"enable_thinking\": false}'."
            )
        for problem in find_chat_template_problems(self.chat_template_kwargs):
            raise ValueError(problem)
        for name in ("num_generations", "max_completion_length", "batch_size", "reward_batch_size", "max_prompts"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}. Policies are sampled.")

    @property
    def has_judges(self) -> bool:
        return bool(self.reward_model_name_or_path or self.reward_funcs or self.preference_funcs)

    @property
    def sampling(self) -> Sampling:
        return Sampling(**{each.name: getattr(self, each.name) for each in fields(Sampling)})

    def load_panel(self, prompt: Any, columns: Iterable[str], chat_template_kwargs: dict[str, Any] | None) -> Panel:
        """The judges, for prompts like this one with these columns. Raises `ValueError` if there are none."""
        if not self.has_judges:
            raise ValueError(
                "no judge given. Pass --reward_model_name_or_path, --reward_funcs or --preference_funcs, ideally a "
                "judge that the policy was not trained on."
            )
        return load_panel(
            [*(self.reward_model_name_or_path or []), *load_reward_funcs(self.reward_funcs or [])],
            load_preference_funcs(self.preference_funcs or []),
            conversational=is_conversational({"prompt": prompt}),
            trust_remote_code=self.reward_trust_remote_code or (),
            both_orders=self.both_orders,
            batch_size=self.reward_batch_size,
            columns=list(columns),
            chat_template_kwargs=chat_template_kwargs,
        )

    def load_prompts(self) -> Dataset:
        """Load the prompts. Raises `ValueError` if there are none."""
        if self.dataset_name is None:
            raise ValueError("no prompts given. Pass --dataset_name: a folder, a file, or an id on the hub.")
        source = dataset_source(self.dataset_name, self.dataset_config)
        try:
            prompts: Any = load_dataset(**source, split=self.dataset_test_split)
            if len(prompts) == 0:
                raise StopIteration
        except (OSError, ValueError, StopIteration, DatasetGenerationError) as error:  # a file may be empty
            raise ValueError(
                f"dataset_name={self.dataset_name!r} with dataset_test_split={self.dataset_test_split!r} cannot be "
                f"loaded: {error.__cause__ or error or 'it is empty'}. Check the path, and name an existing split, "
                "such as --dataset_test_split train."
            ) from error
        if "prompt" not in prompts.column_names:
            raise ValueError(
                f"dataset_name={self.dataset_name!r} has no column 'prompt'. It has {prompts.column_names}. "
                f"{how_to_make_prompts(next(iter(prompts), {}))}"
            )
        if "prompts" in prompts.column_names and self.reward_funcs:
            raise ValueError(
                f"dataset_name={self.dataset_name!r} has a column 'prompts', but reward functions receive all prompts "
                "under this name. Rename or remove the column."
            )
        images = [name for name in prompts.column_names if name in IMAGES or "Image(" in str(prompts.features[name])]
        if images:
            raise ValueError(
                f"dataset_name={self.dataset_name!r} has images (column {images[0]!r}). This command samples from "
                "text only. Evaluate during training (eval_strategy), or pass files of completions."
            )
        return prompts.select(range(min(len(prompts), self.max_prompts or len(prompts))))


def parse(kind: Any, prog: str, argv: list[str], defaults: dict[str, Any] | None = None) -> Any:
    """Options of a command as a `kind`, from a YAML file (`--config`) and the command line, over `defaults`."""
    parser = _Parser((kind,), prog=prog, allow_abbrev=False)
    parser.set_defaults(**(defaults or {}))
    if {"-h", "--help"} & set(argv):
        parser.print_help()
        raise SystemExit(0)
    parsed: Any = parser.parse_args_and_config(split_config(argv), return_remaining_strings=True)
    args, remaining = parsed
    if remaining:
        unknown = next((token for token in remaining if token.startswith("--")), remaining[0])
        raise ValueError(f"command line: {unknown!r} is no option of `{prog}`. See its --help.")
    for name in ("reward_model_name_or_path", "reward_funcs", "preference_funcs"):
        if isinstance(getattr(args, name, None), str):
            setattr(args, name, [getattr(args, name)])
    return args


def run_and_options(argv: list[str], prog: str) -> tuple[Path, list[str]]:
    """Split off the folder of the run, which comes first. Raises `ValueError` if it is missing or no folder."""
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help")):
        raise ValueError(f"no run given. Pass the output directory of a run first: {prog} RUN.")
    if argv[0] in ("-h", "--help"):
        return Path(), argv
    run = Path(argv[0])
    if not run.is_dir():
        raise ValueError(f"{argv[0]!r} is not a folder. Pass the output directory of a run.")
    return run, argv[1:]


def check_matplotlib(prog: str) -> None:
    if find_spec("matplotlib") is None:
        raise ImportError(
            f"`{prog}` needs matplotlib, which is not installed. Install it with `pip install 'trl-sppo[report]'`."
        )
