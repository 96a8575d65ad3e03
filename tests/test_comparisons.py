"""Asking pairwise oracles: who is compared with whom, and what becomes of bad answers."""

import functools
import math

import pytest
import torch
from accelerate import Accelerator

from trl_sppo.diagnostics import order_disagreement
from trl_sppo.oracles.asking import (
    VerdictLog,
    _calls,
    _shares,
    ask_oracle,
    check_oracle,
    ordered_pairs,
    random_pairs,
)
from trl_sppo.preferences import mean_preferences, mean_win_rates, win_rates


PROMPTS = ["p"] * 4 + ["q"] * 4
COMPLETIONS = ["a", "b", "c", "d", "e", "f", "g", "h"]


def alphabet(prompts, first, second, **kwargs):
    """Later letters win, by a probability that is no function of a difference of scores."""
    return [0.5 + abs(ord(a) - ord(b)) % 3 / 10 * (1 if a > b else -1) for a, b in zip(first, second, strict=True)]


def ask(oracle, completions=COMPLETIONS, group_size=4, both_orders=True, batch_size=100, columns=None, **kwargs):
    logged = {}
    answers = ask_oracle(
        oracle, PROMPTS, completions, columns or {}, group_size, both_orders, batch_size, Accelerator(cpu=True),
        log_metric=logged.__setitem__, **kwargs,
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
    pairs = ordered_pairs(~torch.eye(k, dtype=torch.bool).repeat(3, 1, 1), both_orders=False)
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
    # The two a are one question to each of b and c
    assert sorted(asked) == [("a", "b"), ("a", "c"), ("b", "a"), ("b", "c"), ("c", "a"), ("c", "b")]
    assert answers.num_asked == 6 and answers.matrix[0, 0, 2] == answers.matrix[0, 1, 2] == pytest.approx(0.9)
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


@pytest.mark.parametrize("k", [2, 5, 8, 16])
def test_random_pairs_are_as_many_as_asked_for_and_fair(k):
    for num_pairs in range(-(-k // 2), math.comb(k, 2) + 2):
        chosen = random_pairs(k, num_pairs, seed=3)
        assert chosen.sum() == 2 * min(num_pairs, math.comb(k, 2))
        assert (chosen == chosen.T).all() and not chosen.diagonal().any()
        degrees = chosen.sum(dim=1)
        assert degrees.min() >= 1 and degrees.max() - degrees.min() <= 2


def test_all_opponents_are_equally_likely():
    # 3,000 draws of 5 of 15 pairs: each pair is in a third of them, with a standard deviation of 0.0086
    share = torch.stack([random_pairs(6, 5, seed) for seed in range(3000)]).float().mean(dim=0)
    off_diagonal = share[~torch.eye(6, dtype=torch.bool)]
    assert (off_diagonal - 1 / 3).abs().max() < 0.04


@pytest.mark.parametrize("both_orders", [True, False])
def test_fewer_comparisons(both_orders):
    asked = []

    def oracle(prompts, first, second, **kwargs):
        asked.extend(zip(prompts, first, second, strict=True))
        return alphabet(prompts, first, second)

    answers, _ = ask(oracle, both_orders=both_orders, per_group=4)
    assert len(asked) == len(set(asked)) == answers.num_asked == 8
    assert sum(prompt == "p" for prompt, *_ in asked) == 4
    if both_orders:
        assert {(p, b, a) for p, a, b in asked} == set(asked)
    known = ~answers.preferences.isnan()
    assert (known.sum(dim=(1, 2)) == 4 + 2 * (2 if both_orders else 4)).all()  # the diagonal, and each pair twice
    whole, _ = ask(alphabet, both_orders=both_orders)
    torch.testing.assert_close(answers.preferences[known], whole.preferences[known])
    again, _ = ask(alphabet, both_orders=both_orders, per_group=4)  # a resumed run asks the same
    assert (again.matrix.isnan() == answers.matrix.isnan()).all()


def cyclic(k, seed):
    """Random preferences without any order, `(1, K, K)`."""
    upper = torch.rand(k, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).triu(1)
    return (upper + (1 - upper.T).tril(-1) + 0.5 * torch.eye(k)).unsqueeze(0)


@pytest.mark.parametrize("num_pairs", [3, 5, 8, 13])
def test_win_rates_of_fewer_comparisons_are_right_on_average(num_pairs):
    """Also in a panel with an oracle that has compared all: pair by pair, that one would weigh too much."""
    some, all_pairs = cyclic(6, seed=0), cyclic(6, seed=1)
    expected = win_rates(mean_preferences([some, all_pairs], [2.0, 1.0]))
    torch.testing.assert_close(mean_win_rates([some, all_pairs], [2.0, 1.0]), expected)
    found, by_pair = [], []
    for seed in range(4000):
        hidden = ~random_pairs(6, num_pairs, seed) & ~torch.eye(6, dtype=torch.bool)
        panel = [some.masked_fill(hidden, torch.nan), all_pairs]
        found.append(mean_win_rates(panel, [2.0, 1.0]))
        by_pair.append(win_rates(mean_preferences(panel, [2.0, 1.0])))
    assert (torch.stack(found).mean(dim=0) - expected).abs().max() < 0.012
    assert (torch.stack(by_pair).mean(dim=0) - expected).abs().max() > 0.012


def test_a_voter_that_knows_nothing_of_a_completion_has_no_vote_on_it():
    known, unknown = cyclic(3, seed=0), torch.full((1, 3, 3), torch.nan, dtype=torch.float64)
    torch.testing.assert_close(mean_win_rates([known, unknown], [1.0, 5.0]), win_rates(known))
    assert mean_win_rates([unknown], [1.0]).isnan().all()


def test_verdicts_are_written_as_they_come_and_not_asked_for_again(tmp_path):
    path = tmp_path / "folder" / "verdicts-0-0.jsonl"
    asked = []

    def dying(prompts, first, second, **kwargs):
        if prompts[0] == "q":
            raise KeyboardInterrupt
        asked.extend(zip(first, second, strict=True))
        return [0.25 if pair == ("a", "b") else None if pair == ("b", "a") else 0.75 for pair in asked]

    with pytest.raises(KeyboardInterrupt):
        ask(dying, batch_size=12, log=VerdictLog(path))
    assert len(asked) == 12
    with open(path, "a") as file:
        file.write("\n[1, 0, 1, 0.9")  # a line that the process did not finish

    def lasting(prompts, first, second, **kwargs):
        asked.extend(zip(first, second, strict=True))
        return [0.6] * len(first)

    asked.clear()
    answers, _ = ask(lasting, batch_size=12, log=VerdictLog(path))
    # The lost one, and the second group
    assert asked[0] == ("b", "a") and len(asked) == 13 and answers.num_lost == 0
    assert answers.matrix[0, 0, 1] == 0.25 and answers.matrix[0, 1, 0] == pytest.approx(0.6)
    assert answers.matrix[0, 2, 3] == 0.75
    ask(lasting, batch_size=12, log=VerdictLog(path))
    assert len(asked) == 13
    # Another process knows them too, but not those of another oracle
    assert VerdictLog(path.with_name("verdicts-0-1.jsonl")).known == VerdictLog(path).known
    assert VerdictLog(path.with_name("verdicts-1-0.jsonl")).known == {}


def test_a_process_compares_whole_groups():
    groups = torch.tensor([0, 0, 0, 2, 2, 5, 7, 7])
    assert _shares(groups, 2).tolist() == [0, 0, 0, 0, 0, 1, 1, 1]
    assert _shares(groups, 8).tolist() == [0, 0, 0, 2, 2, 4, 6, 6]
    assert _shares(groups[:0], 2).tolist() == []
