"""Messages of a run that ends early."""

import sys
import traceback

from ..errors import RunError, explain
from .checkpoints import last_whole_checkpoint, read_manifest


def how_to_go_on(output_dir: str) -> str:
    """How to continue a run that has ended."""
    checkpoint = last_whole_checkpoint(output_dir)
    if checkpoint is not None and not read_manifest(checkpoint)["can_be_resumed"]:
        return (
            f"The last checkpoint is {checkpoint}, of the model alone (save_only_model): a new run can begin with "
            f"model_name_or_path={str(checkpoint)!r} and another output_dir."
        )
    place = "There is no checkpoint yet" if checkpoint is None else f"The last checkpoint is {checkpoint}"
    return (
        f"{place}; the same command with --resume_from_checkpoint true goes on (in Python: "
        "`trainer.train(resume_from_checkpoint=True)`)."
    )


def report(error: BaseException, what: str, how: str) -> None:
    """Print what has ended (and where), the error, its trace if that helps to understand it, and how to continue."""
    if not isinstance(error, RunError):
        traceback.print_exception(error)
    elif error.__cause__ is not None:
        traceback.print_exception(error.__cause__)
    print(f"trl-sppo: error: {what}: {explain(error)}\n{how}", file=sys.stderr)
