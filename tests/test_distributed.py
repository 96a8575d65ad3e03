"""Two real processes (gloo), with whole or sharded models, give what one gives, and none waits for ever."""

import json
import sys
from importlib import resources
from pathlib import Path

import pytest
import torch
from accelerate.utils import is_deepspeed_available
from helpers import ACCELERATE, encoder, make_tokenizer, run
from peft import PeftModel
from pyarrow.parquet import read_table
from safetensors.torch import load_file
from transformers import Qwen2Config, Qwen2ForCausalLM
from two_processes import MODEL


TESTS = Path(__file__).parent
# Groups straddle the two processes, which keep different numbers of rows; in the last case the second keeps none
FIXED = ("all", "best_and_worst", "everything", "nothing", "pairs")
UNSHARDED = ("moves",)
SAMPLED = ("sampled", "sampled_lora")  # what processes sample depends on their number
SHARDED = [
    "fsdp2",
    *[
        pytest.param(
            mode,
            marks=pytest.mark.skipif(
                not is_deepspeed_available(),
                reason="needs DeepSpeed, which needs a C++ compiler on a CPU: .ci/run has both",
            ),
        )
        for mode in ("zero2", "zero3")
    ],
]


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    """A function that runs all cases in one or two processes, the latter with TRL's configuration of that name."""
    done: dict[str, Path] = {}

    def launch(mode: str) -> Path:
        if mode in done:
            return done[mode]
        done[mode] = folder = tmp_path_factory.mktemp(mode)
        torch.manual_seed(0)
        Qwen2ForCausalLM(Qwen2Config(**MODEL)).save_pretrained(folder / "policy")
        torch.manual_seed(0)
        encoder().save_pretrained(folder / "reward_model")
        make_tokenizer().save_pretrained(folder / "reward_model")
        command = [sys.executable]
        if mode != "one":
            config = resources.files("trl.accelerate_configs") / f"{mode}.yaml"
            command = [*ACCELERATE, "--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0"]
            command += ["--multi_gpu"] if mode == "two" else ["--config_file", str(config)]
        cases = {"one": FIXED + UNSHARDED, "two": FIXED + UNSHARDED + SAMPLED}.get(mode, FIXED + SAMPLED)
        result = run([*command, str(TESTS / "two_processes.py"), str(folder), *cases], timeout=300)
        assert result.returncode == 0, result.stderr
        return folder

    return launch


def assert_same(expected: Path, actual: Path, case: str, atol: float) -> dict[str, torch.Tensor]:
    """Compare logs and weights; return the expected ones."""
    one, two = (torch.load(folder / f"{case}.pt", weights_only=True) for folder in (expected, actual))
    assert one.keys() == two.keys()
    for name, value in one.items():
        rtol = 1e-5 if name in ("loss", "eval_loss") else 0
        torch.testing.assert_close(two[name], value, rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")
    return one


def counts(folder: Path, case: str) -> dict:
    return torch.load(folder / f"{case}.counts.pt", weights_only=True)


@pytest.mark.parametrize("case", FIXED + UNSHARDED)
def test_two_processes_equal_one(launch, case):
    one = assert_same(launch("one"), launch("two"), case, atol=1e-6)
    assert one["loss"][-1] < one["loss"][0]  # it did train
    kept = counts(launch("two"), case)["kept"]  # by process and micro-batch
    if case == "all":
        assert one["win_rate/kept"][0].item() == pytest.approx(8 / 12)
    elif case == "best_and_worst":
        assert one["win_rate/kept"][0].item() == pytest.approx(4 / 12)
        assert (kept == 0).any()
    elif case == "everything":
        assert 0 < one["preferences/oracle/lost"][0].item() < 1
        assert one["preferences/oracle/order_disagreement"][0].item() > 0.1
        used = one["preferences/oracle/input_tokens"]
        assert used[0] > 0 and one["preferences/oracle/input_tokens_total"][0] == used[0]
    elif case == "nothing":
        assert kept.shape == (2, 12) and len(one["loss"]) == 6  # six optimizer steps of two micro-batches
        assert (kept[0] > 0).all() and (kept[1] == 0).all()


@pytest.mark.parametrize("mode", ["one", "two", *SHARDED])
def test_each_process_sends_whole_merged_weights_to_vllm(launch, mode):
    """Those of PEFT's own merge, in TRL's names."""
    folder = launch(mode)
    for case in ("everything", *(["sampled_lora"] if mode != "one" else [])):
        policy = PeftModel.from_pretrained(Qwen2ForCausalLM.from_pretrained(folder / "policy"), folder / case)
        before = policy.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight.clone()
        expected = dict(policy.merge_and_unload().named_parameters())
        assert not torch.equal(expected["model.layers.0.mlp.up_proj.weight"], before)
        for rank in range(1 if mode == "one" else 2):
            sent = torch.load(folder / f"{case}.sent-{rank}.pt", weights_only=True)
            assert list(sent) == list(expected)
            for name, tensor in sent.items():  # a product's last bit depends on the number of threads
                torch.testing.assert_close(tensor, expected[name].detach(), rtol=0, atol=1e-8)


@pytest.mark.parametrize("mode", SHARDED)
def test_sharded_runs_are_resumed_to_the_same_weights(tmp_path, mode):
    """Bit for bit, from inside an iteration, without sampling anew."""
    config = resources.files("trl.accelerate_configs") / f"{mode}.yaml"
    command = [*ACCELERATE, "--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0"]
    for part in ("whole", "ends", "resumed"):
        script = [str(TESTS / "resume_two_processes.py"), str(tmp_path), part]
        result = run([*command, "--config_file", str(config), *script], timeout=300)
        assert result.returncode == 0, result.stderr
    expected, actual = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "ends"))
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def test_runs_that_change_size(tmp_path):
    """From inside an iteration and between two, with other processes and micro-batches: the same weights and log."""
    two = [*ACCELERATE, "--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0", "--multi_gpu"]
    cases = ("sppo", "inpo")
    runs = [
        ([sys.executable], "one", 8, 1, ""),
        (two, "two-1", 4, 1, "one/checkpoint-1"),
        (two, "two-2", 4, 1, "one/checkpoint-2"),
        ([sys.executable], "back", 4, 2, "two-1/checkpoint-3"),
    ]
    for command, name, *how in runs:
        script = [*command, str(TESTS / "resized.py"), str(tmp_path), name, *map(str, how), *cases]
        result = run(script, timeout=300)
        assert result.returncode == 0, result.stderr
        if name != "one":
            assert f"{how[2]} was written with num_processes=" in result.stderr
    for case in cases:
        for _, name, *_ in runs[1:]:
            assert_same_end(tmp_path / case / "one", tmp_path / case / name)


def test_sharded_runs_that_change_size(tmp_path):
    config = resources.files("trl.accelerate_configs") / "fsdp2.yaml"
    command = [*ACCELERATE, "--mixed_precision", "no", "--main_process_port", "0", "--config_file", str(config)]
    runs = (
        (2, "two", 4, 1, ""),
        (4, "four-1", 2, 1, "two/checkpoint-1"),
        (1, "one-2", 4, 2, "two/checkpoint-2"),
    )
    for processes, *how in runs:
        script = [str(TESTS / "resized.py"), str(tmp_path), *map(str, how), "sppo"]
        result = run([*command, "--num_processes", str(processes), *script], timeout=300)
        assert result.returncode == 0, result.stderr
    for name in ("four-1", "one-2"):
        assert_same_end(tmp_path / "sppo" / "two", tmp_path / "sppo" / name)


def assert_same_end(expected: Path, actual: Path) -> None:
    """The weights after the last step, and its line in the log."""
    last = [folder / "checkpoint-4" for folder in (expected, actual)]
    weights = [load_file(next(folder.glob("*model.safetensors"))) for folder in last]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=0, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
    logs = [json.loads((folder / "trainer_state.json").read_text())["log_history"][-1] for folder in last]
    assert logs[0].keys() == logs[1].keys() and logs[0]["step"] == 4
    for name, value in logs[0].items():
        if name != "step_time":
            assert logs[1][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("mode", SHARDED)
def test_sharded_models_equal_whole_ones(launch, mode):
    """Every process has to take part in each forward and backward pass, whatever it has to train on itself."""
    for case in FIXED:
        assert_same(launch("one"), launch(mode), case, atol=1e-5)
    for case in SAMPLED:  # with real generation, a reward model, evaluation; full fine-tuning and LoRA
        two = assert_same(launch("two"), launch(mode), case, atol=1e-5)
        assert len(two["eval_loss"]) == 3 and "eval_win_rate_vs_previous/reward_model" in two
        assert len(read_table(launch(mode) / case / "evaluations" / "step-000003.parquet")) == 5
        assert two["completions/mean_length"].unique().numel() > 1
        kept = counts(launch(mode), case)["kept"]
        assert kept[0].tolist() != kept[1].tolist()
    assert (counts(launch(mode), "nothing")["kept"] == 0).any()
    # They are sharded indeed. ZeRO-2 shards gradients and the optimizer's state only
    share = counts(launch(mode), "all")["held"] / counts(launch("two"), "all")["held"]
    assert share == 1 if mode == "zero2" else share < 0.51
