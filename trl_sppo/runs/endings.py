"""What a run says when it cannot go on."""

import sys
import traceback

from ..errors import RunError, explain
from .checkpoints import last_whole_checkpoint, read_manifest


def how_to_go_on(output_dir: str) -> str:
    """Where a run that has ended can be taken up again."""
    checkpoint = last_whole_checkpoint(output_dir)
    if checkpoint is not None and not read_manifest(checkpoint)["can_be_resumed"]:
        return (
            f"The last checkpoint is {checkpoint}, of the model alone (save_only_model): a new run can begin with "
            f"model_name_or_path={str(checkpoint)!r} and another output_dir."
        )
    if checkpoint is None:
        place = "There is no checkpoint yet"
    else:
        place = f"The last checkpoint is {checkpoint}"
    return (
        f"{place}; the same command with --resume_from_checkpoint true goes on (in Python: "
        "`trainer.train(resume_from_checkpoint=True)`)."
    )


def report(error: BaseException, what: str, how: str) -> None:
    """
    Print what has ended a run: the trace if it is needed to understand that, and how to go on.

    Args:
        error (`BaseException`):
            What has ended it.
        what (`str`):
            What has ended, and where.
        how (`str`):
            How to go on.
    """
    if not isinstance(error, RunError):
        traceback.print_exception(error)
    elif error.__cause__ is not None:
        traceback.print_exception(error.__cause__)
    print(
        f"trl-sppo: error: {what}: {explain(error)}\n{how}",
        file=sys.stderr,
    )
