"""`trl-sppo eval`: one policy against another, on the same prompts, under one or several judges."""

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError
from trl.data_utils import is_conversational

from .alone import alone_in
from .arguments import check_output_dir
from .checkpoints import write_atomically
from .checks import check_vllm_is_installed, how_to_make_prompts
from .evaluation import WinRate
from .loading import dataset_source
from .opponents import Groups, matched, play_stored, row_of, without_images
from .option_checks import find_chat_template_problems
from .panel import Panel
from .policies import Sampling, check_policy, is_file, load_completions, read_prompts, run_of, sample
from .stored_rollouts import IMAGES, write_parquet
from .train import _Parser, fail, load_preference_funcs, load_reward_funcs, split_config


@dataclass
class JudgeArguments:
    """
    Who judges, and how policies are sampled for it.

    Args:
        reward_model_name_or_path, reward_funcs, preference_funcs (`list[str]`, *optional*):
            Judges, given as in training recipes.
        reward_trust_remote_code (`list[str]`, *optional*):
            Reward models that may run Python code of their own.
        both_orders (`bool`, *optional*, defaults to `True`):
            Whether pairwise oracles are asked for each pair in both orders.
        reward_batch_size (`int`, *optional*, defaults to `16`):
            Completions per forward pass of a reward model.
        dataset_name, dataset_config (`str`, *optional*):
            Dataset with a `"prompt"` column.
        dataset_test_split (`str`, *optional*, defaults to `"test"`):
            Its split.
        max_prompts (`int`, *optional*):
            Use the first so many prompts only.
        num_generations (`int`, *optional*, defaults to `4`):
            Completions per prompt of each policy.
        max_completion_length (`int`, *optional*, defaults to `1024`):
            Their length limit, in tokens.
        temperature (`float`, *optional*, defaults to `0.8`):
            Sampling temperature.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the sampling.
        batch_size (`int`, *optional*, defaults to `64`):
            Completions sampled at the same time by transformers.
        use_vllm (`bool`, *optional*, defaults to `False`):
            Whether vLLM samples.
        vllm_gpu_memory_utilization (`float`, *optional*, defaults to `0.5`):
            Share of the GPU's memory that it takes.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether the policies may run Python code of their own.
        chat_template_kwargs (`dict`, *optional*):
            Further arguments of the chat templates of policies and reward models. By default those of the run that a
            policy is of.
    """

    reward_model_name_or_path: list[str] | None = field(default=None, metadata={"help": "Reward models that judge."})
    reward_funcs: list[str] | None = field(default=None, metadata={"help": "Reward functions that judge."})
    preference_funcs: list[str] | None = field(default=None, metadata={"help": "Pairwise oracles that judge."})
    reward_trust_remote_code: list[str] | None = field(
        default=None, metadata={"help": "Reward models that may run Python code of their own."}
    )
    both_orders: bool = field(default=True, metadata={"help": "Ask pairwise oracles for each pair in both orders."})
    reward_batch_size: int = field(default=16, metadata={"help": "Completions per forward pass of a reward model."})
    dataset_name: str | None = field(default=None, metadata={"help": "Dataset with a 'prompt' column."})
    dataset_config: str | None = field(default=None, metadata={"help": "Its configuration."})
    dataset_test_split: str = field(default="test", metadata={"help": "Its split."})
    max_prompts: int | None = field(default=None, metadata={"help": "Use the first so many prompts only."})
    num_generations: int = field(default=4, metadata={"help": "Completions per prompt of each policy."})
    max_completion_length: int = field(default=1024, metadata={"help": "Their length limit, in tokens."})
    temperature: float = field(default=0.8, metadata={"help": "Sampling temperature."})
    seed: int = field(default=0, metadata={"help": "Seed of the sampling."})
    batch_size: int = field(default=64, metadata={"help": "Completions sampled at the same time by transformers."})
    use_vllm: bool = field(default=False, metadata={"help": "Let vLLM sample."})
    vllm_gpu_memory_utilization: float = field(
        default=0.5, metadata={"help": "Share of the GPU's memory that vLLM takes."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Whether the policies may run Python code of their own."}
    )
    chat_template_kwargs: dict | str | None = field(
        default=None,
        metadata={
            "help": "Further arguments of chat templates, as JSON on the command line. By default those of the run "
            "that a policy is of."
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
                "it is JSON, such as '{\"enable_thinking\": false}'."
            )
        for problem in find_chat_template_problems(self.chat_template_kwargs):
            raise ValueError(problem)
        for name in ("num_generations", "max_completion_length", "batch_size", "reward_batch_size", "max_prompts"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}: policies are sampled.")

    @property
    def has_judges(self) -> bool:
        return bool(self.reward_model_name_or_path or self.reward_funcs or self.preference_funcs)

    @property
    def sampling(self) -> Sampling:
        return Sampling(
            num_generations=self.num_generations,
            max_completion_length=self.max_completion_length,
            temperature=self.temperature,
            seed=self.seed,
            batch_size=self.batch_size,
            use_vllm=self.use_vllm,
            vllm_gpu_memory_utilization=self.vllm_gpu_memory_utilization,
            trust_remote_code=self.trust_remote_code,
            chat_template_kwargs=cast(Any, self.chat_template_kwargs),
        )

    def load_panel(self, prompt: Any, columns: Iterable[str], chat_template_kwargs: dict[str, Any] | None) -> Panel:
        """
        The judges.

        Args:
            prompt (`str` or `list[dict]`):
                One of the prompts.
            columns (iterable of `str`):
                Columns of the prompts.
            chat_template_kwargs (`dict`, *optional*):
                Further arguments of the chat templates of reward models.

        Returns:
            [`Panel`].

        Raises:
            `ValueError`: if there are none, or one could not be asked.
        """
        if not self.has_judges:
            raise ValueError(
                "nobody judges: give --reward_model_name_or_path, --reward_funcs or --preference_funcs; at best one "
                "that the policy was not trained on."
            )
        return Panel(
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
        """The prompts. Raises `ValueError` if there are none."""
        if self.dataset_name is None:
            raise ValueError("no prompts: give --dataset_name, a folder, a file, or an id on the hub.")
        source = dataset_source(self.dataset_name, self.dataset_config)
        try:
            prompts: Any = load_dataset(**source, split=self.dataset_test_split)
            if len(prompts) == 0:
                raise StopIteration
        except (OSError, ValueError, StopIteration, DatasetGenerationError) as error:  # a file may be empty
            raise ValueError(
                f"dataset_name={self.dataset_name!r} with dataset_test_split={self.dataset_test_split!r} cannot be "
                f"loaded: {error.__cause__ or error or 'it is empty'}. Check the path, and name a split that it has, "
                "such as --dataset_test_split train."
            ) from error
        if "prompt" not in prompts.column_names:
            raise ValueError(
                f"dataset_name={self.dataset_name!r} has no column 'prompt', but {prompts.column_names}. "
                f"{how_to_make_prompts(next(iter(prompts), {}))}"
            )
        if "prompts" in prompts.column_names and self.reward_funcs:
            raise ValueError(
                f"dataset_name={self.dataset_name!r} has a column 'prompts', but reward functions get all prompts "
                "under this name. Rename or remove the column."
            )
        images = [name for name in prompts.column_names if name in IMAGES or "Image(" in str(prompts.features[name])]
        if images:
            raise ValueError(
                f"dataset_name={self.dataset_name!r} has images (column {images[0]!r}), and policies are sampled here "
                "from texts only. Evaluate during the training (eval_strategy), or give files of completions."
            )
        return prompts.select(range(min(len(prompts), self.max_prompts or len(prompts))))


@dataclass
class EvalArguments(JudgeArguments):
    """
    Arguments of `trl-sppo eval`, besides those of [`JudgeArguments`].

    Args:
        model_name_or_path (`str`):
            Policy: a model, an adapter, or a file of completions.
        opponent_name_or_path (`str`):
            Its opponent, likewise.
        output_dir (`str`, *optional*, defaults to `"eval"`):
            Folder for the completions and the results.
        at_least (`float`, *optional*):
            The command ends with status 1 if the lower bound of a win rate is below this.
    """

    model_name_or_path: str = field(
        default="", metadata={"help": "Policy: a model, an adapter, or a file of completions."}
    )
    opponent_name_or_path: str = field(default="", metadata={"help": "Its opponent, likewise."})
    output_dir: str = field(default="eval", metadata={"help": "Folder for the completions and the results."})
    at_least: float | None = field(
        default=None, metadata={"help": "End with status 1 if the lower bound of a win rate is below this."}
    )


def parse(kind: Any, prog: str, argv: list[str], defaults: dict[str, Any] | None = None) -> Any:
    """
    Options of a command, from a YAML file (`--config`) and the command line.

    Args:
        kind (dataclass):
            The options.
        prog (`str`):
            Name of the command.
        argv (`list[str]`):
            Arguments.
        defaults (`dict`, *optional*):
            Values of what neither says.

    Returns:
        An instance of `kind`.

    Raises:
        `ValueError`: for what is unknown or contradictory.
    """
    parser = _Parser((kind,), prog=prog, allow_abbrev=False)
    parser.set_defaults(**(defaults or {}))
    if {"-h", "--help"} & set(argv):
        parser.print_help()
        raise SystemExit(0)
    args, *remaining = parser.parse_args_and_config(split_config(argv), return_remaining_strings=True)
    unknown = [token for token in remaining[-1] if token.startswith("--")] if remaining else []
    if unknown or (remaining and remaining[-1]):
        raise ValueError(f"command line: {(unknown or remaining[-1])[0]!r} is no option of `{prog}`. See its --help.")
    for name in ("reward_model_name_or_path", "reward_funcs", "preference_funcs"):
        if isinstance(getattr(args, name, None), str):
            setattr(args, name, [getattr(args, name)])
    return args


def main(argv: list[str]) -> int:
    """Run `trl-sppo eval` and return its exit status."""
    try:
        args = parse(EvalArguments, "trl-sppo eval", argv)
        results = evaluate(args)
    except (ValueError, ImportError, OSError) as error:
        fail(error)
    low = min(plain.low for plain, _ in results.values())
    if args.at_least is not None and low < args.at_least:
        print(f"The lowest bound is {low:.3f}, below --at_least {args.at_least}.", file=sys.stderr)
        return 1
    return 0


def evaluate(args: EvalArguments) -> dict[str, tuple[WinRate, WinRate]]:
    """
    Compare two policies, write completions and results to `args.output_dir`, and print a table.

    Args:
        args ([`EvalArguments`]):
            Options.

    Returns:
        `dict`: by judge, the win rate and the length-controlled win rate.

    Raises:
        `ValueError`: for what could not be compared, before a model is loaded if that can be known.
    """
    if args.use_vllm:
        check_vllm_is_installed()
    for name in ("model_name_or_path", "opponent_name_or_path"):
        if not getattr(args, name):
            raise ValueError(f"{name} is missing: give a model, an adapter, or a file of completions.")
        check_policy(getattr(args, name), args.trust_remote_code, args.use_vllm)
    check_output_dir(args.output_dir)
    for name in ("model_name_or_path", "opponent_name_or_path"):
        if Path(getattr(args, name)).resolve().parent == Path(args.output_dir).resolve():
            raise ValueError(
                f"{name}={getattr(args, name)!r} lies in output_dir={args.output_dir!r}, where files would be written "
                "over. Give another output_dir."
            )
    sides = {"model": args.model_name_or_path, "opponent": args.opponent_name_or_path}
    players = _read(sides)
    first = next(iter(players.values()), None)
    prompts = args.load_prompts() if first is None else prompts_of(first[: args.max_prompts])
    players = {side: groups[: len(prompts)] for side, groups in players.items()}
    templates = _chat_template_kwargs(args, sides, prompts["prompt"][0])
    for side in (side for side in sides if side not in players):  # before anything is sampled
        read_prompts(sides[side], prompts, replace(args.sampling, chat_template_kwargs=templates[side]))
    panel = None
    if args.has_judges or not (len(players) == 2 and all("scores" in g for each in players.values() for g in each)):
        columns = [set(prompts.column_names), *(set(row_of(groups[0])) for groups in players.values())]
        template = next((each for each in templates.values() if each), None)
        panel = args.load_panel(prompts["prompt"][0], set.intersection(*columns), template)
        panel.check_prompts(prompts["prompt"])
    with alone_in(args.output_dir):
        return _play(args, sides, prompts, players, templates, panel)


def _play(
    args: EvalArguments,
    sides: dict[str, str],
    prompts: Dataset,
    players: dict[str, Groups],
    templates: dict[str, Any],
    panel: Panel | None,
) -> dict[str, tuple[WinRate, WinRate]]:
    folder = Path(args.output_dir)
    sampled: dict[str, Path] = {}
    try:
        for number, (side, policy) in enumerate(sides.items()):
            if side not in players:
                # Other random numbers for each: a sample must not meet its twin
                sampling = replace(args.sampling, seed=args.seed + number, chat_template_kwargs=templates[side])
                players[side] = sample(policy, prompts, sampling)
                (folder / "win_rates.json").unlink(missing_ok=True)  # of other completions
                write_groups(folder / f"{side}.parquet", players[side])
                sampled[side] = folder / f"{side}.parquet"
            if panel is not None:
                panel.score(players[side])
        players = {side: players[side] for side in sides}
        unit = _unit_of_lengths(players)
        results = panel.compare(*players.values()) if panel is not None else play_stored(*players.values())
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted. {_kept(sampled)}".strip()) from None
    except Exception as error:  # of a judge, or for memory: what was sampled is not lost
        said = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}."
        raise ValueError(f"{said} {_kept(sampled)}".strip()) from error
    for side, groups in players.items():
        write_groups(folder / f"{side}.parquet", groups)
    if not results:
        raise ValueError("no judge has given both policies a score: there is nothing to compare.")
    lengths = {side: _mean_length(groups) for side, groups in players.items()}
    table = {
        judge: {"win_rate": vars(plain), "length_controlled": vars(controlled)}
        for judge, (plain, controlled) in results.items()
    }
    facts = {**sides, "mean_length": lengths, "unit_of_length": unit, "num_prompts": len(prompts), "win_rates": table}
    write_atomically(folder / "win_rates.json", json.dumps(facts, indent=2) + "\n")
    for side, policy in sides.items():
        size = sum(len(group["completions"]) for group in players[side])
        print(
            f"{side:9} {policy} ({size} completions of {len(prompts)} prompts, {lengths[side]:.1f} {unit} on average)"
        )
    print_table(results)
    print(f"Saved in {folder}: win_rates.json, model.parquet, opponent.parquet.")
    return results


def print_table(results: dict[str, tuple[WinRate, WinRate]]) -> None:
    """Print win rates by judge, with their intervals."""
    width = max(map(len, ["judge", *results])) + 2
    print(f"\n{'judge':{width}}{'win rate, 95 % interval':28}length-controlled")
    for judge, (plain, controlled) in results.items():
        print(f"{judge:{width}}{plain!s:28}{controlled}")
    print()


def _read(sides: dict[str, str]) -> dict[str, Groups]:
    """The completions of the sides that are files, of the rows that both have if both are."""
    files = {side: load_completions(policy) for side, policy in sides.items() if is_file(policy)}
    if len(files) < 2:
        return files
    found = matched(*files.values())
    if not found[0]:
        raise ValueError("the two files of completions have no prompt in common.")
    left_out = sum(map(len, files.values())) - sum(map(len, found))
    if left_out:
        print(f"{left_out} rows are left out: their prompts are in one file only.", file=sys.stderr)
    return dict(zip(files, found, strict=True))


def _chat_template_kwargs(args: EvalArguments, sides: dict[str, str], prompt: Any) -> dict[str, Any]:
    """
    How each side's prompts are rendered: as the option says, or else as in the side's training, or else as in that of
    the other side.
    """
    given: Any = args.chat_template_kwargs
    if given is not None:
        return dict.fromkeys(sides, given)
    runs = {side: run_of(policy) for side, policy in sides.items() if not is_file(policy)}
    known = {side: run["config"].get("chat_template_kwargs") for side, run in runs.items() if run}
    found = {side: known.get(side, next(iter(known.values()), None)) for side in runs}
    if is_conversational({"prompt": prompt}):
        texts = [f"{json.dumps(value)} for {side}" for side, value in found.items()]
        if len({json.dumps(value, sort_keys=True) for value in found.values()}) > 1:
            print(
                f"The two policies were trained with different chat_template_kwargs: {' and '.join(texts)}. Each is "
                "prompted as it was trained, and reward models as the first. Give --chat_template_kwargs for the same "
                "prompts.",
                file=sys.stderr,
            )
        elif len(known) == 1 < len(found) and any(found.values()):
            print(
                f"No training of {next(side for side in found if side not in known)} is known: it is prompted with "
                f"chat_template_kwargs={texts[0].split(' for ')[0]}, as the other policy was in its training. Give "
                "--chat_template_kwargs for other prompts.",
                file=sys.stderr,
            )
    return found


def _unit_of_lengths(players: dict[str, Groups]) -> str:
    """Tokens; or words on both sides, which are counted here, if a side does not say."""
    groups = [group for each in players.values() for group in each]
    if all("lengths" in group for group in groups):
        return "tokens"
    for group in groups:
        group["lengths"] = [_words(completion) for completion in group["completions"]]
    return "words"


def write_groups(path: Path, groups: Groups) -> None:
    """Write completions as Parquet, without images."""
    write_parquet(path, [without_images(group) for group in groups], None)


def _kept(sampled: dict[str, Path]) -> str:
    if not sampled:
        return ""
    options = " and ".join(f"--{side}_name_or_path {path}" for side, path in sampled.items())
    return f"The completions are kept: {options}, with another --output_dir, goes on from them."


def prompts_of(groups: Groups) -> Dataset:
    """The rows of the dataset that completions are of."""
    return Dataset.from_list([row_of(group) for group in groups])


def _words(completion: Any) -> int:
    """The length of a completion whose tokens nobody knows."""
    text = completion if isinstance(completion, str) else " ".join(message["content"] for message in completion)
    return len(text.split())


def _mean_length(groups: Groups) -> float:
    lengths = [length for group in groups for length in group["lengths"]]
    return sum(lengths) / len(lengths)
