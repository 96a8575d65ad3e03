"""Options that commands share: judges, datasets, sampling, and the folder of a run."""

import json
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

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


JUDGES = "reward_model_name_or_path", "reward_funcs", "preference_funcs"


@dataclass
class RunArguments:
    """Options of a command on the folder of a run."""

    evaluation_set: str | None = field(default=None, metadata={"help": "Evaluation set. The first by default."})


@dataclass
class JudgeOptions:
    """Options that select judges and a dataset. The metadata describes each."""

    reward_model_name_or_path: list[str] | None = field(default=None, metadata={"help": "Reward models that judge."})
    reward_funcs: list[str] | None = field(default=None, metadata={"help": "Reward functions that judge."})
    preference_funcs: list[str] | None = field(default=None, metadata={"help": "Pairwise oracles that judge."})
    reward_trust_remote_code: list[str] | None = field(
        default=None, metadata={"help": "Reward models whose own Python code may run."}
    )
    reward_batch_size: int = field(default=16, metadata={"help": "Completions per forward pass of a reward model."})
    chat_template_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Arguments of chat templates, as JSON."}
    )
    dataset_name: str | None = field(default=None, metadata={"help": "Folder, file, or id of the dataset."})
    dataset_config: str | None = field(default=None, metadata={"help": "Its configuration."})
    dataset_test_split: str = field(default="test", metadata={"help": "Its split."})

    def __post_init__(self):
        for name in JUDGES:
            if isinstance(getattr(self, name), str):  # a YAML file may give one name instead of a list
                setattr(self, name, [getattr(self, name)])
        if isinstance(self.chat_template_kwargs, str):
            with suppress(ValueError):
                self.chat_template_kwargs = json.loads(self.chat_template_kwargs)
        if not isinstance(self.chat_template_kwargs, dict | None):
            raise ValueError(
                f"chat_template_kwargs must be a mapping, got {self.chat_template_kwargs!r}. On the command line it "
                "is JSON: '{\"enable_thinking\": false}'."
            )
        for problem in find_chat_template_problems(self.chat_template_kwargs):
            raise ValueError(problem)
        self._check_at_least_one("reward_batch_size")

    def _check_at_least_one(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")

    @property
    def has_judges(self) -> bool:
        return any(getattr(self, name) for name in JUDGES)

    def load_panel(
        self, prompt: Any, columns: Iterable[str], template_kwargs: dict[str, Any] | None, both_orders: bool = True
    ) -> Panel:
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
            both_orders=both_orders,
            batch_size=self.reward_batch_size,
            columns=list(columns),
            chat_template_kwargs=template_kwargs,
        )

    def load_rows(self, what: str) -> Any:
        """Load the dataset, which holds `what`. Raises `ValueError` if there is none."""
        if self.dataset_name is None:
            raise ValueError(f"no {what} given. Pass --dataset_name: a folder, a file, or an id on the hub.")
        try:
            return load_dataset(
                **dataset_source(self.dataset_name, self.dataset_config), split=self.dataset_test_split
            )
        except (OSError, ValueError, StopIteration, DatasetGenerationError) as error:  # a file may be empty
            raise ValueError(
                f"dataset_name={self.dataset_name!r} with dataset_test_split={self.dataset_test_split!r} cannot be "
                f"loaded: {str(error.__cause__ or error) or 'it is empty'}. Check the path, and name an existing "
                "split, such as --dataset_test_split train."
            ) from error


@dataclass
class JudgeArguments(Sampling, JudgeOptions):
    """Options that select judges, prompts, and how policies are sampled. The metadata describes each."""

    both_orders: bool = field(default=True, metadata={"help": "Let oracles compare each pair in both orders."})
    max_prompts: int | None = field(default=None, metadata={"help": "Number of prompts. All by default."})

    def __post_init__(self):
        super().__post_init__()
        self._check_at_least_one("num_generations", "max_completion_length", "batch_size", "max_prompts")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}. Policies are sampled.")

    def load_prompts(self) -> Dataset:
        """Load the prompts. Raises `ValueError` if there are none."""
        prompts, name = self.load_rows("prompts"), f"dataset_name={self.dataset_name!r}"
        if len(prompts) == 0 or "prompt" not in prompts.column_names:
            how = how_to_make_prompts(next(iter(prompts), {}))
            raise ValueError(f"{name} needs rows with a column 'prompt'. It has {prompts.column_names}. {how}")
        if has_images(prompts):
            raise ValueError(
                f"{name} has images, and this command samples from text only. Evaluate during training "
                "(eval_strategy), or pass files of completions."
            )
        return prompts.select(range(min(len(prompts), self.max_prompts or len(prompts))))


def has_images(dataset: Dataset) -> bool:
    return bool(set(IMAGES) & set(dataset.column_names)) or "Image(" in str(dataset.features)


def parse(kind: Any, prog: str, argv: list[str], defaults: dict[str, Any] | None = None) -> Any:
    """Options of a command as a `kind`, from a YAML file (`--config`) and the command line, over `defaults`."""
    parser = _Parser((kind,), prog=prog, allow_abbrev=False)
    parser.set_defaults(**(defaults or {}))
    return cast(Any, parser.parse_args_and_config(split_config(argv)))[0]


def parse_run(
    kind: Any, prog: str, argv: list[str], defaults: Callable[[Path], dict[str, Any]] | None = None
) -> tuple[Path, Any]:
    """The folder of the run, which comes first, and the options after it, over the run's `defaults`."""
    if {"-h", "--help"} & set(argv):
        parse(kind, f"{prog} RUN", ["--help"])
    if not argv or not Path(argv[0]).is_dir():
        raise ValueError(
            f"{argv[0] if argv else ''!r} is not a folder. Pass the output directory of a run first: {prog} RUN."
        )
    if find_spec("matplotlib") is None:
        raise ImportError(
            f"`{prog}` needs matplotlib, which is not installed. Install it with `pip install 'trl-sppo[report]'`."
        )
    run = Path(argv[0])
    return run, parse(kind, f"{prog} RUN", argv[1:], defaults(run) if defaults else None)
