"""`trl-sppo report`: a page about a run."""

from dataclasses import dataclass, field

from ..arguments.options import fail
from ..runs.report import write_report
from .judging import check_matplotlib, parse, run_and_options


@dataclass
class ReportArguments:
    """
    Arguments of `trl-sppo report`, which writes `report.html` into the folder of a run.

    Args:
        evaluation_set (`str`, *optional*):
            Evaluation set of a run with several. The first by default.
    """

    evaluation_set: str | None = field(
        default=None, metadata={"help": "Evaluation set of a run with several. The first by default."}
    )


def main(argv: list[str]) -> int:
    """Run `trl-sppo report` and return its exit status."""
    try:
        run, argv = run_and_options(argv, "trl-sppo report")
        args = parse(ReportArguments, "trl-sppo report RUN", argv)
        check_matplotlib("trl-sppo report")
        path = write_report(run, args.evaluation_set)
    except (ValueError, ImportError, OSError) as error:
        fail(error)
    print(f"Wrote {path}.")
    return 0
