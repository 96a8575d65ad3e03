"""benchmarks/gpu.py: its driver, anywhere; what it measures, on a CUDA device."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import gpu  # noqa: E402


STAGES = """
import json, subprocess, sys, time
case, file = sys.argv[2], sys.argv[sys.argv.index("--results") + 1]
def emit(**result):
    with open(file, "a") as opened:
        opened.write(json.dumps(result) + "\\n")
emit(table="Seconds", row={"case": case, "seconds": 1.23456})
if case == "fails":
    raise SystemExit("what went wrong")
if case == "is torn":
    open(file, "a").write('{"table": "Seco')
if case == "hangs":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    emit(table="Children", row={"pid": child.pid})
    time.sleep(60)
if case == "lacks something":
    emit(not_run="needs vLLM")
"""


@pytest.fixture
def drive(tmp_path, monkeypatch, capsys):
    """A function that runs cases with stand-ins for what they measure: exit status, outcomes, and what is printed."""
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "gpu_stages.py").write_text(STAGES)
    monkeypatch.setattr(gpu, "ROOT", tmp_path)

    def drive(cases: dict[str, int], *argv: str) -> tuple[int, dict[str, dict], str]:
        monkeypatch.setattr(gpu, "CASES", {"stage": cases})
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--rehearse", "--out", str(tmp_path / "out"), *argv])
        status = gpu.main()
        outcomes = json.loads((tmp_path / "out" / "results.json").read_text())
        return status, {outcome["case"]: outcome for outcome in outcomes}, capsys.readouterr().out

    return drive


def test_a_case_that_fails_or_hangs_costs_the_others_nothing(drive, tmp_path):
    status, outcomes, said = drive(
        {"hangs": 2, "fails": 20, "is torn": 20, "lacks something": 20, "is good": 20}, "--minutes", "2"
    )
    assert status == 1
    assert {case: outcome["status"] for case, outcome in outcomes.items()} == {
        "hangs": "stopped after its limit of 2 s",
        "fails": "failed (exit status 1)",
        "is torn": "ok",
        "lacks something": "not run: needs vLLM",
        "is good": "ok",
    }
    for case, outcome in outcomes.items():  # what each had measured by then is there
        assert outcome["results"][0] == {"table": "Seconds", "row": {"case": case, "seconds": 1.23456}}
        assert f"| {case} | 1.235 |" in (tmp_path / "out" / "results.md").read_text()
    assert "what went wrong" in said and "3 of 5 cases ended well" in said
    child = Path("/proc") / str(outcomes["hangs"]["results"][1]["row"]["pid"]) / "stat"
    assert not child.exists() or child.read_text().split()[2] == "Z", "what a case has started outlives it"


def test_no_case_begins_without_time(drive):
    start = time.monotonic()
    status, outcomes, _ = drive({"hangs": 100, "is good": 100}, "--minutes", "0.3")
    assert status == 1 and time.monotonic() - start < 25
    assert outcomes["hangs"]["status"] == "stopped after its limit of 16 s"
    assert outcomes["is good"]["status"] == "not started: no time left"


def test_without_a_device(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "no CUDA device. --rehearse runs tiny models on a CPU" in capsys.readouterr().err


@pytest.fixture(scope="module")
def measure(tmp_path_factory, environment_with_devices):
    """A function that runs one stage on the device, and gives the rows of its tables."""

    def measure(stage: str) -> dict[str, list[dict]]:
        out = tmp_path_factory.mktemp(stage)
        command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--stages", stage, "--out", str(out)]
        result = subprocess.run(command, env=environment_with_devices, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout
        rows: dict[str, list[dict]] = {}
        for outcome in json.loads((out / "results.json").read_text()):
            for each in outcome["results"]:
                rows.setdefault(each["table"], []).append(each["row"])
        return rows

    return measure


@pytest.mark.gpu
def test_one_step_equals_that_on_a_cpu(measure):
    rows = measure("environment")["One optimizer step of a tiny model, against float32 on a CPU"]
    assert [row["computes_in"] for row in rows] == ["float32", "bf16 autocast"]
    assert rows[0]["device"] == "cuda" and rows[0]["gradient_off_by"] < 1e-4 and rows[1]["gradient_off_by"] < 0.05


@pytest.mark.gpu
def test_a_killed_run_is_resumed_to_the_same_bits(measure):
    rows = measure("resume")["Resume after SIGKILL inside an iteration"]
    assert {row["trained"] for row in rows} == {"lora", "full"}
    assert all(row["same_bits"] for row in rows if row["full_determinism"])


@pytest.mark.gpu
def test_vllm_has_the_weights_of_the_policy(measure):
    pytest.importorskip("vllm", reason="needs vLLM")
    rows = measure("vllm")["A colocated vLLM, Qwen2.5-1.5B-Instruct"]
    assert {row["trained"] for row in rows} == {"full", "LoRA"}
    for row in rows:
        assert row["nats_per_token_after"] < 0.06
        assert "nats_per_token_before" not in row or row["nats_per_token_before"] > 0.1
        assert row.get("GB_given_back_by_sleep", 1) > 0.5
