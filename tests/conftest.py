import os
import tempfile


# Where `trl-sppo quickstart` left its models. The processes of pytest-xdist inherit it
os.environ.setdefault(
    "TRL_SPPO_TEST_HOME",
    os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface"),
)
os.environ.update(HF_HUB_OFFLINE="1", HF_HOME=tempfile.mkdtemp())  # no test needs a hub, nor what is cached here
WITH_DEVICES = dict(os.environ)  # the environment of processes that the tests marked `gpu` start
# One thread for each of the processes among which pytest-xdist divides the tests
os.environ.update(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")

import atexit  # noqa: E402
import gc  # noqa: E402
import json  # noqa: E402
import shutil  # noqa: E402
import signal  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
from collections import Counter  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402
from helpers import (  # noqa: E402
    COMPLETIONS,
    EVAL_PROMPTS,
    IMAGE_TEMPLATE,
    RUN,
    RUN_PROMPTS,
    TINY,
    Endpoint,
    RewardServer,
    alphabet_score,
    count_abc,
    fixed_rollout,
    make_tokenizer,
)
from transformers import Qwen2Config, Qwen2ForCausalLM  # noqa: E402
from transformers.integrations import deepspeed  # noqa: E402
from transformers.utils import logging  # noqa: E402


NOT_RUN = pytest.StashKey[list]()

atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)


def pytest_collection_modifyitems(config, items):
    """Begin with what takes longest, and leave out what this machine cannot run."""
    items.sort(key=lambda item: item.get_closest_marker("first") is None)
    for marker, can_run in (("gpu", _has_gpu), ("hosts", _has_namespaces)):
        need_it = [item for item in items if item.get_closest_marker(marker)]
        if need_it and not can_run():
            items[:] = [item for item in items if item not in need_it]
            config.stash[NOT_RUN] = [*config.stash.get(NOT_RUN, []), *(item.nodeid for item in need_it)]


def _has_gpu() -> bool:
    question = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    built = torch.backends.cuda.is_built()
    return built and not subprocess.run([sys.executable, "-c", question], env=WITH_DEVICES).returncode


def _has_namespaces() -> bool:
    tools = all(map(shutil.which, ("ip", "unshare")))
    names = f"trial-{os.getpid()}"
    if not tools or not os.access("/dev/net/tun", os.W_OK) or subprocess.run(["ip", "netns", "add", names]).returncode:
        return False
    return not subprocess.run(["ip", "netns", "delete", names]).returncode


def pytest_collection_finish():
    """Spare the garbage collections of each training all that was imported: they took a third of the tests' time."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """
    One process for the tests of one file, which are over before others would have started. Otherwise one more than
    there are cores, since some tests wait for processes and servers.
    """
    if config.args_source == config.ArgsSource.ARGS and len({arg.split("::")[0] for arg in config.args}) == 1:
        if config.args[0].split("::")[0].endswith(".py"):
            return 0
    return (os.cpu_count() or 1) + 1


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # a process of pytest-xdist, which collects for the one that reports
        session.config.workeroutput["not_run"] = session.config.stash.get(NOT_RUN, [])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    if not_run := getattr(node, "workeroutput", {}).get("not_run"):
        node.config.stash[NOT_RUN] = not_run


def pytest_terminal_summary(terminalreporter, config):
    if config.stash.get(NOT_RUN, []):
        terminalreporter.section("not run: this machine has no CUDA device, or no network namespaces")
        terminalreporter.write_line("\n".join(config.stash[NOT_RUN]))


@pytest.fixture(scope="session")
def environment_with_devices():
    return WITH_DEVICES


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
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")

    def make(trainer_kwargs=None, **options):
        options = {
            "optim": "sgd", "learning_rate": 1e-3, "lr_scheduler_type": "constant", "max_grad_norm": 0.0,
            "max_steps": 1, "per_device_train_batch_size": 16, "prompts": list(COMPLETIONS),
            "reward_funcs": alphabet_score, **options,
        }  # fmt: skip
        return make_trainer(trainer_kwargs={"rollout_func": fixed_rollout, **(trainer_kwargs or {})}, **options)

    return make


@pytest.fixture
def workdir(tiny_policy, tmp_path, monkeypatch):
    """A folder with a tiny policy, prompts and a recipe; returns a function that writes the recipe."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts").mkdir()
    for split in ("train", "test"):
        rows = [json.dumps({"prompt": [{"role": "user", "content": text}]}) for text in ("ab", "fgh", "cd e", "xyz")]
        (tmp_path / "prompts" / f"{split}.jsonl").write_text("\n".join(rows))

    def write(**changes):
        recipe = {
            "model_name_or_path": "policy", "reward_funcs": "helpers.count_abc", "dataset_name": "prompts",
            "output_dir": "out", "num_generations": 4, "per_device_train_batch_size": 8, "max_completion_length": 4,
            "max_steps": 1, "use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no",
            "gradient_checkpointing": False, **changes,
        }  # fmt: skip
        lines = [f"{name}: {json.dumps(value)}" for name, value in recipe.items() if value is not None]
        (tmp_path / "recipe.yaml").write_text("\n".join(lines))
        return ["--config", "recipe.yaml"]

    return write


SIZES: dict = {}


@pytest.fixture
def measured_once(monkeypatch):
    """`trl-sppo check` measures a model once for all tests."""
    from trl_sppo.planning import plan

    measure = plan.size_of

    def size_of(config, *args):
        facts = {name: value for name, value in config.to_dict().items() if name != "_name_or_path"}
        key = repr((facts, *args))
        if key not in SIZES:
            SIZES[key] = measure(config, *args)
        return SIZES[key]

    monkeypatch.setattr(plan, "size_of", size_of)


@pytest.fixture
def start(make_trainer, tiny_policy, tmp_path, monkeypatch):
    """A function that builds a trainer in a folder of its own, and counts its calls of `generate` and of scoring."""

    generate = Qwen2ForCausalLM.generate

    def build(folder: str, **options):
        calls = Counter()

        def score(completions, **kwargs):
            calls["score"] += 1
            return count_abc(completions)

        torch.manual_seed(0)
        options = {
            "model": tiny_policy, "reward_funcs": score, "prompts": RUN_PROMPTS, **RUN,
            "output_dir": str(tmp_path / folder), **options,
        }  # fmt: skip
        trainer = make_trainer(**options)

        def counting(*args, **kwargs):
            calls["generate"] += 1
            return generate(*args, **kwargs)

        monkeypatch.setattr(Qwen2ForCausalLM, "generate", counting)
        trainer.calls = calls
        return trainer

    return build


@pytest.fixture
def endpoint(monkeypatch):
    # Pauses between attempts are not what is tested
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    endpoint = Endpoint()
    yield endpoint
    endpoint.server.shutdown()
    endpoint.server.server_close()


@pytest.fixture
def server(monkeypatch):
    # Pauses between attempts are not what is tested
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    server = RewardServer()
    yield server
    server.server.shutdown()
    server.server.server_close()


@pytest.fixture
def seeing():
    """A tiny LLaVA and its processor: an image is 4 patches of 8 x 8 pixels."""
    from transformers import (
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    tokenizer = make_tokenizer(extra_special_tokens={"image_token": "<image>"}, chat_template=IMAGE_TEMPLATE)
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    size = {"height": 16, "width": 16}
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size=size, crop_size=size), tokenizer, patch_size=8, chat_template=IMAGE_TEMPLATE,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
    )  # fmt: skip
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    text = Qwen2Config(**{**TINY, "vocab_size": image_id + 1})
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=image_id, pad_token_id=0, eos_token_id=1)
    )
    return model, processor


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with two policies, an adapter of the first, prompts, and judges in a module."""
    from peft import LoraConfig, get_peft_model

    monkeypatch.chdir(tmp_path)
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(Qwen2Config(**TINY))
        model.save_pretrained(f"policy-{seed}")
        make_tokenizer().save_pretrained(f"policy-{seed}")
    base = Qwen2ForCausalLM.from_pretrained("policy-0")
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=2.0)
    adapted.save_pretrained("adapter")
    (tmp_path / "prompts").mkdir()
    # "step" and "completions" are names that the files have a use of their own for
    rows = [
        json.dumps({"prompt": prompt, "topic": len(prompt), "step": "one", "completions": 1})
        for prompt in EVAL_PROMPTS
    ]
    (tmp_path / "prompts" / "test.jsonl").write_text("\n".join(rows))
    return tmp_path
