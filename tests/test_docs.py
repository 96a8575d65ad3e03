"""What docs/ says exists: metrics, files, options, and the code and commands on its pages."""

import json
import re
import shlex
import shutil
import sys
from dataclasses import fields
from importlib import import_module
from inspect import signature
from pathlib import Path

import pytest
from helpers import ACCELERATE, alphabet_score, decoder, make_tokenizer, message, more_abc, run
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOTrainer, ModelConfig

import trl_sppo
from trl_sppo import judges, train
from trl_sppo.arguments.launching import INSTEAD, VERL, launch_arguments
from trl_sppo.arguments.options import check_arguments, make_parser
from trl_sppo.commands import check
from trl_sppo.commands.evaluate import EvalArguments
from trl_sppo.commands.judge_check import JudgeCheckArguments
from trl_sppo.commands.judging import parse
from trl_sppo.config import SPPOConfig
from trl_sppo.oracles.asking import check_oracle
from trl_sppo.quickstart import assets


ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
pytestmark = pytest.mark.usefixtures("measured_once")
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
        trainer_kwargs={
            "preference_func": more_abc,
            "processing_class": make_tokenizer(chat_template="{# </think> #}"),  # a policy that may think
        },
    )
    trainer.train()
    logged = {name for row in trainer.state.log_history for name in row}
    ours = {
        name
        for name in logged
        if re.match(r"win_rate/|preferences/|log_ratio|kl_|.*(winner|loser|duplicate|reasoning)", name)
    }
    assert len(ours) > 15
    page = (ROOT / "docs" / "metrics.md").read_text()
    first_cells = re.findall(r"^\| (`[^|]*`) \|", page, flags=re.MULTILINE)
    documented = {name for cell in first_cells for name in re.findall(r"`([^`]+)`", cell)}
    expanded = {name.replace("…", "completions") for name in documented}
    agreements = {name for name in ours if "/agreement/" in name}
    assert len(agreements) == 3 and "preferences/<oracle>/agreement/<other>" in expanded
    assert {name.replace("more_abc", "<oracle>") for name in ours - agreements} <= expanded
    # and the other way round: nothing is documented that no run can log
    elsewhere = {
        "aux_loss",
        "importance_weight",
        "<oracle>/truncated",
        "<oracle>/verdict_mass",
        "<oracle>/inconsistency",
        "<oracle>/criterion_1/decided",
        "<oracle>/criterion_1/agreement",
        "preferences/<oracle>/agreement/<other>",
        *(f"preferences/<oracle>/{name}" for name in ("requests", "input_tokens", "output_tokens", "cost")),
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
    first, second = (
        [[{"role": "assistant", "content": text}] for text in texts] for texts in (["a", "aa", "a"], ["b", "b", "bb"])
    )
    assert names["prefers_brevity"](prompts=["p"] * 3, first=first, second=second) == [0.5, 0, 1]


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


def needs_a_gpu(command: str) -> bool:
    return "GPU" in command or "CUDA_VISIBLE_DEVICES" in command or command.startswith("vllm serve")


@pytest.mark.parametrize(("page", "command"), commands(), ids=lambda each: getattr(each, "name", each)[:60])
def test_commands(page, command, monkeypatch):
    """Each is known, names files that are there and options that exist."""
    words = [word for word in shlex.split(command, comments=True) if not re.match(r"[A-Z_]+=", word)]
    if words[0] in ("pip", "pytest", "vllm", "torchrun", "accelerate"):
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
            assert needs_a_gpu(command), f"{command} does not say that it needs a GPU"
        else:
            options[options.index("--config") + 1] = "recipes/quickstart.yaml"
        launch_arguments(make_parser(), options)
    elif name == "check":
        if options[0].startswith("recipes/"):
            assert check.main(options) == 0
    elif name == "eval":
        parse(EvalArguments, "trl-sppo eval", options)
    elif name == "judge-check":
        parse(JudgeCheckArguments, "trl-sppo judge-check", options)
    else:
        assert name == "quickstart"
        check_arguments(["--config", "recipes/quickstart.yaml", *options])


def commands_to_run() -> dict[Path, list[str]]:
    """By page: what needs no GPU, and is not run by .ci/run (install and tests) or above (`check`)."""
    found: dict[Path, list[str]] = {}
    for page, command in commands():
        elsewhere = re.match(r"pip install|pytest|trl-sppo check recipes/", command)
        if not elsewhere and not needs_a_gpu(command):
            found.setdefault(page, []).append(command)
    assert len(found) > 3
    return found


@pytest.mark.parametrize("page", commands_to_run(), ids=lambda page: page.name)
def test_commands_run(page, readers_folder):
    """As they stand, one after the other; the models are tiny."""
    if page.name == "judges.md":
        pairs, judge = (code for code in blocks(page, "python") if "quickstart/" in code)
        exec(pairs, {})
        Path("my_judges.py").write_text(judge)
    for command in commands_to_run()[page]:
        words = shlex.split(command, comments=True)
        several = ["--main_process_port", "0"] if "--num_processes" in words else []  # the usual one may be taken
        if words[0] == "accelerate":
            words = [*ACCELERATE, *several, *words[2:]]
        else:
            words = [sys.executable, "-m", "trl_sppo", *words[1:], *several]
        result = run(words)
        assert result.returncode == 0, f"{command}: {result.stderr}"
    if page.name == "quickstart.md":  # and what may be done with the result
        (code,) = [code for code in blocks(page, "python") if "merge_and_unload" in code]
        exec(code, {})
        merged = AutoModelForCausalLM.from_pretrained("mine-merged")
        assert not hasattr(merged, "peft_config") and AutoTokenizer.from_pretrained("mine-merged").chat_template


@pytest.fixture
def readers_folder(workdir, tmp_path, monkeypatch):
    """What the pages take to be there: the quickstart's files, their own, and `recipe.yaml` and `train.yaml`."""
    workdir(save_strategy="steps", save_steps=1, per_device_train_batch_size=4)
    recipe = (tmp_path / "recipe.yaml").read_text()
    (tmp_path / "train.yaml").write_text(re.sub("^reward_funcs.*\n", "", recipe, flags=re.MULTILINE))
    quickstart = tmp_path / "quickstart"
    for name in ("policy", "run"):
        shutil.copytree(tmp_path / "policy", quickstart / name)
    for part in (decoder(), make_tokenizer()):
        part.save_pretrained(quickstart / "reward_model")
    shutil.copytree(Path(trl_sppo.__file__).parent / "quickstart" / "prompts", quickstart / "prompts")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    fetched = tmp_path / "home/trl_sppo/quickstart"
    shutil.copytree(tmp_path / "policy", fetched / assets.ENCODER)
    (fetched / assets.POLICY).parent.mkdir()
    (fetched / assets.POLICY).touch()
    (mine,), (row,), (rewards, _) = (
        blocks(ROOT / "docs/quickstart.md", language) for language in ("yaml", "json", "python")
    )
    (tmp_path / "mine.yaml").write_text(mine)
    (tmp_path / "my_rewards.py").write_text(rewards)
    (tmp_path / "my_prompts").mkdir()
    (tmp_path / "my_prompts/train.jsonl").write_text((json.dumps(json.loads(row)) + "\n") * 8)  # as many as it says
    return tmp_path


def test_the_quickstarts_page_needs_as_many_prompts_as_it_says(readers_folder, capsys):
    path = readers_folder / "my_prompts/train.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:7]))
    assert "7 prompts, fewer than the 8 of one" in message(capsys, ["--config", "mine.yaml"])


def test_the_reference_has_all_public_names():
    page = (ROOT / "docs/api.md").read_text()
    documented = set(re.findall(r"autoclass:: (?:trl_sppo\.judges\.)?(\w+)$", page, re.MULTILINE))
    documented |= set(re.findall(r"autofunction:: (\w+)$", page, re.MULTILINE))
    assert documented == set(trl_sppo._PUBLIC) | {name for name in vars(judges) if name.endswith(("Judge", "Ranker"))}
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


def test_what_the_migration_page_says_of_grpo(tmp_path):
    """The page names what differs: positions, keys, and the options of other recipes with what took their place."""
    page = (ROOT / "docs" / "migrating.md").read_text()
    ours, theirs = (list(signature(each.__init__).parameters)[1:] for each in (trl_sppo.SPPOTrainer, GRPOTrainer))
    assert ours[:7] == theirs[:7] and [ours[7], theirs[7]] == ["preference_func", "callbacks"]
    (row,) = re.findall(r"^\| `generation_kwargs` \|.*$", page, re.MULTILINE)
    for name in set(re.findall(r"`(\w+)`", row)) - {"generation_kwargs"}:
        with pytest.raises(ValueError, match=f"generation_kwargs=.*{name}"):
            SPPOConfig(str(tmp_path), use_cpu=True, bf16=False, generation_kwargs={name: 2})
    table = page.split("## Recipes of others")[1].split("## ")[0]
    for theirs, here in re.findall(r"^\| (`.*?) \| (.*?) \|$", table, re.MULTILINE):
        for name in re.findall(r"`(\w+)(?:: [\d.]+)?`", theirs):
            if name != "1e":
                told, written = (set(re.findall(r"[a-z]\w{3,}", text.lower())) for text in (INSTEAD[name], here))
                assert told & written, name


def test_verls_options_are_translated_as_the_page_says():
    page = (ROOT / "docs/migrating.md").read_text()
    rows = re.findall(r"^\| (`[a-z_]+\..*?) \| (.*?) \|$", page.partition("## From verl")[2], re.MULTILINE)
    said = {name: here for theirs, here in rows for name in re.findall(r"`([\w.]+)(?:: [\w.]+)?`", theirs)}
    assert set(VERL) == set(said) - {"data.train_batch_size"}
    for name, ours in VERL.items():
        assert ours.split(" ")[0].rstrip(":") in said[name], name
