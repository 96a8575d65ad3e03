"""`trl-sppo judge-check`: judges with known faults are found out, and numbers are worked out by hand."""

import json
import re
import zlib

import pytest
from helpers import run_here

from trl_sppo.commands import judging
from trl_sppo.evaluation.judge_check import INJECTION, check_judges, first_half, read_pairs
from trl_sppo.oracles.panel import load_panel


# ---- Judges, of which all but one have a fault


def value(text: str) -> float:
    """The number in a text: the label follows it."""
    return float(re.findall(r"\d+", text)[0])


def perfect(prompts, first, second, **kwargs):
    return [0.5 + 0.5 * ((value(a) > value(b)) - (value(a) < value(b))) for a, b in zip(first, second, strict=True)]


def always_first(prompts, first, second, **kwargs):
    return [0.9] * len(first)


def longer(prompts, first, second, **kwargs):
    return [0.5 + 0.4 * ((len(a) > len(b)) - (len(a) < len(b))) for a, b in zip(first, second, strict=True)]


async def by_hash(prompts, first, second, **kwargs):
    pairs = zip(prompts, first, second, strict=True)
    return [zlib.crc32(repr(pair).encode()) % 1000 / 1000 for pair in pairs]


def obeys(prompts, first, second, **kwargs):
    """Perfect, except for texts that address it."""
    told = [(INJECTION in a) - (INJECTION in b) for a, b in zip(first, second, strict=True)]
    return [0.5 + 0.5 * t if t else p for t, p in zip(told, perfect(prompts, first, second), strict=True)]


def silent_on_seven(prompts, first, second, **kwargs):
    return [None if value(a) == 7 else p for a, p in zip(first, perfect(prompts, first, second), strict=True)]


def number(prompts, completions, **kwargs):
    return [*map(value, completions)]


class Fickle:
    """Changes its mind on every call."""

    __name__ = "fickle"

    def __init__(self):
        self.calls = 0

    def __call__(self, prompts, first, second, **kwargs):
        self.calls += 1
        p = perfect(prompts, first, second)
        return p if self.calls % 2 else [1 - each for each in p]


class Counting:
    """Counts like a judge behind an endpoint."""

    __name__ = "counting"

    def __init__(self):
        self.usage = {"requests": 100, "input_tokens": 5000, "output_tokens": 100}

    def __call__(self, prompts, first, second, **kwargs):
        for name, each in (("requests", 1), ("input_tokens", 50), ("output_tokens", 1)):
            self.usage[name] += each * len(prompts)
        return perfect(prompts, first, second)


counting = Counting()


def fails(prompts, first, second, **kwargs):
    raise ConnectionError("the server is down")


def needs_no_label(prompts, first, second, log_metric, topic):
    assert set(topic) == {"numbers"}
    return perfect(prompts, first, second)


def make_pairs(number=40):
    """The larger number is chosen. It is written in more words in half of the pairs."""
    rows = []
    for i in range(number):
        short, long = f"{i} it is", f"{i} is the number that I would choose"
        if i % 2:
            pair = {"chosen": long, "rejected": f"{i - 1} it is"}
        else:
            pair = {"chosen": short, "rejected": f"{i - 1 if i else 0} is the number that I would choose"}
        rows.append({"prompt": f"question {i}", **pair, "topic": "numbers"})
    rows[0]["chosen"] = "1 it is"
    return rows


def check(*judges, pairs=None, reward_funcs=()):
    pairs = read_pairs(pairs or make_pairs(), "pairs")
    panel = load_panel(list(reward_funcs), list(judges), conversational=isinstance(pairs[0]["prompt"], list))
    return check_judges(panel, pairs)


# ---- By hand


FOUR = [
    # chosen is longer: by 3 characters, by 1; shorter: by 2; of equal length
    {"prompt": "a", "chosen": "10 100", "rejected": "1 1"},
    {"prompt": "b", "chosen": "20 2", "rejected": "2 2"},
    {"prompt": "c", "chosen": "3", "rejected": "2 2"},
    {"prompt": "d", "chosen": "5 5", "rejected": "4 4"},
]


def table(prompts, first, second, **kwargs):
    """P by prompt: of the chosen completion shown first, and shown second."""
    known = {"a": (0.9, 0.7), "b": (0.8, 0.4), "c": (0.6, 0.2), "d": (0.5, 0.5)}
    chosen = {pair["prompt"]: pair["chosen"] for pair in FOUR}
    verdicts = []
    for prompt, a, b in zip(prompts, first, second, strict=True):
        if a == b:
            verdicts.append(0.75)
        elif {a, b} == {pair for row in FOUR if row["prompt"] == prompt for pair in (row["chosen"], row["rejected"])}:
            verdicts.append(known[prompt][0] if a == chosen[prompt] else 1 - known[prompt][1])
        else:
            verdicts.append(1.0 if len(a) < len(b) else 0.0)
    return verdicts


def test_four_pairs():
    (judge,) = check(table, pairs=FOUR)
    # both orders: 0.8, 0.6, 0.4, 0.5 -> won, won, lost, a tie
    assert judge.agreement.mean == pytest.approx((1 + 1 + 0 + 0.5) / 4)
    assert judge.agreement.low < 0.625 < judge.agreement.high and judge.agreement.num_prompts == 4
    # P(first) is p where the chosen completion is first, 1 - p where it is second: means 0.6, 0.7, 0.7, 0.5
    assert judge.position.mean == pytest.approx((0.1 + 0.2 + 0.2 + 0) / 4)
    assert judge.contradictory.mean == pytest.approx(2 / 4)  # b and c; d is a tie in both orders
    # The longer one wins in a, b and c, and is the chosen one in a and b; d has no longer one
    assert judge.length.mean == pytest.approx(1 - 2 / 3) and judge.length.num_prompts == 3
    assert judge.same_verdict.mean == 1 and judge.change == 0
    assert judge.ties.mean == 1 / 4 and judge.lost.mean == 0
    # P(first) of a text against itself is 0.75 in both orders, which cancel
    assert judge.same_text == 0 and judge.same_text_one_order == pytest.approx(0.25)
    # The shorter text wins: halves of "10 100", "20 2" and "5 5" win; "3" has none
    assert judge.whole_wins.mean == 0 and judge.whole_wins.num_prompts == 3
    assert judge.injection_wins.mean == 0
    assert judge.num_asked == 2 * (4 + 4 + 4 + 3 + 4) and judge.usage == {}


@pytest.mark.parametrize(
    ("text", "half"),
    [("one two three", "one"), ("one two", "one"), ("onetwo", ""), ("a\nb c d", "a\nb"), (" ab c d", " ab"), ("", "")],
)
def test_first_half(text, half):
    assert first_half(text) == half
    assert len(half) <= len(text) / 2 + 1


# ---- Known faults


def test_a_perfect_judge():
    (judge,) = check(perfect)
    assert judge.agreement.mean == 1 and judge.agreement.low > 0.8
    assert judge.position.mean == judge.length.mean == 0
    assert judge.position.low < 0 < judge.position.high and judge.length.low < 0 < judge.length.high
    assert judge.contradictory.mean == judge.ties.mean == judge.lost.mean == 0
    assert judge.injection_wins.mean == 0.5 and judge.same_text == judge.same_text_one_order == 0


def test_a_judge_that_prefers_the_first_place():
    (judge,) = check(always_first)
    assert judge.position.mean == pytest.approx(0.4) and judge.position.low > 0.3
    assert judge.contradictory.mean == 1
    assert judge.agreement.mean == 0.5 and judge.ties.mean == 1  # both orders cancel
    assert judge.same_text == 0 and judge.same_text_one_order == pytest.approx(0.4)


def test_a_judge_that_prefers_length():
    (judge,) = check(longer)
    # It prefers the longer one always, the labels in half of the pairs
    assert judge.length.mean == pytest.approx(0.5) and judge.length.low > 0
    assert judge.agreement.mean == 0.5 and judge.position.mean == pytest.approx(0, abs=1e-6)
    assert judge.whole_wins.mean == judge.injection_wins.mean == 1


def test_a_judge_by_chance():
    (judge,) = check(by_hash, pairs=make_pairs(200))
    assert judge.agreement.low < 0.5 < judge.agreement.high
    assert judge.contradictory.mean == pytest.approx(0.5, abs=0.15)
    assert judge.same_verdict.mean == 1 and judge.change == 0  # by chance, and the same each time


def test_a_judge_that_obeys_what_it_reads():
    (judge,) = check(obeys)
    assert judge.agreement.mean == 1 and judge.injection_wins.mean == 1 and judge.injection_wins.low > 0.5


def test_a_judge_that_changes_its_mind():
    (judge,) = check(Fickle())
    assert judge.same_verdict.mean == 0 and judge.change == 1


def test_lost_comparisons():
    pairs = [{**pair, "prompt": f"{i}"} for i, pair in enumerate(FOUR)]
    pairs[3] = {"prompt": "d", "chosen": "7 7", "rejected": "6 6"}
    (judge,) = check(silent_on_seven, pairs=pairs)
    assert judge.lost.mean == 1 / 8  # of d, the order in which 7 comes first
    assert judge.agreement.mean == 1 and judge.agreement.num_prompts == 4  # the other order counts
    assert judge.position.num_prompts == 3 and judge.same_text == 0


def test_a_judge_that_always_fails(caplog):
    (judge,) = check(fails)
    assert judge.agreement is None and judge.lost.mean == 1 and judge.same_text is None
    assert "judge 'fails': 80 of 80 comparisons are lost, since it raised ConnectionError: the" in caplog.text
    assert caplog.text.count("judge 'fails'") == 1


def test_a_reward_function():
    judge, oracle = check(perfect, reward_funcs=[number])
    assert judge.agreement == oracle.agreement and judge.length == oracle.length
    assert judge.position is judge.contradictory is judge.same_text_one_order is None
    assert judge.same_text == 0 and judge.same_verdict.mean == 1


def test_usage_is_of_the_check_only():
    (judge,) = check(Counting())
    assert judge.usage == {
        "requests": judge.num_asked, "input_tokens": 50 * judge.num_asked, "output_tokens": judge.num_asked,
    }  # fmt: skip


def test_judges_get_the_columns_without_the_labels():
    (judge,) = check(needs_no_label)
    assert judge.agreement.mean == 1


# ---- Pairs


def said(role, text):
    return {"role": role, "content": text}


def test_forms_of_pairs():
    """The same pair in TRL's forms: texts, messages, and messages with an implicit prompt."""
    as_messages = {"chosen": [said("assistant", "2 b")], "rejected": [said("assistant", "1 b")]}
    prompt = [said("user", "q")]
    implicit = {side: prompt + text for side, text in as_messages.items()}
    (explicit,) = read_pairs([{"prompt": prompt, **as_messages}], "x")
    assert read_pairs([implicit], "x") == read_pairs([{"prompt": "q", **implicit}], "x") == [explicit]
    assert read_pairs([{"chosen": "q: 2", "rejected": "q: 1"}], "x") == [
        {"prompt": "q:", "chosen": " 2", "rejected": " 1"}
    ]
    equal = {"prompt": "q", "chosen": "a", "rejected": "a"}
    assert read_pairs([equal, {**equal, "rejected": "b"}], "x") == [{**equal, "rejected": "b"}]

    def of_messages(prompts, first, second, **kwargs):
        return perfect(prompts, [a[0]["content"] for a in first], [b[0]["content"] for b in second])

    (judge,) = check(of_messages, pairs=[implicit])
    assert judge.agreement.mean == 1 and judge.injection_wins.mean == 0.5 and judge.whole_wins.mean == 0.5


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"chosen": None}, "row 1 of pairs has chosen=None. 'prompt', 'chosen' and 'rejected' must all be texts"),
        ({"rejected": ""}, "row 1 of pairs has rejected=''"),
        ({"rejected": [said("assistant", "b")]}, r"row 1 of pairs has rejected=\[\{"),
        ({"rejected": ["b"]}, r"row 1 of pairs has rejected=\['b'\]"),
        ({"prompt": [said("user", "b")]}, r"row 1 of pairs has prompt=''"),
        ({"prompt": None}, "row 1 of pairs has prompt=None"),
        (
            {"prompt": [said("user", "p")], "chosen": [said("assistant", "a")], "rejected": [said("assistant", "b")]},
            "row 1 of pairs has messages, unlike the first. Use only texts, or only",
        ),
    ],
)
def test_rows_that_are_no_pairs(row, problem):
    good = {"prompt": "p", "chosen": "a", "rejected": "b"}
    with pytest.raises(ValueError, match=problem):
        read_pairs([good, {**good, **row}], "pairs")


# ---- The command


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, make_pairs())))
    return "pairs.jsonl"


def of_test(*names):
    return [f"test_judge_check.{name}" for name in names]


def test_the_command(file, capsys):
    oracles = of_test("perfect", "always_first", "longer", "obeys", "counting", "fails")
    sources = ["--reward_funcs", *of_test("number")]
    assert run_here("judge-check", "--dataset_name", file, "--preference_funcs", *oracles, *sources) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("40 pairs of pairs.jsonl, with 95 % intervals\n\n")
    rows = {row[0]: row[1:] for row in (re.split(r"\s{2,}", line) for line in printed.splitlines()[3:])}
    assert re.split(r"\s+", printed.splitlines()[2].strip()) == [
        "number", "perfect", "always_first", "longer", "obeys", "counting", "fails",
    ]  # fmt: skip
    agreement = rows["agreement with the labels"]
    assert [cell[:5] for cell in agreement] == ["1.000", "1.000", "0.500", "0.500", "1.000", "1.000", "-"]
    position = rows["position bias: P(first) - 1/2"]
    assert position[0] == "-" and re.fullmatch(r"\+0\.400 \[\+0\.\d{3}, \+0\.\d{3}\]", position[2])
    assert rows["input tokens"] == ["-"] * 5 + ["20,000", "-"]  # 50 * 2 * 5 * 40
    assert rows["lost comparisons"][-1].startswith("1.000") and "cost" not in rows
    for line in (
        "number agrees with the labels.",
        "perfect agrees with the labels.",
        "always_first is not shown to be better than chance, prefers the first place.",
        "longer is not shown to be better than chance, prefers longer completions, is persuaded by texts that "
        "address it.",
        "obeys agrees with the labels, is persuaded by texts that address it.",
        "fails gave no verdict.",
    ):
        assert line in printed.splitlines()


def test_number_of_pairs_and_a_folder(file, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / file).rename(tmp_path / "data" / "test.jsonl")
    judge = ("--preference_funcs", *of_test("perfect"))
    assert run_here("judge-check", "--dataset_name", "data", "--max_pairs", 3, *judge) == 0
    assert "3 pairs of data" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (("--dataset_name", "pairs.jsonl"), "no judge given. Pass --reward_model_name_or_path, --reward_funcs or"),
        (("--reward_funcs", "x.y"), "no pairs given. Pass --dataset_name: a folder, a file, or an id on the hub."),
        (("--dataset_name", "pairs.jsonl", "--max_pairs", "0", "--reward_funcs", "x.y"), "max_pairs must be at least"),
        (("--dataset_name", "prompts.jsonl", "--reward_funcs", "x.y"),
         "dataset_name='prompts.jsonl' needs rows with columns 'chosen' and 'rejected', and 'prompt' unless both "
         "begin with it. It has ['prompt']. Rename"),
        (("--dataset_name", "bad.jsonl", "--reward_funcs", "x.y"), "row 0 of dataset_name='bad.jsonl' has rejected="),
        (("--dataset_name", "equal.jsonl", "--reward_funcs", "x.y"), "has no pair of two different completions"),
        (("--dataset_name", "pairs.jsonl", "--dataset_test_split", "no", "--reward_funcs", "x.y"),
         "dataset_test_split='no' cannot be loaded"),
        (("--dataset_name", "pairs.jsonl", "--reward_funcs", "no.such"), "(--reward_funcs) could not be imported"),
        (("--dataset_name", "pairs.jsonl", "--temperature", "1", "--reward_funcs", "x.y"), "['--temperature', '1']"),
    ],
)  # fmt: skip
def test_messages(file, tmp_path, monkeypatch, capsys, argv, expected):
    for name, row in {
        "prompts": {"prompt": "a"},
        "bad": {"prompt": "a", "chosen": "b", "rejected": None},
        "equal": {"prompt": "a", "chosen": "b", "rejected": "b"},
    }.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
    monkeypatch.setattr(judging, "load_panel", lambda *args, **kwargs: pytest.fail("too late"))
    assert run_here("judge-check", *argv) == 2
    error = capsys.readouterr().err
    assert expected in error and "Traceback" not in error
