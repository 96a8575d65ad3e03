"""Asking pairwise oracles: who is compared with whom, and what becomes of bad answers."""

import functools
import math

import pytest
import torch
from accelerate import Accelerator

from trl_sppo.diagnostics import order_disagreement
from trl_sppo.oracles.asking import _calls, ask_oracle, check_oracle, ordered_pairs


PROMPTS = ["p"] * 4 + ["q"] * 4
COMPLETIONS = ["a", "b", "c", "d", "e", "f", "g", "h"]


def alphabet(prompts, first, second, **kwargs):
    """Later letters win, by a probability that is no function of a difference of scores."""
    return [0.5 + abs(ord(a) - ord(b)) % 3 / 10 * (1 if a > b else -1) for a, b in zip(first, second, strict=True)]


def ask(oracle, completions=COMPLETIONS, group_size=4, both_orders=True, batch_size=100, columns=None):
    logged = {}
    answers = ask_oracle(
        oracle, PROMPTS, completions, columns or {}, group_size, both_orders, batch_size, Accelerator(cpu=True),
        log_metric=logged.__setitem__,
    )  # fmt: skip
    return answers, logged


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_each_ordered_pair_of_a_group_is_asked_once(batch_size):
    asked, sizes = [], []

    def oracle(prompts, first, second, **kwargs):
        asked.extend(zip(prompts, first, second, strict=True))
        sizes.append(len(prompts))
        return alphabet(prompts, first, second)

    answers, _ = ask(oracle, batch_size=batch_size)
    expected = [("p", a, b) for a in "abcd" for b in "abcd" if a != b]
    expected += [("q", a, b) for a in "efgh" for b in "efgh" if a != b]
    assert sorted(asked) == sorted(expected) and (answers.num_asked, answers.num_lost) == (24, 0)
    assert sizes == ([24] if batch_size == 100 else [12, 12])  # a group is not divided
    for g, letters in enumerate(("abcd", "efgh")):
        for i, a in enumerate(letters):
            for j, b in enumerate(letters):
                expected = 0.5 if i == j else alphabet([""], [a], [b])[0]
                assert answers.preferences[g, i, j].item() == pytest.approx(expected)


@pytest.mark.parametrize("k", [2, 3, 8])
def test_one_order_asks_each_pair_once_and_gives_everyone_the_first_place(k):
    pairs = ordered_pairs(torch.eye(k, dtype=torch.bool).repeat(3, 1, 1), both_orders=False)
    unordered = {(g, *sorted((i, j))) for g, i, j in pairs.tolist()}
    assert len(pairs) == len(unordered) == 3 * math.comb(k, 2)
    first_places = torch.bincount(pairs[:, 1][pairs[:, 0] == 0], minlength=k)
    assert first_places.max() - first_places.min() <= 1


def test_one_order_gives_the_same_preferences_if_the_order_does_not_matter():
    both, one = ask(alphabet)[0], ask(alphabet, both_orders=False)[0]
    assert (one.num_asked, one.num_lost) == (12, 0)
    torch.testing.assert_close(one.preferences, both.preferences)


def test_a_liking_for_the_first_place_cancels():
    def biased(prompts, first, second, **kwargs):
        return [p * 0.5 + 0.5 for p in alphabet(prompts, first, second)]  # P' = P/2 + 1/2, for the first

    expected = (ask(alphabet)[0].preferences - 0.5) / 2 + 0.5
    torch.testing.assert_close(ask(biased)[0].preferences, expected)


def test_identical_completions_tie_and_are_not_asked_about():
    asked = []

    def oracle(prompts, first, second, **kwargs):
        asked.extend(zip(first, second, strict=True))
        return [0.9] * len(first)

    answers, _ = ask(oracle, completions=["a", "a", "b", "c", "z", "z", "z", "z"])
    assert ("a", "a") not in asked and ("z", "z") not in asked and len(asked) == answers.num_asked == 10
    assert answers.preferences[0, 0, 1] == 0.5 and (answers.preferences[1] == 0.5).all()
    # They do not hide that the oracle always favours the first
    assert order_disagreement(answers.matrix).item() == pytest.approx(0.8)
    one, _ = ask(oracle, completions=["a", "a", "b", "c", "z", "z", "z", "z"], both_orders=False)
    assert order_disagreement(one.matrix).isnan()


@pytest.mark.parametrize(
    ("counts", "batch_size", "sizes"),
    [([3, 3, 3], 7, [6, 3]), ([3, 3, 3], 3, [3, 3, 3]), ([3, 9, 1, 1], 4, [3, 9, 2]), ([], 4, [])],
)
def test_calls_divide_no_group(counts, batch_size, sizes):
    groups = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts, dtype=torch.long))
    pairs = torch.stack([groups, groups, groups], dim=1)
    assert [len(call) for call in _calls(pairs, batch_size)] == sizes


def test_columns_metrics_and_asynchronous_oracles():
    async def oracle(prompts, first, second, log_metric, place, **kwargs):
        log_metric("mine", 7.0)
        assert all(place[i] == COMPLETIONS.index(first[i]) for i in range(len(first)))
        return alphabet(prompts, first, second)

    answers, logged = ask(oracle, columns={"place": list(range(8))})
    assert answers.num_lost == 0 and logged == {"mine": 7.0}
    torch.testing.assert_close(answers.preferences, ask(alphabet)[0].preferences)


@pytest.mark.parametrize("bad", [None, math.nan, -0.1, 1.1, math.inf])
def test_what_is_no_probability_is_lost_and_lost_alone(bad):
    def oracle(prompts, first, second, **kwargs):
        good = alphabet(prompts, first, second)
        return [bad if a == "a" else answer for a, answer in zip(first, good, strict=True)]

    answers, _ = ask(oracle)
    assert (answers.num_asked, answers.num_lost) == (24, 3) and answers.matrix[0, 0].isnan().all()
    # The other order was answered: no pair is missing
    torch.testing.assert_close(answers.preferences, ask(alphabet)[0].preferences)
    if bad is None:
        assert answers.problem == "it returned None"
    else:
        assert answers.problem == f"it returned {bad}, which is not a probability in [0, 1]"


@pytest.mark.parametrize(
    ("trouble", "problem"),
    [
        ("raises", "it raised TimeoutError: no answer within 60 s"),
        ("too few", "it raised ValueError: it returned 1 values for 12 comparisons"),
        ("no list", "it raised TypeError: 'int' object is not iterable"),
        ("no numbers", "it raised ValueError: could not convert string to float: 'yes'"),
    ],
)
def test_a_failing_call_loses_its_own_comparisons_only(trouble, problem):
    calls = []

    def oracle(prompts, first, second, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            if trouble == "raises":
                raise TimeoutError("no answer within 60 s")
            return {"too few": [0.5], "no list": 3, "no numbers": ["yes"] * len(first)}[trouble]
        return alphabet(prompts, first, second)

    answers, _ = ask(oracle, batch_size=6)
    assert (answers.num_asked, answers.num_lost) == (24, 12) and answers.problem == problem
    torch.testing.assert_close(answers.preferences[0], ask(alphabet)[0].preferences[0])


def test_keyboard_interrupts_are_not_swallowed():
    def oracle(prompts, first, second, **kwargs):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ask(oracle)


def test_groups_of_one_are_compared_with_nobody():
    answers, _ = ask(lambda **kwargs: 1 / 0, group_size=1)
    assert answers.preferences.tolist() == [[[0.5]]] * 8 and answers.num_asked == 0


def test_callables_of_every_kind_are_accepted():
    class Judge:
        def __call__(self, prompts, first, second, **kwargs):
            return alphabet(prompts, first, second)

    for oracle in (alphabet, Judge(), functools.partial(alphabet, extra=1), lambda **kwargs: []):
        check_oracle(oracle)


@pytest.mark.parametrize("oracle", [lambda prompts, first, second: [], lambda prompts, completions: [], 3, "PairRM"])
def test_what_cannot_be_called_is_refused(oracle):
    with pytest.raises(ValueError, match=r"must be callable as `.*\(prompts, first, second, \*\*kwargs\)`"):
        check_oracle(oracle)


def test_what_an_oracle_changes_changes_nothing_else():
    def vandal(prompts, first, second, place, **kwargs):
        for row in (*first, *second):
            row[0]["content"] = "changed"
        prompts.clear()
        place[0].append(1)
        return [0.5] * len(first)

    completions = [[{"role": "assistant", "content": text}] for text in COMPLETIONS[:2]]
    places: list = [[], []]
    prompts = ["p", "p"]
    ask_oracle(
        vandal, prompts, completions, {"place": places}, group_size=2, both_orders=True, batch_size=8,
        accelerator=Accelerator(cpu=True), log_metric=lambda *_: None,
    )  # fmt: skip
    assert [row[0]["content"] for row in completions] == COMPLETIONS[:2]
    assert prompts == ["p", "p"] and places == [[], []]
