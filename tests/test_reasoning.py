"""Reasoning of thinking policies: what voters and judges read of completions, and its metrics."""

import shutil
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
from datasets import Dataset
from helpers import CHAT_TEMPLATE, EVAL, JUDGES, TINY, history, make_tokenizer, run_here
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOTrainer, chat_template_utils
from trl.chat_template_utils import add_response_schema, parse_response

from trl_sppo.commands.evaluate import EvalArguments
from trl_sppo.commands.judging import parse
from trl_sppo.commands.ladder import _sampling_of
from trl_sppo.errors import RunError
from trl_sppo.evaluation import policies
from trl_sppo.evaluation.policies import Sampling, sample
from trl_sppo.files import mark_beginning
from trl_sppo.rollouts.reasoning import MARKS, Reasoning, find_marks, split_reasoning


THINK, MISTRAL, GEMMA = MARKS
TEMPLATES = chat_template_utils._CHAT_TEMPLATES_DIR

# ---- Texts


@pytest.mark.parametrize(
    ("text", "is_open", "hidden", "visible"),
    [
        ("ab", False, "", "ab"),
        ("", False, "", ""),
        ("<think>\na\n</think>\n\nb", False, "<think>\na\n</think>\n\n", "b"),
        ("\n<think></think>b", False, "\n<think></think>", "b"),
        # the prompt has opened the reasoning
        ("a</think>b", True, "a</think>", "b"),
        ("\n</think>\n\nb", True, "\n</think>\n\n", "b"),
        ("<think>a</think>b", True, "<think>a</think>", "b"),
        # without an end
        ("<think>a", False, "<think>a", None),
        ("a", True, "a", None),
        ("", True, "", None),
        ("<think>a</think><think>b", False, "<think>a</think><think>b", None),
        # nothing visible after it
        ("<think>a</think>", False, "<think>a</think>", ""),
        # several blocks
        ("<think>a</think> <think>b</think> c", False, "<think>a</think> <think>b</think> ", "c"),
        ("a</think><think>b</think>c", True, "a</think><think>b</think>", "c"),
        # quoted marks: the first end mark ends a block, and marks in the visible text are text
        ("<think>a <think> b</think>c", False, "<think>a <think> b</think>", "c"),
        ("<think>a</think>b </think> c", False, "<think>a</think>", "b </think> c"),
        ("<think>a</think>b <think> c", False, "<think>a</think>", "b <think> c"),
        ("a </think> b", False, "", "a </think> b"),
        ("a <think>b</think> c", False, "", "a <think>b</think> c"),
    ],
)
def test_texts(text, is_open, hidden, visible):
    assert split_reasoning(text, THINK, is_open) == (hidden, visible)


# ---- Marks of a template


@pytest.mark.parametrize(
    ("template", "marks"),
    [
        ("qwen3", THINK), ("qwen3_5_think", THINK), ("deepseek_r1_distill", THINK), ("glm4moe", THINK),
        ("nemotron_3_nano", THINK), ("lfm2_2_5", THINK), ("gemma4", GEMMA),
        ("qwen2_5", None), ("qwen3_instruct_2507", None), ("llama3", None), ("gemma3", None), ("gptoss", None),
    ],
)  # fmt: skip
def test_the_templates_of_trl(template, marks):
    tokenizer = make_tokenizer(chat_template=(TEMPLATES / f"{template}.jinja").read_text())
    assert find_marks(None, tokenizer) == marks
    assert find_marks(False, tokenizer) is None


def test_a_template_without_marks():
    tokenizer = make_tokenizer()
    assert find_marks(None, tokenizer) is None and find_marks(False, tokenizer) is None
    with pytest.raises(ValueError, match=r"hide_reasoning=True, but the chat template of m has no mark .*</think>"):
        find_marks(True, tokenizer, "m")
    tokenizer.chat_template = "[/THINK]"
    assert find_marks(True, tokenizer) == MISTRAL


# ---- Completions, by their tokens


def make_thinker(template=CHAT_TEMPLATE + "{# </think> #}", special=(), plain=THINK) -> PreTrainedTokenizerFast:
    """One token per letter and per mark."""
    letters = [chr(i) for i in range(32, 127)] + ["\n"]
    tokens = ["<pad>", "<eos>", "<unk>", *letters]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", chat_template=template
    )


def ids_of(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def hidden(tokenizer, text, completion=None, prompt="u:q a:", marks=THINK, mask=None):
    """What is visible of a completion with this text, and its facts. TRL's text of it if `completion` is `None`."""
    ids = ids_of(tokenizer, text)
    completion = tokenizer.decode(ids, skip_special_tokens=True) if completion is None else completion
    masks = None if mask is None else [mask]
    (visible,), (facts,) = Reasoning(tokenizer, marks).hide([ids_of(tokenizer, prompt)], [ids], [completion], masks)
    return visible, *facts


@pytest.mark.parametrize(
    ("text", "prompt", "visible", "length", "unfinished"),
    [
        ("xyz<eos>", "a:", "xyz", 0, False),
        # <think> a b </think> and a line break
        ("<think>ab</think>\nxy<eos>", "a:", "xy", 5, False),
        ("<think>ab", "a:", "", 3, True),
        ("<think>ab<eos>", "a:", "", 3, True),
        ("ab</think>xy<eos>", "a:<think>\n", "xy", 3, False),
        ("ab", "a:<think>\n", "", 2, True),
        ("<pad>", "a:<think>\n", "", 0, True),  # vLLM gave no token
        # the prompt's reasoning is over, or its mark is the user's
        ("xy</think>z", "a:<think>\n\n</think>\n\n", "xy</think>z", 0, False),
        ("xy", "u:<think> a:", "xy", 0, False),
    ],
)
def test_completions(text, prompt, visible, length, unfinished):
    tokenizer = make_thinker()
    assert hidden(tokenizer, text, prompt=prompt) == (visible, length, unfinished)
    content = tokenizer.decode(ids_of(tokenizer, text), skip_special_tokens=True)
    message = [{"role": "assistant", "content": content}]
    expected = [{"role": "assistant", "content": visible}], length, unfinished
    assert hidden(tokenizer, text, message, prompt) == expected
    assert message[0]["content"] == content  # the whole completion is kept elsewhere


def test_marks_of_several_tokens():
    tokenizer = make_thinker(plain=())
    assert len(ids_of(tokenizer, "</think>")) == 8
    assert hidden(tokenizer, "<think>a</think>xy<eos>") == ("xy", 7 + 1 + 8, False)
    assert hidden(tokenizer, "a</think>xy<eos>", prompt="a:<think>\n") == ("xy", 9, False)


def test_marks_that_are_special_tokens():
    """TRL's text lacks them, but the tokens have them."""
    tokenizer = make_thinker(special=("<|channel>", "<channel|>"), plain=())
    text = "<|channel>thought\nab<channel|>xy<eos>"
    assert tokenizer.decode(ids_of(tokenizer, text), skip_special_tokens=True) == "thought\nabxy"
    # the mark, 7 letters of the word, the line break, a, b and the mark
    assert hidden(tokenizer, text, marks=GEMMA) == ("xy", 12, False)
    assert hidden(tokenizer, "<|channel>thought\nab", marks=GEMMA) == ("", 11, True)
    assert hidden(tokenizer, "xy<eos>", marks=GEMMA) == ("xy", 0, False)


FAMILIES = {
    "qwen3": (["<|im_end|>", "<|im_start|>"], "<think>\n"),
    "qwen3_5_think": (["<|im_end|>", "<|im_start|>"], ""),  # as Qwen3-Thinking-2507: the prompt opens the reasoning
    "deepseek_r1_distill": (["<｜end▁of▁sentence｜>", "<｜Assistant｜>", "<｜User｜>"], ""),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("rest", "visible", "unfinished"),
    [
        ("ab</think>\n\nxy<eos>", "xy", False),
        ("\n</think>\n\nxy<eos>", "xy", False),
        ("ab", "", True),
        ("ab</think>x </think> y<eos>", "x </think> y", False),
    ],
)
@pytest.mark.parametrize("is_parsed", [True, False])
def test_what_trl_makes_of_completions(family, rest, visible, unfinished, is_parsed):
    """Parsed into keys of a message or not, the same is visible."""
    special, begin = FAMILIES[family]
    tokenizer = make_thinker((TEMPLATES / f"{family}.jinja").read_text(), special)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "q"}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    ids = ids_of(tokenizer, begin + rest.replace("<eos>", special[0]))
    if is_parsed:
        message = parse_response(add_response_schema(tokenizer), ids, prefix=prompt)
    else:
        message = {"role": "assistant", "content": tokenizer.decode(ids, skip_special_tokens=True)}
    (completion,), ((_, never_ends),) = Reasoning(tokenizer, find_marks(None, tokenizer)).hide(
        [prompt], [ids], [[message]]
    )
    assert completion == [{"role": "assistant", "content": visible}] and never_ends == unfinished


def test_turns_with_tools():
    """In each of the policy's turns, also where TRL has parsed them."""
    tokenizer = make_thinker()
    turns = ["<think>a</think>c<eos>", "TT", "<think>bb</think>d<eos>", "T", "<think>e"]
    call = [{"type": "function", "function": {"name": "f", "arguments": {}}}]
    completion = [
        {"role": "assistant", "reasoning_content": "a", "content": "", "tool_calls": call},
        {"role": "tool", "name": "f", "content": "<think>TT"},
        {"role": "assistant", "reasoning_content": "bb", "content": "d"},
        {"role": "tool", "name": "f", "content": "T"},
        {"role": "assistant", "reasoning_content": "e", "content": ""},
    ]
    mask = [int(i % 2 == 0) for i, turn in enumerate(turns) for _ in ids_of(tokenizer, turn)]
    visible, length, unfinished = hidden(tokenizer, "".join(turns), completion, mask=mask)
    assert visible == [
        {"role": "assistant", "content": "", "tool_calls": call},  # the call is the content, and stays parsed
        {"role": "tool", "name": "f", "content": "<think>TT"},
        {"role": "assistant", "content": "d"},
        {"role": "tool", "name": "f", "content": "T"},
        {"role": "assistant", "content": ""},
    ]
    assert length == 3 + 4 + 2 and unfinished
    # A prompt that opens the reasoning opens it in each turn
    turns = ["a</think>c<eos>", "TT", "bb<eos>"]
    mask = [int(i % 2 == 0) for i, turn in enumerate(turns) for _ in ids_of(tokenizer, turn)]
    completion = [
        {"role": "assistant", "content": "c"},
        {"role": "tool", "content": "T"},
        {"role": "assistant", "content": "bb"},
    ]
    visible, length, unfinished = hidden(tokenizer, "".join(turns), completion, "a:<think>", mask=mask)
    assert [message["content"] for message in visible] == ["c", "T", ""] and (length, unfinished) == (4, True)
    # Some parsers take reasoning that never ends for content, also beside a call
    completion = [{"role": "assistant", "content": "bb", "tool_calls": call}]
    visible, *_ = hidden(tokenizer, "bb<call>", completion, "a:<think>")
    assert visible == [{"role": "assistant", "content": "", "tool_calls": call}]


# ---- Trainings


# By prompt, for each completion of its group: all of its text, and what is visible
TABLE = {
    "k": [("<think>c</think>a<eos>", "a"), ("<think>a</think>bb<eos>", "bb"), ("z<eos>", "z"), ("<think>aaa", "")],
    "m": [("<think>a</think>y<eos>", "y"), ("<think>b", ""), ("ccc<eos>", "ccc"), ("<think></think>cc<eos>", "cc")],
}
# tokens from <think> to </think>, or to the end: (3 + 3 + 0 + 4 + 3 + 2 + 0 + 2) / 8
MEAN_LENGTH, UNFINISHED = 17 / 8, 2 / 8
VISIBLE = {name: [text for _, text in group] for name, group in TABLE.items()}


class Seen:
    """A reward function and a pairwise oracle that record what they read."""

    def __init__(self):
        self.scored: list[tuple[str, str]] = []
        self.compared: set[tuple[str, str]] = set()
        self.lengths: list[int] = []
        self.fails_at = -1

    def score(self, prompts, completions, completion_ids, trainer_state, **kwargs):
        if trainer_state.global_step == self.fails_at:
            raise OSError("stopped")
        texts = [completion[0]["content"] for completion in completions]
        assert all(
            completion == [{"role": "assistant", "content": completion[0]["content"]}] for completion in completions
        )
        self.scored += [(prompt[0]["content"], text) for prompt, text in zip(prompts, texts, strict=True)]
        self.lengths += [len(ids) for ids in completion_ids]
        return [float(len(text)) for text in texts]

    def prefer(self, prompts, first, second, **kwargs):
        for side in (first, second):
            self.compared |= {(p[0]["content"], c[0]["content"]) for p, c in zip(prompts, side, strict=True)}
        return [0.5] * len(first)

    @property
    def by_prompt(self):
        return {name: sorted(text for prompt, text in self.scored if prompt == name) for name in ("k", "m")}


@pytest.fixture
def think(make_trainer, tmp_path, monkeypatch):
    """A function that builds the trainer of a policy that thinks as in the table, and what its voters have seen."""
    tokenizer = make_thinker()
    sampled = []

    def generate(trainer, prompt_ids, *args, **kwargs):
        sampled.append(trainer.state.global_step)
        seen: dict[str, int] = {}
        completion_ids = []
        for ids in prompt_ids:
            name = "k" if "k" in tokenizer.decode(ids) else "m"
            k = seen[name] = seen.get(name, -1) + 1
            completion_ids.append(ids_of(tokenizer, TABLE[name][k % 4][0]))
        return completion_ids, None

    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", generate)

    def build(template=tokenizer.chat_template, folder="out", trainer_kwargs=None, **options):
        seen = Seen()
        own = make_thinker(template)
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(Qwen2Config(**{**TINY, "vocab_size": len(own)}))
        prompts = [[{"role": "user", "content": text}] for text in ("k", "m")]
        options = {"max_completion_length": 8, "max_steps": 1, "output_dir": str(tmp_path / folder), **options}
        kwargs = {"processing_class": own, "preference_func": seen.prefer, **(trainer_kwargs or {})}
        trainer = make_trainer(model, seen.score, prompts, trainer_kwargs=kwargs, **options)
        trainer.sampled = sampled
        return trainer, seen

    return build


def logged(trainer, name):
    return [row[name] for row in trainer.state.log_history if name in row]


def test_a_training(think, tmp_path):
    trainer, seen = think(num_iterations=2, max_steps=2)  # one iteration, of two optimizer steps
    trainer.train()
    assert seen.by_prompt == {name: sorted(texts) for name, texts in VISIBLE.items()}
    assert seen.compared == {(name, text) for name, texts in VISIBLE.items() for text in texts}
    whole = sorted(len(ids_of(make_thinker(), text)) for group in TABLE.values() for text, _ in group)
    assert sorted(seen.lengths) == whole  # the tokens that reward functions get are all of them
    assert logged(trainer, "completions/reasoning_mean_length") == [MEAN_LENGTH] * 2
    assert logged(trainer, "completions/reasoning_unfinished") == [UNFINISHED] * 2
    # The policy is trained on all tokens, and they are stored
    assert logged(trainer, "completions/mean_length")[0] == sum(whole) / 8
    (group, _) = pyarrow.parquet.read_table(tmp_path / "out/rollouts/iteration-000000.parquet").to_pylist()
    texts = [completion[0]["content"] for completion in group["completions"]]
    assert texts == [text.removesuffix("<eos>") for text, _ in TABLE[group["prompt"][0]["content"]]]
    assert [len(ids) for ids in group["completion_ids"]] == [len(ids) for ids in group["logps"]]
    # lengths beside win rates are of the visible tokens: the reward function is the number of visible letters
    assert logged(trainer, "win_rate/length_correlation")[0] > 0.8


def test_without_hiding(think):
    for options in ({"hide_reasoning": False}, {"template": CHAT_TEMPLATE}):
        trainer, seen = think(**options)
        trainer.train()
        assert ("k", "<think>c</think>a") in seen.scored and ("k", "<think>aaa") in seen.compared
        assert not logged(trainer, "completions/reasoning_mean_length")
        assert not logged(trainer, "completions/reasoning_unfinished")


def test_the_option_needs_marks(think, make_trainer, tiny_policy):
    message = "hide_reasoning=True, but the chat template of the policy has no mark that ends reasoning"
    with pytest.raises(ValueError, match=message):
        think(template=CHAT_TEMPLATE, hide_reasoning=True)
    with pytest.raises(ValueError, match=r"the chat template of model '.*/policy' has no mark"):  # before it is loaded
        make_trainer(tiny_policy, hide_reasoning=True, trainer_kwargs={"processing_class": None})
    trainer, _ = think(hide_reasoning=True)
    assert trainer.args.hide_reasoning is True


def test_a_resumed_run_shows_the_same(think):
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    whole, expected = think(folder="whole", **options)
    whole.train()
    trainer, seen = think(**options)
    seen.fails_at = 1
    with pytest.raises(RunError, match="stopped"):
        trainer.train()
    resumed, again = think(**options)
    del resumed.sampled[:]
    resumed.train(resume_from_checkpoint=True)
    assert resumed.sampled == []  # the second iteration's completions come from the file
    assert again.scored == expected.scored[8:] and len(again.scored) == 8
    assert again.by_prompt == {name: sorted(texts) for name, texts in VISIBLE.items()}
    assert [row for row in history(resumed) if row["step"] == 2] == [row for row in history(whole) if row["step"] == 2]


def test_evaluations_in_a_training(think, tmp_path):
    judge = Seen()
    evaluated = Dataset.from_dict({"prompt": [[{"role": "user", "content": "k"}], [{"role": "user", "content": "m"}]]})
    kwargs = {"eval_dataset": evaluated, "eval_reward_funcs": judge.score, "eval_preference_func": judge.prefer}
    trainer, _ = think(trainer_kwargs=kwargs, eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=8)
    trainer.train()
    texts = {(name, text) for name, group in VISIBLE.items() for text in group}
    assert judge.compared == texts and set(judge.scored) == texts
    assert logged(trainer, "eval_completions/reasoning_mean_length") == [MEAN_LENGTH] * 2
    assert logged(trainer, "eval_completions/reasoning_unfinished") == [UNFINISHED] * 2
    # What is stored of an evaluation is what judges read
    for step in (0, 1):
        groups = pyarrow.parquet.read_table(tmp_path / f"out/evaluations/step-{step:06d}.parquet").to_pylist()
        found = {group["prompt"][0]["content"]: group for group in groups}
        for name, group in found.items():
            assert [completion[0]["content"] for completion in group["completions"]] == VISIBLE[name]
        assert found["k"]["lengths"] == [2, 3, 2, 0]  # with EOS


# ---- Commands


@pytest.fixture
def thinker(think, tmp_path, monkeypatch):
    """The folder of a policy that thinks as in the table, outside of a training."""
    tokenizer = make_thinker()

    def sample_ids(model, tokenizer, prompt_ids, sampling, description):
        names = ["k" if "k" in tokenizer.decode(ids) else "m" for ids in prompt_ids]
        return [[ids_of(tokenizer, text) for text, _ in TABLE[name]] for name in names]

    monkeypatch.setattr(policies, "sample_ids", sample_ids)
    folder = tmp_path / "thinker"
    Qwen2ForCausalLM(Qwen2Config(**{**TINY, "vocab_size": len(tokenizer)})).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_policies_that_commands_sample(thinker):
    prompts = Dataset.from_dict({"prompt": [[{"role": "user", "content": text}] for text in ("k", "m")]})
    groups = sample(str(thinker), prompts, Sampling(num_generations=4))
    assert [[c[0]["content"] for c in group["completions"]] for group in groups] == [VISIBLE["k"], VISIBLE["m"]]
    assert [group["lengths"] for group in groups] == [[2, 3, 2, 0], [2, 0, 4, 3]]
    texts = sample(str(thinker), Dataset.from_dict({"prompt": ["u:k a:"]}), Sampling(num_generations=4))
    assert texts[0]["completions"] == VISIBLE["k"]
    shown = sample(str(thinker), prompts, Sampling(num_generations=4, hide_reasoning=False))
    assert shown[0]["completions"][0][0]["content"] == "<think>c</think>a" and shown[0]["lengths"] == [5, 6, 2, 4]


def completions_in(path) -> list[list[str]]:
    return [group["completions"] for group in pyarrow.parquet.read_table(path).to_pylist()]


def test_eval_shows_both_sides_alike(thinker, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("prompts").mkdir()
    Path("prompts/test.jsonl").write_text('{"prompt": "u:k a:"}\n{"prompt": "u:m a:"}\n')
    shutil.copytree(thinker, "other")
    command = (*EVAL, "--model_name_or_path", thinker, "--opponent_name_or_path", "other", *JUDGES)
    whole = [[text.removesuffix("<eos>") for text, _ in group] for group in TABLE.values()]
    assert run_here(*command, "--output_dir", "hidden") == 0
    mark_beginning("other", config={"hide_reasoning": False})
    assert run_here(*command, "--output_dir", "shown") == 0
    assert run_here(*command, "--output_dir", "asked", "--hide_reasoning", "true") == 0
    for folder, expected in (("hidden", VISIBLE), ("shown", None), ("asked", VISIBLE)):
        for side in ("model", "opponent"):
            found = completions_in(f"{folder}/{side}.parquet")
            assert found == (whole if expected is None else [*expected.values()]), (folder, side)


def test_ladder_does_as_the_training_did(tmp_path):
    assert _sampling_of(tmp_path) == {}
    mark_beginning(str(tmp_path), config={"hide_reasoning": False})
    assert _sampling_of(tmp_path) == {"hide_reasoning": False}


def test_the_option_of_commands(thinker, tiny_policy):
    for text, value in (("true", True), ("false", False)):
        assert parse(EvalArguments, "trl-sppo eval", ["--hide_reasoning", text]).hide_reasoning is value
    assert parse(EvalArguments, "trl-sppo eval", []).hide_reasoning is None
    prompts = Dataset.from_dict({"prompt": ["ab"]})
    with pytest.raises(ValueError, match=r"hide_reasoning=True, but the chat template of policy '.*/policy' has no"):
        sample(tiny_policy, prompts, Sampling(hide_reasoning=True))
