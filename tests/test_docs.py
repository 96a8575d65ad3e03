"""What docs/ says exists: metrics, files, options, and the code and commands on its pages."""

import json
import re
import shlex
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest
from conftest import more_abc
from fixed import alphabet_score
from trl import ModelConfig

import trl_sppo
from trl_sppo import check, judges, train
from trl_sppo.comparisons import check_oracle
from trl_sppo.config import SPPOConfig
from trl_sppo.evaluate import EvalArguments, parse


ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
README_AND_PAGES = [ROOT / "README.md", *PAGES]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)


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
    for path in re.findall(r"`?((?:benchmarks|examples|tests|recipes|trl_sppo)/[\w./-]+\.(?:py|yaml|json))", text):
        folder = Path(trl_sppo.__file__).parents[1] if path.startswith("trl_sppo/") else ROOT  # it may be installed
        assert (folder / path).is_file(), path


def test_the_oracle_in_the_docs_works():
    (code,) = re.findall(r"```python\n(def .*?)\n\n", (ROOT / "docs" / "judges.md").read_text(), flags=re.DOTALL)
    names: dict = {}
    exec(code, names)
    check_oracle(names["prefers_brevity"])
    assert names["prefers_brevity"](prompts=["p"] * 3, first=["a", "aa", "a"], second=["b", "b", "bb"]) == [0.5, 0, 1]


def commands() -> list[tuple[Path, str]]:
    """All that the pages say to type, a line each, with its comment."""
    lines = [
        (page, line)
        for page in README_AND_PAGES
        for block in blocks(page, "bash")
        for line in block.replace("\\\n", " ").splitlines()
    ]
    assert len(lines) > 20
    return lines


@pytest.mark.parametrize(("page", "command"), commands(), ids=lambda each: getattr(each, "name", each)[:60])
def test_commands(page, command, tmp_path, monkeypatch):
    """Each is known, names files that are there and options that exist; what needs a GPU says so."""
    words = shlex.split(command, comments=True)
    on_gpus = "CUDA_VISIBLE_DEVICES" in command or words[0] == "vllm"
    words = [word for word in words if not re.match(r"[A-Z_]+=", word)]
    if words[0] in ("pip", "pytest", "vllm", "python", "torchrun", "accelerate"):
        scripts = [word for word in words if word.endswith(".py")]
        assert all((ROOT / script).is_file() for script in scripts)
        if "&&" not in words:
            return
        words = words[words.index("&&") + 1 :]
    program, name, *options = words
    assert program == "trl-sppo"
    monkeypatch.chdir(ROOT)
    if name in ("train", "rollout"):
        # `recipe.yaml` and the like stand for the reader's own
        path = options[options.index("--config") + 1]
        if path.startswith("recipes/"):
            assert on_gpus or "quickstart" in path or "GPU" in command, f"{command} does not say that it needs a GPU"
        else:
            options[options.index("--config") + 1] = "recipes/quickstart.yaml"
        train.launch_arguments(train.make_parser(), options)
    elif name == "check":
        recipe = options[0] if options[0].startswith("recipes/") else "recipes/quickstart.yaml"
        if recipe == "recipes/quickstart.yaml":  # whose models `trl-sppo quickstart` prepares
            assert Path(recipe).is_file()
        else:
            assert check.main([recipe, *options[1:]]) == 0
    elif name == "eval":
        parse(EvalArguments, "trl-sppo eval", options)
    else:
        assert name == "quickstart"
        train.check_arguments(["--config", "recipes/quickstart.yaml", *options])


def test_the_recipe_of_the_quickstarts_page(tiny_policy, tmp_path, monkeypatch):
    """Model, prompts and reward of one's own: the page's files, with a tiny model, train."""
    page = ROOT / "docs/quickstart.md"
    (recipe,), (rows,), (rewards,) = (blocks(page, language) for language in ("yaml", "json", "python"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("my_prompts").mkdir()
    Path("my_prompts/train.jsonl").write_text(json.dumps(json.loads(rows)) + "\n")
    Path("my_rewards.py").write_text(rewards)
    assert recipe.count("quickstart/policy") == 1
    Path("mine.yaml").write_text(recipe.replace("quickstart/policy", tiny_policy))
    with pytest.raises(SystemExit):  # one row of the eight that the page asks for
        train.main(["--config", "mine.yaml"])
    Path("my_prompts/train.jsonl").write_text((json.dumps(json.loads(rows)) + "\n") * 8)
    assert check.main(["mine.yaml"]) == 0
    assert train.main(["--config", "mine.yaml", "--max_completion_length", "4"]).state.global_step == 4


def test_the_reference_has_all_public_names():
    page = (ROOT / "docs/api.md").read_text()
    documented = set(re.findall(r"autoclass:: (?:trl_sppo\.judges\.)?(\w+)$", page, re.MULTILINE))
    documented |= set(re.findall(r"autofunction:: (\w+)$", page, re.MULTILINE))
    assert documented == set(trl_sppo._PUBLIC) | {name for name in vars(judges) if name.endswith("Judge")}
    for module, name in re.findall(r"auto\w+:: (trl_sppo\.[\w.]+)\.(\w+)$", page, re.MULTILINE):
        assert getattr(import_module(module), name).__doc__


@pytest.mark.parametrize("page", ["options.md", "troubleshooting.md", "quickstart.md"])
def test_options_on_the_pages_exist(page):
    """Names with a colon, as in YAML."""
    names = set(re.findall(r"`(\w+):[^/`]*`", (ROOT / "docs" / page).read_text()))
    for block in blocks(ROOT / "docs" / page, "yaml"):
        names |= set(re.findall(r"^(\w+):", block, re.MULTILINE))
    known = {field.name for kind in (SPPOConfig, ModelConfig, train.SPPOScriptArguments) for field in fields(kind)}
    assert names and names <= known, names - known
