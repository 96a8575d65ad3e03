"""`trl-sppo report`: a page about a run."""

from ..arguments.options import fail
from ..runs.report import write_report
from .judging import RunArguments, parse_run


def main(argv: list[str]) -> int:
    """Run `trl-sppo report` and return its exit status."""
    try:
        run, args = parse_run(RunArguments, "trl-sppo report", argv)
        path = write_report(run, args.evaluation_set)
    except (ValueError, ImportError, OSError) as error:
        fail(error)
    print(f"Wrote {path}.")
    return 0
