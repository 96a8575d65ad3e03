"""`trl-sppo judge-check`: agreement, biases, consistency and cost of judges on labelled pairs."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch

from ..arguments.options import fail
from ..errors import RunError
from ..evaluation.judge_check import JudgeCheck, Pair, check_judges, read_pairs
from ..evaluation.statistics import WinRate
from ..tables import as_table
from .judging import JudgeOptions, has_images, parse


@dataclass
class JudgeCheckArguments(JudgeOptions):
    """Options of `trl-sppo judge-check`. The metadata describes each."""

    max_pairs: int | None = field(default=None, metadata={"help": "Number of pairs. All by default."})

    def __post_init__(self):
        super().__post_init__()
        self._check_at_least_one("max_pairs")
        if self.dataset_name and Path(self.dataset_name).is_file() and self.dataset_test_split == "test":
            self.dataset_test_split = "train"  # the only split of a file

    def load_pairs(self) -> list[Pair]:
        """Load the labelled pairs. Raises `ValueError` if there are none."""
        rows, name = self.load_rows("pairs"), f"dataset_name={self.dataset_name!r}"
        if len(rows) == 0 or not {"chosen", "rejected"} <= set(rows.column_names):
            raise ValueError(
                f"{name} needs rows with columns 'chosen' and 'rejected', and 'prompt' unless both begin with it. It "
                f"has {rows.column_names}. Rename its columns: `dataset.rename_column('...', 'chosen')`."
            )
        if has_images(rows):
            raise ValueError(f"{name} has images, and judges are checked on texts only. Pass pairs without images.")
        return read_pairs(rows.select(range(min(len(rows), self.max_pairs or len(rows)))), name)


def main(argv: list[str]) -> int:
    """Run `trl-sppo judge-check` and return its exit status."""
    try:
        args = parse(JudgeCheckArguments, "trl-sppo judge-check", argv)
        if not args.has_judges:
            raise ValueError("no judge given. Pass --reward_model_name_or_path, --reward_funcs or --preference_funcs.")
        pairs = args.load_pairs()
        columns = [column for column in pairs[0] if column not in ("chosen", "rejected")]
        panel = args.load_panel(pairs[0]["prompt"], columns, cast(Any, args.chat_template_kwargs))
        panel.check_prompts([pair["prompt"] for pair in pairs])
        checks = check_judges(panel, pairs)
    except (ValueError, ImportError, OSError, RunError, torch.OutOfMemoryError) as error:
        fail(error)
    print(f"{len(pairs)} pairs of {args.dataset_name}, with 95 % intervals\n")
    print(as_table(["", *(check.name for check in checks)], table_rows(checks)))
    print("\n" + "\n".join(f"{check.name} {', '.join(verdicts(check))}." for check in checks))
    return 0


def table_rows(checks: list[JudgeCheck]) -> list[list[str]]:
    """The rows of the table. Rows without a value for any judge are left out."""
    rows: list[tuple[str, Callable[[JudgeCheck], str | None]]] = [
        ("agreement with the labels", lambda check: _share(check.agreement)),
        ("position bias: P(first) - 1/2", lambda check: _signed(check.position)),
        ("pairs whose orders contradict", lambda check: _share(check.contradictory)),
        ("pairs that two orders rank differently", lambda check: _number(check.inconsistency)),
        ("length bias: longer wins - longer is chosen", lambda check: _signed(check.length)),
        ("asked again: same verdict", lambda check: _share(check.same_verdict)),
        ("asked again: |change of P|", lambda check: _number(check.change)),
        ("ties", lambda check: _share(check.ties)),
        ("lost comparisons", lambda check: _share(check.lost)),
        ("a text against itself: |P - 1/2|", lambda check: _number(check.same_text)),
        ("the same, in one order", lambda check: _number(check.same_text_one_order)),
        ("a text beats its first half", lambda check: _share(check.whole_wins)),
        ("a text that addresses the judge wins", lambda check: _share(check.injection_wins)),
        ("comparisons, or scores", lambda check: f"{check.num_asked}"),
        ("seconds", lambda check: f"{check.seconds:.1f}"),
        ("requests", lambda check: _count(check.usage.get("requests"))),
        ("input tokens", lambda check: _count(check.usage.get("input_tokens"))),
        ("output tokens", lambda check: _count(check.usage.get("output_tokens"))),
        ("cost", lambda check: _count(check.usage.get("cost"))),
    ]
    cells = [(name, [value(check) for check in checks]) for name, value in rows]
    return [[name, *(cell or "-" for cell in row)] for name, row in cells if any(row)]


def verdicts(check: JudgeCheck) -> list[str]:
    """Sentences about a judge, without their subject. A bias is named only if its interval excludes none."""
    if check.agreement is None:
        return ["gave no verdict"]
    said = []
    if check.agreement.low > 0.5:
        said.append("agrees with the labels")
    elif check.agreement.high < 0.5:
        said.append("contradicts the labels")
    else:
        said.append("is not shown to be better than chance")
    for estimate, none, above, below in (
        (check.position, 0, "prefers the first place", "prefers the second place"),
        (check.length, 0, "prefers longer completions", "prefers shorter completions"),
        (check.whole_wins, 0.5, "", "prefers truncated completions"),
        (check.injection_wins, 0.5, "is persuaded by texts that address it", ""),
    ):
        if estimate is not None and estimate.low > none:
            said.append(above)
        elif estimate is not None and estimate.high < none:
            said.append(below)
    return [*filter(None, said)]


def _share(estimate: WinRate | None) -> str | None:
    return None if estimate is None else f"{estimate}"


def _signed(estimate: WinRate | None) -> str | None:
    return None if estimate is None else f"{estimate.mean:+z.3f} [{estimate.low:+z.3f}, {estimate.high:+z.3f}]"


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.3f}"


def _count(value: float | None) -> str | None:
    return None if value is None else f"{value:,.4f}".rstrip("0").rstrip(".")
