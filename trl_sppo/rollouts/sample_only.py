"""Rollouts without training."""

from typing import Any

from datasets import Dataset
from tqdm.auto import tqdm


def make_rollouts(trainer: Any) -> str:
    """Sample and score an [`SPPOTrainer`]'s prompts. Returns the folder. Raises `ValueError` if models are sharded."""
    args, recorder = trainer.args, trainer._recorder
    if trainer._is_sharded:
        raise ValueError(
            "rollouts are sampled with whole models, but this launch shards them (FSDP or DeepSpeed). Launch without."
        )
    if not recorder.recalls:
        raise ValueError(
            "rollouts are to be written, but save_rollouts=False, save_strategy='no', rollouts=..., tools, "
            "environments or a rollout_func rule that out. Remove that option."
        )
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
