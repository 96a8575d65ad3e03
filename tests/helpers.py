"""Tiny models, reward functions, servers and commands that several test modules use. Fixtures are in conftest.py."""

import json
import math
import os
import subprocess
import sys
import threading
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import warm
from datasets import Dataset
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config


# ---- Tiny models


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


def encoder(num_labels=1):
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=31, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, num_labels=num_labels, pad_token_id=0,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def decoder(num_labels=1):
    from transformers import Qwen2ForSequenceClassification

    return Qwen2ForSequenceClassification(Qwen2Config(**TINY, num_labels=num_labels))


# ---- Reward functions and oracles


def count_abc(completions, **kwargs) -> list[float]:
    """A reward function: the number of letters a, b and c in the answer."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [float(sum(letter in "abc" for letter in text)) for text in texts]


def more_abc(prompts, first, second, **kwargs) -> list[float]:
    """A pairwise oracle: the answer with more letters a, b and c wins."""
    scores = [count_abc(answers) for answers in (first, second)]
    return [0.5 + 0.5 * ((a > b) - (a < b)) for a, b in zip(*scores, strict=True)]


# ---- Rollouts without chance: what the policy says is a table, so that tests can work out what is trained on


# Completions of letters (ids 3 to 28) by prompt and position in the group: all different, some of equal score
COMPLETIONS = {
    prompt: [[*[3 + (7 * p + 5 * k) % 26, 3 + (p + 11 * k) % 26, 3 + k][: 1 + k % 3], 1] for k in range(4)]
    for p, prompt in enumerate(["ab", "fgh", "cd e", "xyz"])
}


def fixed_rollout(prompts, trainer):
    """A `rollout_func` without chance: the k-th copy of a prompt gets the k-th completion of the table."""
    seen: dict[str, int] = {}
    completion_ids = []
    for prompt in prompts:
        k = seen.get(prompt, 0)
        seen[prompt] = k + 1
        completion_ids.append(COMPLETIONS[prompt][k % 4])
    prompt_ids = [trainer.processing_class(prompt)["input_ids"] for prompt in prompts]
    return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": None}


def alphabet_score(completion_ids, **kwargs) -> list[float]:
    """Sum of the letters' places in the alphabet, in steps of 10: with ties."""
    return [float(sum(ids[:-1]) // 10) for ids in completion_ids]


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def completions_table(trainer, iteration: int = 1):
    """The table of completions that TRL writes with `log_completions=True`."""
    import pandas as pd

    return pd.read_parquet(f"{trainer.args.output_dir}/completions/completions_{iteration:05d}.parquet")


def token_logps(model, tokenizer) -> list[list[torch.Tensor]]:
    """Log-probabilities of the tokens of each completion of the table, by groups, one forward pass at a time."""
    groups = []
    for prompt, group in COMPLETIONS.items():
        ids = tokenizer(prompt)["input_ids"]
        groups.append([])
        for completion in group:
            logits = model(torch.tensor([ids + completion])).logits[0, len(ids) - 1 : -1]
            groups[-1].append(logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0])
    return groups


# ---- Images


IMAGE_TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] + ':' }}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ ' ' }}{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)


def image_dataset(with_images: bool = True) -> Dataset:
    from PIL import Image

    prompts = [[{"role": "user", "content": letter}] for letter in "abcd"]
    columns = {"prompt": prompts}
    if with_images:
        columns["image"] = [Image.new("RGB", (16, 16), color=(60 * i, 255 - 60 * i, 30)) for i in range(4)]
    return Dataset.from_dict(columns)


def image_score(completions, **kwargs):
    return [float(sum(map(ord, completion[0]["content"]))) for completion in completions]


# ---- Runs that end and go on


# Iterations of two optimizer steps, each of two micro-batches; three iterations in an epoch
RUN = {
    "per_device_train_batch_size": 4, "steps_per_generation": 4, "gradient_accumulation_steps": 2, "max_steps": 9,
    "save_strategy": "steps", "save_steps": 1, "logging_steps": 2, "seed": 3,
}  # fmt: skip


RUN_PROMPTS = [a + b for a in "abcdef" for b in ("x", "yz")]


def history(trainer) -> list[dict]:
    """The log, without times and what is said of one call of `train`."""
    words = "time", "per_second", "train_loss"
    return [{k: v for k, v in row.items() if not any(w in k for w in words)} for row in trainer.state.log_history]


def assert_same(actual, expected) -> None:
    for name, value in weights(expected).items():
        assert torch.equal(weights(actual)[name], value), name
    for mine, row in zip(history(actual), history(expected), strict=True):
        assert mine == row


# ---- Commands


TRL_SPPO = [sys.executable, "-m", "trl_sppo", "train"]


ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]


def run(command: list[str], timeout: float = 120, fork: bool = True) -> subprocess.CompletedProcess[str]:
    """
    Run a command to its end, with `fork` by forks of a process that has imported everything (warm.py). If it hangs,
    ask it to end, since killing it would leave its processes behind.
    """
    if fork and command[0] == sys.executable:
        command = [warm.python(), *command[1:]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "PYTHONFAULTHANDLER": "1"}
    environment["PYTHONPATH"] = f"{Path(__file__).parent}{os.pathsep}{os.getcwd()}"
    pipe = subprocess.PIPE
    for _ in range(2):
        with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment) as process:
            try:
                stdout, stderr = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                process.terminate()
                raise
        if "(SIGSEGV)" not in stderr:
            break
        # PyTorch's, for we have no native code: seen once, with FSDP on a CPU, which accelerate does not support
        warnings.warn(f"A second try, since a process crashed in native code:\n{stderr}", stacklevel=2)
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def message(capsys, argv, run=None) -> str:
    """What a command refuses with: one message, no traceback, status 2."""
    from trl_sppo import train

    with pytest.raises(SystemExit) as exit:
        (run or train.main)(argv)
    assert exit.value.code == 2
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    return printed.split("trl-sppo: error: ")[1]


EVAL_PROMPTS = ["ab", "fgh", "k", "l m", "no", "p"]


def run_here(*argv) -> int:
    """Run a command in this process, and return its status."""
    from trl_sppo import cli

    try:
        return cli.main([*map(str, argv)])
    except SystemExit as exit:
        return exit.code


EVAL = ("eval", "--dataset_name", "prompts", "--max_completion_length", 6, "--temperature", 1.0)


JUDGES = ("--reward_funcs", "helpers.count_abc", "--preference_funcs", "helpers.more_abc")


# ---- General preference models


def randomise(state, seed=0):
    """Weights that make outputs differ."""
    generator = torch.Generator().manual_seed(seed)
    noise = {name: 0.5 * torch.randn(value.shape, generator=generator) for name, value in state.items()}
    return {name: value + ("norm" in name.lower() and name.endswith("weight")) for name, value in noise.items()}


def save_checkpoint(folder, state, config, tokenizer):
    folder.mkdir(exist_ok=True)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer.save_pretrained(folder)
    return str(folder)


def backbone_of(family):
    """Class and configuration of a general preference model's backbone."""
    from transformers import Gemma2Config, Gemma2Model, LlamaConfig, LlamaModel

    return {
        "llama": (LlamaModel, LlamaConfig(**TINY)),
        "gemma2": (Gemma2Model, Gemma2Config(**TINY, head_dim=8)),
    }[family]


def save_gpm(folder, family="llama", dim=4, prompt_head=True, value_head=True, shards=False, dtype=torch.float32):
    """A checkpoint with the names of the published ones: backbone, heads and, unused, the language model's head."""
    kind, config = backbone_of(family)
    state = {f"model.{name}": value for name, value in kind(config).state_dict().items()}
    state["lm_head.weight"] = torch.empty(31, 16)
    state.update({"value_head.weight": torch.empty(dim, 16)} if value_head else {})
    state.update({"prompt_head.weight": torch.empty(dim // 2, 16)} if prompt_head else {})
    state = {name: value.to(dtype) for name, value in randomise(state).items()}
    fields = {**config.to_dict(), "architectures": ["CustomRewardModel"], "dtype": str(dtype).removeprefix("torch.")}
    path = save_checkpoint(folder, state, fields, make_tokenizer())
    if shards:
        (folder / "model.safetensors").unlink()
        names = sorted(state)
        index = {}
        for i, part in enumerate((names[:5], names[5:])):
            file = f"model-0000{i + 1}-of-00002.safetensors"
            save_file({name: state[name] for name in part}, folder / file, metadata={"format": "pt"})
            index.update(dict.fromkeys(part, file))
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return path, state


# ---- Servers


def verdict(**probabilities):
    """An OpenAI-style answer whose first token has these probabilities."""
    top = [{"token": token, "logprob": math.log(p), "bytes": None} for token, p in probabilities.items()]
    return {
        "id": "x", "object": "chat.completion", "created": 0, "model": "m",
        "choices": [{
            "index": 0, "finish_reason": "length", "message": {"role": "assistant", "content": top[0]["token"]},
            "logprobs": {"content": [{**top[0], "top_logprobs": top}], "refusal": None},
        }],
    }  # fmt: skip


class Endpoint:
    """A small HTTP server. `answer(number, request)` gives a status and a body: JSON, or text."""

    def __init__(self):
        self.requests, self.headers, self.most_at_once = [], [], 0
        self.headers_out = {}  # of each answer
        self.answer = lambda number, request: (200, verdict(A=0.6, B=0.2))
        now, lock = 0, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(handler):
                nonlocal now
                request = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
                with lock:
                    now += 1
                    self.most_at_once = max(self.most_at_once, now)
                    number = len(self.requests)
                    self.requests.append(request)
                    self.headers.append({"path": handler.path, "key": handler.headers["Authorization"]})
                status, body = self.answer(number, request)
                with lock:
                    now -= 1
                body = (body if isinstance(body, str) else json.dumps(body)).encode()
                handler.send_response(status)
                for name, value in {"Content-Type": "application/json", **self.headers_out}.items():
                    handler.send_header(name, value)
                handler.send_header("Content-Length", str(len(body)))
                handler.end_headers()
                try:
                    handler.wfile.write(body)
                except BrokenPipeError:
                    pass  # the client has given up

            def log_message(handler, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()


def logits(*values):
    """vLLM's answer to a request to classify."""
    result = {"index": 0, "label": "LABEL_0", "probs": list(values), "num_classes": len(values)}
    return {"id": "x", "object": "list", "created": 0, "model": "m", "data": [result], "usage": {}}


def request_text(request):
    return request["input"] if "input" in request else request["messages"][-1]["content"]


def score_request(request):
    """What the server answers here: the number of letters a, b and c."""
    return count_abc([request_text(request)])[0]


class RewardServer(Endpoint):
    def __init__(self):
        super().__init__()
        self.url = self.url.removesuffix("/v1")
        self.answer = lambda number, request: (200, logits(score_request(request)))
        self.models = (200, {"object": "list", "data": [{"id": "org/Reward-8B"}, {"id": "other"}]})

        def get(handler):
            status, body = self.models if handler.path == "/v1/models" else (404, {})
            body = (body if isinstance(body, str) else json.dumps(body)).encode()
            handler.send_response(status)
            handler.send_header("Content-Length", str(len(body)))
            handler.end_headers()
            handler.wfile.write(body)

        self.server.RequestHandlerClass.do_GET = get
