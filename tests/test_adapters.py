"""Adapters given by path: a policy's is trained further, a reward model's scores as it was saved."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from helpers import TINY, make_tokenizer, weights
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
)
from trl import ModelConfig

from trl_sppo import train
from trl_sppo.commands import check
from trl_sppo.files import read_beginning
from trl_sppo.models.adapters import adopt_options, base_of, is_adapter, tokenizer_of
from trl_sppo.oracles.reward_models import load_reward_models
from trl_sppo.runs.checkpoints import last_whole_checkpoint


KINDS = {
    "lora": LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"),
    "dora": LoraConfig(r=2, target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM"),
    "embeddings": LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"]),
    "whole modules": LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"], task_type="CAUSAL_LM"),
    "pissa": LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa", task_type="CAUSAL_LM"),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"),
}
TOKENS = torch.tensor([[3, 4, 5, 29, 6, 9]])


@torch.no_grad()
def moved(model, seed=1):
    """The model with its adapter away from where adapters begin."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def save_adapter(base: str, folder: Path, kind="lora", seed=1) -> str:
    model = AutoModelForCausalLM.from_pretrained(base)
    moved(get_peft_model(model, copy.deepcopy(KINDS[kind])), seed).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def adapter(tiny_policy, tmp_path):
    """A LoRA adapter without a tokenizer, away from its beginning."""
    return save_adapter(tiny_policy, tmp_path / "adapter")


def logits(model) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        output = model(TOKENS).logits
    model.train()
    return output


def as_peft_loads(base: str, adapter: str) -> torch.Tensor:
    return logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter))


# ---- Policies


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_a_run_begins_where_the_adapter_is(make_trainer, tiny_policy, tmp_path, kind, beta):
    """So do all kinds, and with `beta` the initial policy is the base model with the adapter, not without."""
    adapter = save_adapter(tiny_policy, tmp_path / "adapter", kind)
    expected = as_peft_loads(tiny_policy, adapter)
    assert (expected - logits(AutoModelForCausalLM.from_pretrained(tiny_policy))).abs().max() > 1e-3
    trainer = make_trainer(adapter, beta=beta, learning_rate=0.1, trainer_kwargs={"processing_class": None})
    torch.testing.assert_close(logits(trainer.model), expected)
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert trained and not any("ref" in name.split(".") for name in trained)
    before = weights(trainer)
    trainer.train()
    changed = {name for name, value in weights(trainer).items() if not torch.equal(value, before[name])}
    assert changed and changed <= trained
    if beta:
        assert trainer.state.log_history[0]["kl_to_initial_policy"] == pytest.approx(0, abs=1e-7)
        assert (logits(trainer.model) - expected).abs().max() > 1e-4
        trainer.model.set_adapter("ref")
        torch.testing.assert_close(logits(trainer.model), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["lora", "embeddings", "ia3"])
def test_the_initial_policy_of_an_adapter_that_is_given_as_a_model(make_trainer, tiny_policy, tmp_path, kind):
    """TRL copies no weights whose name ends with that of the adapter, such as ia3_l.default."""
    adapter = save_adapter(tiny_policy, tmp_path / "adapter", kind)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_policy), adapter, is_trainable=True)
    trainer = make_trainer(model, beta=0.1)
    trainer.model.set_adapter("ref")
    torch.testing.assert_close(logits(trainer.model), as_peft_loads(tiny_policy, adapter), rtol=0, atol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_by_path_it_is_trained_as_when_it_is_given_as_a_model(make_trainer, tiny_policy, adapter, beta):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_policy), adapter, is_trainable=True)
    found = []
    for each in (adapter + "/", model):
        trainer = make_trainer(each, beta=beta)
        torch.manual_seed(0)
        trainer.train()
        found.append(weights(trainer))
    by_path, by_model = found
    assert by_path.keys() == by_model.keys()
    for name, value in by_path.items():
        assert torch.equal(value, by_model[name]), name


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("step", [1, 2, 3])  # inside an iteration and between two
def test_a_run_from_an_adapter_can_be_resumed(make_trainer, tiny_policy, adapter, tmp_path, step, beta):
    run = {
        "per_device_train_batch_size": 4, "steps_per_generation": 4, "gradient_accumulation_steps": 2, "max_steps": 4,
        "save_strategy": "steps", "save_steps": 1, "beta": beta,
    }  # fmt: skip
    whole = make_trainer(adapter, **run, output_dir=str(tmp_path / "whole"))
    whole.train()
    assert (logits(whole.model) - as_peft_loads(tiny_policy, adapter)).abs().max() > 1e-3
    torch.manual_seed(step)
    resumed = make_trainer(adapter, **run, output_dir=str(tmp_path / "resumed"))
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
    for name, value in weights(whole).items():
        assert torch.equal(weights(resumed)[name], value), name
    losses = [[row.get("loss") for row in each.state.log_history[:-1]] for each in (whole, resumed)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_with_beta_a_run_is_resumed_with_the_adapter_that_it_began_with(
    make_trainer, tiny_policy, adapter, tmp_path, beta
):
    """The initial policy is not in the checkpoint."""
    options = {"beta": beta, "max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    make_trainer(model=adapter, **options, output_dir=str(tmp_path / "run")).train()
    other = tmp_path / "other"
    shutil.copytree(adapter, other)
    spoil(other, lambda tensors: [tensor.add_(1) for tensor in tensors.values()])
    checkpoint = str(tmp_path / "run" / "checkpoint-1")
    options |= {"max_steps": 2, "output_dir": str(tmp_path / "again"), "resume_from_checkpoint": checkpoint}
    if beta == 0:
        make_trainer(model=str(other), **options).train(resume_from_checkpoint=checkpoint)
    else:
        with pytest.raises(ValueError, match="the adapter that the run began with was another one"):
            make_trainer(model=str(other), **options)


def test_dtype_revision_and_code_of_its_own_are_about_the_base(make_trainer, tiny_policy, adapter, monkeypatch):
    seen = {}
    load = Qwen2ForCausalLM.from_pretrained.__func__

    def record(cls, path, **kwargs):
        seen.update(kwargs, path=path)
        return load(cls, path, **kwargs)

    config = json.loads(Path(adapter, "adapter_config.json").read_text())
    Path(adapter, "adapter_config.json").write_text(json.dumps({**config, "revision": "then"}))
    monkeypatch.setattr(Qwen2ForCausalLM, "from_pretrained", classmethod(record))
    kwargs = {"dtype": "bfloat16", "attn_implementation": "eager"}
    trainer = make_trainer(adapter, model_init_kwargs=kwargs, trust_remote_code=True)
    assert seen["path"] == tiny_policy and seen["use_safetensors"] is True
    assert (seen["revision"], seen["trust_remote_code"], seen["attn_implementation"]) == ("then", True, "eager")
    dtypes = {parameter.dtype for parameter in trainer.model.parameters() if not parameter.requires_grad}
    assert dtypes == {torch.bfloat16}
    saved = load_file(Path(adapter, "adapter_model.safetensors"))
    for name, value in saved.items():  # not rounded
        parameter = trainer.model.get_parameter(name.replace(".weight", ".default.weight"))
        assert torch.equal(parameter, value), name


def test_the_tokenizer_is_the_adapters_or_else_that_of_the_base(make_trainer, tiny_policy, adapter):
    trainer = make_trainer(adapter, trainer_kwargs={"processing_class": None})
    assert trainer.processing_class.name_or_path == tiny_policy == tokenizer_of(adapter)
    make_tokenizer(chat_template="mine").save_pretrained(adapter)
    trainer = make_trainer(adapter, trainer_kwargs={"processing_class": None})
    assert trainer.processing_class.chat_template == "mine" and tokenizer_of(adapter) == adapter
    assert trainer.processing_class.padding_side == "left"


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_qlora_goes_on(make_trainer, tmp_path, beta):
    """On a base in 4 bit, and in bfloat16, as TRL trains such adapters."""
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    torch.manual_seed(0)
    base = str(tmp_path / "base")
    Qwen2ForCausalLM(Qwen2Config(**{**TINY, "hidden_size": 64, "intermediate_size": 128})).save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    adapter = save_adapter(base, tmp_path / "adapter")
    trainer = make_trainer(adapter, beta=beta, trainer_kwargs={"quantization_config": nf4}, model_init_kwargs={})
    assert trainer.model.is_loaded_in_4bit
    saved = load_file(Path(adapter, "adapter_model.safetensors"))
    for name, value in saved.items():
        parameter = trainer.model.get_parameter(name.replace(".weight", ".default.weight"))
        assert parameter.requires_grad and torch.equal(parameter, value.bfloat16()), name
    trainer.train()
    if beta:
        assert trainer.state.log_history[0]["kl_to_initial_policy"] == pytest.approx(0, abs=1e-7)


def spoil(adapter: str, change) -> None:
    file = Path(adapter, "adapter_model.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def lose(model: str, name: str) -> None:
    file = Path(model, "model.safetensors")
    save_file({each: value for each, value in load_file(file).items() if each != name}, file, {"format": "pt"})


def configure(adapter: str, **values) -> None:
    file = Path(adapter, "adapter_config.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda a: spoil(a, lambda t: t.pop(FIRST)), "safetensors lacks .*layers.0.self_attn.q_proj.lora_A"),
        (lambda a: spoil(a, lambda t: t.update({"x.lora_A.weight": t[FIRST].clone()})), "has x.lora_A.*has no place"),
        (
            lambda a: spoil(a, lambda t: t.update({FIRST: torch.zeros(2, 8)})),
            "does not fit its .*size mismatch .*q_proj",
        ),
        (
            lambda a: configure(a, base_model_name_or_path="./gone"),
            "is an adapter of './gone', which is neither a",
        ),
        (
            lambda a: configure(a, base_model_name_or_path=None),
            "does not name the model it belongs to. Write base_model",
        ),
        (lambda a: configure(a, peft_type="NEW"), "adapter_config.json that PEFT cannot read: 'NEW'"),
        (lambda a: Path(a, "adapter_config.json").write_text("{"), "adapter_config.json that PEFT cannot read: "),
        (
            lambda a: configure(a, task_type="SEQ_CLS"),
            "task_type='SEQ_CLS', but a policy's is 'CAUSAL_LM'. Pass a re",
        ),
        (
            lambda a: Path(a, "adapter_model.safetensors").unlink(),
            "its adapter_model.safetensors cannot be read: No such",
        ),
        (
            lambda a: Path(a, "adapter_model.safetensors").write_bytes(b"torn"),
            "adapter_model.safetensors cannot be read",
        ),
        (
            lambda a: Path(a, "adapter_model.safetensors").rename(Path(a, "adapter_model.bin")),
            "has adapter_model.bin, a pickle, .*only safetensors are loaded",
        ),
        (
            lambda a: shutil.copy(Path(base_of(a), "config.json"), a),
            "has both the config.json of a whole model and an adapter_config.json",
        ),
    ],
)
def test_an_adapter_that_cannot_be_continued(make_trainer, adapter, harm, message):
    harm(adapter)
    with pytest.raises(ValueError, match=message):
        make_trainer(adapter)


def test_a_module_that_was_saved_whole_and_is_missing(make_trainer, tiny_policy, tmp_path):
    adapter = save_adapter(tiny_policy, tmp_path / "adapter", "whole modules")
    spoil(adapter, lambda tensors: tensors.pop("base_model.model.model.norm.weight"))
    with pytest.raises(ValueError, match=r"does not fit .* lacks base_model.model.model.norm.weight\. Correct"):
        make_trainer(adapter)


def test_a_base_that_lacks_weights(make_trainer, tiny_policy, adapter):
    lose(tiny_policy, "model.norm.weight")
    with pytest.raises(ValueError, match=f"model '{tiny_policy}' lacks the weights model.norm.weight"):
        make_trainer(adapter)


def test_two_configurations(make_trainer, adapter):
    with pytest.raises(ValueError, match="is an adapter, which has a configuration of its own, but peft_config is gi"):
        make_trainer(adapter, trainer_kwargs={"peft_config": KINDS["lora"]})


def test_another_adapter_of_the_same_base_is_another_policy(make_trainer, tiny_policy, adapter, tmp_path):
    other = save_adapter(tiny_policy, tmp_path / "other", seed=2)
    trainers = [make_trainer(each) for each in (adapter, other, tiny_policy)]
    assert len({trainer._recorder._run() for trainer in trainers}) == 3
    assert [trainer.describe()["policy"] for trainer in trainers] == [adapter, other, tiny_policy]


@pytest.mark.parametrize("kind", ["adapter", "whole"])
def test_a_checkpoint_is_not_written_over_by_the_run_that_begins_from_it(make_trainer, tiny_policy, tmp_path, kind):
    config = copy.deepcopy(KINDS["lora"]) if kind == "adapter" else None
    options = {"save_strategy": "steps", "save_steps": 1, "save_only_model": True}
    first = make_trainer(tiny_policy, **options, trainer_kwargs={"peft_config": config})
    first.train()
    checkpoint = str(tmp_path / "out" / "checkpoint-1")
    assert is_adapter(checkpoint) == (kind == "adapter")
    with pytest.raises(ValueError, match=r"checkpoint-1' is a checkpoint in output_dir=.*out', .* Set another output"):
        make_trainer(checkpoint, **options)
    make_trainer(checkpoint, output_dir=str(tmp_path / "more"))  # as our own messages say


# ---- On the command line


@pytest.fixture
def recipe(tiny_policy, tmp_path):
    """A function: the arguments of a command, with a policy and a folder."""
    data = tmp_path / "data"
    data.mkdir()
    rows = [{"prompt": prompt} for prompt in ["ab", "fgh", "cd e", "xyz"] * 2]
    (data / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def arguments(model: str, output_dir: str, *options: str) -> list[str]:
        values = {
            "model_name_or_path": model, "output_dir": output_dir, "dataset_name": data, "reward_funcs": "my.abc",
            "num_generations": 4, "max_completion_length": 6, "learning_rate": 0.05, "max_steps": 2, "bf16": "false",
            "use_cpu": "true", "report_to": "none", "save_steps": 1, "gradient_checkpointing": "false",
            "disable_tqdm": "true", "temperature": 1.0, "dtype": "float32",
        }  # fmt: skip
        return [*(str(each) for name, value in values.items() for each in (f"--{name}", value)), *options]

    return arguments


@pytest.fixture
def rewards(tmp_path, monkeypatch):
    (tmp_path / "my.py").write_text("from helpers import count_abc as abc\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


LORA = ["--use_peft", "--lora_r", "2", "--lora_alpha", "4", "--lora_target_modules", "q_proj", "v_proj"]


@pytest.mark.parametrize("where", ["run", "run/checkpoint-1"])
@pytest.mark.parametrize("again", [LORA, ["--use_peft"], []], ids=["same recipe", "use_peft", "nothing"])
def test_the_same_command_continues_an_adapter(recipe, rewards, tiny_policy, where, again):
    train.main(recipe(tiny_policy, "run", *LORA))
    expected = as_peft_loads(tiny_policy, where)
    trainer = train.build_trainer(recipe(where, "more", *again))
    torch.testing.assert_close(logits(trainer.model), expected)
    assert trainer.model.peft_config["default"].r == 2
    assert trainer.optimizer is None and trainer.state.global_step == 0  # a run of its own


def test_a_run_of_a_run(recipe, rewards, tiny_policy, tmp_path):
    train.main(recipe(tiny_policy, "run", *LORA))
    train.main(recipe("run", "more", *LORA, "--beta", "0.1"))
    assert read_beginning("more")["policy"] == "run"
    assert "| adapter | LORA, r = 2, continued from run |" in Path("more/README.md").read_text()
    assert base_of("more") == tiny_policy  # and not run: its adapter holds all that was learned
    assert (as_peft_loads(tiny_policy, "more") - as_peft_loads(tiny_policy, "run")).abs().max() > 1e-3
    assert last_whole_checkpoint("more").name == "checkpoint-2"
    third = train.build_trainer(recipe("more", "third", *LORA))
    torch.testing.assert_close(logits(third.model), as_peft_loads(tiny_policy, "more"))


def test_rollouts_come_from_the_adapter(recipe, rewards, tiny_policy, adapter, tmp_path):
    train.main(recipe(adapter, "rolled"), only_rollouts=True)
    (file, *_) = sorted(Path("rolled/rollouts").glob("*.parquet"))
    rows = Dataset.from_parquet(str(file)).to_list()
    assert {row["policy"] for row in rows} == {adapter}
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_policy), adapter).eval()
    ids = torch.tensor([rows[0]["prompt_ids"] + rows[0]["completion_ids"][0]])
    logps = (model(ids).logits[0, :-1]).log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    logps = logps[len(rows[0]["prompt_ids"]) - 1 :].tolist()
    assert rows[0]["logps"][0] == pytest.approx(logps, abs=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_r": 4}, r"lora_r=4, but .*'.*adapter' is an adapter \(LORA\) with r=2.*Leave out lora_r"),
        ({"lora_alpha": 7}, "lora_alpha=7, but .* with lora_alpha=8"),
        ({"lora_dropout": 0.5}, "lora_dropout=0.5, but .* with lora_dropout=0.0"),
        ({"use_dora": True}, "use_dora=True, but .* with use_dora=False"),
        ({"use_rslora": True}, "use_rslora=True, but .* with use_rslora=False"),
        ({"lora_modules_to_save": ["norm"]}, r"lora_modules_to_save=\['norm'\], but .* with modules_to_save=None"),
        ({"lora_target_modules": ["q_proj", "k_proj"]}, "lora_target_modules=.*, but"),
    ],
)
def test_options_of_another_adapter(adapter, options, message):
    with pytest.raises(ValueError, match=message):
        adopt_options(ModelConfig(model_name_or_path=adapter, **options))


def test_options_become_those_of_the_adapter(tiny_policy, adapter, tmp_path):
    args = ModelConfig(model_name_or_path=adapter, load_in_4bit=True, lora_target_modules=["all-linear"])
    adopt_options(args)
    assert (args.use_peft, args.lora_r, args.lora_alpha, args.lora_dropout) == (True, 2, 8, 0.0)
    with pytest.raises(ValueError, match=r"lora_r=4, but .* is an adapter \(IA3\) with r=None"):
        ia3 = save_adapter(tiny_policy, tmp_path / "ia3", "ia3")
        adopt_options(ModelConfig(model_name_or_path=ia3, lora_r=4))
    other = ModelConfig(model_name_or_path=tiny_policy)
    adopt_options(other)
    assert other.use_peft is False


def test_check_says_what_is_continued(recipe, adapter, rewards, tmp_path, capsys):
    argv = recipe(adapter, "out")
    values = dict(zip((name[2:] for name in argv[::2]), argv[1::2], strict=True))
    (tmp_path / "recipe.yaml").write_text("\n".join(f"{name}: {value}" for name, value in values.items()))
    check.main(["recipe.yaml"])
    said = capsys.readouterr().out
    assert f"Train an adapter (LORA, continued from {adapter}, 1,024 parameters) on {base_of(adapter)} (" in said
    spoil(adapter, lambda tensors: tensors.clear())
    Path(adapter, "adapter_model.safetensors").unlink()
    with pytest.raises(SystemExit):
        check.main(["recipe.yaml"])
    assert "its adapter_model.safetensors cannot be read" in capsys.readouterr().err


# ---- Reward models


TEXTS = ["a", "hello world", "abc def ghi jkl mno", "zz", "x" * 30]
LORA_OF_SCORES = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "SEQ_CLS"}


def one_by_one(model) -> list[float]:
    model.eval()
    with torch.no_grad():
        return [model(**make_tokenizer()([text], return_tensors="pt")).logits.item() for text in TEXTS]


def save_reward_adapter(base: str, folder: Path, seed=1, dtype="float32", **values) -> str:
    """As TRL's RewardTrainer does: on a base of any kind, with the head, and with the tokenizer."""
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=dtype)
    moved(get_peft_model(model, LoraConfig(**{**LORA_OF_SCORES, **values})), seed).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def as_peft_scores(adapter: str, dtype="float32") -> list[float]:
    model = AutoModelForSequenceClassification.from_pretrained(base_of(adapter), num_labels=1, dtype=dtype)
    return one_by_one(PeftModel.from_pretrained(model, adapter))


def scores_of(trainer, i=0) -> list[float]:
    prompts = ["ab"] * len(TEXTS)
    scores = trainer._calculate_rewards([{"prompt": p} for p in prompts], ["" for _ in prompts], TEXTS, None)
    return scores[:, i].tolist()


@pytest.fixture
def reward_adapter(tiny_policy, tmp_path):
    return save_reward_adapter(tiny_policy, tmp_path / "scorer")


@pytest.mark.parametrize("base", ["a policy", "a reward model", "without a padding token", "in bfloat16"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_an_adapter_scores_as_it_was_saved(make_trainer, tiny_model, tiny_policy, tmp_path, base, batch_size):
    if base == "a reward model":
        Qwen2ForSequenceClassification(Qwen2Config(**TINY, num_labels=1)).save_pretrained(tiny_policy)
    if base == "without a padding token":  # as many policies have it; the tokenizer beside the adapter says which
        Qwen2ForCausalLM(Qwen2Config(**{**TINY, "pad_token_id": None})).save_pretrained(tiny_policy)
    dtype = "bfloat16" if base == "in bfloat16" else "float32"
    adapter = save_reward_adapter(tiny_policy, tmp_path / "scorer", dtype=dtype)
    expected = as_peft_scores(adapter, dtype)
    assert torch.tensor(expected).std() > 0.01
    trainer = make_trainer(reward_funcs=adapter, reward_batch_size=batch_size)
    tolerance = 0.02 if dtype == "bfloat16" else 1e-5  # padding changes the order of sums
    assert scores_of(trainer) == pytest.approx(expected, abs=tolerance)
    assert trainer.voters.sources.names == ["scorer"]
    (model,), (tokenizer,) = load_reward_models([adapter], [None], conversational=True)
    assert model.config.pad_token_id == tokenizer.pad_token_id == 0
    assert one_by_one(model) == pytest.approx(expected, abs=1e-6)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    saved = load_file(Path(adapter, "adapter_model.safetensors"))["base_model.model.score.weight"]
    assert torch.equal(model.score.weight, saved)


def test_two_adapters_of_one_base(make_trainer, tiny_policy, tmp_path):
    one, two = (save_reward_adapter(tiny_policy, tmp_path / name, seed=i) for i, name in enumerate(("one", "two")))
    trainer = make_trainer(
        reward_funcs=[one, two], eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=4,
        trainer_kwargs={
            "eval_dataset": Dataset.from_dict({"prompt": ["ab"]}),
            "eval_reward_funcs": save_reward_adapter(tiny_policy, tmp_path / "judge", seed=7),
        },
    )  # fmt: skip
    assert trainer.voters.sources.names == ["one", "two"]
    assert scores_of(trainer, 0) == pytest.approx(as_peft_scores(one), abs=1e-5)
    assert scores_of(trainer, 1) == pytest.approx(as_peft_scores(two), abs=1e-5)
    assert trainer.describe()["judges"] == ["judge"]
    trainer.train()
    (row, *_) = [row for row in trainer.state.log_history if "loss" in row]
    assert row["rewards/one/mean"] != row["rewards/two/mean"]


def test_what_trls_reward_trainer_saves(tiny_policy, tmp_path):
    from trl import RewardConfig, RewardTrainer

    texts = {"chosen": "abc", "rejected": "xyz zz"}
    rows = [{side: [{"role": "assistant", "content": text}] for side, text in texts.items()}] * 4
    args = RewardConfig(
        str(tmp_path / "scorer"), max_steps=1, use_cpu=True, bf16=False, report_to="none", learning_rate=0.1,
        gradient_checkpointing=False, disable_tqdm=True,
    )  # fmt: skip
    config = LoraConfig(r=2, task_type="SEQ_CLS")
    trainer = RewardTrainer(tiny_policy, args=args, train_dataset=Dataset.from_list(rows), peft_config=config)
    trainer.train()
    trainer.save_model()
    (model,), (tokenizer,) = load_reward_models([str(tmp_path / "scorer")], [None], conversational=True)
    assert one_by_one(model) == one_by_one(trainer.model)
    assert model.config.pad_token_id == trainer.model.config.pad_token_id == tokenizer.pad_token_id


def test_an_encoder(tmp_path):
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    config = BertConfig(**sizes, num_attention_heads=2, num_labels=1, pad_token_id=0)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "base")
    adapter = save_reward_adapter(str(tmp_path / "base"), tmp_path / "scorer", target_modules=["query"])
    (model,), _ = load_reward_models([adapter], [None], conversational=False)
    assert one_by_one(model) == pytest.approx(as_peft_scores(adapter), abs=1e-6)


@pytest.mark.parametrize(("bits", "noise"), [("8bit", 0.2), ("4bit", 0.6)])
def test_quantized(make_trainer, tmp_path, bits, noise):
    torch.manual_seed(0)
    config = Qwen2Config(**{**TINY, "hidden_size": 64, "intermediate_size": 128}, initializer_range=0.1)
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "base")
    adapter = save_reward_adapter(str(tmp_path / "base"), tmp_path / "scorer")
    scores = torch.tensor(scores_of(make_trainer(reward_funcs=adapter, reward_quantization=bits)))
    expected = torch.tensor(as_peft_scores(adapter))
    assert 0 < (scores - expected).std() < noise * expected.std()


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (
            lambda a: spoil(a, lambda t: t.pop("base_model.model.score.weight")),
            "has no scoring head: the config.json of",
        ),
        (
            lambda a: spoil(a, lambda t: t.update({"base_model.model.score.weight": torch.zeros(2, 16)})),
            "has 2 labels, but a reward is one number",
        ),
        (
            lambda a: spoil(a, lambda t: t.pop(FIRST)),
            "reward model .* is an adapter that does not fit its base .* lacks",
        ),
        (
            lambda a: configure(a, base_model_name_or_path="./gone"),
            "is an adapter of './gone', which is neither a",
        ),
        (lambda a: Path(a, "adapter_model.safetensors").unlink(), "its adapter_model.safetensors cannot be read"),
        (
            lambda a: Path(a, "adapter_model.safetensors").rename(Path(a, "adapter_model.bin")),
            "has adapter_model.bin, a pickle",
        ),
        (
            lambda a: shutil.copy(Path(base_of(a), "config.json"), a),
            "has both the config.json of a whole model and an ad",
        ),
        (
            lambda a: lose(base_of(a), "model.norm.weight"),
            "lacks the weights model.norm.weight of a Qwen2ForSequenceCl",
        ),
    ],
)
def test_a_reward_adapter_that_is_refused(make_trainer, reward_adapter, harm, message):
    harm(reward_adapter)
    with pytest.raises(ValueError, match=message):
        make_trainer(reward_funcs=reward_adapter)


def test_a_policys_adapter_is_no_reward_model(make_trainer, adapter):
    make_tokenizer().save_pretrained(adapter)
    with pytest.raises(ValueError, match=r"has no scoring head: .* that was trained with lora_task_type SEQ_CLS"):
        make_trainer(reward_funcs=adapter)


def test_an_adapter_on_a_trained_head(tiny_policy, tmp_path):
    """Of the body alone: the head is that of the base, and needs to be there."""
    Qwen2ForSequenceClassification(Qwen2Config(**TINY, num_labels=1)).save_pretrained(tiny_policy)
    adapter = save_reward_adapter(tiny_policy, tmp_path / "scorer", task_type=None)
    (model,), _ = load_reward_models([adapter], [None], conversational=True)
    assert one_by_one(model) == pytest.approx(as_peft_scores(adapter), abs=1e-6)


def test_eval_and_check_take_a_reward_adapter(recipe, rewards, tiny_policy, reward_adapter, tmp_path, capsys):
    from trl_sppo.evaluation.play import score_groups
    from trl_sppo.oracles.panel import load_panel

    panel = load_panel([reward_adapter], [], conversational=False)
    groups = [{"prompt": "", "completions": TEXTS}]
    score_groups(panel, groups)
    assert groups[0]["scores"]["scorer"] == pytest.approx(as_peft_scores(reward_adapter), abs=1e-5)
    argv = recipe(tiny_policy, "out")
    values = dict(zip((name[2:] for name in argv[::2]), argv[1::2], strict=True))
    values["eval_reward_model_name_or_path"] = values.pop("reward_funcs") and reward_adapter
    values |= {"reward_model_name_or_path": reward_adapter, "eval_strategy": "steps", "dataset_test_split": "train"}
    (tmp_path / "recipe.yaml").write_text("\n".join(f"{name}: {value}" for name, value in values.items()))
    check.main(["recipe.yaml"])
    assert f"Win rates in each group of 4 come from {reward_adapter} (weight 1)." in capsys.readouterr().out


# ---- Nothing to train


@pytest.mark.parametrize("options", [{}, {"lr_scheduler_type": "constant"}])
def test_a_learning_rate_of_zero(make_trainer, options):
    with pytest.raises(ValueError, match=r"learning_rate must be positive, got 0\.0"):
        make_trainer(learning_rate=0, **options)


def test_an_adapter_of_which_the_active_one_is_frozen(make_trainer, tiny_policy, adapter):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_policy), adapter)
    model.add_adapter("other", copy.deepcopy(KINDS["lora"]))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".other." in name)
    with pytest.raises(ValueError, match=r"no parameter of the policy .* activate it with `model.set_adapter`"):
        make_trainer(model)
    model.set_adapter("other")
    make_trainer(model)


def test_the_configuration_of_a_saved_adapter(make_trainer, adapter):
    config = LoraConfig.from_pretrained(adapter)
    with pytest.raises(ValueError, match="peft_config has inference_mode=True, so nothing would be trained"):
        make_trainer(trainer_kwargs={"peft_config": config})


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["nowhere"]},
        {"target_modules": []},
        {"target_modules": ["q_proj"], "layers_to_transform": [9]},
        {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]},
    ],
)
def test_an_adapter_that_matches_no_module(make_trainer, config):
    with pytest.raises(ValueError, match="target"):
        make_trainer(trainer_kwargs={"peft_config": LoraConfig(**config, task_type="CAUSAL_LM")})


def test_an_adapter_without_a_parameter_to_train(make_trainer, monkeypatch):
    """Whatever the kind, it is found before training."""
    from peft.tuners.lora import LoraModel

    monkeypatch.setattr(LoraModel, "_mark_only_adapters_as_trainable", lambda self, model: model.requires_grad_(False))
    with pytest.raises(ValueError, match=r"no parameter of the policy .* requires a gradient"):
        make_trainer(trainer_kwargs={"peft_config": copy.deepcopy(KINDS["lora"])})
