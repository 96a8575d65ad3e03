"""Import boundaries, public names, and what the package files promise."""

import ast
import configparser
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import trl_sppo


ROOT = Path(__file__).parents[1]


def loaded_by(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after a statement."""
    code = f"{statement}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    return set(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split())


@pytest.mark.parametrize("statement", ["import trl_sppo", "import trl_sppo.cli", "import trl_sppo.__main__"])
def test_import_is_light(statement):
    assert not {"torch", "trl", "transformers", "datasets", "numpy"} & loaded_by(statement)


@pytest.mark.parametrize("module", ["preferences", "objectives", "diagnostics"])
def test_the_core_is_pure_torch(module):
    loaded = loaded_by(f"import trl_sppo.{module}")
    assert "torch" in loaded and not {"trl", "transformers", "datasets"} & loaded


def test_the_check_can_fail():
    assert "trl" in loaded_by("from trl_sppo import SPPOConfig")


def test_the_core_modules_do_not_import_each_other():
    code = "import trl_sppo.{}\nimport sys\nassert 'trl_sppo.{}' not in sys.modules"
    for names in (("preferences", "objectives"), ("objectives", "preferences")):
        subprocess.run([sys.executable, "-c", code.format(*names)], check=True)


def test_no_test_module_imports_another():
    """What several of them need is in helpers.py, or a fixture in conftest.py."""
    for path in (ROOT / "tests").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not [name for name in names if name == "conftest" or name.startswith("test_")], (path, node.lineno)


def test_public_names_are_there_and_documented():
    for name in trl_sppo._PUBLIC:
        assert getattr(trl_sppo, name).__doc__, name
        assert name in dir(trl_sppo)
    with pytest.raises(AttributeError, match="module 'trl_sppo' has no attribute 'SPPTrainer'"):
        trl_sppo.SPPTrainer  # noqa: B018


def test_package_files():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert {"vllm", "quantization", "judges", "quickstart", "test", "dev"} <= set(setup["options.extras_require"])
    version = trl_sppo.__version__
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == version and citation["license"] == setup["metadata"]["license"]
    assert (Path(trl_sppo.__file__).parent / "py.typed").exists()
    constraints = (ROOT / "constraints.txt").read_text().splitlines()
    assert all("==" in line for line in constraints if line and not line.startswith("#"))


def test_the_release_checklist_stops_at_what_is_not_in_order(tmp_path):
    """Step by step, up to where `.ci/run` would begin."""
    copy = tmp_path / "copy"
    for name in (".ci/release", "CITATION.cff", "CHANGELOG.md"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    (copy / "trl_sppo").mkdir()
    shutil.copy(trl_sppo.__file__, copy / "trl_sppo")
    (copy / ".ci/run").write_text("#!/usr/bin/env bash\necho everything passes; exit 3\n")
    (copy / ".ci/run").chmod(0o755)
    version = trl_sppo.__version__

    def git(*words: str) -> None:
        identity = ["-c", "user.name=t", "-c", "user.email=t@localhost"]
        subprocess.run(["git", *identity, *words], cwd=copy, check=True, capture_output=True)

    def run() -> str:
        done = subprocess.run([str(copy / ".ci/release")], capture_output=True, text=True)
        assert done.returncode != 0
        return done.stdout + done.stderr

    git("init", "--quiet")
    assert "the checkout is not clean" in run()
    git("add", "-A")
    git("commit", "-m", "x")
    git("tag", f"v{version}")
    assert f"there is a tag v{version} already" in run()
    git("tag", "--delete", f"v{version}")
    (copy / "CHANGELOG.md").write_text("## [Unreleased]\n- a change\n")
    git("commit", "-am", "x")
    assert f"CHANGELOG.md has no heading '## [{version}] - date'" in run()
    heading = f"## [{version}] - 2026-01-01\n- the first\n"
    (copy / "CHANGELOG.md").write_text(f"## [Unreleased]\n- a change\n\n{heading}")
    git("commit", "-am", "x")
    assert "CHANGELOG.md has lines under [Unreleased]" in run()
    (copy / "CHANGELOG.md").write_text(f"## [Unreleased]\n\n{heading}")
    (copy / "CITATION.cff").write_text("version: 9\n")
    git("add", "-A")
    git("commit", "-m", "x")
    assert "CITATION.cff has another version" in run()
    (copy / "CITATION.cff").write_text(f"version: {version}\n")
    git("commit", "-am", "x")
    assert "everything passes" in run()
