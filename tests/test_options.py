"""Every field of GRPOConfig: it acts, is refused, or is listed with the reason why this package does not test it."""

import ast
import copy
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from accelerate import ParallelismConfig
from datasets import Dataset
from helpers import count_abc, make_tokenizer
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import TrainerCallback
from transformers.integrations import integration_utils
from transformers.trainer_pt_utils import EvalLoopContainer
from trl import GRPOConfig

from trl_sppo import SPPOConfig, train
from trl_sppo.config import REJECTED_OPTIONS


FIELDS = {option.name: option for option in fields(GRPOConfig)}

# ---- Options that act


@dataclass
class Case:
    """
    An option's value, and what is seen of it. The same is looked for, in vain, in a run without the option.

    Args:
        value:
            Of the option.
        see (`Callable`):
            What is seen of a run.
        expected:
            What is seen with the option.
        besides (`dict`, *optional*):
            Other options and arguments, of both runs.
        train (`bool`, *optional*, defaults to `True`):
            Whether to train. If not, the trainer is only built.
        plain (`dict`, *optional*):
            Options of the run without the option.
    """

    value: Any
    see: Callable[[SimpleNamespace], Any]
    expected: Any
    besides: dict[str, Any] = field(default_factory=dict)
    train: bool = True
    plain: dict[str, Any] = field(default_factory=dict)


class Tracker(TrainerCallback):
    """Stands for trackio, of which TRL asks for tables."""

    tables: list[Any] = []
    Table = staticmethod(lambda dataframe: dataframe)
    log = staticmethod(lambda logs: Tracker.tables.append(logs["completions"]))


class Engine:
    """Stands for vLLM: four completions, which it believes r times as likely as the policy does, for r in `RATIOS`."""

    RATIOS = 1 / 4, 1 / 2, 1.0, 4.0
    vllm_client = SimpleNamespace(get_server_info=lambda: {"model_config": {"logprobs_mode": "processed_logprobs"}})

    def __init__(self, model, processing_class, mode, **kwargs):
        self.model, self.options, self.mode = model, {"mode": mode, **kwargs}, "server"  # which syncs no weights

    def sync_weights(self):
        pass

    def generate(self, prompts, images, num_generations, profiler):
        completions = [[3 + i % 4, 1] for i in range(len(prompts))]
        logps = []
        for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            with torch.no_grad():
                logits = self.model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
            own = logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])
            logps.append((own + math.log(self.RATIOS[i % 4]) / 2).tolist())
        return None, completions, logps, None


@pytest.fixture
def run(make_trainer, tiny_model, tmp_path, monkeypatch, capsys):
    """A function that trains a tiny model, or only builds its trainer, and records what can be seen."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "trackio", Tracker)
    monkeypatch.setattr(integration_utils, "is_trackio_available", lambda: True)
    monkeypatch.setattr("trl.trainer.grpo_trainer.trackio", Tracker, raising=False)
    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", Engine)
    monkeypatch.setattr("trl_sppo.checks.arguments.check_vllm", lambda args: None)
    to_cpu = EvalLoopContainer.to_cpu_and_numpy
    runs = 0

    def make(train: bool, options: dict[str, Any]) -> SimpleNamespace:
        nonlocal runs
        runs += 1
        model = copy.deepcopy(tiny_model)
        seen = SimpleNamespace(generated=[], rows=[], prompts=[], hooks=0, autocast=set(), columns=set())
        seen.cleared = seen.offloaded = 0
        Tracker.tables = []

        def generate(input_ids, generation_config, **kwargs):
            seen.generated.append(generation_config)
            seen.rows.append(len(input_ids))
            seen.prompts += make_tokenizer().batch_decode(input_ids, skip_special_tokens=True)
            return type(model).generate(model, input_ids, generation_config=generation_config, **kwargs)

        def forward(embedding, inputs):
            seen.hooks = max(seen.hooks, len(embedding._forward_hooks))
            seen.width = inputs[0].shape[1]  # at the end, that of the last micro-batch
            seen.seed, seen.deterministic = torch.initial_seed(), torch.are_deterministic_algorithms_enabled()
            seen.verbosity = transformers.logging.get_verbosity()
            if torch.is_autocast_enabled("cpu"):
                seen.autocast.add(torch.get_autocast_dtype("cpu"))

        def score(completions, **kwargs):
            seen.columns |= kwargs.keys()
            return count_abc(completions)

        def clear():
            seen.cleared += 1

        def offload(container):
            seen.offloaded += 1
            to_cpu(container)

        monkeypatch.setattr("transformers.trainer.clear_device_cache", clear)
        monkeypatch.setattr(EvalLoopContainer, "to_cpu_and_numpy", offload)
        model.generate = generate
        model.get_input_embeddings().register_forward_pre_hook(forward)
        before = copy.deepcopy(model.state_dict())
        options = {"output_dir": f"run-{runs}", "model": model, "reward_funcs": score, **options}
        seen.trainer = make_trainer(**options)
        if train:
            seen.output = seen.trainer.train()
            after = seen.trainer.model.state_dict()
            seen.moved = math.sqrt(sum(((after[k] - before[k]) ** 2).sum() for k in before if k in after))
        seen.loader = seen.trainer.get_train_dataloader()
        seen.log = seen.trainer.state.log_history
        seen.tables = [len(table) for table in Tracker.tables]
        seen.printed = capsys.readouterr().out
        folder = Path(seen.trainer.args.output_dir)
        seen.files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
        seen.checkpoints = sorted(path.name for path in folder.glob("checkpoint-*"))
        return seen

    yield make
    torch.use_deterministic_algorithms(False)


def logged(name, key=None):
    return lambda run: [row[key or name] for row in run.log if name in row]


def group(name):
    """An entry of the optimizer's parameter groups."""
    return lambda run: run.trainer.optimizer.param_groups[0][name]


def sampled(name):
    """What reaches `generate`."""
    return lambda run: getattr(run.generated[0], name)


def loader(name):
    return lambda run: getattr(run.loader, name)


def engine(name):
    return lambda run: run.trainer.vllm_generation.options[name]


def ddp(name):
    return lambda run: getattr(run.trainer.accelerator.ddp_handler, name)


def compiler(name):
    return lambda run: getattr(run.trainer.accelerator.state.dynamo_plugin, name)


EVALUATED = Dataset.from_dict({"prompt": ["ab", "cd", "fgh"]})
EVALUATES = {"trainer_kwargs": {"eval_dataset": EVALUATED}, "per_device_eval_batch_size": 8, "eval_strategy": "steps"}
SAVES = {"save_strategy": "steps", "save_steps": 1}
KEEPS_BEST = {**EVALUATES, **SAVES, "eval_steps": 1, "load_best_model_at_end": True}
WORKERS = {"dataloader_num_workers": 1}
TALK = [[{"role": "user", "content": text}] for text in ("ab", "fgh", "cd e", "xyz")]
# A tokenizer whose template has a word of its own
TEMPLATE = make_tokenizer(chat_template="{{ word }} {{ messages[0]['content'] }}")
NOTED = {"train_dataset": Dataset.from_dict({"prompt": ["ab", "cd"], "note": ["x", "y"]})}


VLLM = {"use_vllm": True}
SAMPLED_BY_VLLM = {**VLLM, "max_steps": 1}


def importance(run):
    return pytest.approx(logged("importance_weight")(run)[0], rel=1e-4)


def full_eval(run):
    run.trainer.evaluate()
    return run.trainer.model.dtype


def best_runtime(run):
    return run.trainer.state.best_metric == min(logged("eval_runtime")(run)[1:])  # after step 0


CASES = {
    # steps and batches
    "output_dir": Case("elsewhere", lambda run: Path("elsewhere/rollouts").is_dir(), True),
    "per_device_train_batch_size": Case(4, lambda run: run.rows, [4, 4]),
    "gradient_accumulation_steps": Case(2, lambda run: run.rows, [16, 16]),
    "num_train_epochs": Case(
        2, lambda run: run.trainer.state.global_step, 2, {"max_steps": -1, "prompts": ["ab", "cd"]}
    ),
    "max_steps": Case(1, lambda run: run.trainer.state.global_step, 1),
    "seed": Case(7, lambda run: (run.seed, run.trainer._get_train_sampler().sampler.seed), (7, 7)),
    "full_determinism": Case(True, lambda run: run.deterministic, True),
    # optimizer and scheduler
    "learning_rate": Case(3e-3, logged("learning_rate"), [3e-3, 1.5e-3]),
    "lr_scheduler_type": Case("constant", logged("learning_rate"), [1e-2, 1e-2]),
    "lr_scheduler_kwargs": Case(
        {"lr_end": 6e-3}, logged("learning_rate"), [1e-2, 8e-3], {"lr_scheduler_type": "polynomial"}
    ),
    "warmup_steps": Case(1, logged("learning_rate"), [0.0, 1e-2]),
    "optim": Case("sgd", lambda run: type(run.trainer.optimizer.optimizer), torch.optim.SGD),
    "optim_args": Case("momentum=0.5", group("momentum"), 0.5, {"optim": "sgd"}),
    "weight_decay": Case(0.1, group("weight_decay"), 0.1),
    "adam_beta1": Case(0.5, lambda run: group("betas")(run)[0], 0.5),
    "adam_beta2": Case(0.5, lambda run: group("betas")(run)[1], 0.5),
    "adam_epsilon": Case(1e-3, group("eps"), 1e-3),
    "max_grad_norm": Case(1e-3, lambda run: 0 < run.moved < 1.1e-2 * 1e-3 * 2, True, {"optim": "sgd"}),
    # precision and memory
    "bf16": Case(True, lambda run: torch.bfloat16 in run.autocast, True),
    "bf16_full_eval": Case(True, full_eval, torch.bfloat16, EVALUATES, train=False),
    "fp16_full_eval": Case(True, full_eval, torch.float16, EVALUATES, train=False),
    "gradient_checkpointing": Case(True, lambda run: run.trainer.model.is_gradient_checkpointing, True),
    "gradient_checkpointing_kwargs": Case(
        {"use_reentrant": True},
        lambda run: run.trainer.model.model.layers[0]._gradient_checkpointing_func.keywords["use_reentrant"],
        True,
        {"gradient_checkpointing": True},
    ),
    "torch_empty_cache_steps": Case(1, lambda run: run.cleared, 2),
    "torch_compile": Case(True, lambda run: compiler("backend")(run).value, "INDUCTOR", train=False),
    "torch_compile_backend": Case("eager", lambda run: compiler("backend")(run).value, "EAGER", train=False),
    "torch_compile_mode": Case("max-autotune", compiler("mode"), "max-autotune", train=False),
    "use_cache": Case(True, lambda run: run.trainer.model.config.use_cache, True),
    "neftune_noise_alpha": Case(5.0, lambda run: run.hooks, 1),
    "skip_memory_metrics": Case(False, lambda run: "train_mem_cpu_alloc_delta" in run.output.metrics, True),
    # logging
    "logging_strategy": Case("no", logged("loss"), []),
    "logging_steps": Case(2, logged("loss", "step"), [2]),
    "logging_first_step": Case(True, logged("loss", "step"), [1, 2], {"logging_steps": 2}),
    "log_level": Case("error", lambda run: run.verbosity, 40),
    "disable_tqdm": Case(
        True, lambda run: any(type(each).__name__ == "PrinterCallback" for each in callbacks(run)), True,
        plain={"disable_tqdm": False},
    ),
    "report_to": Case("trackio", lambda run: any(isinstance(each, Tracker) for each in callbacks(run)), True),
    "debug": Case("underflow_overflow", lambda run: run.hooks, 1),
    # evaluation
    "eval_strategy": Case(
        "steps", logged("eval_loss", "step"), [0, 1, 2], {"trainer_kwargs": {"eval_dataset": EVALUATED}}
    ),
    "eval_steps": Case(2, logged("eval_loss", "step"), [0, 2], EVALUATES),
    "eval_delay": Case(2, logged("eval_loss", "step"), [0, 2], EVALUATES),
    "per_device_eval_batch_size": Case(
        4, lambda run: run.rows[:3], [4, 4, 4], EVALUATES, plain={"per_device_eval_batch_size": 8}
    ),
    "eval_accumulation_steps": Case(1, lambda run: run.offloaded, 3 * (4 + 2 * 4), EVALUATES),
    "dataloader_drop_last": Case(True, lambda run: run.rows[:2], [8, 8], EVALUATES),
    # checkpoints
    "save_strategy": Case("steps", lambda run: run.checkpoints, ["checkpoint-1", "checkpoint-2"], {"save_steps": 1}),
    "save_steps": Case(
        1, lambda run: run.checkpoints, ["checkpoint-1", "checkpoint-2"], {"save_strategy": "steps"}
    ),
    "save_total_limit": Case(1, lambda run: run.checkpoints, ["checkpoint-2"], SAVES),
    "save_only_model": Case(True, lambda run: "checkpoint-2/optimizer.pt" in run.files, False, SAVES),
    "metric_for_best_model": Case(
        "eval_completions/mean_length",
        lambda run: run.trainer.state.best_metric in logged("eval_completions/mean_length")(run),
        True,
        KEEPS_BEST,
    ),
    "greater_is_better": Case(False, best_runtime, True, {**KEEPS_BEST, "metric_for_best_model": "eval_runtime"}),
    # processes and data loaders
    "use_cpu": Case(
        True, lambda run: run.trainer.accelerator.state._cpu, True, train=False, plain={"use_cpu": False}
    ),
    "accelerator_config": Case(
        {"non_blocking": True}, lambda run: run.trainer.accelerator.non_blocking, True, train=False
    ),
    "ddp_find_unused_parameters": Case(False, ddp("find_unused_parameters"), False, train=False),
    "ddp_bucket_cap_mb": Case(7, ddp("bucket_cap_mb"), 7, train=False),
    "ddp_broadcast_buffers": Case(False, ddp("broadcast_buffers"), False, train=False),
    "ddp_static_graph": Case(True, ddp("static_graph"), True, train=False),
    "dataloader_num_workers": Case(1, loader("num_workers"), 1, train=False),
    "dataloader_pin_memory": Case(False, loader("pin_memory"), False, {"use_cpu": False}, train=False),
    "dataloader_persistent_workers": Case(True, loader("persistent_workers"), True, WORKERS, train=False),
    "dataloader_prefetch_factor": Case(3, loader("prefetch_factor"), 3, WORKERS, train=False),
    "dataloader_multiprocessing_context": Case(
        "spawn", lambda run: loader("multiprocessing_context")(run).get_start_method(), "spawn", WORKERS, train=False,
        plain={"dataloader_multiprocessing_context": "fork"},
    ),
    "dataloader_in_order": Case(False, loader("in_order"), False, WORKERS, train=False),
    "remove_unused_columns": Case(True, lambda run: "note" in run.columns, False, {"trainer_kwargs": NOTED}),
    # the policy
    "disable_dropout": Case(
        False,
        lambda run: {each.p for each in run.trainer.model.modules() if isinstance(each, torch.nn.Dropout)},
        {0.5},
        {"trainer_kwargs": {"peft_config": LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.5)}},
        train=False,
    ),
    # groups
    "num_generations": Case(2, lambda run: len(set(run.prompts[:8])), 4, {"prompts": [*"abcdefgh"]}),
    "num_generations_eval": Case(2, lambda run: sum(run.rows[:1]), 6, EVALUATES),
    "generation_batch_size": Case(16, lambda run: run.rows, [16]),
    "steps_per_generation": Case(2, lambda run: run.rows, [16]),
    "num_iterations": Case(2, lambda run: run.rows, [8]),
    "shuffle_dataset": Case(False, lambda run: run.prompts[::4], [*"abcd"], {"prompts": [*"abcdefgh"]}),
    "pad_to_multiple_of": Case(8, lambda run: run.width % 8, 0),
    # generation
    "temperature": Case(0.5, sampled("temperature"), 0.5),
    "top_p": Case(0.9, sampled("top_p"), 0.9),
    "top_k": Case(3, sampled("top_k"), 3),
    "min_p": Case(0.1, sampled("min_p"), 0.1),
    "repetition_penalty": Case(1.5, sampled("repetition_penalty"), 1.5),
    "cache_implementation": Case("dynamic", sampled("cache_implementation"), "dynamic"),
    "generation_kwargs": Case({"prefill_chunk_size": 2}, sampled("prefill_chunk_size"), 2),
    "max_completion_length": Case(3, lambda run: logged("completions/max_length")(run)[0], 3),
    "chat_template_kwargs": Case(
        {"word": "w"}, lambda run: {prompt[0] for prompt in run.prompts}, {"w"},
        {"prompts": TALK, "trainer_kwargs": {"processing_class": TEMPLATE}},
    ),
    # what is written down of completions
    "log_completions": Case(True, lambda run: "completions/completions_00001.parquet" in run.files, True),
    "num_completions_to_print": Case(
        1, lambda run: run.printed.count("├"), 0, {"log_completions": True}
    ),
    "log_unique_prompts": Case(
        True, lambda run: run.tables[0], 2, {"log_completions": True, "report_to": "trackio"}
    ),
    # vLLM, up to its door
    "use_vllm": Case(True, lambda run: hasattr(run.trainer, "vllm_generation"), True, train=False),
    "vllm_mode": Case("server", engine("mode"), "server", VLLM, train=False),
    "vllm_model_impl": Case("transformers", engine("model_impl"), "transformers", VLLM, train=False),
    "vllm_structured_outputs_regex": Case("a+", engine("structured_outputs_regex"), "a+", VLLM, train=False),
    "vllm_server_base_url": Case(
        "http://localhost:8001", engine("server_base_url"), "http://localhost:8001", VLLM, train=False
    ),
    "vllm_server_host": Case("localhost", engine("server_host"), "localhost", VLLM, train=False),
    "vllm_server_port": Case(8001, engine("server_port"), 8001, VLLM, train=False),
    "vllm_server_timeout": Case(7.0, engine("server_timeout"), 7.0, VLLM, train=False),
    "vllm_group_port": Case(8002, engine("group_port"), 8002, VLLM, train=False),
    "vllm_gpu_memory_utilization": Case(0.5, engine("gpu_memory_utilization"), 0.5, VLLM, train=False),
    "vllm_tensor_parallel_size": Case(2, engine("tensor_parallel_size"), 2, VLLM, train=False),
    "vllm_max_model_length": Case(64, engine("max_model_length"), 64, VLLM, train=False),
    # The ratios of the policy to vLLM are 4, 2, 1 and 1/4. By default those above 3 become 0
    "vllm_importance_sampling_correction": Case(False, logged("importance_weight"), [], SAMPLED_BY_VLLM),
    "vllm_importance_sampling_mode": Case("sequence_truncate", importance, (3 + 2 + 1 + 0.25) / 4, SAMPLED_BY_VLLM),
    "vllm_importance_sampling_clip_max": Case(1.5, importance, (1 + 0.25) / 4, SAMPLED_BY_VLLM),
    "vllm_importance_sampling_cap": Case(1.5, importance, (1 + 0.25) / 4, SAMPLED_BY_VLLM),
    "vllm_importance_sampling_clip_min": Case(0.5, importance, (2 + 1) / 4, SAMPLED_BY_VLLM),
}  # fmt: skip


def callbacks(run) -> list[TrainerCallback]:
    return run.trainer.callback_handler.callbacks


if "activation_checkpointing" in FIELDS:  # the name since transformers 5.24 or so. The other one stays an alias
    CASES["activation_checkpointing"] = CASES["gradient_checkpointing"]
    CASES["activation_checkpointing_kwargs"] = CASES["gradient_checkpointing_kwargs"]

_plain: dict[str, SimpleNamespace] = {}  # runs without an option, which several have in common


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_an_option_acts(run, name):
    case = CASES[name]
    besides = {**case.besides, **case.plain}
    key = f"{case.train} {besides}"
    plain = _plain.get(key) or run(case.train, besides)
    if case.train:  # of the others, what is seen may need the process's present state
        _plain[key] = plain
    assert case.see(plain) != case.expected
    assert case.see(run(case.train, {**case.besides, name: case.value})) == case.expected


# ---- Options that act only in a longer story


@pytest.mark.shows("logging_nan_inf_filter")
@pytest.mark.parametrize("filters", [True, False])
def test_losses_that_are_not_finite_are_left_out_of_the_log(make_trainer, monkeypatch, filters):
    trainer = make_trainer(logging_nan_inf_filter=filters, max_steps=1)
    loss = trainer._compute_loss
    monkeypatch.setattr(trainer, "_compute_loss", lambda *args: loss(*args) * math.nan)
    trainer.train()
    assert math.isnan(trainer.state.log_history[0]["loss"]) == (not filters)


@pytest.mark.shows("load_best_model_at_end")
@pytest.mark.parametrize("loads", [True, False])
def test_the_best_model_is_loaded_at_the_end(make_trainer, loads):
    scores = iter([1.0, 9.0, 2.0])  # of the evaluations at steps 0, 1 and 2
    options = {**EVALUATES, **SAVES, "eval_steps": 1, "metric_for_best_model": "eval_mine"}

    class Score(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **kwargs):
            metrics["eval_mine"] = next(scores)

    trainer = make_trainer(**options, load_best_model_at_end=loads)
    trainer.add_callback(Score())
    trainer.train()
    folder = f"{trainer.args.output_dir}/checkpoint-{1 if loads else 2}"
    saved = load_file(f"{folder}/model.safetensors")
    parameters = dict(trainer.model.named_parameters())
    assert all(torch.equal(value, parameters[name]) for name, value in saved.items())


@pytest.mark.shows("ignore_data_skip")
@pytest.mark.parametrize("ignores", [True, False])
def test_a_resumed_run_passes_over_the_prompts_it_has_seen(make_trainer, ignores):
    options = {**SAVES, "prompts": [*"abcdefgh"], "shuffle_dataset": False, "ignore_data_skip": ignores}
    make_trainer(**options, max_steps=1).train()
    trainer = make_trainer(**options, max_steps=2)
    trainer.train(resume_from_checkpoint=True)
    assert list(dict.fromkeys(trainer._logs["prompt"])) == ([*"ab"] if ignores else [*"cd"])


@pytest.mark.shows("model_init_kwargs")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_arguments_of_the_models_constructor(make_trainer, tiny_policy, dtype):
    assert make_trainer(model=tiny_policy, model_init_kwargs={"dtype": dtype}).model.dtype == getattr(torch, dtype)


@pytest.mark.shows("cast_lm_head_to_fp32")
@pytest.mark.parametrize("casts", [True, False])
def test_the_head_can_compute_in_float32(make_trainer, tiny_model, casts):
    trainer = make_trainer(model=tiny_model.bfloat16(), cast_lm_head_to_fp32=casts)
    trainer.train()
    ids = torch.tensor([[3, 4]])
    assert trainer.model.lm_head(trainer.model.model(ids)[0]).dtype == (torch.float32 if casts else torch.bfloat16)


@pytest.mark.shows("resume_from_checkpoint")
@pytest.mark.parametrize("resumes", [True, False])
def test_the_command_resumes(tiny_policy, tmp_path, monkeypatch, resumes):
    monkeypatch.chdir(tmp_path)
    Path("prompts").mkdir()
    Path("prompts/train.jsonl").write_text('{"prompt": "ab"}\n' * 8)

    def first_row(steps, *more):
        options = {
            "model_name_or_path": tiny_policy, "reward_funcs": "helpers.count_abc", "dataset_name": "prompts",
            "output_dir": "out", "num_generations": 4, "max_completion_length": 4, "use_cpu": True, "bf16": False,
            "report_to": "none", "save_steps": 1, "logging_steps": 1, "max_steps": steps,
        }  # fmt: skip
        argv = [text for name, value in options.items() for text in (f"--{name}", str(value))]
        return train.main([*argv, *more]).state.log_history[0]

    first = first_row(1)
    again = first_row(2, "--resume_from_checkpoint", str(resumes).lower())
    assert (again["step_time"] == first["step_time"]) == resumes  # the very step


# ---- Options that are refused


def config(tmp_path, **options):
    return SPPOConfig(str(tmp_path), **{"use_cpu": True, "bf16": False, "report_to": "none", **options})


def default(name):
    option = FIELDS[name]
    return option.default if option.default_factory is MISSING else option.default_factory()


@pytest.mark.parametrize("name", REJECTED_OPTIONS)
def test_options_without_a_meaning_are_refused_with_the_reason(tmp_path, name):
    others = {
        type(None): ParallelismConfig(),
        str: "another",
        float: 0.123,
        int: 77,
        list: ["loss"],
        bool: not default(name),
    }
    value = ParallelismConfig() if name == "parallelism_config" else others[type(default(name))]
    message = f"(?s)^{name}=.* is an option that SPPO does not use: .*Remove it"
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **{name: value})


def test_defaults_of_refused_options_can_be_given(tmp_path):
    args = config(tmp_path, **{name: default(name) for name in REJECTED_OPTIONS})
    SPPOConfig(**{name: getattr(args, name) for name in ("output_dir", *REJECTED_OPTIONS)}, use_cpu=True)
    args = config(tmp_path, scale_rewards=True, include_num_input_tokens_seen=False)
    assert (args.scale_rewards, args.include_num_input_tokens_seen) == ("group", "no")


# By other rules, with a value that they refuse
REFUSED = {
    "auto_find_batch_size": (True, "auto_find_batch_size is not supported by SPPO"),
    "hub_token": ("hf_x", "hub_token must not be given: `ps` would show it"),
    "do_eval": (True, "do_eval=True needs an evaluation: set eval_strategy, or remove it"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_other_rules_refuse(tmp_path, name):
    value, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **{name: value})


# ---- Options without a test here, by the reason

LEFT = {
    "Scripts of transformers read it. Training is what `train()` does": ["do_train"],
    "Evaluations always begin with the initial policy": ["eval_on_start"],
    "A launcher sets it": ["local_rank"],
    "A tracker reads it": [
        "run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id",
    ],
    "transformers uploads with it": [
        "push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo", "hub_always_push", "hub_revision",
        "log_completions_hub_repo",
    ],
    "It is for several processes or machines": [
        "ddp_backend", "ddp_timeout", "log_on_each_node", "log_level_replica", "save_on_each_node",
    ],
    "It is for models that are sharded over several devices (test_distributed.py)": [
        "fsdp", "fsdp_config", "deepspeed", "ds3_gather_for_generation",
    ],
    "It is for a GPU": ["tf32", "vllm_enable_sleep_mode"],
    "It needs a package that this one does not install": [
        "use_liger_kernel", "liger_kernel_config", "optim_target_modules",
    ],
    "transformers gives it to callbacks that have a state of their own": ["restore_callback_states_from_checkpoint"],
    "TRL samples with it, before this package sees completions": [
        "use_transformers_continuous_batching", "transformers_continuous_batching_config", "use_transformers_paged",
        "max_tool_calling_iterations",
    ],
}  # fmt: skip


def shown() -> set[str]:
    """Options that tests marked `shows` are evidence for: each fails if the option is ignored."""
    names = set()
    for path in Path(__file__).parent.glob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.shows":
                names |= {ast.literal_eval(name) for name in node.args}
    return names


def test_every_option_acts_or_is_refused_or_is_listed():
    """Fails when TRL or transformers adds an option: show what it does, refuse it, or list it with the reason."""
    groups = [CASES, shown(), REJECTED_OPTIONS, REFUSED, *LEFT.values()]
    names = [name for each in groups for name in each]
    assert sorted(set(names)) == sorted(FIELDS)
    assert [name for name, count in Counter(names).items() if count > 1] == []
