"""Import boundaries, public names, and what the package files promise."""

import ast
import configparser
import shutil
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

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


def requirements(section: str, option: str) -> list[Requirement]:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    return [Requirement(line) for line in setup[section][option].split("\n") if line and not line.startswith("#")]


def imported_modules() -> dict[str, Path]:
    """Top-level modules of other packages that this one imports, anywhere in its code, with a file that does."""
    found = {}
    for file in Path(trl_sppo.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module is not None:
                names = [node.module]
            found |= {name.split(".")[0]: file for name in names}
    return {name: file for name, file in found.items() if name not in {*sys.stdlib_module_names, "trl_sppo"}}


def undeclared(modules: dict[str, Path]) -> dict[str, Path]:
    """Those that no requirement installs, nor an extra that the package's code or documentation names."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    texts = [*ROOT.glob("docs/*.md"), ROOT / "README.md", *Path(trl_sppo.__file__).parent.rglob("*.py")]
    text = "\n".join(file.read_text() for file in texts)
    declared = requirements("options", "install_requires")
    for extra in setup["options.extras_require"]:
        if f"trl-sppo[{extra}]" in text:
            declared += requirements("options.extras_require", extra)
    # An extra may be another package's, such as trl[vllm]
    installed = {canonicalize_name(name) for each in declared for name in (each.name, *each.extras)}
    distributions = packages_distributions()
    return {
        name: file
        for name, file in modules.items()
        if not installed & {canonicalize_name(each) for each in distributions.get(name, [name])}
    }


def test_every_imported_package_is_declared():
    modules = imported_modules()
    assert {"torch", "trl", "yaml", "pydantic", "numpy", "openai", "vllm"} <= modules.keys()
    assert undeclared(modules) == {}
    assert undeclared({"pytest": ROOT, "sphinx": ROOT}).keys() == {"pytest", "sphinx"}  # of extras for developers


def test_every_requirement_has_a_lower_bound_that_the_oldest_versions_meet():
    bounds = {each.name: each.specifier for each in requirements("options", "install_requires")}
    assert [name for name, specifier in bounds.items() if ">=" not in str(specifier)] == []
    oldest = [
        Requirement(line)
        for line in (ROOT / "constraints-oldest.txt").read_text().splitlines()
        if not line.startswith("#")
    ]
    pinned = {each.name: str(each.specifier).removeprefix("==") for each in oldest if each.name in bounds}
    assert {"torch", "trl", "transformers", "accelerate", "datasets", "peft"} <= pinned.keys()
    assert [name for name, version in pinned.items() if version not in bounds[name]] == []


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
