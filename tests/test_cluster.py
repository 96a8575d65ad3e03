"""The scripts in examples/cluster, with a stand-in for the scheduler."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from helpers import TINY, make_tokenizer
from transformers import Qwen2Config, Qwen2ForCausalLM

from trl_sppo.arguments.launching import launch_arguments
from trl_sppo.arguments.options import make_parser


FOLDER = Path(__file__).parents[1] / "examples" / "cluster"
# Two nodes on this machine. Like SLURM, it passes signals to the tasks and returns the highest exit status
SRUN = """#!/usr/bin/env bash
shift  # --kill-on-bad-exit=1
for node in 0 1; do SLURM_NODEID=$node "$@" & tasks+=" $!"; done
trap 'kill -TERM $tasks' TERM
code=0
for task in $tasks; do
    wait $task; status=$?
    while kill -0 $task 2> /dev/null; do wait $task; status=$?; done  # a signal interrupts `wait`
    if [ $status -gt $code ]; then code=$status; fi
done
exit $code
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> requeued; fi
"""


@pytest.fixture
def cluster(tmp_path):
    """A function that starts the job, in a folder with a recipe."""
    (tmp_path / "bin").mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / "bin" / name).write_text(text)
    (tmp_path / "bin" / "trl-sppo").write_text(f'#!/usr/bin/env bash\nexec {sys.executable} -m trl_sppo "$@"\n')
    for path in (tmp_path / "bin").iterdir():
        path.chmod(0o755)
    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(**TINY)).save_pretrained(tmp_path / "policy")
    make_tokenizer().save_pretrained(tmp_path / "policy")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(json.dumps({"prompt": a}) for a in "abcdefgh"))
    recipe = {
        "model_name_or_path": "policy", "dtype": "float32", "dataset_name": "data", "bf16": False, "use_cpu": True,
        "reward_funcs": ["helpers.count_abc"], "num_generations": 4, "per_device_train_batch_size": 2,
        "steps_per_generation": 2, "gradient_accumulation_steps": 2, "max_completion_length": 4, "save_steps": 2,
        "gradient_checkpointing": False, "report_to": "none", "disable_tqdm": True, "max_steps": 100_000,
        "env": {"GLOO_SOCKET_IFNAME": "lo"},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))

    def start(*arguments: str) -> subprocess.Popen:
        env = {
            **os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(Path(__file__).parent),
            "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": "1",
            "SLURM_TMPDIR": str(tmp_path / "scratch"), "PORT": "29588", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        command = ["bash", str(FOLDER / "slurm.sh"), "recipe.yaml", "--output_dir", "out", *arguments]
        return subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True)

    return start


def test_slurm_job_is_queued_again_until_it_is_done(cluster, tmp_path):
    job = cluster()
    end = time.monotonic() + 120
    while not (tmp_path / "out" / "checkpoint-2" / "manifest.json").exists():
        assert job.poll() is None and time.monotonic() < end
        time.sleep(0.1)
    (srun,) = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True, check=True).stdout.split()
    os.kill(int(srun), signal.SIGTERM)
    _, errors = job.communicate(timeout=120)
    assert job.returncode == 0, errors
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    steps = max(int(path.name.partition("-")[2]) for path in (tmp_path / "out").glob("checkpoint-*"))

    job = cluster("--max_steps", str(steps + 2))
    _, errors = job.communicate(timeout=120)
    assert job.returncode == 0, errors
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["global_step"] == steps + 2 and (tmp_path / "out" / "model.safetensors").exists()


def test_slurm_job_that_fails_is_not_queued_again(cluster, tmp_path):
    job = cluster("--eta", "-1")
    _, errors = job.communicate(timeout=120)
    assert job.returncode == 2 and "eta must be positive" in errors
    assert not (tmp_path / "requeued").exists()


def test_kubernetes_command():
    """The launch that the pods would do."""
    service, job = yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text())
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    shell, option, script = container["command"]
    assert (shell, option) == ("bash", "-c")
    program, train, *arguments = shlex.split(script.replace("$JOB_COMPLETION_INDEX", "1"))[1:]
    assert (program, train) == ("trl-sppo", "train")
    where = arguments.index("--config")
    del arguments[where : where + 2]
    found = launch_arguments(make_parser(), arguments)
    launch = dict(zip(found[::2], found[1::2], strict=True))
    machines = spec["completions"]
    gpus = machines * container["resources"]["limits"]["nvidia.com/gpu"]
    assert launch["--num_machines"] == str(machines) == str(spec["parallelism"])
    assert launch["--num_processes"] == str(gpus) and launch["--machine_rank"] == "1"
    assert launch["--main_process_ip"] == f"{job['metadata']['name']}-0.{pod['subdomain']}"
    assert service["metadata"]["name"] == pod["subdomain"] and spec["completionMode"] == "Indexed"
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
