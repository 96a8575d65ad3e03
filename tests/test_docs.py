"""What docs/ says exists: metrics, files, and the code on its pages."""

import re
from pathlib import Path

import pytest
from conftest import more_abc
from fixed import alphabet_score

from trl_sppo.comparisons import check_oracle


ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))


def test_every_metric_of_this_package_is_documented(fixed, tiny_policy):
    def length(completion_ids, **kwargs):
        return [float(len(ids)) for ids in completion_ids]

    trainer = fixed(
        model=tiny_policy,
        beta=1.0,
        reward_funcs=[alphabet_score, length],
        num_iterations=2,
        max_steps=2,
        trainer_kwargs={"preference_func": more_abc},
    )
    trainer.train()
    logged = {name for row in trainer.state.log_history for name in row}
    ours = {
        name for name in logged if re.match(r"win_rate/|preferences/|log_ratio|kl_|.*(winner|loser|duplicate)", name)
    }
    assert len(ours) > 15
    page = (ROOT / "docs" / "metrics.md").read_text()
    first_cells = re.findall(r"^\| (`[^|]*`) \|", page, flags=re.MULTILINE)
    documented = {name for cell in first_cells for name in re.findall(r"`([^`]+)`", cell)}
    expanded = {name.replace("…", "completions") for name in documented}
    assert {name.replace("more_abc", "<oracle>") for name in ours} <= expanded
    # and the other way round: nothing is documented that no run can log
    elsewhere = {
        "aux_loss",
        "importance_weight",
        "<oracle>/truncated",
        "<oracle>/verdict_mass",
        "rewards/<source>/mean",
        "completions/std",
        "skipped_steps",
    }
    assert expanded - elsewhere <= {name.replace("more_abc", "<oracle>") for name in logged}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_files_are_there(page):
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert link.startswith("https://") or (page.parent / link).is_file(), link
    for path in re.findall(r"`?((?:benchmarks|tests|recipes|trl_sppo)/[\w./-]+\.(?:py|yaml|json))", text):
        assert (ROOT / path).is_file(), path


def test_the_oracle_in_the_docs_works():
    (code,) = re.findall(r"```python\n(def .*?)\n\n", (ROOT / "docs" / "judges.md").read_text(), flags=re.DOTALL)
    names: dict = {}
    exec(code, names)
    check_oracle(names["prefers_brevity"])
    assert names["prefers_brevity"](prompts=["p"] * 3, first=["a", "aa", "a"], second=["b", "b", "bb"]) == [0.5, 0, 1]
