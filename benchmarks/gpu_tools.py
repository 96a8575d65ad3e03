"""What the cases of gpu.py share: models with random weights, drawn lengths, time and memory, results.

Lengths are drawn, since random weights never end a completion: log-normal, median 220 tokens and sigma 0.8 (quartiles
128 and 377, mean 300) for completions, median 90 and sigma 0.7 for prompts, cut off at the recipe's or the stage's
longest. One completion of each rollout, and one prompt, is as long as allowed, so that peaks are those of the longest
text. A first iteration of at most 16 tokens per completion warms up, and is not in the numbers.
"""

import argparse
import gc
import json
import math
import random
import threading
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from published_models import POLICIES, REWARD_MODELS
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from transformers.generation.utils import GenerationMixin


ROOT = Path(__file__).parents[1]
MEDIAN, SIGMA = {"completion": 220, "prompt": 90}, {"completion": 0.8, "prompt": 0.7}
LONGEST_PROMPT = 512
WARM_UP = 16  # tokens of the longest completion of the first iteration
SPECIAL = ["<pad>", "<eos>", "<unk>", "<user>", "<assistant>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '<eos>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
TEMPLATE_TOKENS = 3  # that it adds to a prompt
LORA: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")

args = argparse.Namespace(rehearse=True, eager=False, results=None, work=None, checkpoints=None)  # set by main


class NotRunError(Exception):
    """Something that the case needs is not there."""


def emit(table: str, **row: Any) -> None:
    """Add a row to a table of the results, now."""
    with open(args.results, "a") as file:
        file.write(json.dumps({"table": table, "row": row}) + "\n")


def version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


# Models, prompts and lengths


def config_of(name: str, is_tiny: bool | None = None) -> Any:
    """The published configuration, or, by default in a rehearsal, a tiny one of the same architecture."""
    config = deepcopy({**POLICIES, **REWARD_MODELS}[name])
    if args.rehearse if is_tiny is None else is_tiny:
        tiny: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512}
        tiny |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "layer_types": None}
        config = type(config)(**{**config.to_dict(), **tiny})
    config.pad_token_id, config.eos_token_id = 0, 1
    config.initializer_range = config.hidden_size**-0.5  # what goes in is as large as what comes out: scores differ
    return config


def tokenizer_of(config: Any) -> PreTrainedTokenizerFast:
    """One token per word, w5, w6 and so on, which are written without spaces."""
    numbers = range(len(SPECIAL), config.vocab_size)
    words = {word: i for i, word in enumerate([*SPECIAL, *(f"w{i}" for i in numbers)])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"<\w+>|w\d+"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
        chat_template=CHAT_TEMPLATE, padding_side="left",
    )  # fmt: skip


def random_model(name: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A model of that architecture with random weights, on the device."""
    torch.manual_seed(0)
    kind = AutoModelForCausalLM if name in POLICIES else AutoModelForSequenceClassification
    with DEVICE:
        return kind.from_config(config_of(name), dtype=dtype)


def checkpoint(name: str) -> str:
    """Folder with a random model and its tokenizer, made at the first call and kept for the other cases."""
    folder = Path(args.work) / name.replace("/", "--")
    if not (folder / "config.json").exists():
        half = folder.with_name(folder.name + ".half")
        model = random_model(name)
        model.save_pretrained(half)
        tokenizer_of(model.config).save_pretrained(half)
        half.rename(folder)
        del model
        clear()
    return str(folder)


def longest_completion(of_recipe: int) -> int:
    return 24 if args.rehearse else of_recipe


def longest_prompt() -> int:
    return 20 if args.rehearse else LONGEST_PROMPT


def draw(rows: int, longest: int, seed: int, kind: str = "completion") -> list[int]:
    """Lengths in tokens. The first is the longest."""
    rng = random.Random(seed)
    scale = 0.1 if args.rehearse else 1
    drawn = [int(rng.lognormvariate(math.log(scale * MEDIAN[kind]), SIGMA[kind])) for _ in range(rows)]
    return [longest, *(min(max(length, 2), longest) for length in drawn[1:])]


def prompts(number: int, per_iteration: int, longest: int | None = None) -> Dataset:
    """Conversational prompts of random words; the first of each iteration is the longest."""
    longest = (longest or longest_prompt()) - TEMPLATE_TOKENS
    rng = random.Random(0)
    rows = []
    for start in range(0, number, per_iteration):
        for length in draw(per_iteration, longest, start, "prompt"):
            text = "".join(f"w{rng.randrange(len(SPECIAL), 500)}" for _ in range(length))
            rows.append({"prompt": [{"role": "user", "content": text}]})
    return Dataset.from_list(rows)


def hash_reward(completions: list, **kwargs: Any) -> list[float]:
    """Scores that cost nothing and hardly ever tie."""
    return [zlib.crc32(completion[0]["content"].encode()) / 2**32 for completion in completions]


class Rollouts:
    """
    Ends the completions of transformers and of vLLM at drawn lengths.

    Every trainer gets the same `per_iteration` lengths, however it divides them among calls. Until `warm` is called
    they are short.
    """

    def __init__(self, longest: int, per_iteration: int):
        self.longest, self.per_iteration = longest, per_iteration
        self.restart()

    def restart(self) -> None:
        self.is_warm, self.number, self.tokens = False, 0, 0
        self.pool: list[int] = []

    def lengths(self, rows: int) -> list[int]:
        while len(self.pool) < rows:
            self.pool += draw(self.per_iteration, self.longest if self.is_warm else WARM_UP, self.number)
            self.number += 1
        drawn, self.pool = self.pool[:rows], self.pool[rows:]
        self.tokens += sum(drawn)
        return drawn

    def warm(self) -> None:
        self.restart()
        self.is_warm = True

    @contextmanager
    def at_work(self) -> Iterator[None]:
        original = GenerationMixin.generate

        def generate(model, *args, **kwargs):
            return original(model, *args, **kwargs, logits_processor=LogitsProcessorList([EndAt(self.lengths)]))

        GenerationMixin.generate = generate  # type: ignore[method-assign]
        try:
            yield
        finally:
            GenerationMixin.generate = original  # type: ignore[method-assign]

    def end_vllm(self, llm: Any) -> None:
        original = llm.generate

        def generate(prompts, sampling_params, **kwargs):
            each = [sampling_params.clone() for _ in prompts]
            for sampling, length in zip(each, self.lengths(len(prompts)), strict=True):
                sampling.max_tokens, sampling.ignore_eos = length, True
            return original(prompts, sampling_params=each, **kwargs)

        llm.generate = generate


class EndAt(LogitsProcessor):
    """Lets each row end at its length, and no sooner."""

    def __init__(self, lengths: Callable[[int], list[int]]):
        self.draw, self.start, self.lengths = lengths, 0, torch.empty(0)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not self.start:
            self.start = input_ids.size(1)
            self.lengths = torch.tensor(self.draw(len(input_ids)), device=scores.device)
        ends = input_ids.size(1) - self.start + 1 >= self.lengths
        scores = scores.masked_fill(ends.unsqueeze(1), -torch.inf)
        scores[:, 1] = torch.where(ends, 0.0, -torch.inf)  # <eos>
        return scores


# Time and memory


class Meter:
    """Seconds, and peaks of memory, of each phase. Phases may be nested: an inner one is not counted in the outer."""

    def __init__(self):
        self.phases = ["other"]
        self.restart()

        if ON_GPU:
            threading.Thread(target=self._watch, daemon=True).start()

    def restart(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.allocated: dict[str, float] = defaultdict(float)  # by PyTorch
        self.used: dict[str, float] = defaultdict(float)  # of the card, by anybody, with what PyTorch keeps for later
        self._begin()

    def _look(self) -> None:
        free, total = torch.cuda.mem_get_info()
        self.used[self.phases[-1]] = max(self.used[self.phases[-1]], total - free)

    def _watch(self) -> None:
        while True:
            self._look()
            time.sleep(0.05)

    def _begin(self) -> None:
        if ON_GPU:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self.last = time.perf_counter()

    def stop(self) -> None:
        """End the current stretch of time, and begin another."""
        if ON_GPU:
            torch.cuda.synchronize()
        phase = self.phases[-1]
        self.seconds[phase] += time.perf_counter() - self.last
        if ON_GPU:
            self.allocated[phase] = max(self.allocated[phase], torch.cuda.max_memory_allocated())
            self._look()
        self._begin()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.stop()
        self.phases.append(name)
        try:
            yield
        finally:
            self.stop()
            self.phases.pop()

    def wrap(self, owner: Any, method: str, phase: str) -> None:
        """Count the time in a method as a phase."""
        original = getattr(owner, method)

        def measured(*args, **kwargs):
            with self.phase(phase):
                return original(*args, **kwargs)

        setattr(owner, method, measured)


class WarmUp(TrainerCallback):
    """The first optimizer step warms up: what is measured begins after it, and ends with the last."""

    def __init__(self, meter: Meter, rollouts: Rollouts, *also: Callable[[], None]):
        self.meter, self.restarts = meter, [rollouts.warm, meter.restart, *also]

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            for restart in self.restarts:
                restart()
        elif state.global_step == state.max_steps:
            self.meter.stop()


def clear() -> None:
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()


def synchronize() -> float:
    """The time, once the device has nothing left to do."""
    if ON_GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_of(work: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of a call, and the gigabytes that it needs beyond what is there before. Without a GPU: NaN."""
    before = torch.cuda.memory_allocated() if ON_GPU else math.nan
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    start = synchronize()
    work()
    seconds = synchronize() - start
    return seconds, (torch.cuda.max_memory_allocated() - before) / 1e9 if ON_GPU else math.nan


def gb(number: float | None) -> float | None:
    return round(number / 1e9, 2) if ON_GPU and number is not None else None
