import atexit
import os
import shutil
import signal
import subprocess
import sys
import tempfile


os.environ["HF_HUB_OFFLINE"] = "1"  # no test needs a hub, nor what this machine has from one
os.environ["HF_HOME"] = tempfile.mkdtemp()
WITH_DEVICES = dict(os.environ)  # the environment of processes that the tests marked `gpu` start
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest  # noqa: E402
import torch  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: E402
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM  # noqa: E402
from transformers.integrations import deepspeed  # noqa: E402
from transformers.utils import logging  # noqa: E402


NOT_RUN = pytest.StashKey[list]()

atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)


def pytest_collection_modifyitems(config, items):
    """Leave out what needs a CUDA device where there is none."""
    need_one = [item for item in items if item.get_closest_marker("gpu")]
    question = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    if need_one and subprocess.run([sys.executable, "-c", question], env=WITH_DEVICES).returncode:
        items[:] = [item for item in items if item not in need_one]
        config.stash[NOT_RUN] = [item.nodeid for item in need_one]


def pytest_terminal_summary(terminalreporter, config):
    if config.stash.get(NOT_RUN, []):
        terminalreporter.section("not run: there is no CUDA device")
        terminalreporter.write_line("\n".join(config.stash[NOT_RUN]))


@pytest.fixture(autouse=True)
def leaves_nothing_behind():
    """What a test changes about the process is changed back, so that no other test can fail on it."""
    environment, path, folder = dict(os.environ), list(sys.path), os.getcwd()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    deepspeed_config = deepspeed._hf_deepspeed_config_weak_ref
    verbosity, dtype = logging.get_verbosity(), torch.get_default_dtype()
    yield
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)
    sys.path[:] = path
    os.chdir(folder)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    deepspeed._hf_deepspeed_config_weak_ref = deepspeed_config
    logging.set_verbosity(verbosity)
    torch.set_default_dtype(dtype)
    AcceleratorState._reset_state(reset_partial_state=True)


CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] + ':' + m['content'] + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


def make_tokenizer(**kwargs) -> PreTrainedTokenizerFast:
    """One token per letter: a to z, space and colon."""
    letters = [chr(ord("a") + i) for i in range(26)]
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *letters, " ", ":"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    kwargs = {"pad_token": "<pad>", "chat_template": CHAT_TEMPLATE, **kwargs}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>", **kwargs)


TINY = {
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "eos_token_id": 1,
}


@pytest.fixture
def tiny_tokenizer():
    return make_tokenizer()


@pytest.fixture
def tiny_model():
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**TINY))


@pytest.fixture
def tiny_policy(tiny_model, tiny_tokenizer, tmp_path):
    """A tiny policy with its tokenizer, saved."""
    folder = tmp_path / "policy"
    tiny_model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return str(folder)


def count_abc(completions, **kwargs) -> list[float]:
    """A reward function: the number of letters a, b and c in the answer."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [float(sum(letter in "abc" for letter in text)) for text in texts]


def more_abc(prompts, first, second, **kwargs) -> list[float]:
    """A pairwise oracle: the answer with more letters a, b and c wins."""
    scores = [count_abc(answers) for answers in (first, second)]
    return [0.5 + 0.5 * ((a > b) - (a < b)) for a, b in zip(*scores, strict=True)]


@pytest.fixture
def make_trainer(tiny_model, tiny_tokenizer, tmp_path):
    """A function that builds an SPPOTrainer on a tiny model: `make_trainer(eta=5.0, reward_funcs=...)`."""
    from datasets import Dataset

    from trl_sppo import SPPOConfig, SPPOTrainer

    def make(model=None, reward_funcs=count_abc, prompts=None, trainer_kwargs=None, **options):
        prompts = ["ab", "fgh", "cd e", "xyz"] * 4 if prompts is None else prompts
        options = {
            "output_dir": str(tmp_path / "out"),
            "per_device_train_batch_size": 8,
            "num_generations": 4,
            "max_completion_length": 6,
            "temperature": 1.0,
            "learning_rate": 1e-2,
            "gradient_checkpointing": False,
            "bf16": False,
            "use_cpu": True,
            "report_to": "none",
            "save_strategy": "no",
            "logging_steps": 1,
            "disable_tqdm": True,
            "max_steps": 2,
            **options,
        }
        kwargs = {"processing_class": tiny_tokenizer, "train_dataset": Dataset.from_dict({"prompt": prompts})}
        return SPPOTrainer(
            tiny_model if model is None else model,
            reward_funcs,
            SPPOConfig(**options),
            **{**kwargs, **(trainer_kwargs or {})},
        )

    return make


@pytest.fixture
def fixed(make_trainer, monkeypatch):
    """A trainer whose rollouts are the table above and whose optimizer is plain gradient descent."""
    from fixed import COMPLETIONS, alphabet_score, fixed_rollout

    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")

    def make(trainer_kwargs=None, **options):
        options = {
            "optim": "sgd", "learning_rate": 1e-3, "lr_scheduler_type": "constant", "max_grad_norm": 0.0,
            "max_steps": 1, "per_device_train_batch_size": 16, "prompts": list(COMPLETIONS),
            "reward_funcs": alphabet_score, **options,
        }  # fmt: skip
        return make_trainer(trainer_kwargs={"rollout_func": fixed_rollout, **(trainer_kwargs or {})}, **options)

    return make
