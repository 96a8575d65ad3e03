"""`trl-sppo report`: what is on the page, and that a browser shows it and filters its samples."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from datasets import Dataset
from helpers import count_abc

from trl_sppo.evaluation.files import EvaluationFiles
from trl_sppo.evaluation.ladder import stored_players
from trl_sppo.rollouts.files import write_parquet
from trl_sppo.runs.report import RULES, diagnose, samples, write_report


EVIL = "<script>document.title='owned'</script>"
CHROMIUM = shutil.which("chromium")


def length(completions, **kwargs) -> list[float]:
    return [float(len(text)) for text in completions]


@pytest.fixture
def run(make_trainer, tmp_path):
    """A finished run whose dataset has a prompt that is a script."""
    prompts = ["ab", "fgh", "k", EVIL]
    trainer = make_trainer(
        eval_strategy="steps", eval_steps=2, max_steps=4, per_device_eval_batch_size=4, learning_rate=0.1,
        prompts=prompts * 4, trainer_kwargs={
            "eval_dataset": Dataset.from_dict({"prompt": prompts}), "eval_reward_funcs": length,
        },
    )  # fmt: skip
    trainer.train()
    trainer.save_state()
    return tmp_path / "out"


def assert_balanced(text: str) -> None:
    """Each element of a page is closed, and none is closed that is not open."""
    opened = []

    class Page(HTMLParser):
        def handle_starttag(self, tag, attributes):
            if tag not in ("meta", "link", "br", "hr", "input", "img"):
                opened.append(tag)

        def handle_startendtag(self, tag, attributes):
            pass

        def handle_endtag(self, tag):
            assert opened.pop() == tag, self.getpos()

    page = Page()
    page.feed(text)
    page.close()
    assert opened == []


def test_the_page(run):
    text = write_report(run).read_text()
    assert_balanced(text)
    assert EVIL not in text and "&lt;script&gt;" in text  # what models and datasets say is data
    assert not re.search(r"(src|href)=.https?:", text)  # no network
    for expected in ("count_abc", "length", "winners", "learning_rate", "transformers", "step 4"):
        assert expected in text
    assert text.count("<svg") == 4  # curves, win rates, ladder, length
    assert "Only the oracles of the training judged" not in text


def test_a_run_without_evaluations(make_trainer, tmp_path):
    trainer = make_trainer(max_steps=2)
    trainer.train()
    trainer.save_state()
    text = write_report(tmp_path / "out").read_text()
    assert "fewer than two evaluations" in text and "Only the oracles of the training judged" not in text
    assert text.count("<svg") == 1


def test_diagnoses():
    history = [
        {"step": i, "win_rate/length_correlation": i / 10, "preferences/tied": 0.05,
         "preferences/a/agreement/b": 0.9 - i / 18 * (i < 9), "preferences/c/agreement/a": 0.9,
         "preferences/a/agreement/d": 0.0, "preferences/c/agreement/b": 0.0}
        for i in range(1, 11)
    ]  # fmt: skip
    by_name = {each["name"]: each for each in diagnose(history, without_vote=["b", "c"])}
    # b and c watch; b saw no progress for a while. Two voters, or two that watch, may disagree
    agreements = {"preferences/a/agreement/b": False, "preferences/c/agreement/a": True}
    assert set(by_name) == {"win_rate/length_correlation", "preferences/tied", *agreements}
    assert {name: by_name[name]["healthy"] for name in agreements} == agreements
    correlation = by_name["win_rate/length_correlation"]
    assert (correlation["first"], correlation["last"]) == (pytest.approx(0.15), pytest.approx(0.95))
    assert not correlation["healthy"] and "follow length" in correlation["words"]
    assert by_name["preferences/tied"]["healthy"] and by_name["preferences/tied"]["words"] == "healthy (0 to 0.2)"


def test_log_ratios_that_cannot_be_measured_are_not_diagnosed():
    one_step, several = ([{"step": i, "log_ratio_to_target": share * i} for i in range(3)] for share in (0.0, 1e-5))
    assert diagnose(one_step) == []
    (diagnosis,) = diagnose(several)
    assert not diagnosis["healthy"] and "raise the learning rate" in diagnosis["words"]


def test_the_healthy_bounds_are_those_of_the_docs():
    page = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text()
    healthy = dict(re.findall(r"^\| `([^`]+)` \|.*? \| ([^|]*) \| [^|]* \|$", page, flags=re.MULTILINE))
    for name, low, high, _ in RULES:
        found = healthy[name.replace("*", "<oracle>", 1).replace("*", "<other>")]
        assert re.match(rf"{low:g} to {high:g}\b".replace("-", "−"), found), (name, found)


def test_samples():
    before = [{"prompt": "p", "completions": ["a", "b"], "scores": {"j": [1.0, 0.0]}}] * 4
    after = [
        {"prompt": "p", "completions": ["c", "d"], "scores": {"j": [score, 0.0]}} for score in (2.0, 0.0, 1.0, None)
    ]
    assert [row["outcome"] for row in samples(before, after)] == ["won", "lost", "tied", "unscored"]


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
def test_in_a_browser(run, tmp_path):
    path = write_report(run)

    def dom(name: str, script: str = "") -> str:
        page = tmp_path / f"{name}.html"
        page.write_text(path.read_text().replace("</body>", f"<script>{script}</script></body>"))
        command = [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={tmp_path / name}.png", "--dump-dom",
            "--window-size=1200,3000", page.as_uri(),
        ]  # fmt: skip
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout

    def visible(text: str) -> int:
        rows = re.findall(r"<tr data-outcome=\"\w+\"[^>]*>", text)
        return sum("hidden" not in row for row in rows)

    plain = dom("plain")
    assert "4 of 4 prompts" in plain and visible(plain) == 4
    assert "<title>SPPO: out</title>" in plain  # the prompt that is a script did not run
    assert (tmp_path / "plain.png").stat().st_size > 50_000
    found = dom("found", "document.getElementById('filter').value = 'SCRIPT>'; show();")
    assert "1 of 4 prompts" in found and visible(found) == 1
    stored = samples_of(run)
    won = sum(outcome == "won" for outcome in stored)
    select = "const s = document.getElementById('outcome'); s.value = 'won'; s.dispatchEvent(new Event('change'));"
    assert f"{won} of 4 prompts" in dom("won", select)


def samples_of(run) -> list[str]:
    players = stored_players(run)
    return [row["outcome"] for row in samples(players[0], players[max(players)])]


def test_the_beginning_holds_no_secrets(run):
    began = json.loads((run / "run_began.json").read_text())
    assert began["reward_sources"] == ["count_abc"] and began["judges"] == ["length"]
    secrets = [value for name, value in began["config"].items() if name.endswith("_token")]
    assert secrets and all(value == "<HUB_TOKEN>" for value in secrets)  # transformers masks them, set or not


def test_completions_stand_beside_those_to_the_same_prompt(run):
    """Also if an evaluation had another order."""
    files = EvaluationFiles(str(run))
    groups = files.read("", 4)
    for group in groups:
        group["completions"] = [f"completion of {group['prompt']}"] * len(group["completions"])
    write_parquet(files.path("", 4), groups[::-1], None)
    rows = re.findall(r"<tr data-outcome.*?</tr>", write_report(run).read_text(), flags=re.DOTALL)
    assert len(rows) == 4
    for row in rows:
        prompt = re.search(r"<pre>(.*?)</pre>", row)[1]
        assert f"completion of {prompt}</pre>" in row


def test_a_run_that_kept_no_evaluations(make_trainer, tmp_path):
    trainer = make_trainer(
        eval_strategy="steps", eval_steps=1, max_steps=2, per_device_eval_batch_size=4, save_rollouts=False,
        trainer_kwargs={"eval_dataset": Dataset.from_dict({"prompt": ["ab", "q"]})},
    )  # fmt: skip
    trainer.train()
    trainer.save_state()
    assert "<td>count_abc</td><td>yes</td>" in write_report(tmp_path / "out").read_text()  # of the log


def test_a_source_without_a_vote_is_not_trained_on(make_trainer, tmp_path):
    trainer = make_trainer(
        reward_funcs=[count_abc, length], reward_weights=[1.0, 0.0], eval_strategy="steps", eval_steps=1, max_steps=1,
        per_device_eval_batch_size=4, trainer_kwargs={"eval_dataset": Dataset.from_dict({"prompt": ["ab", "q"]})},
    )  # fmt: skip
    trainer.train()
    trainer.save_state()
    text = write_report(tmp_path / "out").read_text()
    assert "<td>count_abc</td><td>yes</td>" in text and "<td>length</td><td>no</td>" in text
    assert "Only the oracles of the training judged" not in text
