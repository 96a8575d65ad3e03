"""What the policies of a run answer to the evaluation prompts, kept, so that later ones play against earlier ones."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet
import torch
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Features
from transformers.utils import logging
from trl.data_utils import is_conversational

from .comparisons import PreferenceFunc, ask_oracle
from .evaluation import WinRate, length_controlled_win_rate, outcomes_of_scores, win_rate
from .stored_rollouts import (
    COLUMNS,
    IMAGES,
    installed_versions,
    key_of,
    to_lists,
    to_tensor,
    unused,
    write_parquet,
)


logger = logging.get_logger(__name__)

# Columns of the dataset with these names are in a group's "dataset_columns": its own have them, or files no place
TAKEN = (*COLUMNS, *IMAGES, "lengths", "dataset_columns")
FOLDER = "evaluations"  # in the output directory
NO_PROMPT = [{"role": "user", "content": ""}]  # TRL's, of a dataset that leaves prompts to its environments

Groups = list[dict[str, Any]]


def group_of(row: dict[str, Any], **own: Any) -> dict[str, Any]:
    """A row of the dataset as a group, with columns of the group's own."""
    taken = {name: value for name, value in row.items() if name in TAKEN}
    free = {name: value for name, value in row.items() if name not in TAKEN}
    return {**free, **({"dataset_columns": taken} if taken else {}), **own}


def row_of(group: dict[str, Any]) -> dict[str, Any]:
    """The row of the dataset that a group is of, which judges get."""
    free = {name: value for name, value in group.items() if name not in TAKEN}
    return {**free, **(group.get("dataset_columns") or {})}


def without_images(group: dict[str, Any]) -> dict[str, Any]:
    """A group as it is written. Images are large."""
    kept = {name: value for name, value in group.get("dataset_columns", {}).items() if name not in IMAGES}
    return {
        **{name: value for name, value in group.items() if name != "dataset_columns"},
        **({"dataset_columns": kept} if kept else {}),  # Parquet has no place for an empty table
    }


def with_json(group: dict[str, Any]) -> dict[str, Any]:
    """A group with completions as JSON: tools make messages of many shapes, which Parquet cannot hold."""
    return {**group, "completions": [json.dumps(completion, default=str) for completion in group["completions"]]}


def with_messages(group: dict[str, Any]) -> dict[str, Any]:
    """A group with messages again, if `with_json` has written it."""
    texts = group["completions"]
    if not is_conversational({"prompt": group.get("prompt")}) or not all(str(text)[:3] == '[{"' for text in texts):
        return group
    return {**group, "completions": [json.loads(text) for text in texts]}


class EvaluationFiles:
    """
    The evaluations in an output directory: a file for each, a folder for each evaluation set if there are several.

    Args:
        output_dir (`str`):
            Folder of the run.
    """

    def __init__(self, output_dir: str):
        self.folder = Path(output_dir) / FOLDER

    def path(self, name: str, step: int) -> Path:
        return self.folder / name / f"step-{step:06d}.parquet"

    def steps(self, name: str) -> list[int]:
        """Optimizer steps at which there is an evaluation, in order."""
        return sorted(int(path.stem.split("-")[1]) for path in (self.folder / name).glob("step-*.parquet"))

    def names(self) -> list[str]:
        """The evaluation sets: `"."` if there is only one."""
        return sorted({str(path.parent.relative_to(self.folder)) for path in self.folder.rglob("step-*.parquet")})

    def read(self, name: str, step: int) -> Groups | None:
        """The rows of an evaluation, or `None` if there is none."""
        path = self.path(name, step)
        return [*map(with_messages, pyarrow.parquet.read_table(path).to_pylist())] if path.is_file() else None

    def set_aside(self) -> None:
        """Move what an earlier run has left here, so that the two are not mixed up."""
        if self.folder.exists():
            aside = unused(self.folder)
            self.folder.rename(aside)
            logger.warning(f"{self.folder} holds evaluations of an earlier run: they are now in {aside}.")

    def rotate(self, step: int, limit: int | None) -> None:
        """Of those up to a checkpoint at this step, keep the first and the last `limit`."""
        if limit is not None:
            for name in self.names():
                for old in [each for each in self.steps(name) if each <= step][1:-limit]:
                    self.path(name, old).unlink()


class Opponents:
    """
    Lets each evaluation of a training play against the first one and the one before, without sampling those again.

    For each evaluation the trainer calls, on all processes: `begin`, `add` for each batch, `finish`.

    Args:
        trainer:
            An [`SPPOTrainer`].
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.args = trainer.args
        self.files = EvaluationFiles(self.args.output_dir)
        self._memory: dict[tuple[str, int], Groups] = {}  # the first and the last of each evaluation set
        self.forget()

    def forget(self) -> None:
        """Of an earlier training of this trainer."""
        self._memory.clear()
        self._groups: Groups = []
        self._elsewhere: EvaluationFiles | None = None

    def resume_from(self, checkpoint: str) -> None:
        """Look for earlier evaluations beside this checkpoint too, which may be in another run's folder."""
        self._elsewhere = EvaluationFiles(str(Path(checkpoint).parent))

    def begin(self, name: str, num_prompts: int | None) -> None:
        """
        Begin an evaluation.

        Args:
            name (`str`):
                Of the evaluation set, `""` if there is only one.
            num_prompts (`int`, *optional*):
                How many it has, if that is known. Several processes may see some of them again at its end.
        """
        self._name, self._num_prompts, self._groups = name, num_prompts, []

    def add(
        self, rows: Sequence[dict[str, Any]], completions: Sequence[Any], lengths: torch.Tensor, scores: dict
    ) -> None:
        """
        Add a batch.

        Args:
            rows (sequence of `dict`), completions (sequence):
                This process's rows of the dataset and their completions.
            lengths (`torch.Tensor` of shape `(groups, K)`):
                Tokens of the completions of all processes.
            scores (`dict[str, torch.Tensor]` of shape `(groups, K)`):
                By reward source.
        """
        size = lengths.size(1)
        # Images are for oracles, and gathered only if there are any: they are large
        has_oracles = bool(self.trainer.preference_funcs or self.trainer.eval_preference_funcs)
        names = [name for name in rows[0] if has_oracles or name not in IMAGES]
        prompts = gather_object([{name: row[name] for name in names} for row in rows])[::size]
        texts = gather_object(list(completions))
        for g, prompt in enumerate(prompts):
            # Parquet has no place for an empty table
            judged = {"scores": {name: to_lists(values[g]) for name, values in scores.items()}} if scores else {}
            self._groups.append(group_of(
                {"prompt": NO_PROMPT, **prompt},
                step=self.trainer.state.global_step,
                completions=texts[g * size : (g + 1) * size],
                lengths=lengths[g].int().tolist(),
                **judged,
                policy=self.trainer.policy_name,
                versions=installed_versions(self.args.use_vllm),
            ))  # fmt: skip

    @property
    def _as_json(self) -> bool:
        """Whether completions are messages of many shapes, which tools and environments bring."""
        return bool(self.trainer.tools or self.trainer.environment_factories)

    def finish(self) -> dict[str, float]:
        """
        Play against the opponents, and keep the answers for the next evaluation.

        Returns:
            `dict[str, float]`: metrics.
        """
        groups, self._groups = self._groups[: self._num_prompts], []
        trainer, step = self.trainer, self.trainer.state.global_step
        steps = trainer._evaluated.get(self._name, [])
        earlier = [each for each in steps if each < step]
        metrics: dict[str, float] = {}
        results: dict[int, dict[str, float]] = {}
        if 0 not in earlier and step > 0 and trainer.is_in_train:
            logger.warning_once(
                "there are no win rates against the initial policy: this training has no evaluation of it, which an "
                "earlier version, or a run without evaluations, has left out."
            )
        for label, opponent in (("initial", earlier[:1]), ("previous", earlier[-1:])):
            if opponent and (label == "previous" or opponent == [0]):
                if opponent[0] not in results:
                    results[opponent[0]] = self._play(groups, self._get(self._name, opponent[0]))
                metrics |= {f"win_rate_vs_{label}/{name}": value for name, value in results[opponent[0]].items()}
        if trainer.is_in_train:
            self._keep(groups, step, steps)
        return metrics

    def _keep(self, groups: Groups, step: int, steps: list[int]) -> None:
        name = self._name
        groups = [without_images(group) for group in groups]
        self.trainer._evaluated[name] = [*(each for each in steps if each < step), step]
        kept = {(name, steps[0] if steps else step)}
        self._memory = {key: value for key, value in self._memory.items() if key[0] != name or key in kept}
        self._memory[name, step] = groups
        if self.args.save_rollouts and self.trainer.is_world_process_zero():
            dataset = self.trainer.eval_dataset
            dataset = dataset.get(name) if isinstance(dataset, dict) else dataset
            features = getattr(dataset, "features", None) or {}
            taken = {column: kind for column, kind in features.items() if column in TAKEN and column not in IMAGES}
            features = Features({column: kind for column, kind in features.items() if column not in TAKEN})
            if taken:
                features["dataset_columns"] = taken
            if self._as_json:
                groups = [*map(with_json, groups)]
            write_parquet(self.files.path(name, step), groups, features)

    def _get(self, name: str, step: int) -> Groups | None:
        if (name, step) not in self._memory:
            found = None
            if self.trainer.is_world_process_zero():
                found = self.files.read(name, step) or (self._elsewhere and self._elsewhere.read(name, step))
            found = broadcast_object_list([found])[0]
            if found is None:
                logger.warning_once(
                    f"{self.files.path(name, step)} is missing, so there are no win rates against the policy of step "
                    f"{step}."
                )
                return None
            self._memory[name, step] = found
        return self._memory[name, step]

    def _play(self, groups: Groups, opponents: Groups | None) -> dict[str, float]:
        if opponents is None:
            return {}
        keys = {key_of(group["prompt"]) for group in opponents}
        if not any(key_of(group["prompt"]) in keys for group in groups):
            logger.warning_once("this evaluation has none of the prompts of the one before: no win rates against it.")
            return {}
        trainer = self.trainer
        oracles = [*trainer.preference_funcs, *trainer.eval_preference_funcs]
        names = [*trainer.preference_func_names, *trainer.eval_preference_func_names]
        results = play(
            groups,
            opponents,
            dict(zip(names, oracles, strict=True)),
            both_orders=self.args.both_orders,
            batch_size=self.args.preference_batch_size,
            accelerator=trainer.accelerator,
            log_metric=trainer._log_metric,
            disable_tqdm=bool(self.args.disable_tqdm),
        )
        metrics: dict[str, float] = {}
        for judge, (plain, controlled) in results.items():
            metrics |= {judge: plain.mean, f"{judge}/low": plain.low, f"{judge}/high": plain.high}
            metrics[f"{judge}/length_controlled"] = controlled.mean
        lengths = torch.tensor([group["lengths"] for group in opponents]).float()
        return {**metrics, "opponent_mean_length": lengths.mean().item()}


def play_stored(groups: Groups, opponents: Groups) -> dict[str, tuple[WinRate, WinRate]]:
    """
    Play one policy's completions against another's, on the same prompts, by the scores that they have.

    Args:
        groups, opponents (`list[dict]`):
            P rows each, with `"lengths"`, and `"scores"` by source.

    Returns:
        `dict`: for each source that scored both, the win rate and the length-controlled win rate. One that has scored
        nothing is left out.
    """
    groups, opponents = aligned(groups, opponents)
    return _rates(_outcomes(groups, opponents), groups, opponents)


def aligned(groups: Groups, opponents: Groups) -> tuple[Groups, Groups]:
    """
    The rows of two policies that play against each other, in the order of the first.

    Rows play against each other if they have the same prompt, each with one. Of several rows of a prompt, those play
    against each other that are equal in the other columns of the dataset, as far as both sides have them; what is left
    does so in its order.

    Args:
        groups, opponents (`list[dict]`):
            Rows with `"prompt"`.

    Returns:
        Two lists of rows of the same length.

    Raises:
        `ValueError`: if there are none.
    """
    ours, theirs = matched(groups, opponents)
    if not ours:
        raise ValueError("two policies have answered no prompt in common, so they cannot play against each other.")
    if len(ours) < max(len(groups), len(opponents)):
        logger.warning(f"two policies play on the {len(ours)} prompts that both have answered.")
    return ours, theirs


def matched(groups: Groups, opponents: Groups) -> tuple[Groups, Groups]:
    """See [`aligned`]: possibly no rows, and nothing is said of those left out."""
    waiting: dict[str, Groups] = {}
    for group in opponents:
        waiting.setdefault(key_of(group["prompt"]), []).append(group)
    found: dict[int, dict[str, Any]] = {}
    for strictly in (True, False):
        for i, group in enumerate(groups):
            rivals = waiting.get(key_of(group["prompt"]), []) if i not in found else []
            place = next((k for k, each in enumerate(rivals) if not strictly or _same_columns(group, each)), None)
            if place is not None:
                found[i] = rivals.pop(place)
    return [groups[i] for i in sorted(found)], [found[i] for i in sorted(found)]


def _same_columns(group: dict[str, Any], other: dict[str, Any]) -> bool:
    ours, theirs = row_of(group), row_of(other)
    return all(
        key_of(ours[name]) == key_of(theirs[name]) for name in ours.keys() & theirs.keys() - {"prompt", *IMAGES}
    )


def _outcomes(groups: Groups, opponents: Groups) -> dict[str, torch.Tensor]:
    outcomes = {}
    for name in groups[0].get("scores", ()):
        if name in opponents[0].get("scores", ()):
            scores = (to_tensor([group["scores"][name] for group in each]) for each in (groups, opponents))
            outcomes[name] = outcomes_of_scores(*scores)
    return outcomes


def _rates(outcomes: dict[str, torch.Tensor], groups: Groups, opponents: Groups) -> dict[str, tuple[WinRate, WinRate]]:
    ours, theirs = (torch.tensor([group["lengths"] for group in each]).float() for each in (groups, opponents))
    return {
        name: (win_rate(outcome), length_controlled_win_rate(outcome, ours, theirs))
        for name, outcome in outcomes.items()
        if not outcome.isnan().all()
    }


def play(
    groups: Groups,
    opponents: Groups,
    oracles: dict[str, PreferenceFunc],
    *,
    both_orders: bool,
    batch_size: int,
    accelerator: Any,
    log_metric: Callable[[str, float], None],
    disable_tqdm: bool,
) -> dict[str, tuple[WinRate, WinRate]]:
    """
    Play one policy's completions against another's, on the same prompts.

    Args:
        groups, opponents (`list[dict]`):
            P rows each, with `"prompt"`, `"completions"`, `"lengths"` and `"scores"` by source, and further columns,
            which oracles get.
        oracles (`dict`):
            Pairwise oracles by name, which compare every completion with every one of the opponent's.
        both_orders, batch_size, accelerator, log_metric, disable_tqdm:
            See [`~comparisons.ask_oracle`].

    Returns:
        `dict`: for each judge (the sources that scored both, then the oracles) the win rate and the length-controlled
        win rate. A judge that says nothing is left out.
    """
    groups, opponents = aligned(groups, opponents)
    outcomes = _outcomes(groups, opponents)
    size = len(groups[0]["completions"])
    total = size + len(opponents[0]["completions"])
    rows = [row_of(group) for group in groups]
    for name, oracle in oracles.items():
        answers = ask_oracle(
            oracle,
            [group["prompt"] for group in groups for _ in range(total)],
            [text for pair in zip(groups, opponents, strict=True) for group in pair for text in group["completions"]],
            {column: [row[column] for row in rows for _ in range(total)] for column in rows[0]},
            group_size=total,
            first_side=size,
            both_orders=both_orders,
            batch_size=batch_size,
            accelerator=accelerator,
            log_metric=log_metric,
            disable_tqdm=disable_tqdm,
        )
        if answers.num_lost:
            logger.warning(
                f"preference_func {name!r}: {answers.num_lost} of {answers.num_asked} comparisons of two policies are "
                f"lost, since {answers.problem}. They take no part in the win rate."
            )
        if answers.num_lost < answers.num_asked or not answers.num_asked:
            outcomes[name] = answers.preferences[:, :size, size:]
    return _rates(outcomes, groups, opponents)
