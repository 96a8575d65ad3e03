"""Faults, one by one: each ends in the right result, or in a message that names the cure, with the last checkpoint."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset, load_dataset
from helpers import (
    TINY,
    TRL_SPPO,
    count_abc,
    logits,
    make_tokenizer,
    run,
    score_request,
    weights,
)
from transformers import Qwen2Config, Qwen2ForCausalLM, TrainerCallback
from trl import GRPOTrainer

from trl_sppo import ServedRewardModel, SPPOTrainer, train
from trl_sppo.errors import RunError, explain
from trl_sppo.judges import LLMJudge
from trl_sppo.runs.checkpoints import last_whole_checkpoint


GO_ON = "the same command with --resume_from_checkpoint true continues"


@pytest.fixture
def run_until(workdir, capsys, monkeypatch, tmp_path):
    """A function that trains, with a fault at the second step, and returns its status, its words and the trainer."""

    build = train.build_trainer

    def go(fault=None, **options) -> tuple[int, str, SPPOTrainer | None]:
        trainers = []

        def build_with_fault(argv):
            trainer = build(argv)
            trainers.append(trainer)
            if fault is not None:
                trainer.add_callback(AtSecondStep(trainer, fault))
            return trainer

        monkeypatch.setattr(train, "build_trainer", build_with_fault)
        argv = workdir(**{"save_strategy": "steps", "save_steps": 1, "max_steps": 3, **options})
        status = 0
        try:
            train.main(argv)
        except SystemExit as error:
            status = error.code
        return status, capsys.readouterr().err, trainers[0] if trainers else None

    return go


class AtSecondStep(TrainerCallback):
    def __init__(self, trainer, fault):
        self.trainer, self.fault = trainer, fault

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.fault(self.trainer)


def assert_stopped(result, expected: str, steps: int = 1, ended: int | None = None) -> None:
    """One message, no trace of the library's own, and the checkpoint before the fault."""
    status, words, trainer = result
    assert status == 1
    assert words.count("trl-sppo: error: ") == 1
    said = words.split("trl-sppo: error: ")[1]
    assert f"training ended at step {ended or steps}: " in said and expected in said, said
    folder = trainer.args.output_dir
    assert f"The last checkpoint is {folder}/checkpoint-{steps}; {GO_ON}" in said
    assert str(last_whole_checkpoint(folder)) == f"{folder}/checkpoint-{steps}"
    assert [path.name for path in Path(folder).glob("checkpoint-*")] == [f"checkpoint-{steps}"]
    assert not list(Path(folder).rglob("*.partial"))


# ---- Reward sources


def replace_source(function):
    def fault(trainer):
        function.__name__ = "count_abc"
        trainer.reward_funcs[0] = function

    return fault


def raising(completions, **kwargs):
    raise ValueError("it has no idea")


async def raising_later(completions, **kwargs):
    raise ConnectionError("it is gone")


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (
            raising,
            "reward source 'count_abc' failed: ValueError: it has no idea. It must return one number, or None, for "
            "each completion. Each is a list of messages here, and the columns are []. A resumed run scores",
        ),
        (
            lambda completions, **kwargs: [1.0],
            "'count_abc' failed: ValueError: it returned 1 scores for 8 completions",
        ),
        (lambda completions, **kwargs: ["good"] * len(completions), "reward source 'count_abc' failed: "),
        (lambda completions, **kwargs: None, "reward source 'count_abc' failed: TypeError:"),
        (lambda completions: [1.0] * len(completions), "reward source 'count_abc' failed: TypeError:"),
    ],
    ids=["raises", "too few", "words", "nothing", "takes no more"],
)
def test_a_reward_source_that_fails(run_until, function, expected):
    result = run_until(replace_source(function))
    assert_stopped(result, expected)
    # What was sampled for the second step is there, and a resumed run scores it
    rows = load_dataset("out/rollouts", split="train")
    assert sorted(set(rows["iteration"])) == [0, 1]
    status, _, trainer = run_until(resume_from_checkpoint="true")
    assert status == 0 and trainer.state.global_step == 3


def test_an_asynchronous_reward_source_that_fails(make_trainer):
    trainer = make_trainer(reward_funcs=raising_later)
    with pytest.raises(RunError, match="reward source 'raising_later' failed: ConnectionError: it is gone"):
        trainer.train()


@pytest.mark.parametrize("nothing", [None, float("nan"), float("inf")], ids=["None", "NaN", "infinite"])
@pytest.mark.parametrize("share", ["one", "some", "all"])
def test_a_reward_source_without_a_score(run_until, nothing, share):
    """They take no part in the comparisons, and the run goes on."""

    def partly(completions, **kwargs):
        scores = count_abc(completions)
        missing = {"one": [0], "some": range(0, len(scores), 2), "all": range(len(scores))}[share]
        return [nothing if i in missing else value for i, value in enumerate(scores)]

    status, _, trainer = run_until(replace_source(partly), logging_steps=1)
    assert status == 0 and trainer.state.global_step == 3
    expected = {"one": 1 / 8, "some": 1 / 2, "all": 1.0}[share]
    assert [row["win_rate/unscorable"] for row in trainer.state.log_history[:3]] == [0, expected, expected]
    assert all(w.isfinite().all() for w in weights(trainer).values())


# ---- Reward models behind a server


def serve(server, answer):
    def fault(trainer):
        server.answer = answer

    return fault


@pytest.fixture
def served(server, run_until):
    """`run_until` with a reward model behind a server."""
    return lambda fault, **options: run_until(
        fault, reward_funcs=None, reward_model_name_or_path=server.url, **options
    )


def test_a_served_reward_model_that_is_not_there(run_until):
    status, words, trainer = run_until(reward_funcs=None, reward_model_name_or_path="http://127.0.0.1:9")
    assert status == 2 and trainer is None and not Path("out").exists()
    assert "no vLLM server at 'http://127.0.0.1:9' gives a score. Start one with" in words


@pytest.mark.parametrize(
    "answer",
    [(500, {"error": "dead"}), (503, "<html>busy</html>"), (200, "nonsense"), (200, logits(1.0, 2.0)),
     (200, {"data": [{"probs": [None]}]}), (404, {"error": "no such model"})],
    ids=["500", "503", "nonsense", "two numbers", "no number", "404"],
)  # fmt: skip
def test_a_served_reward_model_that_stops_answering(server, served, answer):
    result = served(serve(server, lambda number, request: answer))
    assert_stopped(result, f"the reward model at '{server.url}' gave no score to any of 8 completions")


def test_a_served_reward_model_that_is_shut_down_and_started_again(server, served, run_until, monkeypatch):
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.05)
    calls = []

    def fault(trainer):
        trainer.reward_funcs[0].base_url = "http://127.0.0.1:9"

    assert_stopped(served(fault), "APIConnectionError")
    status, _, trainer = served(lambda trainer: calls.append(1), resume_from_checkpoint="true")
    assert status == 0 and trainer.state.global_step == 3 and calls


def test_a_served_reward_model_that_fails_once(server, served):
    served_ones = []

    def shaky(number, request):
        served_ones.append(number)
        return (500, {}) if len(served_ones) % 3 == 1 else (200, logits(score_request(request)))

    status, _, trainer = served(serve(server, shaky), logging_steps=1)
    assert status == 0 and trainer.state.log_history[1]["win_rate/unscorable"] == 0


def test_a_served_reward_model_that_is_slow(server, make_trainer):
    """What takes longer than the time-out, in each attempt, is lost alone."""
    import time

    def slow(number, request):
        if len(server.requests) > 1 and "slow" in json.dumps(request):
            time.sleep(0.5)
        return 200, logits(score_request(request))

    server.answer = slow
    reward = ServedRewardModel(server.url, timeout=0.2, max_retries=1)
    trainer = make_trainer(reward_funcs=reward, max_steps=1, prompts=["ab", "slow"], per_device_train_batch_size=8)
    trainer.train()
    assert trainer.state.log_history[0]["win_rate/unscorable"] == 0.5


# ---- Judges


class Shaky:
    """A pairwise oracle that answers the first rollout only."""

    __name__ = "shaky"

    def __init__(self, then):
        self.calls, self.then = 0, then

    def __call__(self, prompts, first, second, **kwargs):
        self.calls += 1
        return [0.7] * len(first) if self.calls == 1 else self.then(len(first))


def fails(number):
    raise ConnectionError("it is gone")


@pytest.mark.parametrize(
    ("then", "reason"),
    [
        (fails, "it raised ConnectionError: it is gone"),
        (lambda n: [1.5] * n, "it returned 1.5, which is not a probability in [0, 1]"),
        (lambda n: [0.5], "it raised ValueError: it returned 1 values for"),
        (lambda n: "yes", "it raised ValueError: it returned 3 values for"),
    ],
    ids=["raises", "no probability", "too few", "a word"],
)
def test_a_judge_that_falls_silent(run_until, then, reason, monkeypatch):
    """Lost comparisons are counted; after three rollouts without any answer the run stops."""
    judge = Shaky(then)

    def fault(trainer):
        trainer.voters.oracles["more_abc"] = judge
        judge.calls = 1

    result = run_until(fault, reward_funcs=None, preference_funcs="helpers.more_abc", max_steps=9)
    status, words, _ = result
    assert status == 1 and "of the last 6 prompts: " + reason in words
    assert str(last_whole_checkpoint("out")) == "out/checkpoint-3"


def test_an_llm_judge_that_is_not_there(run_until, monkeypatch):
    def fault(trainer):
        trainer.voters.oracles["more_abc"] = LLMJudge("m", "http://127.0.0.1:9/v1", max_retries=0, timeout=1)
        trainer.voters.load_state_dict({"silence": {}})

    result = run_until(fault, reward_funcs=None, preference_funcs="helpers.more_abc")
    assert_stopped(result, "preference_func 'more_abc' gave no valid verdict on any comparison of")


@pytest.mark.parametrize("body", ["nonsense", {"choices": []}, {"choices": [{"logprobs": None}]}])
def test_an_llm_judge_that_answers_nonsense_beside_a_reward_source(endpoint, run_until, body):
    """The reward source goes on alone, until the judge has said nothing for too long."""
    endpoint.answer = lambda number, request: (200, body)

    def fault(trainer):
        trainer.voters.oracles["more_abc"] = LLMJudge("m", endpoint.url, max_retries=0)

    status, _, trainer = run_until(fault, preference_funcs="helpers.more_abc", logging_steps=1, max_steps=2)
    assert status == 0
    assert [row["preferences/more_abc/lost"] for row in trainer.state.log_history[:2]] == [0, 1]


# ---- Sampling


def test_vllm_that_fails(run_until):
    class Broken:
        def sync_weights(self):
            pass

        def generate(self, **kwargs):
            raise RuntimeError("EngineDeadError")

    def fault(trainer):
        trainer.use_vllm, trainer.vllm_generation, trainer._last_loaded_step = True, Broken(), -1

    assert_stopped(run_until(fault), "vLLM failed while sampling: RuntimeError: EngineDeadError. docs/vllm.md lists")


def test_generation_that_fails(run_until):
    def fault(trainer):
        def generate(*args, **kwargs):
            raise RuntimeError("CUDA error: device-side assert triggered")

        trainer.model.generate = generate

    assert_stopped(run_until(fault), "RuntimeError: CUDA error: device-side assert triggered")


def test_memory_that_does_not_suffice(run_until):
    def fault(trainer):
        def generate(*args, **kwargs):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

        trainer.model.generate = generate

    assert_stopped(run_until(fault), "Lower reward_batch_size or per_device_train_batch_size (and raise")


@pytest.mark.parametrize(
    ("completions", "kept"),
    [
        ([[0], [1], [0, 0, 1], [3, 1]], 0.75),  # special ones, which decode to nothing; the first is padding alone
        ([[1], [1], [1], [1]], 0.0),  # all equal: no signal
        ([[3] * 6, [4] * 6, [25] * 6, [26] * 6], 1.0),  # as long as they may be, without an end
    ],
    ids=["special tokens", "all empty", "longest"],
)
def test_completions_of_every_length(fixed, completions, kept):
    def rollout(prompts, trainer):
        ids = [list(completions[i % 4]) for i in range(len(prompts))]
        return {"prompt_ids": [[3, 4]] * len(prompts), "completion_ids": ids, "logprobs": None}

    def by_length_then_letter(completion_ids, **kwargs):
        return [len(ids) + 0.01 * sum(ids) for ids in completion_ids]

    trainer = fixed(trainer_kwargs={"rollout_func": rollout}, reward_funcs=by_length_then_letter)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["win_rate/kept"] == kept
    assert all(w.isfinite().all() for w in weights(trainer).values())


def test_completions_without_tokens(make_trainer, monkeypatch):
    """vLLM may give some. They are compared as the empty texts that they are, and there is nothing to train on."""
    trainer = make_trainer(
        max_steps=1, reward_funcs=lambda completions, **kwargs: [float(len(c)) for c in completions]
    )
    sample = GRPOTrainer._generate_single_turn

    def some_without(self, *args, **kwargs):
        ids, logprobs = sample(self, *args, **kwargs)
        return [[] if i % 2 else [3, 4, 1] for i in range(len(ids))], logprobs

    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", some_without)
    batches = []
    loss = trainer._compute_loss
    trainer._compute_loss = lambda model, inputs: batches.append(inputs) or loss(model, inputs)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["win_rate/kept"] == 0.5 and log["win_rate/spread"] > 0.3
    assert batches[0]["completion_ids"][batches[0]["kept"]].tolist() == [[3, 4, 1]] * 4


def test_a_rollout_func_that_gives_no_tokens(fixed):
    def rollout(prompts, trainer):
        return {"prompt_ids": [[3]] * len(prompts), "completion_ids": [[]] * len(prompts), "logprobs": None}

    with pytest.raises(RunError, match=r"rollout_func gave a completion without tokens. Give at least the EOS token"):
        fixed(trainer_kwargs={"rollout_func": rollout}).train()


# ---- Prompts


@pytest.fixture
def short_policy(tmp_path):
    """A policy with a context of 20 tokens."""
    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(**TINY, max_position_embeddings=20)).save_pretrained(tmp_path / "short")
    make_tokenizer().save_pretrained(tmp_path / "short")
    return str(tmp_path / "short")


def write_prompts(prompts) -> None:
    for split in ("train", "test"):
        Path(f"prompts/{split}.jsonl").write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in prompts))


LONG = [{"role": "user", "content": "abcdefghijklmnopqrstuvwxyz"}]
FITS = [{"role": "user", "content": "abc"}]


def test_a_prompt_longer_than_the_context_is_found_before_anything_is_loaded(run_until, short_policy):
    write_prompts([FITS, LONG, FITS])
    status, words, trainer = run_until(model_name_or_path=short_policy)
    assert status == 2 and trainer is None and not Path("out").exists()
    assert (
        "row 1 of train_dataset has a prompt of 30 tokens, which does not fit into the policy's context: with its "
        "completion, a prompt may have 16. Leave out such prompts"
    ) in words


def test_a_streamed_prompt_longer_than_the_context(run_until, short_policy):
    write_prompts([FITS, FITS, FITS, LONG])
    result = run_until(model_name_or_path=short_policy, dataset_streaming=True, shuffle_dataset=False)
    assert_stopped(
        result, "a row of the dataset has a prompt of 30 tokens, which does not fit into the policy's context"
    )


@pytest.mark.parametrize(
    ("prompt", "problem"),
    [
        (None, "has no prompt, but None"),
        ([], "has no prompt, but []"),
        ([{"role": "user", "content": None}], "has no prompt, but [{"),
        ([{"role": None, "content": "abc"}], "has no prompt, but [{"),
    ],
    ids=["None", "no message", "no content", "no role"],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_row_without_a_prompt(run_until, prompt, problem, streaming):
    write_prompts([FITS, FITS, FITS, prompt, FITS])
    result = run_until(dataset_streaming=streaming, shuffle_dataset=False)
    if streaming:
        assert_stopped(result, f"a row of the dataset {problem}")
    else:
        status, words, trainer = result
        assert status == 2 and trainer is None and f"row 3 of train_dataset {problem}" in words


UNICODE = {
    "emoji": "👩‍👩‍👧‍👦 🏳️‍🌈 🇺🇳", "right to left": "שלום مرحبا \u202ebackwards\u202c", "combining": "e\u0301 Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A̴̵̜̰͔ͫ͗͢L",
    "control": "\x00\x01\x07\x1b[31m\x7f", "zero width": "a\u200b\u200d\ufeffb",
    "private": "\ue000\U000f0000\U0010ffff",
    "line ends": "a\r\nb\u2028c\u2029d\x85", "quotes": "'\"`\\\\{{ messages }} {% raw %} <|im_end|> </s> [INST]",
    "noncharacters": "\ufffe\uffff\ufffd",
}  # fmt: skip


@pytest.mark.parametrize("text", UNICODE.values(), ids=UNICODE)
def test_unicode_of_every_kind(make_trainer, tmp_path, text):
    """From the dataset to the files of rollouts and back, and through the table of completions."""
    prompts = [[{"role": "user", "content": text}], [{"role": "system", "content": text + "2"}]]
    trainer = make_trainer(
        trainer_kwargs={"train_dataset": Dataset.from_dict({"prompt": prompts})}, max_steps=1, log_completions=True
    )
    decode = trainer.processing_class.batch_decode
    trainer.processing_class.batch_decode = lambda ids, **kwargs: [
        f"{text} {k}" for k, _ in enumerate(decode(ids, **kwargs))
    ]
    seen = []
    trainer.reward_funcs[:] = [lambda completions, **kwargs: seen.extend(completions) or [float(k) for k in range(8)]]
    trainer.train()
    assert [message["content"] for (message,) in seen] == [f"{text} {k}" for k in range(8)]
    rows = load_dataset(str(tmp_path / "out" / "rollouts"), split="train")
    assert sorted(row["prompt"][0]["content"] for row in rows) == sorted([text, text + "2"])
    assert [c[0]["content"] for row in rows for c in row["completions"]] == [f"{text} {k}" for k in range(8)]


def test_half_a_character(run_until):
    """JSON can spell half of a surrogate pair, which is no text."""
    for split in ("train", "test"):
        Path(f"prompts/{split}.jsonl").write_text('{"prompt": "ab"}\n{"prompt": "\\ud800"}\n')
    status, words, _ = run_until()
    assert status == 2 and "dataset_name='prompts' cannot be loaded: " in words
    assert "Traceback" not in words


# ---- Losses and gradients that are no numbers


def spoil(how: str, steps: set[int]):
    """Spoil the loss or a gradient in these optimizer steps."""

    def fault(trainer):
        loss_of = trainer._compute_loss

        def spoiled(model, inputs):
            loss = loss_of(model, inputs)
            if trainer.state.global_step not in steps:
                return loss
            if how == "gradient":
                parameter = next(p for p in model.parameters() if p.requires_grad)
                return loss + (parameter.sum() * 0).sqrt()  # its value is 0, its derivative infinite
            return loss * float(how)

        trainer._compute_loss = spoiled

    return fault


@pytest.mark.parametrize("how", ["nan", "inf", "gradient"])
@pytest.mark.parametrize("use_peft", [False, True])
def test_a_step_that_is_not_finite_is_skipped_and_counted(run_until, how, use_peft):
    before = {}

    def fault(trainer):
        spoil(how, {1})(trainer)
        before.update({"weights": weights(trainer), "state": str(trainer.optimizer.state_dict()["state"])})

    class After(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                before["after"] = weights(trainers[0])
                before["state after"] = str(trainers[0].optimizer.state_dict()["state"])

    trainers = []

    def fault_and_look(trainer):
        trainers.append(trainer)
        trainer.add_callback(After())
        fault(trainer)

    status, _, trainer = run_until(fault_and_look, logging_steps=1, use_peft=use_peft, learning_rate=1e-2)
    assert status == 0
    for name, value in before["weights"].items():
        assert torch.equal(before["after"][name], value)
    assert before["state"] == before["state after"]
    log = trainer.state.log_history
    assert "skipped_steps" not in log[0] and log[1]["skipped_steps"] == 1 and "skipped_steps" not in log[2]
    assert any(not torch.equal(w, before["weights"][name]) for name, w in weights(trainer).items())  # the third step
    assert all(w.isfinite().all() for w in weights(trainer).values())


def test_steps_that_stay_not_finite_end_the_run_with_the_batch_on_disk(run_until):
    result = run_until(spoil("nan", set(range(1, 9))), max_steps=9, gradient_accumulation_steps=2)
    status, words, trainer = result
    assert status == 1 and trainer.state.global_step == 3
    assert "not finite in 3 optimizer steps in a row. The last batch is in out/nonfinite-step-4. Lower" in words
    micro_batches = torch.load("out/nonfinite-step-4/micro_batches_0.pt", weights_only=True)
    assert len(micro_batches) == 2 and "win_rates" in micro_batches[0]
    texts = [json.loads(line) for line in Path("out/nonfinite-step-4/texts_0.jsonl").read_text().splitlines()]
    assert sum(len(batch["completion_ids"]) for batch in micro_batches) == len(texts)
    assert {"prompt", "completion"} == texts[0].keys()
    assert str(last_whole_checkpoint("out")) == "out/checkpoint-3"


# ---- Disks


@pytest.mark.parametrize("size", [0, 4_000, 60_000])
def test_a_disk_that_is_full(run_until, workdir, size):
    """The system refuses files above some bytes: rollouts, models, optimizers, in this order as there is more room."""
    argv = workdir(save_strategy="steps", save_steps=1, max_steps=3)
    result = run([sys.executable, str(Path(__file__).parent / "full_disk.py"), str(size), *argv])
    assert result.returncode == 1, result.stderr
    assert "a file could not be written, most likely because the disk is full" in result.stderr
    assert str(last_whole_checkpoint("out")) == "out/checkpoint-1" and not Path("out/checkpoint-2").exists()
    status, _, trainer = run_until(resume_from_checkpoint="true")
    assert status == 0 and trainer.state.global_step == 3


def full(*args, **kwargs):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    "where",
    [
        "trl_sppo.runs.resumable.write_manifest",
        "transformers.trainer_callback.TrainerState.save_to_json",
        "transformers.Trainer._save_rng_state",
        "pandas.DataFrame.to_parquet",
        "pyarrow.parquet.write_table",
    ],
    ids=["manifest", "state", "random state", "table of completions", "rollouts"],
)
def test_a_disk_that_is_full_at_each_kind_of_file(run_until, monkeypatch, where):
    result = run_until(lambda trainer: monkeypatch.setattr(where, full), log_completions=True, logging_steps=1)
    words = "a file could not be written, most likely because the disk is full (OSError: [Errno 28]"
    with_the_rollouts = where in ("pyarrow.parquet.write_table", "transformers.Trainer._save_rng_state")
    assert_stopped(result, words, ended=1 if with_the_rollouts else 2)


@pytest.mark.parametrize("where", ["file/out", "file"])
def test_an_output_directory_that_cannot_be(run_until, where):
    Path("file").write_text("")
    status, words, trainer = run_until(output_dir=where)
    assert status == 2 and trainer is None and "output_dir" in words
    assert Path("file").read_text() == ""


# ---- Processes

DIES = """
import os, signal
from helpers import count_abc
calls = 0
def dies(completions, **kwargs):
    global calls
    calls += 1
    if calls == 3 and os.environ.get("RANK", "0") == "{rank}":
        {how}
    return count_abc(completions)
"""


@pytest.mark.parametrize(
    ("how", "processes", "expected"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", 2, "trl-sppo: error: process 1 was ended by SIGKILL"),
        ("raise ValueError('it has no idea')", 2, "reward source 'dies' failed: ValueError: it has no idea"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 1, "trl-sppo: error: process 0 was ended by SIGKILL"),
    ],
    ids=["killed", "raises", "killed alone"],
)
def test_a_process_dies(workdir, tmp_path, how, processes, expected):
    """The other ends too, if there is one, and does not wait for ever."""
    (tmp_path / "rewards_of_test.py").write_text(DIES.format(how=how, rank=processes - 1))
    argv = workdir(
        per_device_train_batch_size=8 // processes, reward_funcs="rewards_of_test.dies", num_processes=processes,
        use_cpu=True,
        save_strategy="steps", save_steps=1, max_steps=4,
    )  # fmt: skip
    result = run([*TRL_SPPO, *argv, "--main_process_port", "0"], timeout=100)
    assert result.returncode != 0
    assert expected in result.stderr
    assert re.search("--resume_from_checkpoint true continues", result.stderr)
    assert str(last_whole_checkpoint("out")) == "out/checkpoint-2"


# ---- Words


def test_what_is_said_of_errors():
    assert explain(RunError("this helps")) == "this helps"
    assert explain(ValueError("a\nb")) == "ValueError: a\nb"
    assert "another process of this run has ended" in explain(RuntimeError("[gloo] Connection closed by peer [::1]:1"))
    assert "the disk is full" in explain(RuntimeError("PytorchStreamWriter failed writing file data/0"))
    assert "the GPU is out of memory" in explain(torch.OutOfMemoryError("2 GiB"))
