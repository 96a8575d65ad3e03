"""Checkpoints that lack weights are refused wherever a model is loaded: nothing random is trained, or trained on."""

import pytest
import yaml
from datasets import Dataset
from helpers import TINY, make_tokenizer
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2ForSequenceClassification

from trl_sppo import cli
from trl_sppo.commands import check
from trl_sppo.models.weights import check_weights
from trl_sppo.oracles.reward_models import load_reward_models


def save(folder, kind=Qwen2ForCausalLM, without: str = "", **config) -> str:
    """A tiny model on disk, without the weights that have this in their names."""
    kind(Qwen2Config(**TINY, **config)).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    path = folder / "model.safetensors"
    weights = load_file(path)
    lost = [name for name in weights if without and without in name]
    assert bool(lost) == bool(without)
    save_file({name: w for name, w in weights.items() if name not in lost}, path, metadata={"format": "pt"})
    return str(folder)


LOST = ["embed_tokens", "layers.1.mlp.up_proj", "layers.0.self_attn.q_proj.bias", "model.norm", "lm_head"]


@pytest.mark.parametrize("without", LOST)
def test_a_policy_in_training(make_trainer, tmp_path, without):
    path = save(tmp_path / "policy", without=without)
    with pytest.raises(
        ValueError, match=rf"^model '.*policy' lacks the weights .*{without}.* of a Qwen2ForCausalLM.*"
    ):
        make_trainer(model=path)


def test_tied_weights_are_not_missing(make_trainer, tmp_path):
    make_trainer(model=save(tmp_path / "policy", tie_word_embeddings=True))
    with pytest.raises(ValueError, match=r"lacks the weights .*embed_tokens"):
        make_trainer(model=save(tmp_path / "lacks", without="embed_tokens", tie_word_embeddings=True))


def test_the_initial_policy_that_beta_needs(make_trainer, tmp_path):
    path = save(tmp_path / "policy")
    model = Qwen2ForCausalLM.from_pretrained(path)
    save(tmp_path / "policy", without="model.norm")
    with pytest.raises(
        ValueError, match=r"^the initial policy that beta needs, model .* lacks the weights model.norm"
    ):
        make_trainer(model=model, beta=0.1)


@pytest.mark.parametrize("without", ["score", "layers.0.mlp.down_proj"])
def test_a_reward_model(tmp_path, without):
    path = save(tmp_path / "reward", Qwen2ForSequenceClassification, without, num_labels=1)
    with pytest.raises(ValueError, match=rf"^reward model '.*reward' lacks the weights .*{without}"):
        load_reward_models([path], [None], conversational=False)


def test_many_missing_weights_are_counted(tmp_path):
    path = save(tmp_path / "policy", without="layers.")
    with pytest.raises(ValueError, match=r"lacks the weights (\S+, ){4}\S+ and 19 more of a"):  # 2 layers of 12
        check_weights("model", path, Qwen2ForCausalLM)


@pytest.mark.parametrize("side", ["model_name_or_path", "opponent_name_or_path", "reward_model_name_or_path"])
def test_evaluations(tmp_path, monkeypatch, capsys, side):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts").mkdir()
    Dataset.from_dict({"prompt": ["ab", "cd"]}).to_parquet("prompts/test.parquet")
    save(tmp_path / "policy"), save(tmp_path / "reward", Qwen2ForSequenceClassification, num_labels=1)
    kind = Qwen2ForSequenceClassification if side.startswith("reward") else Qwen2ForCausalLM
    save(tmp_path / "lacks", kind, without="model.norm", num_labels=1)
    options = {"model_name_or_path": "policy", "opponent_name_or_path": "policy", "dataset_name": "prompts"}
    options |= {"reward_model_name_or_path": "reward"} | {side: "lacks"}
    with pytest.raises(SystemExit, match="2"):
        cli.main(["eval", *(part for name, value in options.items() for part in (f"--{name}", value))])
    assert "'lacks' lacks the weights" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["model", "reward model"])
def test_check(tmp_path, capsys, monkeypatch, what):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts").mkdir()
    Dataset.from_dict({"prompt": ["ab"] * 64}).to_parquet("prompts/train.parquet")
    policy = save(tmp_path / "policy", without="model.norm" if what == "model" else "")
    reward = save(
        tmp_path / "reward", Qwen2ForSequenceClassification, "score" if what != "model" else "", num_labels=1
    )
    options = {
        "model_name_or_path": policy, "reward_model_name_or_path": reward, "dataset_name": "prompts",
        "output_dir": "out", "use_cpu": True, "bf16": False,
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(options))
    with pytest.raises(SystemExit, match="2"):
        check.main(["recipe.yaml"])
    assert f"{what} '" in (said := capsys.readouterr().err) and "lacks the weights" in said
