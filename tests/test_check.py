"""`trl-sppo check` says what a recipe would do and what looks wrong; and every recipe trains, on a tiny model."""

import json
import re
from copy import deepcopy

import pytest
import torch
import transformers
import yaml
from helpers import TINY, make_tokenizer
from huggingface_hub import constants, is_offline_mode
from recipe_files import CARDS, POLICIES, RECIPES, REWARD_MODELS, at_hand, gpu_of, header_of, options_of
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from trl import ModelConfig

from trl_sppo import SPPOConfig, train
from trl_sppo.arguments.options import load_preference_funcs
from trl_sppo.commands import check
from trl_sppo.judges import LLMJudge
from trl_sppo.planning import plan
from trl_sppo.planning.memory import ModelSize, Placement, budget, peak, size_of


PATHS = sorted(path for path in RECIPES.rglob("*.yaml") if path.stem != "quickstart")
pytestmark = pytest.mark.usefixtures("measured_once")
LORA = RECIPES / "qwen2.5-7b-instruct/lora.yaml"


def name_of(path) -> str:
    return str(path.relative_to(RECIPES).with_suffix(""))


@pytest.fixture
def run(tmp_path, capsys):
    """A function that checks a recipe, with its models at hand: exit status and what it says."""

    def run(path, *options, models=True) -> tuple[int, str]:
        status = check.main([str(path), *(at_hand(path, tmp_path) if models else []), *options])
        return status, capsys.readouterr().out

    return run


@pytest.mark.parametrize("path", PATHS, ids=name_of)
def test_every_recipe_passes_and_needs_what_its_header_says(path, run):
    status, said = run(path, "--gpu_memory", str(gpu_of(path)))
    assert status == 0 and said.endswith("Nothing looks wrong.\n"), said
    assert f", by arithmetic (docs/memory.md), of {gpu_of(path):g} GB\n" in said
    (value,) = re.findall(r"^at most, while [a-z ]+ ([\d.]+)$", said, re.MULTILINE)
    header = re.sub(r"\n# +", " ", header_of(path))
    assert re.search(r"By arithmetic (?:at most )?(\d+) GB", header)[1] == f"{float(value):.0f}"


def test_what_the_recipe_that_was_asked_for_would_do(run):
    status, said = run(LORA)
    assert status == 0
    for words in (
        "(LoRA, r = 16, 40,370,176 parameters)",
        "(7,615,616,512 parameters), frozen in bfloat16, in 1 process.",
        "An iteration: 64 prompts x 8 completions = 512, sampled by vLLM (colocate), of at most 1,024 tokens",
        # ranks 0 to 7 of 7 wins: of those 3/7 and 4/7 lie within 0.4 and 0.6
        "Then 4 optimizer steps on them, of 128 completions each, 96 of them trained on if no two tie.",
        "learning_rate=5e-07 is unusual for an adapter",
        "No evaluation has a judge that is not trained on",
        "The number and length of prompts in trl-lib/ultrafeedback-prompt. It was not loaded.",
    ):
        assert words in said, words
    # 7,615,616,512 weights of 2 bytes; 40,370,176 with weight, gradient and two moments of 4
    for row in (r"^what +GB$", r"^policy, bf16 +15\.23$", r"^adapter, with gradient and AdamW +0\.65$"):
        assert re.search(row, said, re.MULTILINE), said


def test_eight_processes(run):
    said = run(RECIPES / "qwen2.5-7b-instruct/full-8gpu-zero3.yaml")[1]
    assert "in 8 processes (zero3)" in said and "64 prompts x 8 completions = 512" in said
    said = run(LORA, "--num_processes", "2")[1]
    assert "in 2 processes." in said and "128 prompts x 8 completions = 1,024" in said


def test_without_a_hub_and_without_models(run):
    status, said = run(LORA, models=False)
    assert status == 0 and "Memory" not in said and "64 prompts x 8 completions" in said
    assert "The number of GPUs. One process is assumed, but training starts one on each GPU." in said
    assert "Anything about model Qwen/Qwen2.5-7B-Instruct. The hub cannot be reached." in said
    assert "Anything about reward model Skywork/Skywork-Reward-V2-Qwen3-4B. The hub cannot be reached." in said


def test_an_unreachable_hub_is_asked_once(run, monkeypatch):
    """Otherwise each file is tried six times, with growing pauses."""
    asked, offline = [], []

    class Session:
        def head(self, url, timeout):
            asked.append(url)
            raise OSError("no network")

    def from_pretrained(*args, **kwargs):
        offline.append(is_offline_mode())
        raise OSError("We couldn't connect")

    plan._hub_responds.cache_clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(plan, "get_session", Session)
    monkeypatch.setattr(plan.AutoConfig, "from_pretrained", from_pretrained)
    said = run(LORA, models=False)[1]
    plan._hub_responds.cache_clear()
    assert said.count("The hub cannot be reached.") == 2 and asked == [constants.ENDPOINT] and offline == [True, True]
    assert not is_offline_mode()


def test_no_sum_without_a_part_of_it(run, tmp_path):
    """A reward model that is not at hand is not counted as nothing."""
    said = run(LORA, "--reward_model_name_or_path", "somebody/reward-model")[1]
    assert "7,615,616,512 parameters" in said and "Memory" not in said


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["--gpu_memory", "40"],
            r"training needs 47\.0 GB. Plan with at most 36\.0 of 40 GB\. Lower per_device",
        ),
        (["--gpu_memory", "60", "--vllm_gpu_memory_utilization", "0.8"], r"generating needs \d.*vllm_gpu_memory_util"),
        (["--vllm_max_model_length", "1024"], "max_completion_length=1024 leaves no room for a prompt"),
        (
            ["--use_peft", "false"],
            "dtype='bfloat16' without an adapter: steps of learning_rate=5e-07 are lost",
        ),
        # 15.23 GB of weights, and 4,096 tokens of 57,344 bytes
        (
            ["--vllm_gpu_memory_utilization", "0.15"],
            "gives vLLM 12.0 GB, but the weights .* take 15.5",
        ),
    ],
)
def test_what_looks_wrong(run, options, words):
    status, said = run(LORA, *options)
    assert status == 1 and "Nothing looks wrong" not in said
    assert re.search(words, said.split("Looks wrong")[1]), said


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--nonsense", "1"], "there is no option 'nonsense'"),
        (["--num_generations", "7"], "generation_batch_size"),
        (["--reward_funcs", "my_rewrads.brevity"], "no module 'my_rewrads'"),
        (["--dataset_name", "./prompts"], "dataset_name='./prompts' cannot be loaded: "),
        (["--dataset_name", "empty"], "dataset_name='empty' cannot be loaded: a file is empty"),
        (["--reward_funcs", "acuracy_reward"], "trl.rewards.acuracy_reward' (--reward_funcs) could not be imported"),
        (["--load_in_8bit", "true"], "use_vllm=True with a policy in 8 bit"),
        (["--num_processes", "2", "--accelerate_config", "fsdp1"], "an adapter under FSDP1"),
        (["--num_processes", "2", "--accelerate_config", "fsdp2", "--load_in_4bit", "true"], "in 4 bit under FSDP"),
        (["--num_processes", "2", "--accelerate_config", "zero3", "--reward_quantization", "8bit"], "under DeepSpeed"),
        (["--eval_reward_funcs", "accuracy_reward"], "eval_strategy='no' evaluates nothing"),
        (["--reward_trust_remote_code", "foo/bar"], "not one of the reward models"),
        (["--gradient_checkpointing_kwargs", '{"nonsense": 1}'], "is not accepted by torch.utils.checkpoint"),
        (["--output_dir", f"{__file__}/out"], "output_dir must be a folder that can be created"),
        (["--rollouts", "missing", "--use_vllm", "false"], "missing"),
        (["--reward_model_name_or_path", "http://localhost:1", "--reward_quantization", "8bit"], "but there is none"),
        (["--model_init_kwargs", '{"dtype": "float64"}'], "dtype must be float32 or bfloat16"),
        (["--use_cpu", "true", "--optim", "nonsense"], "optim"),
        (["--lora_r", "0"], "lora_r must be between 1"),
        (["--dataset_name", "."], "dataset_name='.' cannot be loaded"),
        (["--gpu_memory", "-1"], "gpu_memory (in GB) and prompt_length (in tokens) must be positive"),
        (["--prompt_length", "0"], "gpu_memory (in GB) and prompt_length (in tokens) must be positive"),
    ],
)
def test_what_training_would_refuse(run, capsys, tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "train.jsonl").touch()
    with pytest.raises(SystemExit) as end:
        run(LORA, *options)
    assert end.value.code == 2 and words in capsys.readouterr().err


def test_a_prompt_that_does_not_fit(run, tmp_path, capsys):
    prompts = write_prompts(tmp_path / "prompts", 64)
    row = json.dumps({"prompt": "a" * 5000})
    (tmp_path / "prompts/train.jsonl").write_text("\n".join([row] * 64))
    with pytest.raises(SystemExit):
        run(LORA, "--dataset_name", prompts)
    assert "which does not fit into the policy's context" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--accelerate_config", "zero1", "--num_processes", "4"], "in 4 processes (zero1)."),
        (["--use_deepspeed", "--zero_stage", "3", "--num_processes", "4"], "in 4 processes (zero3)."),
        (["--accelerate_config", "fsdp1", "--num_processes", "2", "--use_peft", "false"], "in 2 processes (fsdp1)."),
    ],
)
def test_sharding_is_recognised(run, options, words):
    said = run(LORA, *options)[1]
    assert words in said and "DDP" not in said and "lost in the rounding" not in said


def test_a_recipe_for_gpus_is_checked_without_one(run):
    status, said = run(LORA, "--tf32", "true", "--num_processes", "2")
    assert status == 0 and "in 2 processes." in said


def test_weights_are_told_where_they_differ(run, tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text("from somewhere import brevity, judge\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    sources = ("--reward_funcs", "my_rewards.brevity", "--preference_funcs", "my_rewards.judge")
    said = run(LORA, *sources, "--reward_weights", "1", "0")[1]
    assert " (weight 1), my_rewards.brevity (weight 0), my_rewards.judge (weight 1)." in said


def test_the_backend_of_the_processes_is_not_looked_for(run):
    status, said = run(RECIPES / "qwen2.5-7b-instruct/full-8gpu-zero3.yaml", "--ddp_backend", "nccl")
    assert status == 0, said


def test_on_a_cpu_there_is_no_gpu_to_fill(run):
    assert "Memory" not in run(LORA, "--use_cpu", "true", "--use_vllm", "false")[1]


@pytest.mark.parametrize("kind", ["Bert", "Roberta"])
def test_a_reward_model_that_is_an_encoder(run, tmp_path, kind):
    """Their positions are a buffer, which has to hold some when they are measured."""
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=31, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_labels=1,
        architectures=[f"{kind}ForSequenceClassification"],
    )  # fmt: skip
    config.save_pretrained(tmp_path / "reward")
    make_tokenizer().save_pretrained(tmp_path / "reward")
    for _ in range(3):
        assert "reward model, bf16" in run(LORA, "--reward_model_name_or_path", str(tmp_path / "reward"))[1]


def test_an_architecture_that_cannot_be_measured(run, tmp_path):
    config = transformers.GPT2Config(
        vocab_size=31, n_embd=16, n_layer=2, n_head=2, num_labels=1, architectures=["GPT2ForSequenceClassification"]
    )
    config.save_pretrained(tmp_path / "reward")
    make_tokenizer().save_pretrained(tmp_path / "reward")
    status, said = run(LORA, "--reward_model_name_or_path", str(tmp_path / "reward"))
    assert status == 0 and "Its architecture could not be measured" in said and "Memory" not in said


def test_attention_that_makes_a_matrix_of_pairs():
    config = POLICIES["Qwen/Qwen2.5-7B-Instruct"].__class__(**TINY)
    assert size_of(deepcopy(config)).kept_of_pairs == 0
    assert size_of(deepcopy(config), attention="eager").kept_of_pairs > 0
    assert size_of(deepcopy(config), attention="flash_attention_2").kept_of_pairs == 0


@pytest.mark.parametrize("argv", [["--config", str(LORA)], ["--learning_rate", "1", str(LORA)]])
def test_where_the_recipe_stands(argv, capsys):
    if argv[0] == "--config":
        assert check.main(argv) == 0
        return
    with pytest.raises(SystemExit):
        check.main(argv)
    assert "no recipe given" in capsys.readouterr().err


def test_a_missing_recipe(capsys):
    with pytest.raises(SystemExit) as end:
        check.main(["recipes/no-such.yaml"])
    assert end.value.code == 2 and "is not a file" in capsys.readouterr().err


def write_prompts(folder, number: int) -> str:
    folder.mkdir()
    rows = [{"prompt": [{"role": "user", "content": letter * 3}]} for letter in "abcdefghijklmnopqrstuvwxyz"]
    rows = (rows * (number // len(rows) + 1))[:number]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder)


def test_a_dataset_at_hand_is_counted(run, tmp_path):
    prompts = write_prompts(tmp_path / "prompts", 200)
    said = run(LORA, "--dataset_name", prompts)[1]
    assert "In all 3 iterations, 12 optimizer steps, 1,536 completions." in said
    assert "was not loaded" not in said
    said = run(LORA, "--dataset_name", prompts, "--max_steps", "9")[1]
    assert "In all 3 iterations, 9 optimizer steps, 1,536 completions." in said
    # 0.6 of 12 steps are 8, rounded up as the trainer does, and the last iteration is sampled whole
    said = run(LORA, "--dataset_name", prompts, "--num_train_epochs", "0.6")[1]
    assert "In all 2 iterations, 8 optimizer steps, 1,024 completions." in said


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, "all of them"),
        ({"train_on": "best_and_worst"}, "32 of them"),
        ({"win_rate_threshold": 0.9}, "32 of them"),  # of 8 ranks the first and the last
        ({"win_rate_threshold": 0.6, "comparison": "bradley_terry"}, "trained on if the threshold keeps them"),
        ({"win_rate_threshold": 0.6, "reward_funcs": "accuracy_reward"}, "trained on if the threshold keeps them"),
        (
            {"win_rate_threshold": 0.6, "preference_funcs": "helpers.more_abc"},
            "trained on if the threshold keeps them",
        ),
    ],
)
def test_what_is_trained_on(run, tmp_path, options, kept):
    recipe = {name: value for name, value in options_of(LORA).items() if name != "win_rate_threshold"}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe | options))
    assert f"128 completions each, {kept}" in run(path, models=False)[1]


def test_sizes_are_those_of_the_model_cards():
    for name, billions in CARDS.items():
        config = deepcopy({**POLICIES, **REWARD_MODELS}[name])
        with torch.device("meta"):
            kind = AutoModelForSequenceClassification if name in REWARD_MODELS else AutoModelForCausalLM
            number = kind.from_config(config).num_parameters()
        assert number / 1e9 == pytest.approx(billions, rel=0.02), name


def tiny(config, folder, reward: bool) -> str:
    """A random model of an architecture, with a tokenizer, saved."""
    values = config.to_dict() | TINY | {"head_dim": 8, "layer_types": None, "no_rope_layers": None}
    torch.manual_seed(0)
    kind = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
    more = {"num_labels": 1} if reward else {}
    model = kind.from_config(config.__class__(**values, **more))
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def test_memory_of_a_tiny_model_by_hand():
    """Two layers of width 16: an embedding of 31 x 16, shared with the head."""
    config = POLICIES["Qwen/Qwen2.5-7B-Instruct"].__class__(**TINY, tie_word_embeddings=True)
    size = size_of(config)
    # q: 16 x 16 + 16, k and v: 16 x 8 + 8, o: 16 x 16, three of 16 x 32, two norms of 16
    layer = 272 + 2 * 136 + 256 + 3 * 512 + 32
    assert size.layer == layer and size.parameters == 2 * layer + 31 * 16 + 16
    assert size.matrices == 2 * (256 + 2 * 128 + 256 + 3 * 512) and size.widest == 512
    assert size.cache == 2 * 2 * 8 * 2 and size.heads == 16 and size.adapter == 0 and size.kept_of_pairs == 0


SIZE = ModelSize(
    parameters=1000, matrices=800, layer=400, embedding=100, widest=50, layers=2, hidden=4, cache=32, heads=4, kept=64,
    kept_of_pairs=0,
)  # fmt: skip
READING = "reading prompts: cache, one layer, mask"


@pytest.mark.parametrize(
    ("options", "model_options", "place", "row", "value"),
    [
        # a float32 policy: weight, gradient, two moments
        ({}, {"dtype": "float32"}, {}, "policy, with gradient and AdamW", 1000 * 16),
        ({"optim": "rmsprop"}, {"dtype": "float32"}, {}, "policy, with gradient and RMSprop", 1000 * 12),
        ({"optim": "adamw_8bit"}, {"dtype": "float32"}, {}, "policy, with gradient and AdamW", 1000 * (8 + 2)),
        ({}, {"dtype": "float32"}, {"processes": 2}, "policy, DDP's buckets of gradients", 4000),
        ({}, {}, {"processes": 4, "sharding": "zero2"}, "policy, with gradient and AdamW", 2000 + 14_000 / 4),
        ({}, {}, {"processes": 4, "sharding": "zero3"}, "policy, with gradient and AdamW", 4000),
        ({"beta": 0.1}, {"dtype": "float32"}, {}, "initial policy, float32", 4000),
        ({"beta": 0.1}, {}, {"processes": 4, "sharding": "fsdp2"}, "initial policy, bf16", 500),
        ({"optim": "adafactor"}, {"dtype": "float32"}, {}, "policy, with gradient and Adafactor", 1000 * 8),
        ({}, {}, {"processes": 4, "sharding": "zero1"}, "policy, with gradient and AdamW", 4000 + 12_000 / 4),
        ({"reward_quantization": "4bit"}, {}, {}, "reward model, matrices in NF4", 800 * (1 / 2 + 1 / 64 + 1 / 4096)),
        # rows of 8 + 4 tokens: 4 micro-batches of 8 rows are sampled at once
        ({}, {}, {}, "generating: cache", 32 * 12 * 32),
        ({}, {}, {}, READING, 32 * 8 * 32 + 4 * 8 * 64 + 4 * 8 * 8 * 3),  # of 4 prompts
        ({"generation_kwargs": {"prefill_chunk_size": 8}}, {}, {}, READING, 32 * 8 * 32 + 4 * 8 * 64 + 4 * 8 * 8 * 3),
        (
            {"generation_kwargs": {"prefill_chunk_size": 2}}, {}, {}, READING,
            32 * 8 * 32 + 32 * 2 * 64 + 32 * 2 * 8 * 3,
        ),
        (
            {"cache_implementation": "static"}, {}, {}, READING,
            32 * 8 * 32 + 32 * 8 * 64 + 32 * 8 * 8 * 3,
        ),
        (  # an evaluation of 40 rows, 2 of each prompt
            {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 40, "num_generations_eval": 2},
            {}, {}, READING, 40 * 8 * 32 + 20 * 8 * 64 + 20 * 8 * 8 * 3,
        ),
        ({"gradient_checkpointing": False}, {}, {}, "training: all layers", 8 * 12 * 3 * 64),
    ],
)  # fmt: skip
def test_a_row_of_the_budget(options, model_options, place, row, value):
    options = {"max_completion_length": 4, "per_device_train_batch_size": 8, "steps_per_generation": 4, **options}
    args = SPPOConfig(use_cpu=True, bf16=False, **options)
    model_args = ModelConfig(**{"dtype": "bfloat16", **model_options})
    rows = budget(args, model_args, SIZE, [SIZE], Placement(1e6, prompt_length=8, **place))
    assert rows[row] == value


def test_the_peak_is_that_of_one_phase():
    assert peak({"always": 1.0, "a: x": 2.0, "b: y": 1.5, "b: z": 1.0}) == (3.5, "b")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", PATHS, ids=name_of)
def test_dry_run(path, tmp_path, monkeypatch):
    """Two optimizer steps of each recipe on the CPU: its models tiny and random, completions short, one process."""
    options = options_of(path)
    for name in options.pop("env", {}):
        monkeypatch.delenv(name, raising=False)
    for name in ("num_processes", "accelerate_config", *(name for name in options if "vllm" in name)):
        options.pop(name, None)
    policy = options["model_name_or_path"]
    options["model_name_or_path"] = tiny(POLICIES[policy], tmp_path / "policy", reward=False)
    if "reward_model_name_or_path" in options:
        kind = REWARD_MODELS.get(options["reward_model_name_or_path"], REWARD_MODELS[min(REWARD_MODELS)])
        options["reward_model_name_or_path"] = tiny(kind, tmp_path / "reward", reward=True)
    if "preference_funcs" in options:
        if options["preference_funcs"] != "trl_sppo.judges.published.pairrm":  # a judge behind an endpoint
            (judge,) = load_preference_funcs(options["preference_funcs"])
            assert isinstance(judge, LLMJudge) and len(judge.rubric) == 3
        options["preference_funcs"] = "helpers.more_abc"
    options |= {
        "dataset_name": write_prompts(tmp_path / "prompts", 64),
        "output_dir": str(tmp_path / "out"),
        "steps_per_generation": options["gradient_accumulation_steps"],
        "max_completion_length": 4,
        "max_steps": 2,
        "logging_steps": 1,
        "use_cpu": True,
    }
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(options))
    trainer = train.main(["--config", str(recipe)])
    assert trainer.state.global_step == 2
    assert type(trainer.model.config) is type(POLICIES[policy])
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 2 and all(torch.isfinite(torch.tensor(losses)))


def test_the_published_judge_by_name(monkeypatch):
    monkeypatch.setattr("trl_sppo.judges.pairrm.PairRMJudge", lambda name: {"llm-blender/PairRM-hf": print}[name])
    assert load_preference_funcs(["trl_sppo.judges.published.pairrm"]) == [print]
    with pytest.raises(ValueError, match=r"no attribute 'pairmr'\. It has: pairrm"):
        load_preference_funcs(["trl_sppo.judges.published.pairmr"])


def test_a_judge_with_its_arguments_in_a_recipe():
    rubric = [{"criterion": "x", "weight": 2}]
    arguments = {"model": "org/judge", "base_url": "http://localhost:1/v1", "rubric": rubric}
    (judge,) = load_preference_funcs([{"trl_sppo.judges.LLMJudge": arguments}])
    assert isinstance(judge, LLMJudge) and judge.rubric == [("x", 2.0)]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"trl_sppo.judges.LLMJudge": {"model": "x"}}, r"LLMJudge \(preference_funcs\) cannot be made: .*'base_url'"),
        ({"trl_sppo.judges.LLMJudge": {"model": "x", "base_url": "y"}}, r"cannot be made: base_url must be an http"),
        ({"trl_sppo.judges.LLMJudge": {"api_key": "k"}}, "has a key, and recipes are shared. Set OPENAI_API_KEY"),
        (
            {"trl_sppo.judges.LLMJudge": {"request_options": {"extra_headers": {"Authorization": "Bearer k"}}}},
            "has a key, and recipes are shared",
        ),
        ("trl_sppo.judges.LLMJudge", r"LLMJudge \(preference_funcs\) is a class. Give its arguments below it"),
        ({"a.b": {}, "c.d": {}}, "must be one class and a mapping"),
        ({"trl_sppo.judges.LLMJudje": {}}, "could not be imported"),
    ],
)
def test_judges_of_a_recipe_that_cannot_be_made(entry, message):
    with pytest.raises(ValueError, match=message):
        load_preference_funcs([entry])


@pytest.mark.parametrize("value", [{"a.b": {}}, [{"a.b": "c"}], [3]])
def test_judges_of_a_wrong_form_are_refused_with_the_recipe(tmp_path, value, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"model_name_or_path": "x", "dataset_name": "y", "preference_funcs": value}))
    with pytest.raises(SystemExit):
        check.main([str(recipe)])
    assert "preference_funcs" in capsys.readouterr().err
