"""Every recipe on disk parses, into the options it names, has its header, and launches what it is meant to."""

import math
import re
import runpy
import shlex
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from datasets import Dataset
from datasets import load_dataset as load_from_folder
from recipe_files import RECIPES, header_of, options_of
from transformers.trainer_pt_utils import AcceleratorConfig
from trl.scripts.vllm_serve import ScriptArguments, build_command

from trl_sppo.arguments.launching import launch_arguments
from trl_sppo.arguments.options import make_parser


ROOT = Path(__file__).parents[1]
PATHS = sorted(RECIPES.rglob("*.yaml"))
SEVEN_BILLION = sorted((RECIPES / "qwen2.5-7b-instruct").glob("*.yaml"))

# What is for `accelerate launch`: processes, and the file of TRL's that says how they share the model
LAUNCHES = {"full-8gpu-fsdp2": (8, "fsdp2.yaml"), "full-8gpu-zero3": (8, "zero3.yaml"), "paper": (8, "zero3.yaml")}
LAUNCHES |= {"full-16gpu-fsdp2": (16, "fsdp2.yaml")}
SEVERAL_MACHINES = {"num_machines", "main_process_port"}


def name_of(path: Path) -> str:
    return str(path.relative_to(RECIPES).with_suffix(""))


def command_in(header: str, start: str) -> list[str]:
    """The words of the command in a header that begins with `start`, also over several lines."""
    lines = re.sub(r" \\\n# +", " ", header).splitlines()
    (line,) = [line for line in lines if f" {start}" in line]
    return shlex.split(line[line.index(start) :])


def test_there_are_recipes():
    seven = {"lora", "qlora-24gb", "full-8gpu-fsdp2", "full-8gpu-zero3", "vllm-server", "served-reward-model"}
    seven |= {"inpo", "llm-judge", "panel", "full-16gpu-fsdp2"}
    assert {path.stem for path in SEVEN_BILLION} == seven
    assert {"quickstart", "qwen2.5-0.5b-instruct/lora"} <= {name_of(path) for path in PATHS}


@pytest.mark.parametrize("path", PATHS, ids=name_of)
def test_recipe(path, monkeypatch):
    recipe = options_of(path)
    for name in recipe.get("env", {}):
        monkeypatch.setenv(name, "")  # and unset it afterwards
    parser = make_parser()
    # What is known neither to training nor to accelerate is an error
    found = launch_arguments(parser, ["--config", str(path)])
    launch = launch_command_parser().parse_args([*found, "--module", "trl_sppo.train"])
    processes, config = LAUNCHES.get(path.stem, (None, None))
    assert launch.num_processes == processes
    assert launch.config_file is None if config is None else Path(launch.config_file).name == config
    launching = {"num_processes", "accelerate_config"} if processes else set()
    launching |= recipe.keys() & SEVERAL_MACHINES
    assert len(found) == 2 * len(launching)

    # a GPU's bf16 cannot be asked for here: everything else is checked as it stands
    argv = ["--config", str(path), "--use_cpu", "--bf16", "false"]
    script, sppo, model, *_ = parser.parse_args_and_config(argv, return_remaining_strings=True)
    for name, value in recipe.items():
        if name in {"bf16", "use_cpu", "report_to", "env"} | launching:
            continue
        owner = next(config for config in (script, sppo, model) if hasattr(config, name))
        actual = getattr(owner, name)
        named = name in ("reward_model_name_or_path", "preference_funcs") and isinstance(value, str)
        expected = [value] if named else value
        if isinstance(actual, AcceleratorConfig):
            expected = AcceleratorConfig(**value)
        assert getattr(actual, "value", actual) == expected, name
    for part in ("# Goal:", "# Launch:", "# Override:", "# Hardware:", "# Expect:"):
        assert part in header_of(path), f"the header of {path} lacks {part}"
    if path.stem != "quickstart":
        assert re.search("NOT YET RUN (ON A GPU|TO ITS END)", header_of(path).replace("\n#            ", " "))
        assert f"trl-sppo train --config recipes/{path.relative_to(RECIPES)}\n" in header_of(path)


def assert_batches(options: dict, iteration: int, step: int) -> None:
    """What the trainer needs, and what the recipe says: completions of an iteration and of an optimizer step."""
    per_pass = options.get("num_processes", 1) * options["per_device_train_batch_size"]
    slices, accumulated = options["steps_per_generation"], options["gradient_accumulation_steps"]
    assert per_pass * slices == iteration and per_pass * accumulated == step
    assert iteration % options["num_generations"] == 0 and slices % accumulated == 0


@pytest.mark.parametrize("path", PATHS, ids=name_of)
def test_batches_of_all_processes(path):
    options, text = options_of(path), path.read_text().replace("\n# ", " ")
    if path.stem == "quickstart":
        return assert_batches(options, 64, 32)
    numbers = r"One iteration: (\d+) prompts x (\d+) completions[^.]* for (\d+) optimizer steps of (\d+) completions"
    prompts, group, steps, completions = map(int, re.search(numbers, text).groups())
    assert prompts * group == steps * completions and group == options["num_generations"]
    assert_batches(options, prompts * group, completions)


def test_the_seven_billion_recipe_is_the_configuration_that_was_asked_for():
    recipe = options_of(RECIPES / "qwen2.5-7b-instruct/lora.yaml")
    asked = {
        "model_name_or_path": "Qwen/Qwen2.5-7B-Instruct", "num_generations": 8, "eta": 10.0, "win_rate_threshold": 0.6,
        "learning_rate": 5e-7, "use_vllm": True, "temperature": 0.8, "max_completion_length": 1024,
    }  # fmt: skip
    assert asked.items() <= recipe.items()


@pytest.mark.parametrize("path", SEVEN_BILLION, ids=name_of)
def test_the_seven_billion_recipes_differ_only_in_where_things_are(path):
    placement = {
        "use_peft", "lora_r", "lora_alpha", "lora_target_modules",
        "load_in_4bit", "bnb_4bit_quant_type", "use_bnb_nested_quant", "env", "generation_kwargs",
        "reward_model_name_or_path", "reward_batch_size", "reward_quantization",
        "use_vllm", "vllm_mode", "vllm_gpu_memory_utilization", "vllm_enable_sleep_mode", "vllm_max_model_length",
        "vllm_server_base_url", "num_processes", "accelerate_config", "accelerator_config",
        "per_device_train_batch_size", "steps_per_generation", "gradient_accumulation_steps", *SEVERAL_MACHINES,
    }  # fmt: skip
    if path.stem in ("llm-judge", "panel"):  # other judges, and a rate at which an adapter learns
        placement |= {"preference_funcs", "comparisons_per_group", "learning_rate", "output_dir"}
    if path.stem == "inpo":  # another objective
        placement |= {"loss_type", "eta", "beta", "train_on", "win_rate_threshold", "learning_rate", "output_dir"}
    kept = [
        {name: value for name, value in options_of(p).items() if name not in placement}
        for p in (path, path.with_name("lora.yaml"))
    ]
    assert kept[0] == kept[1]


def test_one_machine_or_two_share_a_run():
    """Each optimizer step and iteration has as many completions, so a checkpoint of one continues on the other."""
    eight, sixteen = (options_of(RECIPES / f"qwen2.5-7b-instruct/full-{n}gpu-fsdp2.yaml") for n in (8, 16))
    for name in ("steps_per_generation", "gradient_accumulation_steps"):
        factors = "num_processes", "per_device_train_batch_size", name
        assert len({math.prod(each[factor] for factor in factors) for each in (eight, sixteen)}) == 1
    divided = {"steps_per_generation", "gradient_accumulation_steps", "num_processes", "accelerator_config"}
    same = [
        {name: value for name, value in each.items() if name not in divided | SEVERAL_MACHINES}
        for each in (eight, sixteen)
    ]
    assert same[0] == same[1]


def test_fsdp2_divides_gradients_after_each_micro_batch():
    """Else accelerate lets each GPU keep whole ones: docs/memory.md."""
    options = options_of(RECIPES / "qwen2.5-7b-instruct/full-8gpu-fsdp2.yaml")
    assert options["accelerator_config"] == {"gradient_accumulation_kwargs": {"sync_each_batch": True}}
    assert options["gradient_accumulation_steps"] > 1


def test_the_vllm_server_is_launched_as_trl_needs_it():
    path = RECIPES / "qwen2.5-7b-instruct/vllm-server.yaml"
    options, header = options_of(path), header_of(path)
    served = command_in(header, "CUDA_VISIBLE_DEVICES=1")
    assert served[1:5] == ["VLLM_SERVER_DEV_MODE=1", "vllm", "serve", options["model_name_or_path"]]
    assert options["vllm_server_base_url"] == f"http://localhost:{served[served.index('--port') + 1]}"
    # What TRL's own, deprecated, command would add
    needed = build_command(ScriptArguments(model=options["model_name_or_path"]))
    needed = needed[needed.index("--weight-transfer-config") :]
    assert len(needed) >= 6 and served[-len(needed) :] == needed
    assert command_in(header, "CUDA_VISIBLE_DEVICES=0 ")[1:3] == ["trl-sppo", "train"]
    more = command_in(header, "CUDA_VISIBLE_DEVICES=0,1,2,3")
    changed = {more[i][2:]: int(more[i + 1]) for i in range(len(more)) if more[i].startswith("--")}
    assert changed["num_processes"] == 4
    assert_batches(options | changed, 512, 128)


def test_the_reward_model_is_served_as_the_docs_say():
    path = RECIPES / "qwen2.5-7b-instruct/served-reward-model.yaml"
    served = command_in(header_of(path), "CUDA_VISIBLE_DEVICES=1")
    (documented,) = re.findall(r"^(vllm serve .*--runner pooling.*)$", (ROOT / "docs/judges.md").read_text(), re.M)
    documented = shlex.split(documented)
    assert served[1:3] == documented[:2] and served[4:] == documented[3:]  # of another model
    assert options_of(path)["reward_model_name_or_path"] == f"http://localhost:{served[-1]}"


@pytest.mark.parametrize("name", ["vllm-server", "served-reward-model"])
def test_the_docs_show_the_same_launches(name):
    path = RECIPES / f"qwen2.5-7b-instruct/{name}.yaml"
    page = re.sub(r" \\\n +", " ", (ROOT / "docs/memory.md").read_text())
    blocks = [block.splitlines() for block in re.findall(r"```bash\n(.*?)\n```", page, re.S)]
    commands = [command_in(header_of(path), f"CUDA_VISIBLE_DEVICES={gpu} ") for gpu in (1, 0)]
    assert commands in [[shlex.split(line) for line in block] for block in blocks]


def test_the_docs_list_every_recipe():
    page = (ROOT / "docs/recipes.md").read_text()
    rows = re.findall(r"^\| `(.+\.yaml)` \| .* \| (?:(\d+) × (\d+) GB|none) \| (?:(\d+) GB)? ?\|$", page, re.MULTILINE)
    assert sorted(row[0] for row in rows) == sorted(f"{name_of(path)}.yaml" for path in PATHS)
    numbers = {"one": "1", "two": "2", "eight": "8", "sixteen": "16"}
    for name, gpus, gigabytes, needed in rows:
        header = re.sub(r"\n# +", " ", header_of(RECIPES / name))
        if name != "quickstart.yaml":
            hardware = re.search(r"Hardware:  (\w+) GPUs? with (\d+) GB.*By arithmetic (?:at most )?(\d+) GB", header)
            assert (numbers[hardware[1]], *hardware.groups()[1:]) == (gpus, gigabytes, needed), name


def test_the_prompts_of_the_papers_runs(monkeypatch, tmp_path):
    """Three parts, one after the other, as many of each as an iteration of the recipes has."""
    script = runpy.run_path(str(ROOT / "examples/paper_prompts.py"))
    for path in RECIPES.glob("*/paper.yaml"):
        options = options_of(path)
        batch = 8 * options["per_device_train_batch_size"] * options["steps_per_generation"]
        assert script["PROMPTS"] == batch / options["num_generations"] and options["shuffle_dataset"] is False
    prepare, size = script["prepare"], script["PROMPTS"]
    parts = [
        Dataset.from_dict({"prompt": [f"{part}:{i}" for i in range(size + part)], "chosen": [""] * (size + part)})
        for part in range(3)
    ]
    parts[2] = parts[2].map(lambda row, i: {"prompt": row["prompt"] + "x" * 3500 * (i == 0)}, with_indices=True)
    monkeypatch.setattr("datasets.load_dataset", lambda name, split: parts)
    script = runpy.run_path(str(ROOT / "examples/paper_prompts.py"))  # which has imported it by then
    monkeypatch.setattr("sys.argv", ["paper_prompts.py", "--output_dir", str(tmp_path / "paper_prompts")])
    script["main"]()
    found = load_from_folder(str(tmp_path / "paper_prompts"), cache_dir=str(tmp_path / "cache"))
    assert set(found) == {"train", "iteration_1", "iteration_2", "iteration_3"}
    prompts = found["train"]
    assert prompts.column_names == ["prompt"] and len(prompts) == 3 * size
    # of the last part the first prompt is too long
    assert [prompts[i]["prompt"] for i in (0, size, 2 * size)] == [
        [{"role": "user", "content": text}] for text in ("0:0", "1:0", "2:1")
    ]
    assert found["iteration_2"]["prompt"] == prompts["prompt"][size : 2 * size]
    with pytest.raises(ValueError, match="train_iteration_2 has 10 prompts"):
        prepare([parts[0], parts[1].select(range(10)), parts[2]])
    tagged = {"prompt": "<s>[INST] Who? [/INST]"}
    assert script["first_user_turn"](tagged) == {"prompt": [{"role": "user", "content": "Who?"}]}
