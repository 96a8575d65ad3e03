"""The parts of TRL and other packages that are not public and are used here. Messages name the file to open."""

import argparse
import ast
import inspect
import re
from collections import defaultdict, deque
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from helpers import TINY, count_abc, make_tokenizer
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.optim.lr_scheduler import LambdaLR
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.integrations import deepspeed
from trl import GRPOTrainer
from trl.generation.vllm_generation import VLLMGeneration

import trl_sppo
from trl_sppo import SPPOConfig, SPPOTrainer
from trl_sppo.rollouts.batch import IMAGE_FIELDS
from trl_sppo.runs.resumable import ResumableTrainer


SIGNATURES = {
    "_generate_and_score_completions": ["self", "inputs"],
    "_generate": ["self", "prompts"],
    "_calculate_rewards": ["self", "inputs", "prompts", "completions", "completion_ids_list"],
    "_compute_loss": ["self", "model", "inputs"],
    "_prepare_inputs": ["self", "generation_batch"],
    "_log_completion_extra": ["self", "column", "values"],
    "_generate_single_turn": [
        "self",
        "prompt_ids",
        "images",
        "multimodal_fields",
        "num_generations",
        "has_tool_images",
    ],
    "get_batch_samples": ["self", "epoch_iterator", "num_batches", "device"],
    "_get_train_sampler": ["self", "dataset"],
    "_save_checkpoint": ["self", "model", "trial"],
    "_load_rng_state": ["self", "checkpoint"],
    "_load_optimizer_and_scheduler": ["self", "checkpoint"],
    "_load_from_checkpoint": ["self", "resume_from_checkpoint", "model"],
    "_save_rng_state": ["self", "output_dir"],
    "_get_output_dir": ["self", "trial"],
    "_log_metric": ["self", "name", "value"],
    "_evaluate": ["self", "trial", "ignore_keys_for_eval", "skip_scheduler"],
    "_get_grad_norm": ["self", "model", "grad_norm"],
    "_finalize_training": ["self", "trial", "num_train_samples", "start_time"],
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name):
    found = getattr(GRPOTrainer, name, None)
    actual = found and list(inspect.signature(found).parameters)
    assert actual == SIGNATURES[name], changed(f"GRPOTrainer.{name}", f"the parameters {SIGNATURES[name]}", name)


# ---- Private names. The walk says which are touched, and where


def is_private(name: object) -> bool:
    return isinstance(name, str) and name.isidentifier() and name.startswith("_") and not name.startswith("__")


def names_of_the_trainer() -> set[str]:
    """Private attributes of `GRPOTrainer` and its bases: those of the classes, and those that methods assign."""
    bases = [base for base in GRPOTrainer.__mro__ if base is not object]
    assigned = [re.findall(r"self\.(_\w+)(?:: [^=\n]+)? [+-]?= ", inspect.getsource(base)) for base in bases]
    return set(filter(is_private, [*dir(GRPOTrainer), *chain(*assigned)]))


class Walk(ast.NodeVisitor):
    """Private attributes in a source: which it defines, and where it touches which, also by `getattr` and strings."""

    def __init__(self, path: Path, theirs: set[str]):
        self.path, self.theirs, self.inside = path, theirs, []
        self.own, self.places = set(), []

    def touch(self, name: object) -> None:
        if is_private(name):
            self.places.append((name, f"{self.path}, {'.'.join(node.name for node in self.inside) or 'at the top'}"))

    @property
    def in_class(self) -> bool:
        return bool(self.inside) and isinstance(self.inside[-1], ast.ClassDef)

    def visit_FunctionDef(self, node):
        if self.in_class:
            self.own.add(node.name)
            if self.inside[-1].name.endswith("Trainer"):
                self.touch(node.name)
        self.inside.append(node)
        self.generic_visit(node)
        self.inside.pop()

    visit_AsyncFunctionDef = visit_ClassDef = visit_FunctionDef

    def visit_Name(self, node):
        if self.in_class and isinstance(node.ctx, ast.Store):
            self.own.add(node.id)
            if self.inside[-1].name.endswith("Trainer"):
                self.touch(node.id)

    def visit_Attribute(self, node):
        owner = next((each.name for each in self.inside if isinstance(each, ast.ClassDef)), "")
        of_self = isinstance(node.value, ast.Name) and node.value.id == "self"
        if of_self and isinstance(node.ctx, ast.Store):
            self.own.add(node.attr)
        if not of_self or owner.endswith("Trainer"):  # other classes have only names of their own
            self.touch(node.attr)
        self.generic_visit(node)

    def visit_ImportFrom(self, node):
        if not node.level:
            for name in [*str(node.module).split("."), *(alias.name for alias in node.names)]:
                self.touch(name)

    def visit_Call(self, node):
        if getattr(node.func, "id", None) in ("getattr", "setattr", "hasattr", "delattr"):
            self.touch(getattr(node.args[1], "value", None))
        self.generic_visit(node)

    def visit_Constant(self, node):
        if isinstance(node.value, str) and node.value in self.theirs:
            self.touch(node.value)


def walk() -> dict[str, list[str]]:
    """The private names of other packages that our sources touch, each with its places."""
    theirs, root = names_of_the_trainer(), Path(trl_sppo.__file__).parents[1]
    own, found = set(), defaultdict(list)
    for path in sorted(root.joinpath("trl_sppo").rglob("*.py")):
        visitor = Walk(path.relative_to(root), theirs)
        visitor.visit(ast.parse(path.read_text()))
        own |= visitor.own
        for name, place in visitor.places:
            found[name].append(place)
    return {name: list(dict.fromkeys(places)) for name, places in found.items() if name in theirs or name not in own}


TOUCHED = walk()


def changed(what: str, relied_on: str, name: str) -> str:
    return f"{what} has changed. Open {'; '.join(TOUCHED.get(name, ()))}: we rely on {relied_on}."


def scheduler_with_rate(rate: float) -> LambdaLR:
    scheduler = LambdaLR(torch.optim.SGD([torch.zeros(1)], lr=1.0), lambda step: 1.0)
    scheduler._last_lr = [rate]
    return scheduler


def zero3_by_reference() -> bool:
    class Config:
        def is_zero3(self):
            return True

    config = Config()
    deepspeed._hf_deepspeed_config_weak_ref = lambda: config  # conftest.py puts it back
    return deepspeed.is_deepspeed_zero3_enabled()


def parser_of_numbers() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("--number", type=int, choices=[1, 2])
    return parser


def accepts(value: str) -> bool:
    parser = parser_of_numbers()
    action = parser._actions[-1]
    try:
        parser._check_value(action, parser._get_value(action, value))
    except argparse.ArgumentError:
        return False
    return True


# Name: whose it is, what we rely on, and whether that holds for a trainer after one optimizer step of two micro-steps
CONTRACT: dict[str, tuple[str, str, Callable]] = {
    "_buffered_inputs": (
        "GRPOTrainer._buffered_inputs", "a list of the slices of a generation batch, each a dict of tensors",
        lambda t: len(t._buffered_inputs) == 2 and all(isinstance(piece, dict) for piece in t._buffered_inputs),
    ),
    "_set_pg_timeout": (
        "torch.distributed.distributed_c10d._set_pg_timeout", "sets the time-out of the default process group",
        lambda t: list(inspect.signature(_set_pg_timeout).parameters) == ["timeout", "group"],
    ),
    "_step": ("GRPOTrainer._step", "the number of micro-steps so far", lambda t: t._step == 2),
    "_metrics": (
        "GRPOTrainer._metrics", "a defaultdict of lists for 'train' and for 'eval'",
        lambda t: set(t._metrics) == {"train", "eval"} and all(
            isinstance(values, defaultdict) and values.default_factory is list for values in t._metrics.values()
        ),
    ),
    "_logs": (
        "GRPOTrainer._logs", "a deque in 'advantages', with a value per completion of the last rollout",
        lambda t: isinstance(t._logs["advantages"], deque) and len(t._logs["advantages"]) == 16,
    ),
    "_log_completion_extra": (
        "GRPOTrainer._log_completion_extra", "columns of the table of completions, a value per completion",
        lambda t: len(t._logs["extra"]["win_rate"]) == 16,
    ),
    "_tokenizer": (
        "GRPOTrainer._tokenizer", "the policy's tokenizer, also where processing_class is a processor",
        lambda t: t._tokenizer is t.processing_class
        and "self._tokenizer = processing_class.tokenizer" in inspect.getsource(GRPOTrainer.__init__),
    ),
    "_name": (
        "TRL's BaseTrainer._name", "the name of the method in the model card",
        lambda t: "trainer_name=self._name" in inspect.getsource(GRPOTrainer.create_model_card),
    ),
    "_paper": (
        "TRL's BaseTrainer._paper", "'title', 'id' and 'citation' of the paper in the model card",
        lambda t: set(GRPOTrainer._paper) == {"title", "id", "citation"},
    ),
    "_tag_names": ("TRL's BaseTrainer._tag_names", "a list of tags", lambda t: "trl" in GRPOTrainer._tag_names),
    "_tr_loss": (
        "transformers' Trainer._tr_loss", "a tensor without dimensions: the loss since the last line of the log",
        lambda t: t._tr_loss.shape == () and t._tr_loss == 0,
    ),
    "_globalstep_last_logged": (
        "transformers' Trainer._globalstep_last_logged", "the step of the last line of the log",
        lambda t: t._globalstep_last_logged == 1,
    ),
    "_name_or_path": (
        "transformers' PretrainedConfig._name_or_path", "where a model was loaded from",
        lambda t: Qwen2Config(name_or_path="somewhere")._name_or_path == "somewhere",
    ),
    "_VALID_DICT_FIELDS": (
        "transformers' TrainingArguments._VALID_DICT_FIELDS", "the names of the options that are mappings",
        lambda t: {"lr_scheduler_kwargs", "gradient_checkpointing_kwargs"} <= set(SPPOConfig._VALID_DICT_FIELDS),
    ),
    "_hf_deepspeed_config_weak_ref": (
        "transformers.integrations.deepspeed._hf_deepspeed_config_weak_ref", "what says that ZeRO-3 is active",
        lambda t: zero3_by_reference(),
    ),
    "_dataloaders": (
        "accelerate's Accelerator._dataloaders", "a list that a prepared loader is appended to",
        lambda t: isinstance(t.accelerator._dataloaders, list)
        and "self._dataloaders.append(prepared" in inspect.getsource(Accelerator.prepare_data_loader),
    ),
    "_last_lr": (
        "torch's LRScheduler._last_lr", "what get_last_lr() returns",
        lambda t: scheduler_with_rate(7.0).get_last_lr() == [7.0],
    ),
    "_actions": (
        "Python's ArgumentParser._actions", "a list of the options, with their dest",
        lambda t: [action.dest for action in parser_of_numbers()._actions] == ["help", "number"],
    ),
    "_get_value": ("Python's ArgumentParser._get_value", "the type of an option", lambda t: not accepts("x")),
    "_check_value": (
        "Python's ArgumentParser._check_value", "the choices of an option",
        lambda t: accepts("1") and not accepts("3"),
    ),
    "_parameters": (
        "PyTorch's Module._parameters", "a dict by name, from which the attribute is read",
        lambda t: torch.nn.Linear(1, 1)._parameters.keys() == {"weight", "bias"},
    ),
    "_buffers": (
        "PyTorch's Module._buffers", "a dict by name, from which the attribute is read",
        lambda t: "running_mean" in torch.nn.BatchNorm1d(1)._buffers,
    ),
}  # fmt: skip

ELSEWHERE = {"_get_per_token_logps_and_entropies", "_iter_named_params"}  # have tests of their own below


@pytest.fixture(scope="module")
def after_a_step(tmp_path_factory):
    torch.manual_seed(0)
    trainer = SPPOTrainer(
        Qwen2ForCausalLM(Qwen2Config(**TINY)),
        count_abc,
        SPPOConfig(
            str(tmp_path_factory.mktemp("contract")), per_device_train_batch_size=8, gradient_accumulation_steps=2,
            num_generations=4, max_completion_length=6, temperature=1.0, bf16=False, use_cpu=True, report_to="none",
            save_strategy="no", logging_steps=1, disable_tqdm=True, max_steps=1, gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_dict({"prompt": ["ab", "fgh", "cd e", "xyz"]}),
        processing_class=make_tokenizer(),
    )  # fmt: skip
    trainer.train()
    return trainer


@pytest.mark.parametrize("name", CONTRACT)
def test_private_names(name, after_a_step):
    what, relied_on, holds = CONTRACT[name]
    try:
        problem = None if holds(after_a_step) else "it is something else"
    except (AttributeError, KeyError, TypeError) as error:
        problem = repr(error)
    assert problem is None, f"{changed(what, relied_on, name)} ({problem})"


def test_every_private_name_has_its_line():
    lines = {*filter(is_private, SIGNATURES), *CONTRACT, *ELSEWHERE}
    missing = {name: places for name, places in TOUCHED.items() if name not in lines}
    assert not missing, f"private names of other packages without a line in CONTRACT of this file: {missing}"
    stale = lines - TOUCHED.keys()
    assert not stale, f"no source touches {sorted(stale)} any more: remove their lines from this file"


def test_the_sampler(after_a_step):
    sampler = GRPOTrainer._get_train_sampler(after_a_step)
    assert {"shuffle", "generator", "seed", "num_samples"} <= vars(sampler).keys(), changed(
        "TRL's RepeatSampler", "its attributes shuffle, generator, seed and num_samples", "_get_train_sampler"
    )
    orders = []
    for _ in range(2):
        sampler.generator.manual_seed(sampler.seed)
        orders.append(list(sampler))
    assert orders[0] == orders[1] != list(sampler), changed(
        "TRL's RepeatSampler", "an order that its generator alone decides, with one randperm per epoch",
        "_get_train_sampler",
    )  # fmt: skip


def test_the_vllm_engine():
    source = inspect.getsource(VLLMGeneration)
    parts = "self.llm = LLM(", "self.llm.reset_prefix_cache()", "llm_engine.model_executor.driver_worker"
    for part in (*parts, "if is_bitsandbytes_available():"):  # this one is switched off
        assert part in source, changed("TRL's VLLMGeneration", f"`{part}`, as TRL does itself", "_iter_named_params")


def test_signature_of_the_log_probability_pass():
    actual = list(inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters)
    expected = ["self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size", "compute_entropy"]
    name = "_get_per_token_logps_and_entropies"
    assert actual[:7] == expected, changed(f"GRPOTrainer.{name}", f"the first parameters {expected}", name)
    assert set(actual[7:]) == {*IMAGE_FIELDS, "compute_aux_loss"}, changed(
        "what a model with images needs", f"the fields {IMAGE_FIELDS}", name
    )


def test_the_fused_head(make_trainer):
    """What TRL's own pass calls, which the pass of `rollouts/micro_batches.py` calls too."""
    trainer = make_trainer()
    ids = torch.tensor([[3, 4, 5], [6, 7, 0]])
    labels = torch.tensor([[-100, 4, 5], [-100, 7, -100]])
    outputs = trainer.model(input_ids=ids, labels=labels, fused_lm_head=True)
    call = "model(input_ids=..., labels=..., fused_lm_head=True)"
    relied_on = "log_probs and entropy of shape (B, L - 1), 0 where a label is -100, and aux_loss"
    message = changed(f"TRL's {call}", relied_on, "_get_per_token_logps_and_entropies")
    assert outputs.log_probs.shape == outputs.entropy.shape == (2, 2) and outputs.aux_loss is None, message
    assert (outputs.log_probs == 0).tolist() == [[False, False], [False, True]], message
    source = inspect.getsource(GRPOTrainer._get_per_token_logps_and_entropies)
    assert "labels=labels, fused_lm_head=True" in source, message


def test_signatures_of_the_vllm_backend():
    for name in ("sync_weights", "_iter_named_params"):
        actual = list(inspect.signature(getattr(VLLMGeneration, name)).parameters)
        assert actual == ["self"], changed(f"VLLMGeneration.{name}", "no parameter", "_iter_named_params")


def test_what_is_overridden_and_nothing_else():
    overridden = {
        kind: {name for name, value in vars(kind).items() if name in dir(GRPOTrainer) and callable(value)}
        for kind in (SPPOTrainer, ResumableTrainer)
    }
    assert overridden[SPPOTrainer] - {"__init__"} == {
        "_generate_and_score_completions", "_generate", "_generate_single_turn", "_calculate_rewards",
        "_get_per_token_logps_and_entropies", "_compute_loss", "create_model_card", "_prepare_inputs",
        "evaluation_loop",
    }  # fmt: skip
    assert overridden[ResumableTrainer] - {"__init__"} == {
        "train", "evaluate", "_evaluate", "_get_grad_norm", "get_batch_samples", "_get_train_sampler",
        "_finalize_training", "_save_checkpoint", "_load_from_checkpoint", "_load_rng_state",
        "_load_optimizer_and_scheduler",
    }  # fmt: skip


def test_order_of_calls_and_shapes(make_trainer, monkeypatch):
    """TRL: generate, then log-probabilities, then scores, then the batch is shuffled and split into slices."""
    calls = []

    def spy(kind, name):
        original = getattr(kind, name)

        def record(self, *args, **kwargs):
            result = original(self, *args, **kwargs)
            calls.append((name, args, result))
            return result

        monkeypatch.setattr(kind, name, record)

    spy(GRPOTrainer, "_generate")
    spy(SPPOTrainer, "_get_per_token_logps_and_entropies")
    spy(SPPOTrainer, "_calculate_rewards")
    # 16 completions (4 groups of 4), 2 optimizer steps per generation batch: pi_t needs a log-probability pass
    trainer = make_trainer(steps_per_generation=2, max_steps=1)
    trainer.train()
    names = [name for name, _, _ in calls]
    assert names == [
        "_generate",
        "_calculate_rewards",  # SPPOTrainer._generate asks
        "_get_per_token_logps_and_entropies",  # pi_t
        "_calculate_rewards",  # TRL asks, and gets the same scores
        "_get_per_token_logps_and_entropies",  # pi_theta
    ], changed("the order of a rollout in GRPOTrainer", "this order", "_generate_and_score_completions")

    generated = calls[0][2]
    assert len(generated) == 8, changed("what GRPOTrainer._generate returns", "its 8 parts", "_generate")
    _, completion_ids, tool_mask, completions, _, extra_fields, *_ = generated
    assert len(completion_ids) == len(completions) == 16 and isinstance(completion_ids[0], list)
    assert tool_mask is None and extra_fields == {}
    scores = calls[1][2]
    assert calls[3][2] is scores
    assert scores.shape == (16, 1), changed(
        "GRPOTrainer._calculate_rewards",
        "the shape (completions of all processes, reward sources)",
        "_calculate_rewards",
    )
    logps, entropies, _ = calls[4][2]
    assert logps.shape == entropies.shape

    assert len(trainer._buffered_inputs) == 2
    for piece in trainer._buffered_inputs:
        assert {
            "prompt_ids",
            "prompt_mask",
            "completion_ids",
            "completion_mask",
            "old_per_token_logps",
        } <= piece.keys()
        assert len(piece["win_rates"]) == len(piece["kept"]) == len(piece["completion_ids"])
        assert "advantages" not in piece


def test_groups_are_consecutive(make_trainer, monkeypatch):
    seen = []
    original = GRPOTrainer._generate
    monkeypatch.setattr(
        GRPOTrainer, "_generate", lambda self, prompts: seen.append(prompts) or original(self, prompts)
    )
    make_trainer(max_steps=1).train()
    assert len(seen[0]) == 8 and all(len(set(seen[0][i : i + 4])) == 1 for i in (0, 4)), (
        "TRL changed the order of a generation batch: win rates reshape it to (groups, num_generations)"
    )


def test_trl_leaves_the_loss_unscaled_for_accumulation():
    assert GRPOTrainer.loss_is_scaled_for_ga is True, (
        "SPPOTrainer divides its loss by the completions of the whole optimizer step; nobody may divide it again"
    )
