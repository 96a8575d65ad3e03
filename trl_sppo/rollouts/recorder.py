"""Recorder of rollouts: writes them as they are made, and returns them when a run is resumed."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from tqdm.auto import tqdm
from transformers.trainer_utils import SaveStrategy
from transformers.utils import logging

from ..oracles.asking import VerdictLog, Verdicts
from ..oracles.voters import preferences_of_sources
from ..rows import IMAGES, ROW, same_prompts, to_lists, to_tensor, without_nulls
from .files import COLUMNS, RolloutFiles, installed_versions
from .targets import RolloutTargets


logger = logging.get_logger(__name__)

# Options, by the beginnings of their names, that do not affect sampling
NEUTRAL = (
    "output_dir", "run_name", "logging_", "log_", "num_completions_to_print", "save_", "eval_", "do_", "report_to",
    "project", "trackio_", "disable_tqdm", "push_to_hub", "hub_", "resume_from_checkpoint", "ignore_data_skip",
    "time_budget", "rollouts", "load_best_model_at_end", "metric_for_best_model", "greater_is_better",
    "judge_token_budget", "preference_batch_size",
    # How an iteration is divided. Its size is generation_batch_size
    "per_device_", "gradient_accumulation_steps", "steps_per_generation",
    # What a machine needs
    "ddp_", "dataloader_", "gradient_checkpointing", "activation_checkpointing", "reward_batch_size",
    "vllm_tensor_parallel_size", "vllm_gpu_memory_utilization",
)  # fmt: skip


class RolloutRecorder:
    """
    Writes the rollouts of a training, and returns them when the run is resumed, or returns the `given` ones of
    `args.rollouts`. For each iteration the trainer calls, on all processes: `begin`, `completion_ids`, `sampled`,
    `scored`, `finish`.
    """

    def __init__(self, trainer: Any, given: Dataset | None):
        self.trainer = trainer
        self.args = trainer.args
        self.accelerator = trainer.accelerator
        self.files = RolloutFiles(self.args.output_dir)
        self.rollouts: Any = given
        self.given = given is not None
        self._writes = self.args.save_rollouts and not self.given
        # The work of tools, environments and a `rollout_func` cannot be repeated from tokens
        repeatable = not (trainer.tools or trainer.environment_factories or trainer.rollout_func)
        self.recalls = self._writes and repeatable and self.args.save_strategy != SaveStrategy.NO
        self._has_warned = False
        self._forget()

    def _forget(self) -> None:
        # One row per group: of the whole rollout, and the same on all processes, if it is given or recalled
        self.groups: list[dict[str, Any]] = []
        self._on_disk: set[str] = set()  # columns of the iteration's file, on the main process
        self._mine: dict[int, dict[str, Any]] = {}  # with all columns, groups with completions of this process
        self._recalled = False

    def begin(self, iteration: int, inputs: Sequence[dict[str, Any]], group_size: int, resumed: bool) -> None:
        """Begin an iteration with this process's rows of the dataset. A resumed run may have sampled it before."""
        self._forget()
        self._iteration, self._inputs, self._group_size = iteration, inputs, group_size
        if self.given:
            # All of the preferences, but only this process's completions
            rows = gather_object([row[ROW] for row in self._first_of_groups(inputs)])
            columns = {"prompt", "preferences", "scores"} & set(self.rollouts.column_names)
            self.groups = self.rollouts.select_columns(list(columns)).select(rows).to_list()
            start = self.accelerator.process_index * len(inputs)
            mine = range(start // group_size, (start + len(inputs) - 1) // group_size + 1)
            self._mine = dict(zip(mine, self.rollouts.select([rows[g] for g in mine]).to_list(), strict=True))
        elif resumed and self.recalls:
            self._recall()

    def _recall(self) -> None:
        prompts = gather_object([row["prompt"] for row in self._first_of_groups(self._inputs)])
        groups = None
        if self.accelerator.is_main_process:
            groups = self.files.read(self._iteration)
            if groups is not None:
                self._on_disk = set(groups[0])
                groups = self.files.with_scored(self._iteration, groups)
                state = self.files.state(self._iteration, scored="win_rates" in groups[0])
                if groups[0]["run"] != self._run() or not same_prompts(groups, prompts) or not state.is_dir():
                    self.files.set_aside(self._iteration)  # before the random states are overwritten
                    groups = None
        self.groups = broadcast_object_list([groups])[0] or []
        self._recalled = bool(self.groups)

    def _run(self) -> str:
        """A hash that is equal for runs whose options sample the same."""
        trainer = self.trainer
        options = {name: value for name, value in self.args.to_dict().items() if not name.startswith(NEUTRAL)}
        options["policy"] = trainer.policy_name
        options["sources"] = [trainer.voters.sources.names, list(trainer.voters.oracles)]
        return hashlib.sha256(json.dumps(options, sort_keys=True, default=str).encode()).hexdigest()[:16]

    def _first_of_groups(self, rows: Sequence[Any]) -> list[Any]:
        """This process's rows, of one per completion, that are the first of their groups."""
        start = self.accelerator.process_index * len(rows)  # a group may straddle processes
        return [row for i, row in enumerate(rows) if (start + i) % self._group_size == 0]

    def _on_main(self, rows: list) -> list:
        """The rows of all processes, on the main one. Of a large rollout they are too many to be everywhere."""
        if self.accelerator.num_processes == 1:
            return rows
        parts: list = [None] * self.accelerator.num_processes
        torch.distributed.gather_object(rows, parts if self.accelerator.is_main_process else None, dst=0)
        return [row for part in parts for row in part or ()]

    def _local(self, name: str) -> list:
        """A column of the groups, an entry for each of this process's completions."""
        start = self.accelerator.process_index * len(self._inputs)
        places = [divmod(start + i, self._group_size) for i in range(len(self._inputs))]
        groups = self._mine if self.given else self.groups
        return [None if groups[g].get(name) is None else groups[g][name][k] for g, k in places]

    @property
    def is_complete(self) -> bool:
        """Whether the iteration was recalled with everything that `SPPOTrainer.rollout` writes."""
        return self._recalled and self.groups[0].get("logps") is not None

    def skip(self) -> None:
        """Pass over an iteration that is complete, with the random state that its sampling led to."""
        self.trainer.load_random_state(self.files.state(self._iteration, scored=True))
        self._forget()

    def completion_ids(self, prompt_ids: list[list[int]]) -> tuple[list[list[int]], list[list[float]] | None] | None:
        """Tokens of this process's completions, and their log-probabilities if vLLM sampled them; or `None`."""
        if not self.groups:
            return None
        known = self._local("completion_ids")
        if None in known:
            texts = zip(self._inputs, prompt_ids, self._local("completions"), strict=True)
            known = [self._tokenize(row["prompt"], ids, completion) for row, ids, completion in texts]
        logps = self._local("sampling_logps")
        return known, None if None in logps or self.given else logps

    def _tokenize(self, prompt: Any, prompt_ids: list[int], completion: Any) -> list[int]:
        """Tokens of a given completion, up to its end."""
        trainer, tokenizer = self.trainer, self.trainer._tokenizer
        if isinstance(completion, str):
            ids = tokenizer(completion, add_special_tokens=False)["input_ids"]
        else:
            messages = [without_nulls(message) for message in completion]
            whole = tokenizer.apply_chat_template(
                [*prompt, *messages], chat_template=trainer.chat_template, tokenize=True, return_dict=True,
                **trainer.chat_template_kwargs,
            )["input_ids"]  # fmt: skip
            if whole[: len(prompt_ids)] != prompt_ids:
                raise ValueError(
                    f"the policy's chat template does not render the completions of rollouts={self.args.rollouts!r} "
                    "after their prompts. Add a column 'completion_ids' with their tokens."
                )
            ids = whole[len(prompt_ids) :]
        ends = [i for i, token in enumerate(ids) if token in trainer.eos_token_ids]
        return ids[: ends[0] + 1] if ends else [*ids, tokenizer.eos_token_id]

    def sampled(
        self,
        prompt_ids: list[list[int]],
        completion_ids: list[list[int]],
        completions: list,
        tool_mask: list[list[int]] | None,
        sampling_logps: list[list[float]] | None,
    ) -> None:
        """Write TRL's samples, an entry per completion of this process, before they are scored."""
        self._lengths = [len(ids) for ids in completion_ids]
        if self._recalled:
            self.trainer.load_random_state(self.files.state(self._iteration, self.is_scored))
        if self._recalled or not self._writes:
            return
        trainer, inputs = self.trainer, self._inputs
        columns = [name for name in inputs[0] if name not in (*COLUMNS, *IMAGES)]
        if trainer.tools or trainer.environment_factories:  # messages of many shapes
            completions = [json.dumps(completion, default=str) for completion in completions]
        samples = [completions, completion_ids, tool_mask, sampling_logps]
        per_row = zip(*(values if values is not None else [None] * len(inputs) for values in samples), strict=True)
        rows = self._on_main(list(per_row))
        prompts = self._on_main(self._first_of_groups(list(zip(inputs, prompt_ids, strict=True))))
        if self.accelerator.is_main_process:
            run, versions = self._run(), installed_versions(self.args.use_vllm)
            for g, (prompt, ids) in enumerate(prompts):
                group = rows[g * self._group_size : (g + 1) * self._group_size]
                texts, tokens, masks, logps = (list(values) for values in zip(*group, strict=True))
                self.groups.append({
                    "iteration": self._iteration,
                    "step": trainer.state.global_step,
                    **{name: prompt[name] for name in columns},
                    "completions": texts,
                    "prompt_ids": ids,
                    "completion_ids": tokens,
                    "tool_mask": None if tool_mask is None else masks,
                    "sampling_logps": None if sampling_logps is None else logps,
                    "policy": trainer.policy_name,
                    "run": run,
                    "versions": versions,
                })  # fmt: skip
            self.files.forget_scored(self._iteration)  # of another run
        self._save_random_state(scored=False)
        self._write()

    @property
    def is_scored(self) -> bool:
        """Whether the iteration was recalled with its scores and preferences."""
        return self._recalled and "win_rates" in self.groups[0]

    def scores(self, names: Sequence[str]) -> torch.Tensor:
        """Recalled scores of these reward sources, of shape `(completions of all processes, sources)`."""
        table = [[group["scores"][name] for group in self.groups] for name in names]
        shape = (len(names), len(self.groups) * self._group_size)
        return to_tensor(table).view(shape).T.to(self.accelerator.device)

    def verdicts(self, name: str) -> torch.Tensor:
        """Recalled verdicts of a pairwise oracle, of shape `(groups, K, K)`."""
        return to_tensor([group["answers"][name] for group in self.groups])

    def verdict_log(self, number: int) -> VerdictLog | None:
        """Where the verdicts of this oracle are written while it is asked."""
        if not self.recalls:
            return None
        folder, process = self.files.state(self._iteration, scored=True), self.accelerator.process_index
        oracle = [*self.trainer.voters.oracles.values()][number]
        return VerdictLog(folder / f"verdicts-{number}-{process}.jsonl", getattr(oracle, "form", ""))

    def scored(self, scores: dict[str, torch.Tensor], verdicts: dict[str, Verdicts], targets: RolloutTargets) -> None:
        """Write scores of shape `(groups, K)` by reward source, and verdicts by pairwise oracle."""
        if self.is_scored or not self._writes:
            return
        if self.accelerator.is_main_process:
            matrices = {name: verdict.matrix for name, verdict in verdicts.items()}
            for g, group in enumerate(self.groups):
                for name, tables in (("scores", scores), ("answers", matrices)):
                    if tables:
                        group[name] = {source: to_lists(table[g]) for source, table in tables.items()}
                group["preferences"] = to_lists(targets.preferences[g])
                group["win_rates"] = to_lists(targets.win_rates[g])
        self._save_random_state(scored=True)
        if self.recalls and self.accelerator.is_main_process:
            self.files.write_scored(self._iteration, self.groups)

    def given_votes(self, ended: torch.Tensor) -> tuple[list[torch.Tensor], list[float]]:
        """The votes that given rollouts bring, as `Voters.panel` returns them."""
        size, first = ended.size(1), self.groups[0]
        if first.get("preferences") is not None:
            preferences = to_tensor([group["preferences"] for group in self.groups])
            if preferences.shape[1:] != (size, size):
                found = tuple(preferences.shape[1:])
                raise ValueError(f"the preferences in the rollouts must be {size} x {size} per group, got {found}.")
            return [preferences.to(ended.device)], [1.0]
        names = list(first["scores"]) if isinstance(first["scores"], dict) else [None]
        rows = [group["scores"] for group in self.groups]
        scores = to_tensor([[row if name is None else row[name] for row in rows] for name in names])
        if scores.shape[2:] != (size,):
            raise ValueError(f"the scores in the rollouts must be {size} per group and source, got {scores.size(2)}.")
        return preferences_of_sources(scores.to(ended.device), [1.0] * len(scores), ended, self.args)

    def finish(self, batch: dict[str, Any], kept: torch.Tensor) -> None:
        """Write log-probabilities, or put given ones into TRL's batch. `kept`, `(N,)`, marks rows to train on."""
        if self.given:
            self._put_logps(batch, kept.tolist())
        elif self._writes:
            columns: dict[str, list] = {}
            if "old_per_token_logps" in batch:
                rows = zip(batch["old_per_token_logps"].cpu(), self._lengths, strict=True)
                known = [None if row[:length].isnan().any() else row[:length].tolist() for row, length in rows]
                columns["logps"] = self._on_main(known)
            if "importance_sampling_ratio" in batch:
                columns["importance_weights"] = self._on_main(batch["importance_sampling_ratio"].flatten().tolist())
            if self.accelerator.is_main_process:
                for name, values in columns.items():
                    for g, group in enumerate(self.groups):
                        group[name] = values[g * self._group_size : (g + 1) * self._group_size]
            self._write()
        self._forget()

    def _put_logps(self, batch: dict[str, Any], kept: list[bool]) -> None:
        ids, rows, weights = batch["completion_ids"], self._local("logps"), self._local("importance_weights")
        if any(row is not None and len(row) != length for row, length in zip(rows, self._lengths, strict=True)):
            raise ValueError(
                f"rollouts={self.args.rollouts!r} have log-probabilities for other tokens than their completions "
                "have. Correct the column 'logps', or remove it."
            )
        missing = sum(row is None for row, is_kept in zip(rows, kept, strict=True) if is_kept)
        if self.trainer.agree(missing) == 0:
            logps = torch.full(ids.shape, torch.nan)
            for i, row in enumerate(rows):
                if row is not None:
                    logps[i] = 0.0
                    logps[i, : len(row)] = torch.tensor(row)
            batch["old_per_token_logps"] = logps.to(ids.device)
        elif not self._has_warned:
            self._has_warned = True
            logger.warning(
                f"rollouts={self.args.rollouts!r} lack log-probabilities of some completions that are trained on, so "
                "the current policy counts as the one that sampled them, which is true of its first iteration only: "
                "let that be the whole file (steps_per_generation), or use `trl-sppo rollout`. Shown once."
            )
        if not self.trainer.agree(int(None in weights)):
            batch["importance_sampling_ratio"] = torch.tensor(weights).unsqueeze(1).to(ids.device)

    def _save_random_state(self, scored: bool) -> None:
        # Before the file: where that is, the random states of all processes are whole
        if self.recalls:
            folder = self.files.state(self._iteration, scored)
            if self.accelerator.is_main_process:
                for path in folder.glob("rng_state*.pth"):  # of a run with another number of processes
                    path.unlink()
            self.accelerator.wait_for_everyone()
            self.trainer._save_rng_state(str(folder))
            self.accelerator.wait_for_everyone()

    def _write(self) -> None:
        if self.accelerator.is_main_process and self._on_disk != self.groups[0].keys():
            self.files.write(self._iteration, self.groups, getattr(self.trainer.train_dataset, "features", None))
            self._on_disk = set(self.groups[0])


def make_rollouts(trainer: Any) -> str:
    """Sample and score an [`SPPOTrainer`]'s prompts. Returns the folder. Raises `ValueError` if it cannot."""
    args, recorder = trainer.args, trainer._recorder
    if trainer._is_sharded:
        raise ValueError("rollouts are sampled with whole models. Launch without FSDP or DeepSpeed, which shard them.")
    if not recorder.recalls:
        options = "save_rollouts=False, save_strategy='no', rollouts=..., tools, environments or a rollout_func"
        raise ValueError(f"rollouts cannot be written with {options}. Remove that option.")
    period = trainer._micro_steps_per_iteration
    batches = trainer.get_train_dataloader()
    total = len(batches) // period if isinstance(trainer.train_dataset, Dataset) else None
    if args.max_steps > 0:
        total = -(-args.max_steps * args.gradient_accumulation_steps // period)
    quiet = bool(args.disable_tqdm) or not trainer.is_world_process_zero()
    trainer.model.train()
    with tqdm(total=total, desc="generation batches", disable=quiet) as progress:
        for iteration, inputs in enumerate(trainer.generation_batches(batches)):
            if iteration == total:
                break
            trainer._interruption.check_time()
            recorder.begin(iteration, inputs, trainer.num_generations, resumed=True)
            if recorder.is_complete:
                recorder.skip()
            else:
                trainer._generate_and_score_completions(inputs, iteration, only_sample=True)
            progress.update()
    return str(recorder.files.folder)
