"""Rollouts without training."""

from collections.abc import Iterator
from itertools import count, islice
from typing import Any

from datasets import Dataset
from tqdm.auto import tqdm


def make_rollouts(trainer: Any) -> str:
    """Sample and score an [`SPPOTrainer`]'s prompts. Returns the folder. Raises `ValueError` if models are sharded."""
    args, recorder = trainer.args, trainer._recorder
    if trainer._is_sharded:
        raise ValueError(
            "rollouts are sampled with whole models, but this launch shards them (FSDP or DeepSpeed). Launch without, "
            "with use_vllm=True where one GPU does not suffice."
        )
    if not recorder.recalls:
        raise ValueError(
            "rollouts are to be written, but save_rollouts=False, save_strategy='no' or rollouts=... says not to, or "
            "tools, environments or a rollout_func take part, which cannot be repeated. Remove that option."
        )
    period = trainer._micro_steps_per_iteration
    batches = trainer.get_train_dataloader()
    total = len(batches) // period if isinstance(trainer.train_dataset, Dataset) else None
    if args.max_steps > 0:
        total = -(-args.max_steps * args.gradient_accumulation_steps // period)
    quiet = bool(args.disable_tqdm) or not trainer.is_world_process_zero()
    trainer.model.train()
    with tqdm(total=total, desc="generation batches", disable=quiet) as progress:
        for iteration, inputs in enumerate(_generation_batches(trainer, batches, period)):
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


def _generation_batches(trainer: Any, batches: Any, period: int) -> Iterator[list[dict[str, Any]]]:
    """Each generation batch once, of the first epoch, or of as many as `max_steps` needs. TRL repeats each."""
    for epoch in count():
        trainer.state.epoch = epoch
        batch = None
        for batch in islice(batches, 0, None, period):
            yield batch
        if batch is None or trainer.args.max_steps <= 0:
            break
