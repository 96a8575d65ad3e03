"""The methods of the race, `learning.py`: how each trains, and who judges it while the clock stands still."""

import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl.trainer.utils import selective_log_softmax

from trl_sppo import SPPOConfig, SPPOTrainer
from trl_sppo.evaluation.policies import Sampling, sample_ids, tokenize_prompt
from trl_sppo.quickstart.run import FOLDER
from trl_sppo.quickstart.scores import vader


COMPLETIONS = 384
BATCH = 64  # completions per iteration
STEP = 32  # completions per optimizer step
GROUP = 8
SAMPLING: dict[str, Any] = {"max_completion_length": 24, "temperature": 0.8}
COMMA_BONUS = 1.0


# Judges


@cache
def _reward_model() -> tuple[Any, Any]:
    path = FOLDER / "reward_model"
    return AutoModelForSequenceClassification.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


@torch.no_grad()
def accurate(completions: list[list[dict[str, str]]], **kwargs: Any) -> list[float]:
    """The quickstart's reward model."""
    model, tokenizer = _reward_model()
    texts = [completion[0]["content"] for completion in completions]
    return model(**tokenizer(texts, padding=True, truncation=True, return_tensors="pt")).logits[:, 0].tolist()


def biased(completions: list[list[dict[str, str]]], **kwargs: Any) -> list[float]:
    """The same with a point for each comma: a reward model that mistakes a habit of style for quality."""
    commas = [completion[0]["content"].count(",") for completion in completions]
    return [score + COMMA_BONUS * n for score, n in zip(accurate(completions), commas, strict=True)]


JUDGES = {"reward model": accurate, "VADER": vader, "biased reward model": biased}


class Referee(TrainerCallback):
    """Stops the clock after `every` optimizer steps, and scores completions of held-out prompts."""

    last = COMPLETIONS // STEP

    def __init__(self, tokenizer, seed: int, every: int, split: str = "test"):
        self.tokenizer = tokenizer
        self.seed = seed
        self.every = every
        self.initial, _ = load()
        self.steps = 0  # of all trainers that this referee has seen
        self.rows: list[dict[str, Any]] = []
        self.seconds = 0.0
        self.started = time.process_time()
        prompts = read_prompts(split)["prompt"]
        self.prompt_ids = [tokenize_prompt(tokenizer, prompt) for prompt in prompts]

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.steps += 1
        if self.steps % self.every == 0:
            self.judge(model)
        if self.steps == self.last:
            control.should_training_stop = True

    def judge(self, model) -> None:
        self.seconds += time.process_time() - self.started
        samples = 2 if self.steps == self.last else 1
        row = judge_policy(model, self.initial, self.tokenizer, self.prompt_ids, samples, self.seed)
        self.rows.append({"step": self.steps, "seconds": self.seconds, **row})
        self.started = time.process_time()


def judge_policy(model, initial, tokenizer, prompt_ids: list[list[int]], samples: int, seed: int) -> dict[str, Any]:
    """Scores of `samples` completions per prompt under each judge, their mean length, and KL to the initial policy."""
    sampling = Sampling(num_generations=samples, seed=seed, batch_size=64, **SAMPLING)
    training, generation_config = model.training, model.generation_config
    with torch.random.fork_rng():
        ids = sample_ids(model.eval(), tokenizer, prompt_ids, sampling)
    firsts = [(prompt, group[0]) for prompt, group in zip(prompt_ids, ids, strict=True)][::2]
    kl = (log_probs(model, tokenizer, firsts) - log_probs(initial, tokenizer, firsts)).mean().item()
    model.train(training)
    model.generation_config = generation_config
    texts = [tokenizer.batch_decode(group, skip_special_tokens=True) for group in ids]
    flat = [[{"role": "assistant", "content": text}] for group in texts for text in group]
    scores = {name: torch.tensor(score(flat)).view(len(ids), samples).tolist() for name, score in JUDGES.items()}
    lengths = [len(each) for group in ids for each in group]
    return {"scores": scores, "length": sum(lengths) / len(lengths), "kl": kl, "texts": texts}


@torch.no_grad()
def log_probs(model, tokenizer, pairs: list[tuple[list[int], list[int]]]) -> torch.Tensor:
    """Log-probability of each completion after its prompt, at the sampling temperature."""
    found = []
    for start in range(0, len(pairs), 16):
        batch = pairs[start : start + 16]
        inputs = tokenizer.pad(
            {"input_ids": [prompt + completion for prompt, completion in batch]}, padding_side="right",
            return_tensors="pt",
        )  # fmt: skip
        logps = selective_log_softmax(
            model(**inputs).logits[:, :-1] / SAMPLING["temperature"], inputs["input_ids"][:, 1:]
        )
        for row, (prompt, completion) in zip(logps, batch, strict=True):
            found.append(row[len(prompt) - 1 :][: len(completion)].sum())
    return torch.stack(found)


# Methods


def read_prompts(split: str) -> Dataset:
    """The quickstart's. An empty system message keeps the template from adding one, which nearly doubles a prompt."""
    prompts: Any = Dataset.from_json(str(FOLDER / "prompts" / f"{split}.jsonl"))
    return prompts.map(lambda row: {"prompt": [{"role": "system", "content": ""}, *row["prompt"]]})


def load() -> tuple[Any, Any]:
    torch.set_num_threads(1)  # several trainings run at the same time
    model = AutoModelForCausalLM.from_pretrained(FOLDER / "policy", dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(FOLDER / "policy")


LORA: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
COMMON: dict[str, Any] = {
    "lr_scheduler_type": "constant",  # a step of warm-up would be one in four where iterations are trainings
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,  # OnlineDPO's and DPO's default would make them several times slower
    "logging_strategy": "no",
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}
# An iteration of 64 completions for two optimizer steps, 8 completions per prompt
ROLLOUT: dict[str, Any] = {
    **COMMON,
    **SAMPLING,
    "num_generations": GROUP,
    "per_device_train_batch_size": 16,
    "steps_per_generation": 4,
    "gradient_accumulation_steps": 2,
    "max_steps": COMPLETIONS // STEP,
}


def train_sppo(referee: Referee, model, common: dict[str, Any], reward: Callable = accurate, **options) -> None:
    args = SPPOConfig(**{**ROLLOUT, **common, **options})
    fit(SPPOTrainer, model, args, referee, reward_funcs=reward, train_dataset=read_prompts("train"))


def train_grpo(referee: Referee, model, common: dict[str, Any]) -> None:
    from trl import GRPOConfig, GRPOTrainer

    args = GRPOConfig(**{**ROLLOUT, **common})
    fit(GRPOTrainer, model, args, referee, reward_funcs=accurate, train_dataset=read_prompts("train"))


def train_online_dpo(referee: Referee, model, common: dict[str, Any]) -> None:
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    options = {
        "per_device_train_batch_size": STEP // 2,  # two completions per prompt
        "max_steps": COMPLETIONS // STEP,
        "max_new_tokens": SAMPLING["max_completion_length"],
        "temperature": SAMPLING["temperature"],
    }
    args = OnlineDPOConfig(**{**COMMON, **options, **common})
    fit(OnlineDPOTrainer, model, args, referee, reward_funcs=accurate, train_dataset=read_prompts("train"))


def train_iterative_dpo(referee: Referee, model, common: dict[str, Any]) -> None:
    """The official pipeline's shape: sample, rank, TRL's DPO `sppo_hard` on best and worst; three times."""
    for start in range(0, COMPLETIONS, COMPLETIONS // 3):
        prompts = _some_prompts(COMPLETIONS // 3 // GROUP, common["seed"] + start)
        groups = _sample(referee, model, prompts, GROUP, common["seed"] + start)
        rows = []
        for prompt, group in zip(prompts, groups, strict=True):
            scores = torch.tensor(accurate(group))
            pair = {"chosen": group[int(scores.argmax())], "rejected": group[int(scores.argmin())]}
            rows.append({"prompt": prompt, **pair})
        model = _dpo(referee, model, common, rows, STEP // GROUP, loss_type=["sppo_hard"])
        if referee.steps == referee.last:
            return


def train_dpo(referee: Referee, model, common: dict[str, Any]) -> None:
    """Offline: pairs of film-review snippets by people, in the order in which people rated them."""
    texts, ratings = _human_ratings(referee.tokenizer)
    order = torch.randperm(len(texts)).tolist()
    rows = []
    for prompt in _some_prompts(COMPLETIONS // 2, common["seed"]):
        while abs(ratings[order[-1]] - ratings[order[-2]]) < 1:  # clearly rated
            order.pop()
        high, low = sorted((order.pop(), order.pop()), key=lambda i: -ratings[i])
        rows.append({"prompt": prompt, "chosen": answer(texts[high]), "rejected": answer(texts[low])})
    _dpo(referee, model, common, rows, STEP // 2)


def train_spin(referee: Referee, model, common: dict[str, Any]) -> None:
    """Own completions lose against film-review snippets by people that people rated 2 or better; three iterations."""
    texts, ratings = _human_ratings(referee.tokenizer)
    good = [text for text, rating in zip(texts, ratings, strict=True) if rating >= 2]
    for start in range(0, COMPLETIONS, COMPLETIONS // 3):
        prompts = _some_prompts(COMPLETIONS // 3 // 2, common["seed"] + start)
        own = _sample(referee, model, prompts, 1, common["seed"] + start)
        people = [good[i] for i in torch.randperm(len(good))[: len(prompts)].tolist()]
        rows = [
            {"prompt": prompt, "chosen": answer(text), "rejected": group[0]}
            for prompt, text, group in zip(prompts, people, own, strict=True)
        ]
        model = _dpo(referee, model, common, rows, STEP // 2)
        if referee.steps == referee.last:
            return


def fit(trainer_class, model, args, referee: Referee, **kwargs) -> Any:
    trainer = trainer_class(
        model=model,
        args=args,
        processing_class=referee.tokenizer,
        peft_config=LoraConfig(**LORA),
        callbacks=[referee],
        **kwargs,
    )
    trainer.train()
    return trainer.accelerator.unwrap_model(trainer.model)


def _dpo(referee: Referee, model, common: dict[str, Any], rows: list[dict], pairs_per_step: int, **options) -> Any:
    """One epoch. The policy so far is the reference: its adapter is merged, and a new one begun."""
    from trl import DPOConfig, DPOTrainer

    args = DPOConfig(**{**COMMON, **common}, per_device_train_batch_size=pairs_per_step, num_train_epochs=1, **options)
    return fit(DPOTrainer, model, args, referee, train_dataset=Dataset.from_list(rows)).merge_and_unload()


def _sample(referee: Referee, model, prompts: list, samples: int, seed: int) -> list[list[list[dict[str, str]]]]:
    sampling = Sampling(num_generations=samples, seed=seed, batch_size=BATCH, **SAMPLING)
    prompt_ids = [tokenize_prompt(referee.tokenizer, prompt) for prompt in prompts]
    groups = sample_ids(model.eval(), referee.tokenizer, prompt_ids, sampling)
    return [[answer(t) for t in referee.tokenizer.batch_decode(ids, skip_special_tokens=True)] for ids in groups]


def _some_prompts(number: int, seed: int) -> list:
    """Training prompts in random order, again from the start where there are too few."""
    prompts = read_prompts("train")
    epochs = [prompts.shuffle(seed=seed * 1000 + i)["prompt"] for i in range(number // len(prompts) + 1)]
    return [prompt for epoch in epochs for prompt in epoch][:number]


def answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


@cache
def _human_ratings(tokenizer) -> tuple[list[str], list[float]]:
    """Snippets, cut off where the policy's own answers are: else the end would tell them apart."""
    from quickstart_reward_model import read_ratings

    texts, ratings = read_ratings()
    ids = [tokens[: SAMPLING["max_completion_length"]] for tokens in tokenizer(texts)["input_ids"]]
    return tokenizer.batch_decode(ids), ratings.tolist()


def _sppo(**options) -> Callable:
    return lambda referee, model, common: train_sppo(referee, model, common, **options)


SOFT: dict[str, Any] = {"comparison": "bradley_terry"}
PAIR: dict[str, Any] = {"train_on": "best_and_worst"}
THRESHOLD: dict[str, Any] = {"win_rate_threshold": 0.6}
METHODS: dict[str, tuple[str, Callable]] = {
    "sppo": ("SPPO, best and worst", _sppo(**PAIR)),
    "grpo": ("TRL GRPO", train_grpo),
    "online_dpo": ("TRL OnlineDPO", train_online_dpo),
    "iterative_dpo": ("TRL DPO sppo_hard, 3 iterations", train_iterative_dpo),
    "sppo_all": ("SPPO, all", _sppo()),
    "sppo_threshold": ("SPPO, threshold 0.6", _sppo(**THRESHOLD)),
    "sppo_three": ("SPPO, best and worst, 3 iterations", _sppo(**PAIR, steps_per_generation=8)),
    "sppo_soft": ("SPPO, soft, best and worst", _sppo(**SOFT, **PAIR)),
    "sppo_soft_all": ("SPPO, soft, all", _sppo(**SOFT)),
    "sppo_soft_threshold": ("SPPO, soft, threshold 0.6", _sppo(**SOFT, **THRESHOLD)),
    "dpo": ("DPO on human pairs", train_dpo),
    "spin": ("SPIN", train_spin),
    "sppo_biased": ("SPPO, biased reward", _sppo(**PAIR, reward=biased)),
}


def swept_as(method: str) -> str:
    """All forms of SPPO have the learning rate of the first."""
    return "sppo" if method.startswith("sppo") else method
