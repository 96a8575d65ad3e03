"""Pairwise oracles: pairs, orders, processes, and invalid verdicts."""

import asyncio
import inspect
import itertools
import json
import math
import os
import zlib
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm.auto import tqdm
from trl.trainer.utils import start_event_loop_in_daemon

from ..preferences import preferences_from_answers


# Columns that oracles do not get: TRL adds them, or an oracle's own arguments have these names
NO_COLUMNS = {"prompt", "completion", "completion_ids", "prompts", "first", "second", "log_metric", "log_verdict"}

SAYS_NOTHING = "it returned None"

# oracle(prompts=..., first=..., second=..., **columns) -> P(first beats second) of each, None where it cannot say
PreferenceFunc: TypeAlias = Callable[..., Sequence[float | None] | Coroutine[Any, Any, Sequence[float | None]]]


def oracle_name(oracle: PreferenceFunc) -> str:
    """The name of a pairwise oracle in logs and messages."""
    return getattr(oracle, "__name__", type(oracle).__name__)


def told_apart(names: list[str]) -> list[str]:
    """Names with their places, where two are the same."""
    return [f"{name}_{i}" if names.count(name) > 1 else name for i, name in enumerate(names)]


def check_oracle(oracle: PreferenceFunc) -> None:
    """Raise `ValueError` if a pairwise oracle could not be called."""
    try:
        # Partially: its other arguments may be columns of the dataset
        inspect.signature(oracle).bind_partial(prompts=[], first=[], second=[], log_metric=None, a_column=[])
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"preference_func {oracle_name(oracle)!r} must be callable as `(prompts, first, second, **kwargs)`, with "
            f"the dataset's other columns by name: {error}."
        ) from error


def ordered_pairs(compared: torch.Tensor, both_orders: bool) -> torch.Tensor:
    """
    The comparisons to make, `(comparisons, 3)`: group, first and second completion, by groups. `compared`, of shape
    `(groups, K, K)` and symmetric, marks the pairs. With one order, the first place alternates.
    """
    ask = compared
    if not both_orders:
        i = torch.arange(compared.size(1))
        even = (i[:, None] + i) % 2 == 0
        ask = ask & torch.where(i[:, None] < i, even, ~even.T)
    return ask.nonzero()


def random_pairs(group_size: int, num_pairs: int, seed: int) -> torch.Tensor:
    """
    A symmetric mask `(K, K)` of `num_pairs` random pairs, or all. With half of K, rounded up, each completion has one.
    Completions differ by at most two in their number of pairs, and for each all opponents are equally likely.
    """
    order = torch.randperm(group_size, generator=torch.Generator().manual_seed(seed))
    chosen = torch.zeros(group_size, group_size, dtype=torch.bool)
    # On a circle, with the neighbour at distance 1, then 2, ...; first by every other stretch of that length
    places = range(group_size)
    for distance, odd in itertools.product(range(1, group_size // 2 + 1), (0, 1)):
        for i in (i for i in places if i // distance % 2 == odd and chosen.sum() < 2 * num_pairs):
            a, b = order[i], order[(i + distance) % group_size]
            chosen[a, b] = chosen[b, a] = True
    return chosen


@dataclass
class Verdicts:
    """Verdicts of a pairwise oracle on a rollout."""

    matrix: torch.Tensor  # (groups, K, K): P(i beats j) when i is shown first, NaN where not asked or lost
    same: torch.Tensor  # (groups, K, K): pairs of identical completions among those to compare, which tie
    questions: torch.Tensor  # (num_asked, 3): group, first and second completion. Copies are asked about once
    num_lost: int
    num_sent: int = 0  # of the questions, over all processes. The others were known
    problem: str = SAYS_NOTHING  # the first one

    @property
    def num_asked(self) -> int:
        return len(self.questions)

    @property
    def preferences(self) -> torch.Tensor:
        """Shape `(groups, K, K)`: both orders averaged, 1/2 for identical completions, NaN where unknown."""
        return preferences_from_answers(self.matrix).masked_fill(self.same, 0.5)


class VerdictLog:
    """
    Verdicts of this process on a rollout, for processes that continue after it was killed. `form` is that of the
    questions: what was asked in another one is asked again. The number of the process ends the name of the file.
    """

    def __init__(self, path: Path, form: str = ""):
        self.path = path
        self.known: dict[tuple[int, ...], float] = {}  # by group, first and second completion
        is_new = True
        # All processes' files, since there may be another number of them now
        for each in path.parent.glob(f"{path.stem.rpartition('-')[0]}-*{path.suffix}"):
            first, *lines = each.read_text().splitlines() or [""]
            if first == f"form {form}":
                is_new &= each != path
                for line in lines:
                    with suppress(ValueError):  # a line may have been cut off
                        *question, verdict = json.loads(line)
                        self.known[tuple(question)] = verdict
        if is_new:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"form {form}")

    def write(self, verdicts: Iterable[tuple[list[int], float]]) -> None:
        """Add verdicts that are not known yet. Lost ones are left out, to be asked for again."""
        new = {tuple(question): verdict for question, verdict in verdicts if not math.isnan(verdict)}
        lines = [json.dumps([*question, verdict]) for question, verdict in new.items() if question not in self.known]
        self.known |= new
        with open(self.path, "a") as file:
            file.writelines(f"\n{line}" for line in lines)  # after a line that was cut off

    def write_one(self, call: list[list[int]], number: int, verdict: float) -> None:
        """Add the verdict on one comparison of a call, which may still wait for others."""
        self.write([(call[number], verdict)])


def ask_oracle(
    oracle: PreferenceFunc,
    prompts: list,  # of all processes, by groups, like completions and columns
    completions: list,
    columns: dict[str, list],
    group_size: int,
    both_orders: bool,
    batch_size: int,  # comparisons per call, of whole groups: an oracle can read each of their completions once
    accelerator: Accelerator,
    log_metric: Callable[[str, float], None],
    disable_tqdm: bool = False,
    known: torch.Tensor | None = None,  # the matrix of stored verdicts, which replaces the calls
    first_side: int | None = None,  # compare only the first so many of each group with the others of it
    per_group: int | None = None,  # comparisons of a group, of random pairs. All by default
    log: VerdictLog | None = None,  # verdicts of an earlier process, and where to write those of this one
) -> Verdicts:
    """
    Compare the completions of each group, a part of the groups on each process. All processes get the same result. A
    verdict that is missing or outside [0, 1], or whose call raised an error, is lost.
    """
    columns = {name: values for name, values in columns.items() if name not in NO_COLUMNS}
    groups = [completions[i : i + group_size] for i in range(0, len(completions), group_size)]
    same, compared = _to_compare(groups, both_orders, first_side, per_group)
    pairs = ordered_pairs(compared & ~same, both_orders)
    same &= compared | torch.eye(group_size, dtype=torch.bool)
    # The same two texts of a group are one question
    copy_of = torch.tensor([[group.index(each) for each in group] for group in groups])
    group, first, second = pairs.unbind(dim=1)
    questions = torch.stack([group, copy_of[group, first], copy_of[group, second]], dim=1)
    questions, question_of = questions.unique(dim=0, return_inverse=True)
    if known is not None:
        said = known[pairs.unbind(dim=1)]
        by_question = torch.full((len(questions),), torch.nan).index_put((question_of,), said)
        return Verdicts(known, same, questions, num_lost=int(by_question.isnan().sum()))

    mine = questions[_shares(questions[:, 0], accelerator.num_processes) == accelerator.process_index]
    found = torch.tensor([torch.nan if log is None else log.known.get(tuple(q), torch.nan) for q in mine.tolist()])
    problems: list[str] = []
    open_questions = found.isnan().nonzero().squeeze(1)
    calls = _calls(mine[open_questions], batch_size)
    hidden = disable_tqdm or len(calls) < 2 or not accelerator.is_local_main_process
    done = 0
    for call in tqdm(calls, desc=f"{oracle_name(oracle)}: calls with comparisons", leave=False, disable=hidden):
        group, first, second = call.unbind(dim=1)
        first, second = (group * group_size + first).tolist(), (group * group_size + second).tolist()
        try:
            asked = {
                "prompts": [prompts[i] for i in first],
                "first": [completions[i] for i in first],
                "second": [completions[i] for i in second],
                **{column: [values[i] for i in first] for column, values in columns.items()},
            }
            early = {} if log is None else {"log_verdict": partial(log.write_one, call.tolist())}
            output = oracle(**own_copy(asked), log_metric=log_metric, **early)
            if inspect.iscoroutine(output):
                (output,) = run_coroutines([output])
            verdicts = _read_verdicts(output, len(first), problems)
        except Exception as error:  # of any kind: one bad call must not discard expensive rollouts
            verdicts = [torch.nan if log is None else log.known.get(tuple(q), torch.nan) for q in call.tolist()]
            problems.append(f"it raised {type(error).__name__}: {error}")
        found[open_questions[done : done + len(call)]] = torch.tensor(verdicts)
        done += len(call)
        if log is not None:
            log.write(zip(call.tolist(), verdicts, strict=True))

    said = torch.tensor(gather_object(found.tolist()))  # shares are in the order of the questions
    problems, num_sent = gather_object(problems), sum(gather_object([len(open_questions)]))
    matrix = torch.full(same.shape, torch.nan)
    matrix[pairs.unbind(dim=1)] = said[question_of]
    num_lost = int(said.isnan().sum())
    return Verdicts(matrix, same, questions, num_lost, num_sent, problem=problems[0] if problems else SAYS_NOTHING)


def _to_compare(
    groups: list[list], both_orders: bool, first_side: int | None, per_group: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks of shape `(groups, K, K)`: pairs of identical completions, and pairs to compare."""
    same = torch.tensor([[[a == b for b in group] for a in group] for group in groups])
    compared, group_size = torch.ones_like(same), same.size(1)
    if first_side is not None:
        is_first = torch.arange(group_size) < first_side
        compared &= is_first[:, None] != is_first
    if per_group is not None:
        num_pairs = per_group // 2 if both_orders else per_group
        seeds = (zlib.crc32(repr(group).encode()) for group in groups)  # the same on all processes, and after a resume
        compared &= torch.stack([random_pairs(group_size, num_pairs, seed) for seed in seeds])
    return same, compared


def _shares(groups: torch.Tensor, num_processes: int) -> torch.Tensor:
    """The process of each question: whole groups, so that an oracle can read all completions of one together."""
    if len(groups) == 0:
        return groups
    place = groups.unique_consecutive(return_inverse=True)[1]
    return place * num_processes // (int(place[-1]) + 1)


def _calls(pairs: torch.Tensor, batch_size: int) -> list[torch.Tensor]:
    """Cut comparisons into calls of `batch_size` or a little less, or of one group if that has more."""
    sizes: list[int] = []
    for count in pairs[:, 0].unique_consecutive(return_counts=True)[1].tolist():
        if sizes and sizes[-1] + count <= batch_size:
            sizes[-1] += count
        else:
            sizes.append(count)
    return list(pairs.split(sizes)) if sizes else []


def own_copy(value: Any) -> Any:
    """A deep copy of lists and mappings, so that a function can change only its own arguments."""
    if type(value) is dict:
        return {key: own_copy(item) for key, item in value.items()}
    return [own_copy(item) for item in value] if type(value) is list else value


def run_coroutines(
    coroutines: Sequence[Coroutine[Any, Any, Any]], loop: asyncio.AbstractEventLoop | None = None
) -> list[Any]:
    """Results or exceptions of coroutines that run together, by default in one loop of this process."""

    async def together() -> list[Any]:
        return await asyncio.gather(*coroutines, return_exceptions=True)

    if not coroutines:
        return []
    return asyncio.run_coroutine_threadsafe(together(), loop or _event_loop(os.getpid())).result()


@cache
def _event_loop(process: int) -> asyncio.AbstractEventLoop:
    """A loop in a thread of its own: clients keep connections in it, and a notebook's own loop is running already."""
    _, loop, is_ready = start_event_loop_in_daemon(name="trl_sppo")
    is_ready.wait()
    return loop


def _read_verdicts(output: Any, expected: int, problems: list[str]) -> list[float]:
    """Probabilities, NaN where there is none. Adds errors to `problems`."""
    if isinstance(output, BaseException):
        raise output
    values = list(output)
    if len(values) != expected:
        raise ValueError(f"it returned {len(values)} values for {expected} comparisons")
    verdicts = [None if value is None else float(value) for value in values]
    wrong = [verdict for verdict in verdicts if verdict is not None and not 0 <= verdict <= 1]
    if wrong:
        problems.append(f"it returned {wrong[0]}, which is not a probability in [0, 1]")
    return [verdict if verdict is not None and 0 <= verdict <= 1 else torch.nan for verdict in verdicts]
